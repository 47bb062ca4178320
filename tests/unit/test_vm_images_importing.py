"""Files that become images: each format, and each way in which a file can be bad.

qemu-img is the real one. What is refused leaves nothing behind.
"""

from __future__ import annotations

import lzma
import os
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from drivebay.errors import HostError
from drivebay.vm.images import importing
from drivebay.vm.images.store import BuiltImage, ImageFacts, Images
from tests.unit.command import Done, Run, run_command

MIB = 1 << 20
# 2 MiB of data, a hole, and some more, not whole MiB long.
CONTENT = random.Random(6).randbytes(MIB // 16) * 32 + bytes(3 * MIB) + b"end" * 1000 + bytes(72)
FORMATS = ("qcow2", "vdi", "vmdk", "vhdx")


@pytest.fixture
def run(own_folders: None, capsys: pytest.CaptureFixture[str]) -> Run:
    """`drivebay image …` with folders of its own, while no target runs."""

    def words(*more: str | Path) -> Done:
        return run_command(capsys, "image", *more)

    return words


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)
    return path


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)


def converted(raw: Path, kind: str, *options: str) -> Path:
    path = raw.with_suffix(f".{kind}")
    qemu_img("convert", "-f", "raw", "-O", kind, *options, raw, path)
    return path


def refused(done: Done, tmp_path: Path) -> str:
    """What a refusal said; nothing is left of what was tried."""
    assert done.code in (1, 2), done
    assert done.out == ""
    folder = tmp_path / "data" / "drivebay" / "images"
    left = {path.name for path in folder.iterdir()} if folder.exists() else set()
    assert left <= {".lock"}
    return done.err


# ---- what is good -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_becomes_the_same_raw_image(run: Run, raw: Path, kind: str) -> None:
    done = run("import", converted(raw, kind), "--json")
    assert done.code == 0, done.err
    image = Images().get("disk")
    content = image.path.read_bytes()
    assert content == CONTENT.ljust(8 * MIB, b"\0")
    assert done.json["origin"] == str(raw.with_suffix(f".{kind}"))
    assert done.json["virtual_size"] % 512 == 0
    assert image.used < 3 * MIB
    assert run("import", raw, "--name", "as-raw", "-q").out == "as-raw\n"
    assert Images().get("as-raw").checksum == image.checksum


def test_compressed_images_and_packed_files_are_unpacked(run: Run, raw: Path) -> None:
    small = converted(raw, "qcow2", "-c")
    packed = raw.with_name("Web Server (1).qcow2.xz")
    half = len(small.read_bytes()) // 2
    # Two streams, one behind the other, with padding, as parallel packers write them.
    data = lzma.compress(small.read_bytes()[:half], preset=0) + bytes(4)
    packed.write_bytes(data + lzma.compress(small.read_bytes()[half:], preset=0))
    streamed = converted(raw, "vmdk", "-o", "subformat=streamOptimized")
    for path, name in ((small, "disk"), (packed, "Web-Server-1"), (streamed, "streamed")):
        words = ["--name", "streamed"] if name == "streamed" else []
        done = run("import", path, "-q", *words)
        assert (done.code, done.out) == (0, f"{name}\n"), done.err
        assert Images().get(name).path.read_bytes() == CONTENT.ljust(8 * MIB, b"\0")


def test_a_raw_file_of_odd_length_loses_nothing(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(b"x" * 1001)
    assert run("import", path).code == 0
    assert Images().get("odd").path.read_bytes() == (b"x" * 1001).ljust(4 * MIB, b"\0")


def test_the_whole_life_of_an_image(run: Run, raw: Path, tmp_path: Path) -> None:
    assert run("import", raw, "--name", "web").code == 0
    listed = run("list")
    assert listed.out.splitlines()[1].split()[:3] == ["web", "8", "MiB"]
    assert run("list", "-q").out == "web\n"
    assert [image["name"] for image in run("list", "--json").json] == ["web"]
    assert run("check", "web").out == "image 'web' is as it was added\n"
    assert run("resize", "web", "12M", "--json").json["size"] == 12 * MIB
    out = tmp_path / "web.qcow2"
    assert run("convert", "web", out).code == 0
    assert run("import", out, "--name", "again").code == 0
    assert Images().get("again").checksum == Images().get("web").checksum
    dry = run("delete", "web", "--dry-run")
    assert dry.out.startswith("would delete image 'web'")
    assert run("delete", "web", "--yes").out == "image 'web' deleted\n"
    assert run("list", "-q").out == "again\n"


def test_an_empty_image_takes_up_nothing(run: Run, tmp_path: Path) -> None:
    done = run("create", "empty", "--size", "1T", "--json")
    assert (done.json["size"], done.json["used"], done.json["cloud_init"]) == (1 << 40, 0, False)
    for size in ("1M", "65T"):
        assert (
            "an image's size is a multiple of 4 MiB" in run("create", "other", "--size", size).err
        )


def test_what_a_recipe_builds_becomes_an_image(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_tiny(work: Path, say: Callable[[str], None]) -> BuiltImage:
        say("making a disk")
        (work / "root").mkdir()
        raw = work / "disk"
        raw.write_bytes(CONTENT)
        if (tmp_path / "fail").exists():
            raise HostError("no busybox", 2)
        return BuiltImage(raw, ImageFacts("built here", "Tiny", cloud_init=False))

    monkeypatch.setattr("drivebay.vm.images.tiny.build_tiny", build_tiny)
    (tmp_path / "fail").touch()
    assert "no busybox" in refused(run("build", "tiny"), tmp_path)
    (tmp_path / "fail").unlink()
    done = run("build", "tiny", "mine", "--json")
    assert (done.code, done.err) == (0, "making a disk\n")
    assert (done.json["name"], done.json["os"], done.json["cloud_init"]) == ("mine", "Tiny", False)
    assert run("build", "tiny", "-q").out == "tiny\n"
    assert "already" in run("build", "tiny").err


def test_a_dry_run_imports_nothing(run: Run, raw: Path, tmp_path: Path) -> None:
    done = run("import", raw, "--dry-run")
    assert done.out == f"would copy '{raw}' in as image 'disk'\n"
    assert Images().names() == []


@pytest.mark.parametrize("kind", ["raw", *FORMATS])
def test_an_export_has_its_format_and_replaces_nothing(
    run: Run, raw: Path, tmp_path: Path, kind: str
) -> None:
    run("import", raw, "--name", "web")
    out = tmp_path / f"new.{kind}"
    done = run("convert", "web", out, "--json")
    assert done.json == {"name": "web", "file": str(out), "format": kind}
    umask = os.umask(0o022)
    os.umask(umask)
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask
    again = run("convert", "web", out)
    assert (again.code, f"there is a file '{out}' already" in again.err) == (1, True)
    assert "doesn't say which format" in run("convert", "web", tmp_path / "new").err
    assert "No such file" in run("convert", "web", tmp_path / "none" / "x.raw").err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "disk.raw", out.name]


# ---- formats that are not what they say ---------------------------------------------------------


def test_a_header_alone_does_not_make_a_qcow2_of_a_raw_disk(
    run: Run, raw: Path, tmp_path: Path
) -> None:
    """The guest that owned the disk could have written the header, with any backing file."""
    disk = converted(raw, "qcow2").rename(tmp_path / "disk.img")
    said = refused(run("import", disk), tmp_path)
    assert "looks like a qcow2 image, but its name doesn't say so" in said
    assert "--format qcow2" in said
    assert run("import", disk, "--name", "meant", "--format", "qcow2").code == 0
    assert run("import", disk, "--name", "content", "--format", "raw").code == 0
    assert Images().get("meant").path.read_bytes()[:MIB] == CONTENT[:MIB]
    assert Images().get("content").path.read_bytes()[:4] == b"QFI\xfb"


def test_a_name_or_format_that_the_header_belies_is_refused(
    run: Run, raw: Path, tmp_path: Path
) -> None:
    disk = converted(raw, "vdi")
    said = refused(run("import", disk, "--format", "vmdk"), tmp_path)
    assert "is no vmdk image: its header is that of vdi" in said
    raw.rename(tmp_path / "false.vhdx")
    said = refused(run("import", tmp_path / "false.vhdx"), tmp_path)
    assert "is no vhdx image: its header is not one" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b\x08....", "is compressed by gzip"),
        (b"(\xb5/\xfd....", "is compressed by zstd"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"conectix", "is a VHD image"),
        (b"", "is empty"),
    ],
)
def test_what_is_no_image_is_said(run: Run, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(content)
    assert message in refused(run("import", path), tmp_path)


def test_places_that_are_no_files(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        assert "is neither a file nor" in refused(run("import", path, "--name", "a"), tmp_path)
    assert "there is no file" in refused(run("import", tmp_path / "none"), tmp_path)


@pytest.mark.parametrize("name", ["a/b", "-", "a b", "ä", "x" * 41, ""])
def test_names_with_odd_characters_are_refused(run: Run, raw: Path, name: str) -> None:
    done = run("import", raw, f"--name={name}")
    assert (done.code, "can't be the name of an image" in done.err) == (2, name != "") or (
        name == "" and done.code == 0  # as without the option
    )


def test_file_names_with_odd_characters_are_shown_and_kept_harmless(
    run: Run, tmp_path: Path
) -> None:
    path = tmp_path / os.fsdecode(b"we\x1b[31mb \xff\n,file=x.img")
    path.write_bytes(b"x" * 512)
    done = run("import", path, "--json")
    assert done.code == 0, done.err
    assert done.json["name"] == "we-31mb-file-x"
    assert done.json["origin"].endswith("we?[31mb ??,file=x.img")
    nameless = tmp_path / "ä.img"
    nameless.write_bytes(b"x")
    assert "no name can be made of" in run("import", nameless).err


# ---- broken and hostile images ------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("cut", [1000, 100_000, 2_200_000])
def test_a_truncated_image_is_refused(
    run: Run, raw: Path, tmp_path: Path, kind: str, cut: int
) -> None:
    raw.write_bytes(b"data" * (4 * MIB))
    disk = converted(raw, kind)
    os.truncate(disk, disk.stat().st_size - cut)
    said = refused(run("import", disk), tmp_path)
    assert "cut off" in said or "damaged" in said, said


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("length", [0, 4, 100, 600, 70_000])
def test_the_stump_of_an_image_is_refused(
    run: Run, raw: Path, tmp_path: Path, kind: str, length: int
) -> None:
    disk = converted(raw, kind)
    os.truncate(disk, length)
    refused(run("import", disk), tmp_path)


def test_a_damaged_qcow2_is_refused(run: Run, raw: Path, tmp_path: Path) -> None:
    disk = converted(raw, "qcow2")
    data = bytearray(disk.read_bytes())
    table = struct.unpack_from(">Q", data, 40)[0]  # l1_table_offset
    struct.pack_into(">Q", data, table, 3 << 62 | 0x7FFF0000)
    disk.write_bytes(data)
    assert "is damaged or cut off" in refused(run("import", disk), tmp_path)


def test_a_damaged_xz_file_is_refused(run: Run, raw: Path, tmp_path: Path) -> None:
    packed = lzma.compress(raw.read_bytes(), preset=0)
    path = tmp_path / "disk.img.xz"
    for content in (packed[:-100], packed[:100_000] + b"?" + packed[100_001:], b"no xz", b""):
        path.write_bytes(content)
        assert "damaged or cut off" in refused(run("import", path), tmp_path)


def test_an_xz_file_that_unpacks_without_end_is_stopped(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "_UNPACKED_MOST", 8 * MIB)
    path = tmp_path / "bomb.img.xz"
    path.write_bytes(lzma.compress(bytes(9 * MIB), preset=0))
    assert "has more than 8 MiB when unpacked" in refused(run("import", path), tmp_path)


def test_images_that_read_other_files_are_refused_by_name(
    run: Run, raw: Path, tmp_path: Path
) -> None:
    base = converted(raw, "qcow2")
    backed = tmp_path / "backed.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", backed)
    assert f"its backing file '{base}'" in refused(run("import", backed), tmp_path)
    external = tmp_path / "external.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path}/data.raw", external, "1M")
    assert "keeps its data in another file" in refused(run("import", external), tmp_path)
    parent = converted(raw, "vmdk")
    child = tmp_path / "child.vmdk"
    qemu_img("create", "-f", "vmdk", "-b", parent, "-F", "vmdk", child)
    assert f"its parent '{parent}'" in refused(run("import", child), tmp_path)


def test_a_vmdk_descriptor_that_names_a_file_of_the_host_is_refused(
    run: Run, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 512)
    lines = ["# Disk DescriptorFile", "version=1", "CID=1", "parentCID=ffffffff"]
    lines += ['createType="monolithicFlat"', f'RW 1 FLAT "{secret}" 0', ""]
    descriptor = tmp_path / "evil.vmdk"
    descriptor.write_text("\n".join(lines))
    assert "data lies in other files" in refused(run("import", descriptor), tmp_path)
    # The same behind a sparse header that leads QEMU to the descriptor.
    header = struct.pack("<4sIIQQQQ", b"KDMV", 1, 3, 0, 128, 1, 1).ljust(512, b"\0")
    descriptor.write_bytes(header + "\n".join(lines).encode().ljust(512, b"\0"))
    assert "data lies in other files" in refused(run("import", descriptor), tmp_path)
    # … which may call itself what it likes.
    text = "\n".join(lines).replace("monolithicFlat", "monolithicSparse").encode()
    descriptor.write_bytes(header + text.ljust(512, b"\0"))
    assert "data lies in other files" in refused(run("import", descriptor), tmp_path)
    split = converted_split(tmp_path)
    assert "data lies in other files" in refused(run("import", split), tmp_path)


def converted_split(tmp_path: Path) -> Path:
    raw = tmp_path / "plain.raw"
    raw.write_bytes(b"x" * MIB)
    return converted(raw, "vmdk", "-o", "subformat=twoGbMaxExtentSparse")


def test_an_encrypted_image_is_refused(run: Run, tmp_path: Path) -> None:
    disk = tmp_path / "locked.qcow2"
    qemu_img("create", "-f", "qcow2", disk, "1M")
    data = bytearray(disk.read_bytes())
    struct.pack_into(">I", data, 32, 2)  # crypt_method: LUKS
    disk.write_bytes(data)
    assert "is encrypted" in refused(run("import", disk), tmp_path)


def test_an_image_of_a_size_that_no_disk_has_is_refused(run: Run, tmp_path: Path) -> None:
    disk = tmp_path / "huge.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=2M", disk, "65T")
    assert "is 65 TiB large" in refused(run("import", disk), tmp_path)


def test_a_checksum_that_differs_is_shown_beside_the_right_one(
    run: Run, raw: Path, tmp_path: Path
) -> None:
    said = refused(run("import", raw, "--sha256", "A" * 64), tmp_path)
    assert f"and {'a' * 64} was expected" in said
    assert "is no SHA-256" in refused(run("import", raw, "--sha256", "abc"), tmp_path)
    own = subprocess.run(["sha256sum", str(raw)], check=True, capture_output=True, text=True)
    assert run("import", raw, "--sha256", own.stdout.split()[0].upper()).code == 0


def test_an_image_that_a_machine_writes_is_refused(run: Run, raw: Path, tmp_path: Path) -> None:
    disk = converted(raw, "qcow2")
    machine = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(disk)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert machine.stdin is not None
    assert machine.stdout is not None
    try:
        machine.stdin.write(b"read 0 512\n")
        machine.stdin.flush()
        assert machine.stdout.readline()  # it is open by now
        assert "somebody writes to it" in refused(run("import", disk), tmp_path)
    finally:
        machine.communicate(b"quit\n")


# ---- full disks ---------------------------------------------------------------------------------


def test_an_image_larger_than_the_disk_is_refused_before(
    run: Run, raw: Path, small_tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw.write_bytes(b"full" * (6 * MIB // 4))
    disk = converted(raw, "qcow2")
    monkeypatch.setenv("XDG_DATA_HOME", str(small_tmpfs))
    done = run("import", disk)
    assert (done.code, "holds 6 MiB" in done.err) == (1, True), done.err
    assert "4 MiB are left" in done.err
    assert Images().names() == []


@pytest.mark.parametrize("kind", ["qcow2", "raw", "qcow2.xz"])
def test_a_disk_that_fills_up_in_mid_conversion_leaves_nothing(
    run: Run, raw: Path, small_tmpfs: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    raw.write_bytes(b"full" * (6 * MIB // 4))
    disk = raw if kind == "raw" else converted(raw, "qcow2")
    if kind == "qcow2.xz":
        disk = raw.with_suffix(".qcow2.xz")
        disk.write_bytes(lzma.compress(raw.with_suffix(".qcow2").read_bytes(), preset=0))
    monkeypatch.setenv("XDG_DATA_HOME", str(small_tmpfs))
    monkeypatch.setattr(importing, "free_bytes", lambda path: 1 << 40)
    done = run("import", disk)
    assert (done.code, "No space left on device\nhint: df -h" in done.err) == (1, True), done.err
    assert [path.name for path in (small_tmpfs / "drivebay" / "images").iterdir()] == [".lock"]
    status = os.statvfs(small_tmpfs)
    assert status.f_bfree * status.f_frsize > 3 * MIB
