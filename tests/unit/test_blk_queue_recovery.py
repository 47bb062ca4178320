"""A queue with an inflight region: what one target left undone, the next one does, once.

The first queue's channel is gated for ever, which is how a dead target looks to its ring; the
second queue is bound to the same ring and region.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from drivebay.dataplane.inflight import InflightRegion, inflight_queue_bytes
from drivebay.errors import PeerError
from tests.fakes.driver import F_RING_PACKED, BlkDriver, Completion, Framing, Kind, Pending, Status
from tests.fakes.stepped import FEATURES, PACKED, Machine

SIZE = 32
STARTS = [0, 1, 17, 29, 31, 45, 61, 63, 65530]
ONE = Framing(indirect=True)  # a request in one descriptor of the ring


@dataclass
class Scene:
    """A machine, and the region that a front end keeps for its only ring."""

    machine: Machine
    region: InflightRegion
    fd: int
    packed: bool

    def start(self, start: int = 0) -> BlkDriver:
        return self.machine.add_queue(SIZE, start=start, inflight=self.region.queue(0))

    def die(self) -> None:
        """What is in flight never comes back, and nothing more is taken."""
        self.machine.gate_forever()

    def succeed(self, disk: BlkDriver) -> None:
        """The next target; SET_VRING_BASE says what it said to the first one."""
        self.machine.add_queue(ring=disk.any_ring, inflight=self.region.queue(0))

    def stop(self) -> int:
        return self.machine.stop_queue(len(self.machine.queues) - 1)

    def where(self, disk: BlkDriver) -> int:
        """The base of a drained ring."""
        if self.packed:
            return disk.packed.off_wrap(disk.packed.position) * 0x10001
        return disk.ring.avail_idx


@pytest.fixture(params=[FEATURES, PACKED], ids=["split", "packed"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    packed = bool(request.param >> F_RING_PACKED & 1)
    size = inflight_queue_bytes(SIZE, packed)
    fd = os.memfd_create("inflight")
    os.ftruncate(fd, size)
    region = InflightRegion(
        fd=fd, mmap_size=size, mmap_offset=0, num_queues=1, queue_size=SIZE, packed=packed
    )
    with Machine(features=request.param) as machine:
        yield Scene(machine, region, fd, packed)
    region.release()
    os.close(fd)


def leave_undone(scene: Scene, disk: BlkDriver) -> list[Pending]:
    """Requests in flight, with answered ones between them; then the target dies."""
    machine = scene.machine
    for n in range(3):
        disk.write(n, bytes([n + 1]) * 512)
    scene.die()
    held = [disk.queue(Kind.IN, 0, room=512)]
    held.append(disk.queue(Kind.OUT, 5, b"\x55" * 512, framing=ONE))
    early = [disk.queue(Kind.GET_ID, room=20, framing=ONE) for _ in range(2)]
    held.append(disk.queue(Kind.IN, 1, room=512, framing=ONE))
    disk.publish()
    machine.step(3)
    assert machine.queues[-1].counters().inflight == 3
    assert disk.collect() == early
    machine.settle(machine.queues[-1].set_enabled(False))
    return held


@pytest.mark.parametrize("start", STARTS)
def test_what_was_in_flight_is_done_once_and_in_order_before_what_came_later(
    scene: Scene, start: int
) -> None:
    disk = scene.start(start)
    held = leave_undone(scene, disk)
    later = disk.queue(Kind.IN, 5, room=512, framing=ONE)
    disk.publish()
    scene.succeed(disk)
    scene.machine.step(5)
    assert disk.collect() == [*held, later]
    assert held[0].completion == Completion(Status.OK, 513, b"\x01" * 512)
    assert held[2].completion == Completion(Status.OK, 513, b"\x02" * 512)
    assert later.completion == Completion(Status.OK, 513, b"\x55" * 512)
    assert scene.machine.queues[-1].counters().requests == 4
    disk.write(9, b"\x09" * 512)
    assert disk.read(9, 512) == b"\x09" * 512
    assert scene.stop() == scene.where(disk)


@pytest.mark.parametrize("start", [1, 45, 1000, 65530])
def test_spdk_3766_the_first_request_of_a_new_region_on_a_ring_that_is_not_new(
    scene: Scene, start: int
) -> None:
    """The region must know where the ring stands: if it began with 0, the first request would
    pass for one of a batch whose end was not noted, and nobody would do it again."""
    disk = scene.start(start)
    scene.die()
    held = disk.queue(Kind.IN, 0, room=512)
    disk.publish()
    scene.machine.step(3)
    assert scene.machine.queues[-1].counters().inflight == 1
    scene.machine.settle(scene.machine.queues[-1].set_enabled(False))
    scene.succeed(disk)
    scene.machine.step(5)
    assert disk.collect() == [held]
    assert held.completion == Completion(Status.OK, 513, bytes(512))


@pytest.mark.parametrize("start", STARTS)
def test_nothing_was_in_flight(scene: Scene, start: int) -> None:
    disk = scene.start(start)
    for _ in range(5):
        disk.flush()
    assert scene.stop() == scene.where(disk)
    scene.succeed(disk)
    disk.flush()
    assert scene.machine.queues[-1].counters().requests == 1
    assert scene.stop() == scene.where(disk)


def test_a_second_death_before_anything_was_answered(scene: Scene) -> None:
    """The second target's requests are all the first one's, and still the third one's."""
    disk = scene.start(61)
    held = leave_undone(scene, disk)
    scene.die()
    scene.succeed(disk)
    # Its channel is gated too, so that it dies with the same requests in flight.
    scene.machine.settle(scene.machine.channel.gate())
    scene.machine.step(5)
    scene.machine.gate_forever()
    scene.machine.settle(scene.machine.queues[-1].set_enabled(False))
    scene.succeed(disk)
    scene.machine.step(5)
    assert [pending for pending in disk.collect() if pending in held] == held


def test_many_laps_leave_no_marks(scene: Scene) -> None:
    """In all orders of completion, the region is empty when the ring is."""
    machine = scene.machine
    disk = scene.start(20)
    for turn in range(40):
        machine.settle(machine.channel.gate())
        held = [disk.queue(Kind.IN, 0, room=512) for _ in range(1 + turn % 3)]
        early = [disk.queue(Kind.GET_ID, room=20) for _ in range(turn % 4)]
        disk.publish()
        machine.step(2)
        assert disk.collect() == early
        machine.settle(machine.channel.ungate())
        machine.step(2)
        assert disk.collect() == held
    marks = marked(scene)
    assert not marks, f"entries {marks} are still marked"
    scene.stop()
    scene.succeed(disk)
    machine.step(5)
    assert machine.queues[-1].counters().requests == 0


def marked(scene: Scene) -> list[int]:
    head, entry = (32, 32) if scene.packed else (16, 16)
    data = os.pread(scene.fd, head + SIZE * entry, 0)
    return [at for at in range(SIZE) if data[head + at * entry]]


def test_each_chain_is_marked_while_it_is_in_flight(scene: Scene) -> None:
    disk = scene.start()
    leave_undone(scene, disk)
    assert len(marked(scene)) == 3


def test_a_stop_drains_what_an_earlier_target_left(scene: Scene) -> None:
    """GET_VRING_BASE in the very turn of the start: the ring stands where all is answered."""
    disk = scene.start()
    held = leave_undone(scene, disk)
    machine = scene.machine
    queue = machine.prepare_queue(disk.any_ring, inflight=scene.region.queue(0))
    queue.set_enabled(True)
    started = queue.start(-1, -1, -1)
    stopped = queue.stop()
    assert machine.settle(started) == 0
    assert machine.settle(stopped) == scene.where(disk)
    assert disk.collect() == held


def test_a_disabled_queue_submits_nothing_again_and_stops_at_once(scene: Scene) -> None:
    disk = scene.start()
    leave_undone(scene, disk)
    machine = scene.machine
    queue = machine.prepare_queue(disk.any_ring, inflight=scene.region.queue(0))
    machine.settle(queue.start(-1, -1, -1))
    machine.step(5)
    machine.settle(queue.stop())
    assert not disk.collect()
    assert len(marked(scene)) == 3


def test_a_queue_enabled_later_submits_again_then(scene: Scene) -> None:
    disk = scene.start()
    held = leave_undone(scene, disk)
    machine = scene.machine
    queue = machine.prepare_queue(disk.any_ring, inflight=scene.region.queue(0))
    machine.settle(queue.start(-1, -1, -1))
    machine.step(200)
    machine.settle(queue.set_enabled(True))
    machine.step(5)
    assert disk.collect() == held


def test_more_than_a_poll_takes_is_submitted_again_before_what_is_new(scene: Scene) -> None:
    disk = scene.start(7)
    scene.die()
    held = [disk.queue(Kind.IN, n, room=512, framing=ONE) for n in range(SIZE - 1)]
    disk.publish()
    scene.machine.step(3)
    scene.machine.settle(scene.machine.queues[-1].set_enabled(False))
    new = disk.queue(Kind.FLUSH, framing=ONE)
    disk.publish()
    scene.succeed(disk)
    scene.machine.step(9)
    assert disk.collect() == [*held, new]


def test_a_kept_chain_that_leads_out_of_memory_gives_the_queue_up(scene: Scene) -> None:
    """The region is the front end's, the table the guest's: both are checked as ever."""
    disk = scene.start()
    held = leave_undone(scene, disk)
    if scene.packed:
        os.pwrite(scene.fd, struct.pack("<Q", 0xDEAD_0000_0000), 32 + 32 * entry_of(scene) + 24)
    else:
        disk.ring.poke_desc(held[0].head, 0xDEAD_0000_0000, 16)
    scene.succeed(disk)
    scene.machine.step(5)
    assert "outside the memory table" in (scene.machine.queues[-1].broken or "")
    scene.stop()


def entry_of(scene: Scene) -> int:
    """The marked entry whose counter is the lowest."""
    data = os.pread(scene.fd, 32 + 32 * SIZE, 0)
    return min(marked(scene), key=lambda at: struct.unpack_from("<Q", data, 32 + 32 * at + 8))


@pytest.mark.parametrize("scene", [PACKED], indirect=True, ids=["packed"])
def test_a_region_without_room_gives_the_queue_up(scene: Scene) -> None:
    """Its free list is damaged while requests run; the region is not touched any more.

    A split chain's entry is its head, which was checked.
    """
    disk = scene.start()
    os.pwrite(scene.fd, b"\xff" * (32 * SIZE), 32)
    disk.queue(Kind.FLUSH)
    disk.publish()
    disk.queue(Kind.FLUSH)
    disk.publish()
    scene.machine.step(5)
    assert "inflight region" in (scene.machine.queues[-1].broken or "")
    scene.stop()


def test_nonsense_is_refused_with_a_sentence(scene: Scene) -> None:
    disk = scene.start()
    leave_undone(scene, disk)
    os.pwrite(scene.fd, b"\xff" * 8, 8)
    with pytest.raises(PeerError, match="inflight region"):
        scene.machine.prepare_queue(disk.any_ring, inflight=scene.region.queue(0))
