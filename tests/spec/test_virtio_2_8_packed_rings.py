"""virtio 1.3 §2.8: packed rings, where descriptors are used in the place they were offered in.

Our positions run free; what must be right at each wrap of the ring, for each length of chain,
is enumerated. Not checked: IN_ORDER, which we do not offer.
"""

from __future__ import annotations

import random

import pytest

from drivebay.errors import PeerError
from tests.fakes.driver import F_INDIRECT, BlkDriver, Completion, Framing, Kind, Pending, Status
from tests.fakes.memory import PAGE, adjacent
from tests.fakes.packed_ring import (
    F_AVAIL,
    F_USED,
    PACKED_DESC,
    PackedRing,
    table_of,
)
from tests.fakes.ring import F_INDIRECT as INDIRECT
from tests.fakes.ring import F_NEXT, F_WRITE, Segment
from tests.fakes.stepped import PACKED, Machine

SIZE = 8
STARTS = [0, 1, 5, 7, 8, 9, 15, 16, 65535]
DATA = random.Random(28).randbytes(4096)


def used_flags(ring: PackedRing, position: int) -> int:
    return F_AVAIL | F_USED if ring.wrap(position) else 0


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("buffers", [2, 3, 4, 7, 8])
def test_chains_of_any_length_go_round_the_ring(buffers: int, start: int) -> None:
    """§2.8.6: a chain may lie over the end of the ring; the wrap counter changes within it."""
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue(SIZE, start=start)
        framing = Framing(writable=tuple([512] * (buffers - 2)))
        disk.write(0, DATA, Framing(readable=()))
        for turn in range(20):
            length = 512 * max(buffers - 2, 1)
            assert disk.read(turn % 2, length, framing) == DATA[512 * (turn % 2) :][:length]
        assert disk.packed.position == start + 2 + 20 * buffers
        assert machine.stop_queue(0) == disk.packed.off_wrap(disk.packed.position) * 0x10001


def test_a_used_descriptor_stands_where_its_chain_began() -> None:
    """§2.8.6: "The device only writes out a single used descriptor for the whole list"."""
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue(SIZE, start=6)
        ring = disk.packed
        offered = disk.queue(Kind.IN, 0, room=512)
        before = [ring.desc_at(at) for at in range(6, 9)]
        disk.publish()
        machine.step()
        used = ring.desc_at(6)
        assert used.id == offered.head
        assert used.length == 513
        assert used.flags & (F_AVAIL | F_USED) == used_flags(ring, 6)
        assert ring.desc_at(7) == before[1], "the chain's other descriptors are left alone"
        assert ring.desc_at(8) == before[2]
        assert len(disk.collect()) == 1


@pytest.mark.parametrize("start", [0, SIZE], ids=["first lap", "second lap"])
def test_write_tells_whether_anything_was_written(start: int) -> None:
    """§2.8.3: "In a used descriptor, this bit is used to specify whether any data has been
    written by the device into any parts of the buffer"."""
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue(SIZE, start=start)
        ring = disk.packed
        disk.queue(Kind.FLUSH)  # its status byte is written
        header = ring.memory.allocate(16)
        disk.queue_chain([Segment(header, 16, False)], [])  # nowhere to write to
        disk.publish()
        machine.step()
        assert ring.desc_at(start).flags == used_flags(ring, start) | F_WRITE
        assert ring.desc_at(start + 2).flags == used_flags(ring, start + 2)
        assert [done.completion for done in disk.collect()] == [
            Completion(Status.OK, 1, b""),
            Completion(Status.UNTOUCHED, 0, b""),
        ]


def test_a_batch_is_shown_by_its_first_descriptor() -> None:
    """§2.8.2: the driver looks only at the next one; then all of the batch must be there."""
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue(32, start=20)
        for turn in range(8):
            batch = [disk.queue(Kind.GET_ID, room=20) for _ in range(3 + turn % 3)]
            disk.publish()
            machine.step()
            assert machine.ports[0].take_calls() == 0, "in the next turn"
            machine.step()
            assert machine.ports[0].take_calls() == 1
            assert disk.collect() == batch


def hold_reads(machine: Machine, disk: BlkDriver, count: int) -> list[Pending]:
    machine.settle(machine.channel.gate())
    held = [disk.queue(Kind.IN, n, room=512) for n in range(count)]
    disk.publish()
    machine.step(3)
    assert not disk.collect()
    return held


@pytest.mark.parametrize("start", STARTS)
def test_buffers_come_back_in_the_order_of_their_completion(start: int) -> None:
    """§2.8: "Used device descriptors are written in the order in which their processing is
    complete"; the ids alone say whose they are."""
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue(16, start=start)
        disk.write(0, DATA)
        held = hold_reads(machine, disk, 2)
        early = [disk.queue(Kind.GET_ID, room=20, framing=Framing(writable=())) for _ in range(2)]
        disk.publish()
        machine.step(3)
        assert disk.collect() == early, "what was asked for later is done earlier"
        machine.settle(machine.channel.ungate())
        machine.step(3)
        assert disk.collect() == held
        for n, pending in enumerate(held):
            assert pending.completion == Completion(Status.OK, 513, DATA[512 * n :][:512])
        disk.flush()


def test_the_ring_may_be_full_of_requests_in_flight() -> None:
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue(16, start=13)
        held = hold_reads(machine, disk, 5)
        assert machine.queues[0].counters().inflight == 5
        assert disk.packed.free_descriptors == 1
        last = disk.queue(Kind.GET_ID, room=20, framing=Framing(indirect=True))
        disk.publish()
        machine.step(3)
        assert disk.collect() == [last]
        machine.settle(machine.channel.ungate())
        machine.step(3)
        assert disk.collect() == held
        assert machine.queues[0].broken is None


def test_the_same_id_may_be_in_flight_twice() -> None:
    """§2.8 leaves ids to the driver: ours are stored, and given back as often as they came."""
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue(16)
        ring = disk.packed
        disk.queue(Kind.GET_ID, room=20, framing=Framing(writable=()))
        disk.queue(Kind.GET_ID, room=20, framing=Framing(writable=()))
        for position in (1, 3):
            desc = ring.desc_at(position)
            ring.poke_desc(position, desc.addr, desc.length, 7, desc.flags)
        disk.publish()
        machine.step()
        assert [ring.desc_at(at).id for at in (0, 2)] == [7, 7]
        assert machine.queues[0].broken is None


@pytest.mark.parametrize("buffer_id", [0, 15, 16, 0x7FFF, 0xFFFF])
def test_ids_are_any_16_bits_and_count_in_the_last_descriptor_only(buffer_id: int) -> None:
    """§2.8.6: "Buffer ID is included in the last descriptor in the list"."""
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue(16)
        ring = disk.packed
        disk.queue(Kind.FLUSH)
        last = ring.desc_at(1)
        ring.poke_desc(1, last.addr, last.length, buffer_id, last.flags)
        disk.publish()
        machine.step()
        assert ring.desc_at(0).id == buffer_id


def test_requests_are_served_whatever_the_length_of_the_one_before() -> None:
    """Our look ahead guesses from the last chain; a wrong guess must cost nothing but time."""
    rng = random.Random(8)
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue(64, start=61)
        disk.write(0, DATA)
        for _ in range(300):
            wanted = []
            for _ in range(rng.randrange(1, 7)):
                cuts = tuple([512] * rng.randrange(0, 7))
                framing = Framing(writable=cuts, indirect=rng.random() < 0.3)
                wanted.append(disk.queue(Kind.IN, 0, room=4096, framing=framing))
                if rng.random() < 0.3:
                    disk.publish()
            disk.publish()
            machine.step(rng.choice([1, 1, 2, 200]))
            disk.wait_all()
            assert all(done.completion == Completion(Status.OK, 4097, DATA) for done in wanted)


# ---- indirect tables ----------------------------------------------------------------------


def test_the_flags_within_a_table_are_ignored_but_for_write() -> None:
    """§2.8.7: "The VIRTQ_DESC_F_WRITE flags bit is the only valid flag for descriptors in the
    indirect table. Others are reserved and are ignored by the device"."""
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue()
        disk.write(0, DATA)
        pending = disk.queue(Kind.IN, 0, room=512, framing=Framing(indirect=True))
        ring = disk.packed
        table = ring.desc_at(ring.position - 1)
        for at in range(table.addr, table.addr + table.length, 16):
            desc = PACKED_DESC.unpack(disk.memory.read(at, 16))
            noise = (F_NEXT if at > table.addr else 0) | INDIRECT | F_AVAIL | 0x7F00
            disk.memory.write(at, PACKED_DESC.pack(desc[0], desc[1], 0xABCD, desc[3] | noise))
        disk.publish()
        assert disk.wait(pending) == Completion(Status.OK, 513, DATA[:512])


def test_the_write_flag_of_the_indirect_descriptor_is_ignored() -> None:
    """§2.8.7: "In descriptors with VIRTQ_DESC_F_INDIRECT set VIRTQ_DESC_F_WRITE is reserved and
    is ignored by the device"."""
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue()
        disk.write(0, DATA)
        ring = disk.packed
        at = ring.position
        pending = disk.queue(Kind.IN, 0, room=512, framing=Framing(indirect=True))
        disk.publish()
        ring.poke_flags(at, ring.desc_at(at).flags | F_WRITE)
        assert disk.wait(pending) == Completion(Status.OK, 513, DATA[:512])


def test_a_table_may_span_two_regions() -> None:
    with Machine(features=PACKED, layouts=adjacent([1 << 20, PAGE, 1 << 20])) as machine:
        disk = machine.add_queue()
        disk.write(0, DATA)
        ring, memory = disk.packed, disk.memory
        header, answer = memory.allocate(16), memory.allocate(513)
        memory.write(header, bytes(16))
        table = machine.memory.regions[1].guest_addr - 16
        memory.write(table, table_of([Segment(header, 16, False), Segment(answer, 513, True)]))
        at = ring.position
        ring.poke_desc(at, table, 32, 1, INDIRECT | ring.available(at))
        machine.ports[0].kick()
        machine.step(20)
        assert ring.desc_at(at).length == 513
        assert memory.read(answer, 512) == DATA[:512]


def test_a_table_is_refused_when_it_was_not_negotiated() -> None:
    with Machine(features=PACKED & ~(1 << F_INDIRECT)) as machine:
        disk = machine.add_queue()
        disk.queue(Kind.FLUSH, framing=Framing(indirect=True))
        disk.publish()
        machine.step(20)
        assert "not negotiated" in (machine.queues[0].broken or "")


# ---- where a ring goes on -------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
def test_stopping_tells_both_indexes_and_a_new_start_goes_on_there(start: int) -> None:
    """vhost-user: bits 0-14 avail index, 15 its wrap counter, 16-30 used index, 31 its wrap."""
    with Machine(features=PACKED) as machine:
        disk = machine.add_queue(SIZE, start=start)
        ring = disk.packed
        for _ in range(5):
            disk.flush()
        base = machine.stop_queue(0)
        assert base == ring.off_wrap(start + 10) * 0x10001
        assert machine.stop_queue(0) == base
        ring.start = ring.position
        assert ring.base == base
        machine.add_queue(ring=ring)
        pending = disk.queue(Kind.FLUSH)
        ring.publish()
        machine.step(20)
        assert disk.collect() == [pending]


def test_a_base_of_the_older_form_has_nothing_in_flight() -> None:
    """Deviation: some front ends send the avail half alone."""
    with Machine(features=PACKED) as machine:
        ring = PackedRing(machine.memory, SIZE, start=3)
        queue = machine.prepare_queue(ring, base=ring.off_wrap(3))
        assert queue.stop().result() == ring.base


@pytest.mark.parametrize("base", [SIZE, 0x8000 | SIZE, SIZE << 16 | 1, 0x7FFF, 0xFFFF_FFFF])
def test_a_base_beyond_the_ring_is_refused(base: int) -> None:
    with Machine(features=PACKED) as machine:
        ring = PackedRing(machine.memory, SIZE)
        with pytest.raises(PeerError, match="packed ring of 8"):
            machine.prepare_queue(ring, base=base)


def test_a_base_with_more_in_flight_than_the_ring_has_is_refused() -> None:
    """The used index is one ahead of the avail index: a lap and all but one are missing."""
    with Machine(features=PACKED) as machine:
        ring = PackedRing(machine.memory, SIZE)
        with pytest.raises(PeerError, match="more in flight"):
            machine.prepare_queue(ring, base=ring.off_wrap(3) | ring.off_wrap(4) << 16)


@pytest.mark.parametrize(("area", "shift"), [("desc", 8), ("avail", 2), ("used", 2)])
def test_an_area_that_is_not_aligned_is_refused(area: str, shift: int) -> None:
    """§2.8.10.1: 16 for the descriptors, 4 for each event area."""
    with Machine(features=PACKED) as machine:
        ring = PackedRing(machine.memory, SIZE)
        setattr(ring, area, getattr(ring, area) + shift)
        with pytest.raises(PeerError, match="aligned"):
            machine.prepare_queue(ring)


def test_event_areas_may_lie_at_the_very_end_of_memory() -> None:
    """They have 4 bytes, not what a split ring of that size would need."""
    with Machine(features=PACKED) as machine:
        ring = PackedRing(machine.memory, 256)
        ring.avail = machine.memory.regions[0].end - 8
        ring.used = machine.memory.regions[0].end - 4
        ring.poke_event(ring.avail, 0, 0)
        disk = machine.add_queue(ring=ring)
        disk.flush()
        assert machine.queues[0].broken is None
