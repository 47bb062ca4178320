"""virtio 1.3 §2.7.4, message framing: "the device MUST NOT make assumptions about the particular
arrangement of descriptors", and §2.7.5.3, indirect descriptors.
"""

from __future__ import annotations

import random

import pytest

from tests.fakes.driver import BlkDriver, Completion, Framing, Kind, Status, segment_bytes
from tests.fakes.memory import PAGE, adjacent
from tests.fakes.ring import DESC, F_INDIRECT, F_NEXT, F_WRITE, Segment
from tests.fakes.stepped import FEATURES, PACKED, Machine

BOTH_RINGS = pytest.mark.parametrize("features", [FEATURES, PACKED], ids=["split", "packed"])
DATA = random.Random(11).randbytes(4096)

READABLE = {
    "header and data in one": (),
    "header alone": (16,),
    "header in bytes": (1,) * 16,
    "header in two": (8, 8),
    "header and the first of the data": (17,),
    "header across three": (4, 9, 100),
    "data in odd pieces": (16, 1, 511, 3, 1000),
}
WRITABLE = {
    "data and status in one": (),
    "status alone": (4096,),
    "status with the last of the data": (4000,),
    "data in odd pieces": (1, 511, 3, 1000, 2580),
    "data in bytes at both ends": (1, 4094, 1),
}


@BOTH_RINGS
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("how", READABLE)
def test_header_and_data_may_be_cut_anywhere(how: str, indirect: bool, features: int) -> None:
    with Machine(features=features) as machine:
        disk = machine.add_queue(32)
        framing = Framing(readable=READABLE[how], indirect=indirect)
        assert disk.request(Kind.OUT, 8, DATA, framing=framing) == Completion(Status.OK, 1, b"")
        assert disk.read(8, 4096) == DATA


@BOTH_RINGS
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("how", WRITABLE)
def test_data_and_status_may_be_cut_anywhere(how: str, indirect: bool, features: int) -> None:
    with Machine(features=features) as machine:
        disk = machine.add_queue(32)
        disk.write(8, DATA)
        framing = Framing(writable=WRITABLE[how], indirect=indirect)
        done = disk.request(Kind.IN, 8, room=4096, framing=framing)
        assert done == Completion(Status.OK, 4097, DATA)


@pytest.mark.parametrize("cuts", [(), (16, 1), (16, 15), (8, 8, 8, 4), (20, 4)])
def test_a_discard_segment_may_be_cut_anywhere(cuts: tuple[int, ...]) -> None:
    with Machine() as machine:
        disk = machine.add_queue()
        disk.write(0, DATA)
        framing = Framing(readable=cuts)
        done = disk.request(Kind.WRITE_ZEROES, data=segment_bytes(1, 6), framing=framing)
        assert (done.status, done.used_length) == (Status.OK, 1)
        assert disk.read(0, 4096) == DATA[:512] + bytes(3072) + DATA[3584:]


@BOTH_RINGS
def test_get_id_into_scattered_bytes(features: int) -> None:
    with Machine(features=features) as machine:
        disk = machine.add_queue()
        whole = disk.get_id()
        framing = Framing(writable=(1, 2, 3, 4, 5))
        done = disk.request(Kind.GET_ID, room=20, framing=framing)
        assert done == Completion(Status.OK, 21, whole)


@BOTH_RINGS
def test_buffers_of_no_length_are_passed_over(features: int) -> None:
    with Machine(features=features) as machine:
        disk = machine.add_queue()
        disk.write(0, DATA)
        readable = [Segment(PAGE, 0, False), *header_of(disk, Kind.IN, 0), Segment(PAGE, 0, False)]
        data = disk.memory.allocate(513)
        writable = [Segment(PAGE, 0, True), Segment(data, 513, True), Segment(PAGE, 0, True)]
        pending = disk.queue_chain(readable, writable)
        disk.publish()
        done = disk.wait(pending)
        assert done == Completion(Status.OK, 513, DATA[:512])


def header_of(disk: BlkDriver, kind: Kind, sector: int) -> list[Segment]:
    addr = disk.memory.allocate(16)
    disk.memory.write(addr, kind.to_bytes(4, "little") + bytes(4) + sector.to_bytes(8, "little"))
    return [Segment(addr, 16, False)]


# ---- long chains ------------------------------------------------------------------------


@BOTH_RINGS
@pytest.mark.parametrize("pieces", [7, 8, 9, 62, 126, 254])
def test_a_chain_may_be_as_long_as_the_ring(pieces: int, features: int) -> None:
    """§2.7.5.3.1: "A driver MUST NOT create a descriptor chain longer than the Queue Size"."""
    with Machine(features=features) as machine:
        disk = machine.add_queue(256)
        data = random.Random(pieces).randbytes(512 * pieces)
        disk.write(0, data, Framing(readable=(16, *[512] * (pieces - 1))))
        cuts = tuple([512] * pieces)
        assert disk.read(0, len(data), Framing(writable=cuts)) == data
        assert disk.read(0, len(data), Framing(writable=cuts, indirect=True)) == data


@BOTH_RINGS
@pytest.mark.parametrize("size", [1, 2, 4, 8, 1024])
def test_rings_of_the_smallest_and_the_largest_size(size: int, features: int) -> None:
    """§2.7: any power of two. A chain in a table may be no longer than the ring, so the smallest
    that can hold a request has one buffer for each direction."""
    with Machine(features=features) as machine:
        disk = machine.add_queue(size)
        if size == 1:
            disk.queue(Kind.FLUSH, framing=Framing(indirect=True))
            disk.publish()
            machine.step(20)
            assert machine.queues[0].broken
            return
        disk.write(0, DATA[:512], Framing(readable=()))
        assert disk.read(0, 512, Framing(writable=())) == DATA[:512]
        assert disk.read(0, 512, Framing(writable=(), indirect=True)) == DATA[:512]


@BOTH_RINGS
def test_more_long_chains_than_there_can_be_spare_blocks(features: int) -> None:
    """No pool fails a request because it is empty: it waits."""
    with Machine(features=features) as machine:
        disk = machine.add_queue(1024)
        machine.settle(machine.channel.gate())
        cuts = tuple([512] * 31)
        wanted = [
            disk.queue(Kind.OUT, 32 * n, bytes([n]) * 16384, framing=Framing((16, *cuts)))
            for n in range(30)
        ]
        disk.publish()
        machine.step(50)
        machine.settle(machine.channel.ungate())
        assert [disk.wait(pending).status for pending in wanted] == [Status.OK] * 30
        for n in range(30):
            assert disk.read(32 * n, 16384) == bytes([n]) * 16384


# ---- indirect tables ----------------------------------------------------------------------


def test_the_write_flag_of_the_indirect_descriptor_is_ignored() -> None:
    """§2.7.5.3.2: "The device MUST ignore the write-only flag in the descriptor that refers to
    an indirect table"."""
    with Machine() as machine:
        disk = machine.add_queue()
        disk.write(0, DATA)
        pending = disk.queue(Kind.IN, 0, room=512, framing=Framing(indirect=True))
        where = disk.ring.desc + 16 * pending.head
        addr, length, flags, following = DESC.unpack(disk.memory.read(where, 16))
        assert flags == F_INDIRECT
        disk.ring.poke_desc(pending.head, addr, length, flags | F_WRITE, following)
        disk.publish()
        assert disk.wait(pending) == Completion(Status.OK, 513, DATA[:512])


def test_an_indirect_descriptor_may_follow_a_direct_one() -> None:
    """§2.7.5.3.1 allows a driver to set INDIRECT in the last descriptor of a chain.

    Linux and QEMU accept it; a device that does not must give the queue up, not guess.
    """
    with Machine() as machine:
        disk = machine.add_queue()
        disk.write(0, DATA)
        table = disk.memory.allocate(16, 16)
        answer = disk.memory.allocate(513)
        disk.memory.write(table, DESC.pack(answer, 513, F_WRITE, 0))
        head = header_of(disk, Kind.IN, 0)[0]
        disk.ring.poke_desc(0, head.addr, head.length, F_NEXT, 1)
        disk.ring.poke_desc(1, table, 16, F_INDIRECT, 0)
        disk.ring.poke_avail(disk.ring.avail_idx, 0)
        disk.ring.poke_avail_idx(disk.ring.avail_idx + 1)
        disk.port.kick()
        machine.step(20)
        if machine.queues[0].broken is None:
            assert disk.ring.used_at(disk.ring.used_idx - 1) == (0, 513)
            assert disk.memory.read(answer, 512) == DATA[:512]


def test_an_indirect_table_may_span_two_regions() -> None:
    with Machine(layouts=adjacent([1 << 20, PAGE, 1 << 20])) as machine:
        disk = machine.add_queue()
        disk.write(0, DATA)
        table = machine.memory.regions[1].guest_addr - 16
        answer = disk.memory.allocate(513)
        head = header_of(disk, Kind.IN, 0)[0]
        raw = DESC.pack(head.addr, 16, F_NEXT, 1) + DESC.pack(answer, 513, F_WRITE, 0)
        disk.memory.write(table, raw)
        disk.ring.poke_desc(0, table, 32, F_INDIRECT, 0)
        disk.ring.poke_avail(disk.ring.avail_idx, 0)
        disk.ring.poke_avail_idx(disk.ring.avail_idx + 1)
        disk.port.kick()
        machine.step(20)
        assert machine.queues[0].broken is None
        assert disk.ring.used_at(disk.ring.used_idx - 1) == (0, 513)
        assert disk.memory.read(answer, 512) == DATA[:512]


# ---- regions ------------------------------------------------------------------------------


@BOTH_RINGS
@pytest.mark.parametrize("pages", [1, 2, 3, 6])
def test_a_buffer_may_span_regions(pages: int, features: int) -> None:
    """Adjacent for the guest, apart in every other address: one buffer, several iovecs."""
    layouts = adjacent([1 << 20, *[PAGE] * pages, 1 << 20])
    with Machine(layouts=layouts, features=features) as machine:
        disk = machine.add_queue()
        data = random.Random(pages).randbytes(PAGE * (pages + 2))
        start = machine.memory.regions[1].guest_addr - 1000
        machine.memory.write(start, data)
        header = header_of(disk, Kind.OUT, 0)
        status = disk.memory.allocate(1)
        out = disk.queue_chain(
            [*header, Segment(start, len(data), False)], [Segment(status, 1, True)]
        )
        disk.publish()
        assert disk.wait(out).status == Status.OK
        assert disk.read(0, len(data)) == data
        back = disk.queue_chain(header_of(disk, Kind.IN, 0), [Segment(start, len(data) + 1, True)])
        machine.memory.write(start, bytes(len(data)))
        disk.publish()
        assert disk.wait(back) == Completion(Status.OK, len(data) + 1, data)
