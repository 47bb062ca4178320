"""One more partition: where it goes, what is refused, and that nothing else is ever written."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from drivebay.cli.main import main
from drivebay.disks.block_device import find_device
from drivebay.disks.partition import (
    NewPartition,
    free_ranges,
    plan_partition,
    remove_partition,
    write_partition,
    write_table,
)
from drivebay.errors import HostError, InUse, StateError, UsageError
from drivebay.wire.gpt import SPDK_TYPE, Entry, GptError, add_entry, new_table, table_writes
from tests.fakes.lvol_target import LvolTarget

MIB = 1 << 20
SIZE = 64 * MIB


class Image:
    """A disk that is a file, and what was written to it."""

    def __init__(self, path: Path, block_bytes: int = 512) -> None:
        self.path = path
        self.block_bytes = block_bytes
        with path.open("wb") as file:
            file.truncate(SIZE)
        self.fd = os.open(path, os.O_RDWR)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, offset)

    def plan(self, size: int | None = None, name: str = "pool") -> NewPartition:
        blocks = SIZE // self.block_bytes
        return plan_partition(self.read, str(self.path), blocks, self.block_bytes, name, size)

    def partition(self, *parts: tuple[int, int]) -> None:
        """Give it a table with these partitions: (first MiB, MiBs)."""
        table = new_table(SIZE // self.block_bytes, self.block_bytes, uuid4())
        per_mib = MIB // self.block_bytes
        for number, (first, count) in enumerate(parts, 1):
            place = (first * per_mib, (first + count) * per_mib - 1)
            table = add_entry(table, Entry(number, uuid4(), uuid4(), *place))
        for group in table_writes(table, self.block_bytes):
            for offset, data in group:
                os.pwrite(self.fd, data, offset)


@pytest.fixture(params=[512, 4096])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Image]:
    made = Image(tmp_path / "disk.img", request.param)
    yield made
    os.close(made.fd)


def test_an_empty_disk_gets_a_table_and_one_partition(image: Image) -> None:
    new = image.plan(16 * MIB)
    assert new.before is None
    assert (new.offset, new.size, new.entry.number) == (MIB, 16 * MIB, 1)
    write_table(image.fd, new)
    again = image.plan()
    assert again.before == new.table
    assert again.entry.number == 2
    assert (again.offset, again.size) == (17 * MIB, SIZE - 18 * MIB)
    assert again.holds == ("partition 1 'pool': nothing that is recognized, 16 MiB",)


def test_free_space_between_partitions_is_found(image: Image) -> None:
    image.partition((1, 4), (10, 10), (40, 4))
    assert [
        (first * image.block_bytes // MIB, (last + 1) * image.block_bytes // MIB)
        for first, last in free_ranges(image.plan().before, image.block_bytes)  # type: ignore[arg-type]
    ] == [(5, 10), (20, 40), (44, 63)]
    assert image.plan(5 * MIB).offset == 5 * MIB
    assert image.plan(6 * MIB).offset == 20 * MIB
    assert (image.plan().offset, image.plan().size) == (20 * MIB, 20 * MIB)
    with pytest.raises(StateError, match="no room for a partition of 21 MiB: .* has 20 MiB"):
        image.plan(21 * MIB)


def test_only_the_table_is_written_and_old_entries_stay(image: Image) -> None:
    image.partition((1, 4), (10, 10))
    os.pwrite(image.fd, b"precious" * 1000, 10 * MIB)
    before = image.read(0, SIZE)
    new = image.plan(20 * MIB)
    write_table(image.fd, new)
    after = image.read(0, SIZE)
    changed = {
        offset // MIB for offset in range(0, SIZE, 4096)
        if before[offset : offset + 4096] != after[offset : offset + 4096]
    }  # fmt: skip
    assert changed == {0, SIZE // MIB - 1}
    assert before[2 * image.block_bytes :][:256] == after[2 * image.block_bytes :][:256]


def test_what_is_on_a_disk_is_named_and_kept(image: Image) -> None:
    os.pwrite(image.fd, b"\x53\xef", 1024 + 0x38)
    with pytest.raises(InUse, match="is not empty: it holds ext2"):
        image.plan()
    os.pwrite(image.fd, b"\0\0", 1024 + 0x38)
    for place in (SIZE - 10, 5000):
        os.pwrite(image.fd, b"x", place)
        with pytest.raises(InUse, match="it holds data that is not recognized"):
            image.plan()
        os.pwrite(image.fd, b"\0", place)
    image.plan()


@pytest.mark.parametrize("damage", ["head", "entries", "copy", "copy's entries", "both differ"])
def test_a_damaged_table_is_left_alone(image: Image, damage: str) -> None:
    image.partition((1, 4))
    end = SIZE - image.block_bytes
    if damage == "head":
        os.pwrite(image.fd, bytes(2 * image.block_bytes), 0)
        os.pwrite(image.fd, b"\xee", 450)
        os.pwrite(image.fd, b"\x55\xaa", 510)
    elif damage == "both differ":
        copy = image.read(end - 32 * 512, 32 * 512 + image.block_bytes)
        image.partition((2, 4))
        os.pwrite(image.fd, copy, end - 32 * 512)
    else:
        place = {"entries": 2 * image.block_bytes, "copy": end, "copy's entries": end - 16384}
        os.pwrite(image.fd, b"\xff", place[damage] + 20)
    with pytest.raises(GptError):
        image.plan()


def test_a_table_that_changed_meanwhile_is_not_written(image: Image) -> None:
    new = image.plan(10 * MIB)
    image.partition((1, 4))
    before = image.read(0, SIZE)
    with pytest.raises(InUse, match="have changed meanwhile; nothing was written"):
        write_table(image.fd, new)
    assert image.read(0, SIZE) == before


def test_sixty_four_bit_sizes() -> None:
    """A disk of 8 EiB: its reads are answered with zeroes, nothing is computed in 32 bits."""
    blocks = 1 << 54
    new = plan_partition(lambda offset, length: bytes(length), "/dev/huge", blocks, 512, "p", None)
    assert new.size == (blocks - 2048 - 2048) * 512


# ---- who a device is ----------------------------------------------------------------------------


def describe(folder: Path, device: Path, files: dict[str, str]) -> None:
    number = device.stat().st_rdev
    base = folder / "sys" / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}"
    for name, text in files.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text + "\n")
    (folder / "proc" / "self").mkdir(parents=True, exist_ok=True)


LoopDevice = Callable[..., Path]


@pytest.mark.needs_root
def test_a_device_is_named_by_model_and_serial(loop_device: LoopDevice, tmp_path: Path) -> None:
    device = loop_device(MIB)
    number = device.stat().st_rdev
    describe(
        tmp_path,
        device,
        {
            "size": "1000",
            "ro": "0",
            "dev": f"{os.major(number)}:{os.minor(number)}",
            "queue/logical_block_size": "4096",
            "device/vendor": "ACME",
            "device/model": "Fast 9000",
            "device/serial": "A-1",
            "sdx1/dev": "8:1",
            "sdx1/holders/md0": "",
            "sdx2/dev": "8:2",
        },
    )
    (tmp_path / "proc" / "self" / "mountinfo").write_text("1 2 8:2 / /mnt rw - ext4 /dev/x rw\n")
    found = find_device(str(device), tmp_path / "sys", tmp_path / "proc")
    assert str(found) == f"{device} (ACME Fast 9000, serial A-1)"
    assert (found.size, found.block_bytes, found.is_partition) == (512_000, 4096, False)
    assert found.holders == ("sdx2 is mounted on /mnt", "sdx1 is held by md0")


@pytest.mark.needs_root
def test_the_kernel_shows_a_new_partition_and_loses_it_again(loop_device: LoopDevice) -> None:
    device = loop_device(SIZE, "--partscan")
    found = find_device(str(device))
    assert found.model.startswith("loop device on ")
    fd = os.open(device, os.O_RDONLY)
    try:
        new = plan_partition(
            lambda offset, length: os.pread(fd, length, offset), str(device), SIZE // 512, 512,
            "p", 16 * MIB,
        )  # fmt: skip
        node = Path(write_partition(new))
        assert node.name.startswith(device.name) or "by-partuuid" in str(node)
        part = find_device(str(node.resolve()))
        assert (part.is_partition, part.size) == (True, 16 * MIB)
        node.resolve().write_bytes(b"mine")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, 4, MIB) == b"mine"
        shown = subprocess.run(["blkid", "-p", str(device)], capture_output=True, text=True)
        assert 'PTTYPE="gpt"' in shown.stdout
        remove_partition(new)
        assert not node.resolve().exists()
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert not any(os.pread(fd, MIB, 0))
        assert not any(os.pread(fd, MIB, SIZE - MIB))
    finally:
        os.close(fd)


@pytest.mark.needs_root
def test_a_pool_on_a_device_is_planned_made_and_taken_back(
    loop_device: LoopDevice, disk_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = loop_device(SIZE, "--partscan")
    target = LvolTarget(disk_folder / "s")
    try:
        words = ["pool", "create", "p", "-s", str(disk_folder / "s"), "--device", str(device)]
        assert main([*words, "--dry-run"]) == 0
        shown = capsys.readouterr().out
        assert f"{device} (loop device on " in shown
        assert "  it is empty\n" in shown
        assert "would make partition 1 of 62 MiB at 1 MiB, and touch nothing else" in shown
        assert main(words) == 1, "it has to ask"
        assert "nobody can be asked without a terminal" in capsys.readouterr().err
        target.failing.add("bdev_lvol_create_lvstore")
        assert main([*words, "--yes"]) == 1
        assert not any(device.read_bytes()), "the partition was taken back"
        target.failing.clear()
        target.calls.clear()
        # The model asks the file system for sizes, and knows of no devices.
        target.bdev_aio_create = _any_size(target)  # type: ignore[method-assign]
        assert main([*words, "--yes", "--size", "16M"]) == 0, capsys.readouterr().err
        (_, params), _ = target.calls
        part = find_device(str(Path(params["filename"]).resolve()))
        assert (part.is_partition, part.size) == (True, 16 * MIB)
        capsys.readouterr()
        assert main([*words[:2], "q", *words[3:], "--dry-run"]) == 0
        assert "partition 1 'p': nothing that is recognized, 16 MiB" in capsys.readouterr().out
        # An empty partition is taken as it is; one that holds something is not.
        used = [*words[:2], "q", *words[3:-1], str(part.path)]
        assert main([*used, "--dry-run"]) == 0
        assert "Make a pool" not in capsys.readouterr().out
        subprocess.run(["mkfs.ext4", "-q", "-L", "old", part.path], check=True)
        assert main([*used, "--dry-run"]) == 1
        assert 'it holds ext4 "old", 16 MiB' in capsys.readouterr().err
        assert main([*used, "--size", "1M"]) == 2
    finally:
        target.close()


def _any_size(target: LvolTarget) -> Callable[..., str]:
    def bdev_aio_create(name: str, filename: str) -> str:
        with Path(filename).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
        from tests.fakes.lvol_target import Base

        target.bases[name] = Base(name, size, {"aio": {"filename": filename}})
        return name

    return bdev_aio_create


def test_what_is_no_device(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="can't find"):
        find_device(str(tmp_path / "nosuch"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is no block device") as caught:
        find_device(str(tmp_path / "file"))
    assert "--file" in str(caught.value.hint)


def test_new_partitions_are_of_the_type_that_spdk_takes(image: Image) -> None:
    assert image.plan().entry.type_guid == SPDK_TYPE
