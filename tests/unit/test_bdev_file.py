"""Disks in files: through O_DIRECT on a disk's file system, through the page cache in memory."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.bdev.file import FileBdev
from drivebay.errors import UsageError
from tests.fakes.driver import BlkDriver, Framing, Kind, Pending, Status, segment_bytes
from tests.fakes.memory import GuestMemory
from tests.fakes.ring import Segment, Used
from tests.fakes.stepped import Machine

MIB = 1 << 20
SIZE = 8 * MIB
PATTERN = (bytes(range(1, 252)) * (SIZE // 251 + 1))[:SIZE]
UNMAP = 1
BOUNCE_BYTES = 128 << 10


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest) -> Path:
    found = request.getfixturevalue(f"{request.param}_folder")
    assert isinstance(found, Path)
    return found


@pytest.fixture
def path(folder: Path) -> Path:
    made = folder / "disk.img"
    made.write_bytes(PATTERN)
    return made


@pytest.fixture
def bdev(path: Path) -> FileBdev:
    return FileBdev("File0", None, str(path), 512)


@pytest.fixture
def disk(bdev: FileBdev) -> Iterator[BlkDriver]:
    with Machine(bdev) as machine:
        yield machine.add_queue(256)


@pytest.fixture
def direct_path(disk_folder: Path) -> Path:
    made = disk_folder / "disk.img"
    made.write_bytes(PATTERN)
    return made


@pytest.fixture
def direct_disk(direct_path: Path) -> Iterator[BlkDriver]:
    """Through O_DIRECT, so with bounce buffers where ours are not aligned."""
    bdev = FileBdev("File0", None, str(direct_path), 512)
    assert bdev.direct, "the file system of the tests has no O_DIRECT"
    with Machine(bdev) as machine:
        yield machine.add_queue(256)


def blocks_of(path: Path) -> int:
    """Bytes that the file takes on its disk."""
    os.sync()
    return path.stat().st_blocks * 512


# ---- reading and writing --------------------------------------------------------------------


def test_what_is_written_is_in_the_file_and_read_again(disk: BlkDriver, path: Path) -> None:
    assert disk.read(0, MIB) == PATTERN[:MIB]
    disk.write(8, b"A" * 8192)
    disk.flush()
    assert disk.read(0, 20480) == PATTERN[:4096] + b"A" * 8192 + PATTERN[12288:20480]
    assert path.read_bytes() == PATTERN[:4096] + b"A" * 8192 + PATTERN[12288:]


def test_the_last_block_is_reachable_and_nothing_behind_it(disk: BlkDriver, path: Path) -> None:
    last = SIZE // 512 - 1
    disk.write(last, b"Z" * 512)
    assert disk.read(last, 512) == b"Z" * 512
    for sector, length in ((last, 1024), (last + 1, 512)):
        assert disk.request(Kind.IN, sector, room=length).status == Status.IOERR
        assert disk.request(Kind.OUT, sector, b"x" * length).status == Status.IOERR
    assert path.stat().st_size == SIZE


def test_only_what_the_file_system_can_is_promised(bdev: FileBdev, folder: Path) -> None:
    """tmpfs has nothing behind its cache, so O_DIRECT is of no use there."""
    in_memory = str(folder).startswith("/dev/shm")
    assert bdev.direct is not in_memory
    assert bdev.driver_specific()["aio"]["direct"] is not in_memory
    assert bdev.write_cache
    assert {"read", "write", "flush", "unmap", "write_zeroes"} <= bdev.io_types
    bdev.close()


ODD = [
    Framing((16, 1), (1,)),
    Framing((16, 511), (511,)),
    Framing((16, 512, 3, 509), (512, 3, 509)),
    Framing((7, 9, 4095), (4095,)),
    Framing((16, 100, 100, 100), (100, 100, 100)),
    Framing((16, 4096, 1), (4096, 1)),
]


@pytest.mark.parametrize("length", [512, 4096, BOUNCE_BYTES, BOUNCE_BYTES + 512, 700 * 512, MIB])
@pytest.mark.parametrize("framing", ODD, ids=str)
def test_buffers_of_any_alignment_and_cut(disk: BlkDriver, framing: Framing, length: int) -> None:
    data = PATTERN[1000 : 1000 + length]
    disk.write(24, data, framing)
    assert disk.read(24, length, framing) == data
    before, after = disk.read(0, 24 * 512), disk.read(24 + length // 512, 512)
    assert before == PATTERN[: 24 * 512]
    assert after == PATTERN[24 * 512 + length :][:512]


@pytest.mark.parametrize("shift", [1, 2, 511, 512, 513, 2048])
def test_a_buffer_that_is_shifted_by_some_bytes(direct_disk: BlkDriver, shift: int) -> None:
    disk = direct_disk
    memory = disk.memory
    base = memory.allocate(2 * MIB, 4096)
    header = memory.allocate(16, 16)
    status = memory.allocate(1)
    for kind, data in ((Kind.OUT, b"S" * MIB), (Kind.IN, bytes(MIB))):
        memory.write(base, bytes(2 * MIB))
        memory.write(base + shift, data)
        memory.write(header, kind.to_bytes(4, "little") + bytes(4) + (2048).to_bytes(8, "little"))
        buffers = [(header, 16, False), (base + shift, MIB, kind == Kind.IN), (status, 1, True)]
        chain = [_segment(*buffer) for buffer in buffers]
        disk.ring.add(chain)
        disk.publish()
        used: list[Used] = []
        while not used:
            disk.port.wait(1)
            used = disk.ring.take_used()
        assert memory.read(status, 1) == bytes([Status.OK])
        assert used[0].length == (MIB + 1 if kind == Kind.IN else 1)
    assert memory.read(base + shift, MIB) == b"S" * MIB
    assert memory.read(base, shift) == bytes(shift)
    assert memory.read(base + shift + MIB, 4096) == bytes(4096)


def _segment(addr: int, length: int, writable: bool) -> Segment:
    return Segment(addr, length, writable)


def test_more_misaligned_requests_than_there_are_bounce_buffers(direct_disk: BlkDriver) -> None:
    """They wait for one; none fails, none is mixed up."""
    disk = direct_disk
    odd = Framing((16, 3), (3,))
    writes = [disk.queue(Kind.OUT, 8 * i, bytes([i + 1]) * 4096, framing=odd) for i in range(60)]
    disk.publish()
    for pending in writes:
        assert disk.wait(pending).status == Status.OK
    reads = [disk.queue(Kind.IN, 8 * i, room=4096, framing=odd) for i in range(60)]
    disk.publish()
    for i, pending in enumerate(reads):
        assert disk.wait(pending).data == bytes([i + 1]) * 4096


def test_random_requests_against_a_model(disk: BlkDriver, path: Path) -> None:
    rng = random.Random(17)
    model = bytearray(PATTERN)
    for _ in range(150):
        length = 512 * rng.choice([1, 2, 7, 8, 9, 63, 64, 256, 257, 300])
        sector = rng.randrange((SIZE - length) // 512)
        start = 512 * sector
        cuts = (16, *(rng.choice([1, 5, 512, 700, 4096]) for _ in range(rng.randrange(4))))
        framing = Framing(cuts, cuts[1:], indirect=rng.random() < 0.3)
        kind = rng.choice([Kind.IN, Kind.OUT, Kind.DISCARD, Kind.WRITE_ZEROES])
        if kind == Kind.IN:
            assert disk.read(sector, length, framing) == model[start : start + length]
        elif kind == Kind.OUT:
            data = rng.randbytes(length)
            disk.write(sector, data, framing)
            model[start : start + length] = data
        else:
            flags = UNMAP if kind == Kind.WRITE_ZEROES and rng.random() < 0.5 else 0
            data = segment_bytes(sector, length // 512, flags)
            assert disk.request(kind, data=data).status == Status.OK
            model[start : start + length] = bytes(length)
    disk.flush()
    assert path.read_bytes() == model


# ---- clearing -------------------------------------------------------------------------------


def test_discard_gives_blocks_back(disk: BlkDriver, path: Path) -> None:
    before = blocks_of(path)
    disk.discard(2048, 8192)
    assert before - blocks_of(path) >= 8192 * 512 - 2 * 4096
    assert path.stat().st_size == SIZE
    assert disk.read(2048, MIB) == bytes(MIB)
    assert disk.read(2047, 512) == PATTERN[2047 * 512 : MIB]


def test_zeroes_that_may_be_a_hole_give_blocks_back(disk: BlkDriver, path: Path) -> None:
    before = blocks_of(path)
    disk.write_zeroes(2048, 8192, unmap=True)
    assert before - blocks_of(path) >= 8192 * 512 - 2 * 4096
    assert disk.read(2048, 4096) == bytes(4096)


def test_zeroes_that_keep_their_blocks(direct_disk: BlkDriver, direct_path: Path) -> None:
    before = blocks_of(direct_path)
    direct_disk.write_zeroes(2048, 8192)
    assert blocks_of(direct_path) == before
    assert direct_disk.read(2048, 4096) == bytes(4096)


def test_clearing_parts_of_a_page_leaves_its_rest(disk: BlkDriver) -> None:
    disk.discard(1, 9)
    disk.write_zeroes(33, 1)
    model = bytearray(PATTERN[: 64 * 512])
    model[512:5120] = bytes(4608)
    model[33 * 512 : 34 * 512] = bytes(512)
    assert disk.read(0, 64 * 512) == model


def test_without_fallocate_nothing_is_cleared(path: Path) -> None:
    bdev = FileBdev("File0", None, str(path), 512, fallocate=False)
    assert bdev.io_types == {"read", "write", "flush"}
    with Machine(bdev) as machine:
        disk = machine.add_queue()
        for kind in (Kind.DISCARD, Kind.WRITE_ZEROES):
            assert disk.request(kind, data=segment_bytes(0, 8)).status == Status.UNSUPP
        assert disk.read(0, 4096) == PATTERN[:4096]


def test_trying_for_holes_changes_nothing(path: Path) -> None:
    before = path.stat().st_size, blocks_of(path)
    FileBdev("File0", None, str(path), 512).close()
    assert (path.stat().st_size, blocks_of(path)) == before
    assert path.read_bytes() == PATTERN


# ---- what goes wrong ------------------------------------------------------------------------


def test_a_file_cut_short_behind_our_back_fails_what_is_gone(disk: BlkDriver, path: Path) -> None:
    os.truncate(path, MIB)
    assert disk.request(Kind.IN, 4096, room=4096).status == Status.IOERR
    assert disk.request(Kind.IN, 2048 - 8, room=8192).status == Status.IOERR
    assert disk.read(0, MIB) == PATTERN[:MIB]


def test_a_full_file_system_is_an_io_error_and_nothing_more(small_tmpfs: Path) -> None:
    path = small_tmpfs / "sparse.img"
    with path.open("wb") as file:
        file.truncate(32 * MIB)
    with Machine(FileBdev("File0", None, str(path), 512)) as machine:
        disk = machine.add_queue()
        outcomes = [disk.request(Kind.OUT, at * 2048, b"x" * MIB).status for at in range(8)]
        assert outcomes[:3] == [Status.OK] * 3
        assert outcomes[-1] == Status.IOERR
        assert machine.channel.stats()["write"].errors >= 1
        assert disk.read(0, 4096) == b"x" * 4096
        disk.discard(0, 4096)
        disk.write(6 * 2048, b"y" * MIB)
        assert disk.read(6 * 2048, MIB) == b"y" * MIB


def test_a_read_only_disk_writes_nothing(path: Path) -> None:
    bdev = FileBdev("File0", None, str(path), 512, readonly=True)
    assert bdev.io_types == {"read"}
    with Machine(bdev) as machine:
        disk = machine.add_queue()
        assert disk.read(0, 4096) == PATTERN[:4096]
        assert disk.request(Kind.OUT, 0, b"x" * 512).status == Status.IOERR
        for kind in (Kind.DISCARD, Kind.WRITE_ZEROES):
            assert disk.request(kind, data=segment_bytes(0, 8)).status == Status.IOERR
    assert path.read_bytes() == PATTERN


# ---- size -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "block_size"), [(0, 512), (511, 512), (SIZE + 1, 512), (SIZE + 512, 4096), (100, 0)]
)
def test_a_size_that_is_no_whole_number_of_blocks_is_refused(
    path: Path, size: int, block_size: int
) -> None:
    os.truncate(path, size)
    with pytest.raises(UsageError, match=f"has {size} bytes") as refused:
        FileBdev("File0", None, str(path), block_size)
    assert refused.value.field == "filename"
    FileBdev("Again", None, _made(path, SIZE)).close()


def _made(path: Path, size: int) -> str:
    os.truncate(path, size)
    return str(path)


def test_a_file_that_grew_is_served_to_its_new_end(bdev: FileBdev, path: Path) -> None:
    with Machine(bdev) as machine:
        disk = machine.add_queue()
        os.truncate(path, SIZE + MIB)
        assert bdev.num_blocks == SIZE // 512
        assert disk.request(Kind.IN, SIZE // 512, room=512).status == Status.IOERR
        assert bdev.rescan() == (SIZE + MIB) // 512
        bdev.resize(bdev.rescan())
        assert disk.read(SIZE // 512, MIB) == bytes(MIB)


def test_blocks_of_4096_bytes(path: Path) -> None:
    with Machine(FileBdev("File0", None, str(path), 4096)) as machine:
        disk = machine.add_queue()
        assert machine.bdev.num_blocks == SIZE // 4096
        assert disk.read(8, 4096) == PATTERN[4096:8192]
        assert disk.request(Kind.IN, 1, room=4096).status == Status.IOERR


def test_saving_names_the_call_that_makes_it_again(path: Path) -> None:
    for module in ("aio", "uring"):
        bdev = FileBdev("File0", None, str(path), 512, module=module)
        saved = bdev.save()
        assert saved is not None
        method, params = saved
        assert method == f"bdev_{module}_create"
        assert params["filename"] == str(path)
        assert params["uuid"] == str(bdev.uuid)
        bdev.close()


def test_nothing_stays_open(path: Path) -> None:
    def descriptors() -> list[str]:
        found = []
        for link in Path("/proc/self/fd").iterdir():
            try:
                found.append(str(link.readlink()))
            except OSError:
                continue
        return [target for target in found if target == str(path) or "io_uring" in target]

    for _ in range(5):
        with Machine(FileBdev("File0", None, str(path), 512)) as machine:
            machine.add_queue().read(0, 4096)
            assert descriptors().count(str(path)) == 1
    assert descriptors() == []


def test_the_descriptor_waits_where_it_has_to(path: Path) -> None:
    """With O_NONBLOCK left on, a file system that can't try first answers EAGAIN for ever."""
    bdev = FileBdev("File0", None, str(path), 512)
    found = []
    for link in Path("/proc/self/fd").iterdir():
        if os.path.realpath(link) == str(path):
            text = Path(f"/proc/self/fdinfo/{link.name}").read_text()
            (flags,) = [line.split()[1] for line in text.splitlines() if line.startswith("flags")]
            found.append(int(flags, 8))
    assert len(found) == 1
    assert not found[0] & os.O_NONBLOCK
    assert found[0] & os.O_CLOEXEC
    bdev.close()


def finished(disk: BlkDriver, pending: list[Pending]) -> list[int]:
    return [disk.wait(each).status for each in pending]


def test_a_gate_holds_and_a_removal_fails_requests_of_a_file(bdev: FileBdev) -> None:
    with Machine(bdev) as machine:
        disk = machine.add_queue(64)
        reads = [disk.queue(Kind.IN, 8 * i, room=4096) for i in range(8)]
        disk.publish()
        machine.reactor.step(machine.now)
        gated = machine.channel.gate()
        machine.settle(gated)
        assert finished(disk, reads) == [Status.OK] * 8
        held = disk.queue(Kind.IN, 0, room=4096)
        disk.publish()
        machine.step(20)
        assert not disk.collect()
        machine.settle(machine.channel.remove())
        assert finished(disk, [held]) == [Status.IOERR]


def punch(memory: GuestMemory, addr: int, length: int) -> None:
    """As a VM monitor's balloon does: the pages are gone, and new ones come when touched."""
    region = memory.region_of(addr)
    libc = ctypes.CDLL(None, use_errno=True)
    at, size = ctypes.c_long(region.mmap_offset + addr - region.guest_addr), ctypes.c_long(length)
    keep_size_punch_hole = 3
    assert libc.fallocate(region.fd, keep_size_punch_hole, at, size) == 0


@pytest.mark.parametrize("shift", [0, 1], ids=["straight", "bounced"])
def test_a_hole_punched_into_guest_memory_between_two_requests(
    direct_disk: BlkDriver, direct_path: Path, shift: int
) -> None:
    """The pages that a buffer has now are read and written, not those that it had before.

    Memory that is pinned once and for all would fail this: its old pages live on.
    """
    memory = direct_disk.memory
    page = memory.allocate(2 * 4096, 4096, one_region=True)
    places = [(memory.allocate(16, 16), 16), (page + shift, 4096), (memory.allocate(1), 1)]
    header = places[0][0]

    def transfer(kind: Kind, sector: int) -> None:
        memory.write(header, kind.to_bytes(4, "little") + bytes(4) + sector.to_bytes(8, "little"))
        data = Segment(*places[1], kind == Kind.IN)
        pending = direct_disk.queue_chain(
            [Segment(*places[0], False), *([] if kind == Kind.IN else [data])],
            [*([data] if kind == Kind.IN else []), Segment(*places[2], True)],
        )
        direct_disk.publish()
        assert direct_disk.wait(pending).status == Status.OK

    for turn in range(4):
        fill = bytes([turn + 1]) * 4096
        punch(memory, page, 2 * 4096)
        memory.write(page + shift, fill)
        transfer(Kind.OUT, 8)
        assert direct_path.read_bytes()[4096:8192] == fill
        punch(memory, page, 2 * 4096)
        transfer(Kind.IN, 8 * (turn + 2))
        at = 4096 * (turn + 2)
        assert memory.read(page + shift, 4096) == PATTERN[at : at + 4096]
    memory.free(page, 2 * 4096)


def test_a_bounced_request_counts_once(direct_path: Path) -> None:
    """As the guest's one request, not once for each piece that goes through our buffers."""
    with Machine(FileBdev("File0", None, str(direct_path), 512), write_through=True) as machine:
        disk = machine.add_queue()
        odd = Framing((16, 511), (511,))
        disk.write(8, PATTERN[:MIB], odd)
        assert disk.read(8, MIB, odd) == PATTERN[:MIB]
        assert disk.request(Kind.IN, SIZE // 512, room=MIB, framing=odd).status == Status.IOERR
        stats = machine.channel.stats()
        assert {name: (s.ops, s.bytes, s.errors) for name, s in stats.items() if s.ops} == {
            "read": (1, MIB, 1),
            "write": (1, MIB, 0),
        }
