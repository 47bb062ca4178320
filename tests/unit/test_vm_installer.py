"""vm/installer.py: which files are taken out of an ISO, and how little its maker can do to us."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from drivebay.errors import DrivebayError, NotFound, UsageError
from drivebay.vm import installer
from drivebay.vm.installer import check_installer, take_out
from drivebay.vm.iso import check_iso
from tests.unit.iso_files import write_iso

KERNEL = bytes(0x202) + b"HdrS" + b"the kernel" * 500
INITRD = b"the initrd" * 1000
DEBIAN = {"/install.amd/vmlinuz": KERNEL, "/install.amd/initrd.gz": INITRD}
SERIAL = "console=ttyS0,115200"


def taken(
    folder: Path, files: dict[str, bytes], label: str = "X", names: str = "rock-ridge"
) -> str:
    """Take out what an ISO with ``files`` has; return what the kernel is told."""
    iso = write_iso(folder / "an iso", files, label=label, names=names)
    check_installer(iso)
    out = folder / "out"
    out.mkdir()
    boot = take_out(iso, out)
    assert Path(boot.kernel).read_bytes() == KERNEL
    assert boot.initrd is not None
    assert Path(boot.initrd).read_bytes() == INITRD
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o600}
    return boot.append


@pytest.mark.parametrize("names", ["rock-ridge", "joliet", "plain"])
@pytest.mark.parametrize(
    ("kernel", "initrd", "words"),
    [
        ("/install.amd/vmlinuz", "/install.amd/initrd.gz", f"--- {SERIAL}"),
        ("/install/vmlinuz", "/install/initrd.gz", f"--- {SERIAL}"),
        ("/linux", "/initrd.gz", f"--- {SERIAL}"),
        ("/casper/vmlinuz", "/casper/initrd", f"--- {SERIAL}"),
        (
            "/images/pxeboot/vmlinuz",
            "/images/pxeboot/initrd.img",
            f"inst.stage2=hd:LABEL=Fedora-S inst.text {SERIAL}",
        ),
    ],
)
def test_each_layout_is_found_by_names_of_each_kind(
    tmp_path: Path, names: str, kernel: str, initrd: str, words: str
) -> None:
    files = {kernel: KERNEL, initrd: INITRD, "/a/b/c": b"more"}
    assert taken(tmp_path, files, "Fedora-S", names) == words


def test_a_label_is_one_word_of_the_kernels(tmp_path: Path) -> None:
    files = {"/images/pxeboot/vmlinuz": KERNEL, "/images/pxeboot/initrd.img": INITRD}
    label = "my 'CD' init=/x"
    told = taken(tmp_path, files, label).split(" ")
    assert told[0] == "inst.stage2=hd:LABEL=my\\x20\\x27CD\\x27\\x20init=\\x2fx"
    assert told[1:] == ["inst.text", SERIAL]


@pytest.mark.parametrize(
    "files",
    [
        {"/a": b"a"},
        {"/install.amd/vmlinuz": KERNEL},
        {"/install.amd/initrd.gz": INITRD},
        {"/install.amd/vmlinuz": KERNEL, "/install.amd/initrd.gz": b""},
        {"/install.amd/vmlinuz/x": KERNEL, "/install.amd/initrd.gz": INITRD},
        {"/install.amd/vmlinuz": KERNEL, "/casper/initrd": INITRD},
    ],
)
def test_an_iso_without_both(tmp_path: Path, files: dict[str, bytes]) -> None:
    iso = write_iso(tmp_path / "iso", files)
    for use in (check_installer, lambda path: take_out(path, tmp_path)):
        with pytest.raises(NotFound, match="has no installer's kernel where Debian") as caught:
            use(iso)
        assert "without --text" in str(caught.value.hint)
    assert [path.name for path in tmp_path.iterdir()] == ["iso"]


def test_another_processors_kernel(tmp_path: Path) -> None:
    files = {**DEBIAN, "/install.amd/vmlinuz": bytes(4096)}
    with pytest.raises(UsageError, match=r"vmlinuz' on '.*' is no Linux for this processor"):
        take_out(write_iso(tmp_path / "iso", files), tmp_path)


@pytest.mark.parametrize(("limit", "path"), [("KERNEL_MOST", "vmlinuz"), ("INITRD_MOST", "initrd")])
def test_sizes_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, path: str
) -> None:
    iso = write_iso(tmp_path / "iso", DEBIAN)
    for most, fits in ((1000, False), (10000, True)):
        monkeypatch.setattr(installer, limit, most)
        out = tmp_path / str(most)
        out.mkdir()
        if fits:
            take_out(iso, out)
            continue
        with pytest.raises(UsageError, match=f"{path}.*, and an installer's has at most 1000"):
            take_out(iso, out)


def test_an_iso_without_its_end(tmp_path: Path) -> None:
    """A CD drive could have it, since ISOs end with padding: here a kernel may be there."""
    iso = write_iso(tmp_path / "iso", DEBIAN)
    with iso.open("r+b") as file:
        file.truncate(iso.stat().st_size - 1)
    check_iso(iso)
    with pytest.raises(UsageError, match="is cut off"):
        take_out(iso, tmp_path)


def test_a_folder_that_leads_to_itself(tmp_path: Path) -> None:
    """Who follows it never comes to an end."""
    iso = write_iso(tmp_path / "iso", {**DEBIAN, "/a/b/c": b"c"})
    data = bytearray(iso.read_bytes())
    root = int.from_bytes(data[16 * 2048 + 158 : 16 * 2048 + 162], "little")
    at = root * 2048
    for _ in range(3):  # behind '.' and '..', which are folders too, and the first file or folder
        at += data[at]
    assert data[at + 25] & 2, "no folder"
    data[at + 2 : at + 10] = root.to_bytes(4, "little") + root.to_bytes(4, "big")
    iso.write_bytes(data)
    with pytest.raises(UsageError, match="is broken, or made in an unusual way: .*loop"):
        check_installer(iso)


def complaint(iso: Path, folder: Path) -> str | None:
    """What is said of an ISO; None when its installer is taken out."""
    folder.mkdir()
    try:
        take_out(iso, folder)
    except DrivebayError as error:
        return str(error)
    return None


def test_a_broken_iso_is_one_sentence(tmp_path: Path) -> None:
    """Bytes of its descriptors, tables and folders are others, the same ones each time."""
    iso = write_iso(tmp_path / "iso", DEBIAN)
    whole = iso.read_bytes()
    chance = random.Random(7)
    said = []
    for number in range(60):
        broken = bytearray(whole)
        for _ in range(chance.randint(1, 12)):
            broken[chance.randrange(16 * 2048, 32 * 2048)] = chance.randrange(256)
        iso.write_bytes(broken)
        said.append(complaint(iso, tmp_path / str(number)))
    refusals = [text for text in said if text is not None]
    assert len(refusals) > 15
    assert {str(iso) in text and "\n" not in text for text in refusals} == {True}
