"""vm/images/bootable.py with the real tools: what lies where on a disk that starts."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from drivebay.errors import HostError, InternalError, NotFound
from drivebay.vm.images.bootable import (
    check_tools,
    grub_config,
    make_bootable,
    make_table,
    run_tool,
)

MIB = 1 << 20
UUID = "1f0c4c5a-6b7d-4c1e-9a53-0d2f5a1b7c33"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bootable")
    root = folder / "root"
    (root / "boot/grub").mkdir(parents=True)
    (root / "boot/grub/grub.cfg").write_text(grub_config("It", UUID, "ro quiet"))
    make_bootable(root, folder / "disk.raw", 32 * MIB, UUID)
    return folder / "disk.raw"


def test_the_table_has_three_partitions_and_the_last_ends_with_the_disk(disk: Path) -> None:
    table = json.loads(run_tool(["sfdisk", "--json", str(disk)]))["partitiontable"]
    assert table["label"] == "gpt"
    places = [(part["start"] * 512, part["size"] * 512) for part in table["partitions"]]
    assert places == [(MIB, MIB), (2 * MIB, 8 * MIB), (10 * MIB, 21 * MIB)]
    kinds = [part["type"][:8] for part in table["partitions"]]
    assert kinds == ["21686148", "C12A7328", "0FC63DAF"]  # BIOS boot, EFI system, Linux


def test_bios_finds_grub_sector_by_sector(disk: Path) -> None:
    image = disk.read_bytes()
    assert image[510:512] == b"\x55\xaa"
    assert struct.unpack_from("<Q", image, 0x5C) == (MIB // 512,)
    assert image[0x64] == 0xFF
    assert image[0x66:0x68] == b"\x90\x90"
    assert image[0x1C2] == 0xEE, "the sector has lost its protective partition"
    start, sectors, segment = struct.unpack_from("<QHH", image, MIB + 500)
    assert (start, segment) == (MIB // 512 + 1, 0x820)
    end = MIB + 512 + sectors * 512
    assert any(image[end - 512 : end]), "the list of blocks is longer than GRUB"
    assert not any(image[end : 2 * MIB]), "the list of blocks is shorter than GRUB"


def test_uefi_finds_grub_where_removable_disks_have_it(disk: Path) -> None:
    loader = run_tool(["mcopy", "-i", f"{disk}@@2M", "::/EFI/BOOT/BOOTX64.EFI", "-"])
    assert loader[:2] == b"MZ"


def test_the_root_file_system_is_whole_and_roots(disk: Path) -> None:
    place = f"{disk}?offset={10 * MIB}"
    run_tool(["e2fsck", "-f", "-n", place])
    config = run_tool(["debugfs", "-R", "cat /boot/grub/grub.cfg", place]).decode()
    assert f"linux /vmlinuz root=UUID={UUID} ro quiet\n" in config
    status = run_tool(["debugfs", "-R", "stat /boot/grub/grub.cfg", place]).decode()
    assert "User:     0   Group:     0" in status
    header = run_tool(["dumpe2fs", "-h", place]).decode()
    assert UUID in header


def test_the_disk_takes_up_what_it_holds(disk: Path) -> None:
    assert disk.stat().st_size == 32 * MIB
    assert disk.stat().st_blocks * 512 < 12 * MIB


def test_an_ordinary_users_files_become_roots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "unshare"
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\nshift\nexec "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    (tmp_path / "root").mkdir()
    make_bootable(tmp_path / "root", tmp_path / "disk.raw", 16 * MIB, UUID)
    called = (tmp_path / "called").read_text().split()
    assert called[:2] == ["--map-root-user", "mke2fs"]


def test_missing_tools_are_named_with_their_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_tools()
    monkeypatch.setattr(
        "drivebay.vm.images.bootable.tools_environment", lambda: {"PATH": str(tmp_path)}
    )
    for name in ("sfdisk", "mke2fs", "mkfs.vfat", "grub-mkimage"):
        (tmp_path / name).touch()
    with pytest.raises(NotFound, match="without mmd, mcopy, mmdebstrap$") as caught:
        check_tools({"mmdebstrap": "mmdebstrap"})
    assert str(caught.value.hint).endswith("--no-install-recommends mmdebstrap mtools")


def test_a_disk_too_small_or_no_whole_mib_is_our_mistake(tmp_path: Path) -> None:
    for size in (14 * MIB, 32 * MIB + 512):
        with pytest.raises(InternalError):
            make_table(tmp_path / "disk.raw", size)
    assert not list(tmp_path.iterdir())


def test_a_table_is_never_written_into_a_file_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        make_table(path, 32 * MIB)
    assert path.read_text() == "precious"


def test_a_tool_that_fails_is_quoted() -> None:
    with pytest.raises(HostError, match="^sh failed and said: no room left"):
        run_tool(["sh", "-c", "echo working >&2; echo 'no room left' >&2; echo >&2; exit 3"])
    with pytest.raises(HostError, match="cannot run drivebay-no-such-tool"):
        run_tool(["drivebay-no-such-tool"])
