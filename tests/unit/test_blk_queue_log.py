"""A queue that marks what it writes: buffers, status bytes, and the ring itself if asked to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from drivebay.dataplane.dirty_log import DirtyLog
from tests.fakes.driver import BlkDriver, Kind, Pending
from tests.fakes.memory import PAGE, GuestMemory
from tests.fakes.ring import Segment
from tests.fakes.stepped import FEATURES, PACKED, Machine

LOG_BYTES = 1 << 18  # for 8 GiB: the fake guest's memory ends behind 4 GiB


@dataclass
class Scene:
    machine: Machine
    disk: BlkDriver
    log: DirtyLog
    fd: int

    def dirty(self) -> set[int]:
        """The marked pages; the front end clears them as it reads."""
        data = os.pread(self.fd, LOG_BYTES, 0)
        os.pwrite(self.fd, bytes(LOG_BYTES), 0)
        return {
            8 * at + bit
            for at, byte in enumerate(data)
            if byte
            for bit in range(8)
            if byte >> bit & 1
        }

    def set_log(self, rings: bool = False) -> None:
        self.machine.settle(self.machine.queues[0].set_log(self.log, rings))

    @property
    def memory(self) -> GuestMemory:
        return self.machine.memory

    def ring_pages(self) -> set[int]:
        """Of the areas that the device writes to."""
        ring = self.disk.any_ring
        if self.machine.features == PACKED:
            return pages(ring.desc, 16 * ring.size) | pages(ring.used, 4)
        return pages(ring.used, 6 + 8 * ring.size)


def pages(addr: int, length: int) -> set[int]:
    return set(range(addr // PAGE, (addr + length - 1) // PAGE + 1))


@pytest.fixture(params=[FEATURES, PACKED], ids=["split", "packed"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    fd = os.memfd_create("log")
    os.ftruncate(fd, LOG_BYTES)
    log = DirtyLog(fd, 0, LOG_BYTES)
    with Machine(features=request.param) as machine:
        machine.memory.allocate(PAGE, PAGE)
        disk = machine.add_queue(64)
        yield Scene(machine, disk, log, fd)
    log.release()
    os.close(fd)


def apart(scene: Scene, length: int) -> int:
    """Pages that nothing else lies in."""
    return scene.memory.allocate(-(-length // PAGE) * PAGE, PAGE)


def put(scene: Scene, kind: Kind, sector: int, data: Segment | None) -> tuple[Pending, int]:
    """A request whose parts lie in pages of their own; returns it and its status byte's page."""
    header, status = apart(scene, 16), apart(scene, 1)
    scene.memory.write(header, bytes([kind, 0, 0, 0, 0, 0, 0, 0]) + sector.to_bytes(8, "little"))
    parts = [Segment(header, 16, False), Segment(status, 1, True)]
    if data is not None:
        parts.insert(1, data)
    readable = [part for part in parts if not part.writable]
    pending = scene.disk.queue_chain(readable, [part for part in parts if part.writable])
    return pending, status // PAGE


def finish(scene: Scene, pending: Pending) -> None:
    scene.disk.publish()
    scene.disk.wait(pending)


def test_a_read_marks_its_buffer_and_its_status(scene: Scene) -> None:
    scene.set_log()
    data = apart(scene, 3 * PAGE)
    pending, status = put(scene, Kind.IN, 0, Segment(data + 512, 2 * PAGE, True))
    finish(scene, pending)
    assert scene.dirty() == pages(data + 512, 2 * PAGE) | {status}


def test_a_write_and_a_flush_mark_their_status_only(scene: Scene) -> None:
    scene.set_log()
    pending, status = put(scene, Kind.OUT, 0, Segment(apart(scene, 512), 512, False))
    flush, other = put(scene, Kind.FLUSH, 0, None)
    finish(scene, pending)
    finish(scene, flush)
    assert scene.dirty() == {status, other}


def test_a_failed_read_and_one_that_is_refused_at_once(scene: Scene) -> None:
    """The first may have written something before it failed; the second has not."""
    scene.set_log()
    data = apart(scene, 512)
    beyond, status = put(scene, Kind.IN, 1 << 40, Segment(data, 512, True))
    finish(scene, beyond)
    assert status in scene.dirty()
    odd, status = put(scene, Kind.IN, 0, Segment(data, 100, True))
    finish(scene, odd)
    assert scene.dirty() == {status}


def test_an_identity_marks_what_it_wrote(scene: Scene) -> None:
    scene.set_log()
    data = apart(scene, 2 * PAGE)
    pending, status = put(scene, Kind.GET_ID, 0, Segment(data + PAGE - 10, PAGE, True))
    finish(scene, pending)
    assert scene.dirty() == {data // PAGE, data // PAGE + 1, status}


def test_a_request_in_flight_is_marked_when_it_is_done(scene: Scene) -> None:
    """Also one that was taken before the log was there."""
    machine = scene.machine
    machine.settle(machine.channel.gate())
    data = apart(scene, 2 * PAGE)
    pending, status = put(scene, Kind.IN, 0, Segment(data, 2 * PAGE, True))
    scene.disk.publish()
    machine.step(3)
    scene.set_log()
    assert scene.dirty() == set()
    machine.settle(machine.channel.ungate())
    scene.disk.wait(pending)
    assert scene.dirty() == {data // PAGE, data // PAGE + 1, status}


def test_a_request_of_an_older_table_is_marked_by_that_table(scene: Scene) -> None:
    machine = scene.machine
    scene.set_log()
    machine.settle(machine.channel.gate())
    data = apart(scene, PAGE)
    pending, status = put(scene, Kind.IN, 0, Segment(data, PAGE, True))
    scene.disk.publish()
    machine.step(3)
    switched = machine.queues[0].set_table(machine.new_table())
    machine.settle(machine.channel.ungate())
    machine.settle(switched)
    scene.disk.wait(pending)
    assert scene.dirty() == {data // PAGE, status}


def test_rings_are_marked_if_asked_to(scene: Scene) -> None:
    scene.set_log(rings=True)
    pending, status = put(scene, Kind.FLUSH, 0, None)
    finish(scene, pending)
    assert scene.dirty() == scene.ring_pages() | {status}
    scene.machine.step(200)
    assert scene.machine.reactor.stats().queues_armed == 1
    assert scene.dirty() == scene.ring_pages(), "going to rest writes to the ring"


def test_the_end_of_a_log_is_the_end_of_marking(scene: Scene) -> None:
    scene.set_log(rings=True)
    scene.machine.settle(scene.machine.queues[0].set_log(None, True))
    scene.dirty()
    pending, _status = put(scene, Kind.GET_ID, 0, Segment(apart(scene, 20), 20, True))
    finish(scene, pending)
    assert scene.dirty() == set()


def test_a_log_may_be_set_before_the_start_and_after_the_end(scene: Scene) -> None:
    machine = scene.machine
    machine.stop_queue(0)
    assert machine.queues[0].set_log(scene.log, True).done
    ring = scene.disk.any_ring
    base = machine.queues[0].stop().result()
    queue = machine.prepare_queue(ring, base)
    assert queue.set_log(scene.log, False).done
    machine.settle(queue.set_enabled(True))
    machine.settle(queue.start(-1, -1, -1))
    pending, status = put(scene, Kind.FLUSH, 0, None)
    ring.publish()
    scene.disk.wait(pending)
    assert scene.dirty() == {status}
