"""vhost-user, "Migration": what a queue marks of both kinds of ring, stepped by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from drivebay.dataplane.dirty_log import DirtyLog as MappedLog
from tests.fakes.dirty_log import DirtyLog, pages_of
from tests.fakes.driver import BlkDriver
from tests.fakes.memory import APART
from tests.fakes.stepped import FEATURES, PACKED, Machine

BOTH_RINGS = pytest.mark.parametrize("features", [FEATURES, PACKED], ids=["split", "packed"])
SIZE = 512  # so that a ring has more than a page


class Logged:
    """A queue with a log, whose ring lies below its buffers."""

    def __init__(self, machine: Machine, log: DirtyLog) -> None:
        self.machine = machine
        self.log = log
        self.driver: BlkDriver = machine.add_queue(SIZE)
        self.mapped = MappedLog(log.fd, 0, log.size)
        machine.memory.keep_below(APART[1].guest_addr)

    def switch(self, log: bool, rings: bool) -> None:
        (queue,) = self.machine.queues
        self.machine.settle(queue.set_log(self.mapped if log else None, rings))

    def ring_pages(self) -> set[int]:
        """The areas that the device writes."""
        ring = self.driver.any_ring
        if self.machine.features == PACKED:
            return pages_of([(ring.desc, 16 * SIZE), (ring.used, 4)])
        return pages_of([(ring.used, 6 + 8 * SIZE)])

    def marked_by_a_read(self) -> set[int]:
        """Of the pages below the buffers, those that one request marks."""
        self.log.take()
        self.driver.read(0, 8192)
        return {page for page in self.log.pages() if page < APART[1].guest_addr >> 12}


@contextmanager
def logged(features: int) -> Iterator[Logged]:
    with Machine(features=features) as machine, DirtyLog(machine.memory) as log:
        one = Logged(machine, log)
        yield one
        one.switch(False, False)
        one.mapped.release()


@BOTH_RINGS
def test_the_areas_that_the_device_writes_are_marked(features: int) -> None:
    with logged(features) as one:
        one.switch(True, True)
        assert one.marked_by_a_read() == one.ring_pages()


@BOTH_RINGS
def test_without_its_flag_no_ring_is_marked(features: int) -> None:
    with logged(features) as one:
        one.switch(True, False)
        assert one.marked_by_a_read() == set()
        assert one.log.pages()


@BOTH_RINGS
def test_without_a_log_the_flag_marks_nothing(features: int) -> None:
    with logged(features) as one:
        one.switch(False, True)
        assert one.marked_by_a_read() == set()
        assert not one.log.pages()


@BOTH_RINGS
def test_a_wish_for_kicks_is_marked_too(features: int) -> None:
    """The queue that goes to rest writes into the ring, with no request about."""
    with logged(features) as one:
        one.switch(True, True)
        one.driver.read(0, 512)
        one.log.take()
        one.machine.step(200)
        assert one.log.pages() == one.ring_pages()


@BOTH_RINGS
def test_a_switch_of_memory_leaves_the_log_as_it_is(features: int) -> None:
    with logged(features) as one:
        one.switch(True, True)
        one.machine.settle(one.machine.queues[0].set_table(one.machine.new_table()))
        assert one.marked_by_a_read() == one.ring_pages()
