"""virtio 1.3 §5.2.6, block device operation: each request kind, its status and its used length.

A used length is the truth: bytes of data the device wrote, plus one for the status.
Not checked here: LIFETIME, SECURE_ERASE and zones beyond their refusal; we do not offer them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.fakes.driver import (
    STATUS_UNTOUCHED,
    BlkDriver,
    Completion,
    Framing,
    Kind,
    Status,
    segment_bytes,
)
from tests.fakes.memory import Layout
from tests.fakes.ring import Segment
from tests.fakes.stepped import FEATURES, PACKED, SERIAL, Machine, malloc_bdev

DISK_BYTES = 4 << 20
SECTORS = DISK_BYTES // 512
UNMAP = 1
PATTERN = random.Random(7).randbytes(8192)


@pytest.fixture(params=[FEATURES, PACKED], ids=["split", "packed"])
def features(request: pytest.FixtureRequest) -> int:
    assert isinstance(request.param, int)
    return request.param


@pytest.fixture
def machine(features: int) -> Iterator[Machine]:
    with Machine(malloc_bdev(size_bytes=DISK_BYTES), features=features) as machine:
        yield machine


@pytest.fixture
def disk(machine: Machine) -> BlkDriver:
    return machine.add_queue()


@pytest.fixture
def disk_of_4k_blocks() -> Iterator[BlkDriver]:
    with Machine(malloc_bdev(block_size=4096, size_bytes=DISK_BYTES)) as machine:
        yield machine.add_queue()


def outcome(done: Completion) -> tuple[int, int]:
    return done.status, done.used_length


def test_out_then_in_is_the_same_and_lengths_are_true(disk: BlkDriver) -> None:
    assert outcome(disk.request(Kind.OUT, 3, PATTERN)) == (Status.OK, 1)
    done = disk.request(Kind.IN, 3, room=len(PATTERN))
    assert outcome(done) == (Status.OK, len(PATTERN) + 1)
    assert done.data == PATTERN


def test_flush(disk: BlkDriver) -> None:
    assert outcome(disk.request(Kind.FLUSH)) == (Status.OK, 1)


def test_the_whole_disk_is_reachable_and_nothing_behind_it(disk: BlkDriver) -> None:
    disk.write(SECTORS - 1, PATTERN[:512])
    assert disk.read(SECTORS - 1, 512) == PATTERN[:512]


BEYOND = {
    "behind the end": (SECTORS, 512),
    "over the end": (SECTORS - 1, 1024),
    "the last sector number": ((1 << 64) - 1, 512),
    "a byte offset of exactly 2^64": (1 << 55, 512),
    "a byte offset that wraps to the start": ((1 << 55) + 8, 512),
    "an end that wraps": ((1 << 55) - 1, 1024),
}


@pytest.mark.parametrize("where", BEYOND)
def test_beyond_the_end_is_an_io_error_and_moves_no_data(disk: BlkDriver, where: str) -> None:
    sector, length = BEYOND[where]
    disk.write(0, PATTERN)
    done = disk.request(Kind.IN, sector, room=length)
    assert outcome(done) == (Status.IOERR, 1)
    assert done.data == bytes([STATUS_UNTOUCHED]) * length
    assert outcome(disk.request(Kind.OUT, sector, b"\xff" * length)) == (Status.IOERR, 1)
    assert disk.read(0, len(PATTERN)) == PATTERN
    assert disk.read(SECTORS - 1, 512) == bytes(512)


@pytest.mark.parametrize("length", [0, 1, 511, 513, 1023])
def test_a_length_that_is_not_whole_sectors_is_unsupported(disk: BlkDriver, length: int) -> None:
    assert outcome(disk.request(Kind.IN, 0, room=length)) == (Status.UNSUPP, 1)
    assert outcome(disk.request(Kind.OUT, 0, b"\xff" * length)) == (Status.UNSUPP, 1)
    assert disk.read(0, 1024) == bytes(1024)


@pytest.mark.parametrize(("sector", "length"), [(0, 512), (1, 4096), (0, 4608), (7, 512)])
def test_parts_of_a_large_block_are_an_io_error(
    disk_of_4k_blocks: BlkDriver, sector: int, length: int
) -> None:
    disk = disk_of_4k_blocks
    assert outcome(disk.request(Kind.IN, sector, room=length)) == (Status.IOERR, 1)
    assert outcome(disk.request(Kind.OUT, sector, b"\xff" * length)) == (Status.IOERR, 1)
    assert disk.read(0, 8192) == bytes(8192)


def test_sectors_are_512_bytes_whatever_the_block_size(disk_of_4k_blocks: BlkDriver) -> None:
    disk_of_4k_blocks.write(8, PATTERN[:4096])
    assert disk_of_4k_blocks.read(0, 8192) == bytes(4096) + PATTERN[:4096]


@pytest.mark.parametrize("kind", [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 17, 26, 99, 0x7FFF_FFFF])
def test_an_unknown_type_is_unsupported(disk: BlkDriver, kind: int) -> None:
    assert outcome(disk.request(kind, 0, PATTERN[:512], room=0)) == (Status.UNSUPP, 1)
    done = disk.request(kind, 0, room=512)
    assert outcome(done) == (Status.UNSUPP, 1)
    assert done.data == bytes([STATUS_UNTOUCHED]) * 512


def test_get_id_is_twenty_bytes_padded_with_nul(disk: BlkDriver) -> None:
    done = disk.request(Kind.GET_ID, room=20)
    assert outcome(done) == (Status.OK, 21)
    assert done.data == SERIAL.ljust(20, b"\0")


def test_get_id_without_a_buffer_is_unsupported(disk: BlkDriver) -> None:
    assert outcome(disk.request(Kind.GET_ID, room=0)) == (Status.UNSUPP, 1)


@pytest.mark.parametrize("room", [1, 8, 64])
def test_get_id_never_writes_more_than_twenty_or_the_buffer(disk: BlkDriver, room: int) -> None:
    done = disk.request(Kind.GET_ID, room=room)
    if done.status == Status.OK:
        written = min(room, 20)
        assert done.used_length == written + 1
        assert done.data[:written] == SERIAL.ljust(20, b"\0")[:written]
        assert done.data[written:] == bytes([STATUS_UNTOUCHED]) * (room - written)
    else:
        assert outcome(done) == (Status.UNSUPP, 1)


# ---- discard and write zeroes ---------------------------------------------------------

CLEARING = [Kind.DISCARD, Kind.WRITE_ZEROES]
BAD_SEGMENTS = {
    "two segments": (segment_bytes(0, 8) + segment_bytes(8, 8), {Status.IOERR}),
    "unknown flag": (segment_bytes(0, 8, 2), {Status.UNSUPP}),
    "all flags": (segment_bytes(0, 8, 0xFFFF_FFFF), {Status.UNSUPP}),
    "behind the end": (segment_bytes(SECTORS, 8), {Status.IOERR}),
    "over the end": (segment_bytes(SECTORS - 4, 8), {Status.IOERR}),
    "offset wraps": (segment_bytes(1 << 55, 8), {Status.IOERR}),
    "end wraps": (segment_bytes((1 << 64) - 4, 8), {Status.IOERR}),
    "no segment": (b"", {Status.IOERR, Status.UNSUPP}),
    "15 bytes": (segment_bytes(0, 8)[:15], {Status.IOERR, Status.UNSUPP}),
    "17 bytes": (segment_bytes(0, 8) + b"\0", {Status.IOERR, Status.UNSUPP}),
}


@pytest.mark.parametrize("kind", CLEARING)
@pytest.mark.parametrize("what", BAD_SEGMENTS)
def test_a_bad_segment_clears_nothing(disk: BlkDriver, kind: Kind, what: str) -> None:
    data, allowed = BAD_SEGMENTS[what]
    disk.write(0, PATTERN)
    disk.write(SECTORS - 16, PATTERN)
    done = disk.request(kind, data=data)
    assert done.status in allowed
    assert done.used_length == 1
    assert disk.read(0, len(PATTERN)) == PATTERN
    assert disk.read(SECTORS - 16, len(PATTERN)) == PATTERN


def test_unmap_is_no_flag_of_discard(disk: BlkDriver) -> None:
    done = disk.request(Kind.DISCARD, data=segment_bytes(0, 8, UNMAP))
    assert outcome(done) == (Status.UNSUPP, 1)


@pytest.mark.parametrize("flags", [0, UNMAP])
@pytest.mark.parametrize(("sector", "sectors"), [(1, 1), (3, 14), (8, 8), (5, 4096)])
def test_after_write_zeroes_reads_give_zeroes_and_neighbours_stay(
    disk: BlkDriver, sector: int, sectors: int, flags: int
) -> None:
    for at in range(0, 4352, 16):
        disk.write(at, PATTERN)
    data = segment_bytes(sector, sectors, flags)
    assert outcome(disk.request(Kind.WRITE_ZEROES, data=data)) == (Status.OK, 1)
    assert disk.read(sector, 512 * sectors) == bytes(512 * sectors)
    before = disk.read(0, 512 * sector)
    assert before == PATTERN[: 512 * sector]
    after = (sector + sectors) % 16 * 512
    assert disk.read(sector + sectors, 512) == PATTERN[after : after + 512]


def test_discard_of_more_than_a_mebibyte_leaves_the_rest(disk: BlkDriver) -> None:
    disk.write(0, PATTERN[:512])
    disk.write(SECTORS - 1, PATTERN[:512])
    done = disk.request(Kind.DISCARD, data=segment_bytes(1, SECTORS - 2))
    assert outcome(done) == (Status.OK, 1)
    assert disk.read(0, 512) == disk.read(SECTORS - 1, 512) == PATTERN[:512]


def test_a_disk_that_clears_answers_reads_meanwhile(machine: Machine) -> None:
    clearing, reading = machine.add_queue(), machine.add_queue()
    everything = segment_bytes(0, SECTORS)
    pending = clearing.queue(Kind.WRITE_ZEROES, data=everything)
    clearing.publish()
    machine.step()
    assert not clearing.collect(), "4 MiB were cleared in one turn"
    assert len(reading.read(8, 4096)) == 4096
    assert clearing.wait(pending).status == Status.OK


def test_a_read_as_long_as_the_disk_is_done_in_pieces_and_others_are_answered(
    machine: Machine,
) -> None:
    """Its buffers may all be the same one: a guest needs no memory to ask for a lot of copying."""
    greedy, modest = machine.add_queue(), machine.add_queue()
    buffer = machine.memory.allocate(1 << 19)
    for at in range(0, SECTORS, 1024):
        greedy.write(at, bytes([at // 1024 + 1]) * (1 << 19))
    header = machine.memory.allocate(16)
    machine.memory.write(header, bytes(16))
    status = machine.memory.allocate(1)
    pending = greedy.queue_chain(
        [Segment(header, 16, False)],
        [*[Segment(buffer, 1 << 19, True)] * 8, Segment(status, 1, True)],
    )
    greedy.publish()
    for sector in range(3):
        assert len(modest.read(sector, 512)) == 512
        assert not greedy.collect(), "4 MiB were copied within a few turns"
    done = greedy.wait(pending)
    assert outcome(done) == (Status.OK, DISK_BYTES + 1)
    assert machine.memory.read(buffer, 1 << 19) == bytes([8]) * (1 << 19)


@pytest.mark.parametrize("cuts", [(), (3 << 20,), (1, (1 << 20) - 1, 1 << 20, 7), (1 << 20,) * 3])
def test_requests_longer_than_a_piece_carry_every_byte(cuts: tuple[int, ...]) -> None:
    layout = (Layout(0, 16 << 20),)
    with Machine(malloc_bdev(size_bytes=DISK_BYTES), layouts=layout) as machine:
        disk = machine.add_queue()
        data = random.Random(len(cuts)).randbytes(DISK_BYTES - 1024)
        disk.write(1, data, Framing(readable=(16, *cuts)))
        assert disk.read(1, len(data), Framing(writable=cuts)) == data
        assert disk.read(0, 512) == bytes(512)


# ---- directions -------------------------------------------------------------------------


def test_a_write_takes_no_data_from_a_writable_buffer(disk: BlkDriver) -> None:
    """§2.7.5: a buffer is either read or written by the device, never what the type says."""
    assert outcome(disk.request(Kind.OUT, 0, room=512)) == (Status.UNSUPP, 1)
    assert disk.read(0, 512) == bytes(512)


def test_a_read_writes_nothing_into_a_readable_buffer(disk: BlkDriver) -> None:
    disk.write(0, PATTERN[:512])
    pending = disk.queue(Kind.IN, 0, data=b"\x11" * 512)
    buffers = [(s.addr, s.length) for s in pending.readable]
    before = [disk.memory.read(*where) for where in buffers]
    disk.publish()
    assert outcome(disk.wait(pending)) == (Status.UNSUPP, 1)
    assert [disk.memory.read(*where) for where in buffers] == before


def test_status_is_the_last_writable_byte_even_of_a_write(disk: BlkDriver) -> None:
    done = disk.request(Kind.OUT, 0, PATTERN[:512], room=100)
    assert outcome(done) == (Status.OK, 1)
    assert done.data == bytes([STATUS_UNTOUCHED]) * 100


# ---- read-only --------------------------------------------------------------------------

CHANGING = {
    "write": (Kind.OUT, b"\xff" * 512),
    "discard": (Kind.DISCARD, segment_bytes(0, 8)),
    "write zeroes": (Kind.WRITE_ZEROES, segment_bytes(0, 8)),
    "write zeroes with unmap": (Kind.WRITE_ZEROES, segment_bytes(0, 8, UNMAP)),
}


@pytest.mark.parametrize("what", CHANGING)
def test_a_read_only_disk_refuses_and_nothing_is_written(what: str) -> None:
    kind, data = CHANGING[what]
    with Machine(malloc_bdev()) as machine:
        writer = machine.add_queue()
        writer.write(0, PATTERN)
        machine.readonly = True
        reader = machine.add_queue()
        assert outcome(reader.request(kind, data=data)) == (Status.IOERR, 1)
        assert reader.read(0, len(PATTERN)) == PATTERN
        assert outcome(reader.request(Kind.FLUSH)) == (Status.OK, 1)


# ---- many at once -------------------------------------------------------------------------


def test_requests_of_one_batch_see_each_other_in_ring_order(disk: BlkDriver) -> None:
    """Not promised by §5.2.6, but by a disk in memory: each is done before the next is taken."""
    first = disk.queue(Kind.OUT, 0, b"\x01" * 512)
    read = disk.queue(Kind.IN, 0, room=512)
    second = disk.queue(Kind.OUT, 0, b"\x02" * 512)
    disk.publish()
    for pending in (first, second, read):
        disk.wait(pending)
    assert read.completion is not None
    assert read.completion.data == b"\x01" * 512
    assert disk.read(0, 512) == b"\x02" * 512


def test_a_gated_disk_answers_when_the_gate_opens(machine: Machine) -> None:
    disk = machine.add_queue()
    machine.settle(machine.channel.gate())
    pending = disk.queue(Kind.OUT, 0, PATTERN)
    disk.publish()
    machine.step(20)
    assert not disk.collect()
    machine.settle(machine.channel.ungate())
    assert outcome(disk.wait(pending)) == (Status.OK, 1)
    assert disk.read(0, len(PATTERN)) == PATTERN


def test_a_removed_disk_answers_with_errors(machine: Machine) -> None:
    disk = machine.add_queue()
    machine.settle(machine.channel.gate())
    pending = disk.queue(Kind.OUT, 0, PATTERN)
    disk.publish()
    machine.step(20)
    machine.settle(machine.channel.remove())
    assert outcome(disk.wait(pending)) == (Status.IOERR, 1)
    assert outcome(disk.request(Kind.IN, 0, room=512)) == (Status.IOERR, 1)


def test_a_data_buffer_may_be_the_header_itself(machine: Machine) -> None:
    """§5.2.6: nothing forbids a driver to let a request read into the memory of its own header."""
    disk = machine.add_queue()
    disk.write(0, PATTERN[:512])
    memory = disk.memory
    addr = memory.allocate(1024)
    memory.write(addr, bytes(16))
    pending = disk.queue_chain([Segment(addr, 16, False)], [Segment(addr, 513, True)])
    disk.publish()
    assert outcome(disk.wait(pending)) == (Status.OK, 513)
    assert memory.read(addr, 512) == PATTERN[:512]
