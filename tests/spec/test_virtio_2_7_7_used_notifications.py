"""virtio 1.3 §2.7.7.2, used buffer notification suppression, device requirements.

Indexes wrap at 65,536; the wraps are enumerated. A batch is shown in one turn of the reactor,
and the notification follows in the next. Not checked here: that used.idx is stored once
per poll (only its notification can be counted from outside).
"""

from __future__ import annotations

import pytest

from tests.fakes.driver import F_INDIRECT, F_VERSION_1, Kind
from tests.fakes.ring import AVAIL_F_NO_INTERRUPT, need_event
from tests.fakes.stepped import Machine

STARTS = [0, 1, 100, 32767, 32768, 65532, 65533, 65534, 65535]
WITHOUT_EVENT_IDX = 1 << F_VERSION_1 | 1 << F_INDIRECT


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_notified_exactly_when_the_batch_steps_over_used_event(start: int, count: int) -> None:
    """The requirement: "If the idx field in the used ring … was equal to used_event, the device
    MUST send a notification"; ours sends none otherwise."""
    for distance in range(-3, count + 3):
        event = (start + distance) & 0xFFFF
        with Machine() as machine:
            disk = machine.add_queue(start=start)
            machine.ports[0].take_calls()
            disk.ring.poke_used_event(event)
            for _ in range(count):
                disk.queue(Kind.FLUSH)
            disk.publish()
            machine.step()
            end = (start + count) & 0xFFFF
            assert disk.ring.used_idx == end, "the batch was not finished in one turn"
            machine.step()
            calls = machine.ports[0].take_calls()
            assert calls == int(need_event(event, end, start)), f"used_event {event}"


def test_the_wish_is_renewed_over_a_whole_round_of_the_index() -> None:
    """A driver that always asks for the next one is always told, over the wrap."""
    with Machine() as machine:
        disk = machine.add_queue(64, start=60_000)
        port = machine.ports[0]
        for _ in range(1000):
            for _ in range(10):
                disk.queue(Kind.FLUSH)
            disk.publish()
            machine.step(2)
            assert port.take_calls() == 1
            assert len(disk.collect()) == 10
        assert disk.ring.used_idx == (60_000 + 10_000) & 0xFFFF


def test_with_event_idx_the_avail_flags_are_ignored() -> None:
    """The requirement: "The device MUST ignore the lower bit of flags"."""
    with Machine() as machine:
        disk = machine.add_queue()
        disk.ring.poke_avail_flags(AVAIL_F_NO_INTERRUPT)
        disk.queue(Kind.FLUSH)
        disk.publish()
        machine.step(5)
        assert machine.ports[0].take_calls() == 1


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("count", [1, 3])
def test_without_event_idx_flags_0_is_always_notified(start: int, count: int) -> None:
    """The requirement: "if flags is 0, the device MUST send a notification" - once for a batch."""
    with Machine(features=WITHOUT_EVENT_IDX) as machine:
        disk = machine.add_queue(start=start)
        for _ in range(count):
            disk.queue(Kind.FLUSH)
        disk.publish()
        machine.step(2)
        assert machine.ports[0].take_calls() == 1
        assert len(disk.collect()) == count


def test_without_event_idx_flags_1_is_not_notified_and_used_event_is_ignored() -> None:
    """The requirement: "The device MUST ignore the used_event value"; with flags 1 it "SHOULD
    NOT send a notification"."""
    with Machine(features=WITHOUT_EVENT_IDX) as machine:
        disk = machine.add_queue()
        disk.ring.poke_avail_flags(AVAIL_F_NO_INTERRUPT)
        disk.ring.poke_used_event(0)
        disk.queue(Kind.FLUSH)
        disk.publish()
        machine.step(5)
        assert len(disk.collect()) == 1
        assert machine.ports[0].take_calls() == 0


def test_a_queue_without_a_call_descriptor_completes_all_the_same() -> None:
    with Machine() as machine:
        disk = machine.add_queue()
        port = machine.ports[0]
        machine.settle(machine.queues[0].set_notifiers(port.kick_fd, -1, -1))
        disk.write(0, b"\x01" * 512)
        assert port.take_calls() == 0
        machine.settle(machine.queues[0].set_notifiers(port.kick_fd, port.call_fd, port.err_fd))
        disk.write(0, b"\x02" * 512)
        assert port.take_calls() > 0


def test_counters_count_requests_and_notifications() -> None:
    with Machine() as machine:
        disk = machine.add_queue()
        for _ in range(5):
            disk.queue(Kind.FLUSH)
        disk.publish()
        machine.step(2)
        counters = machine.queues[0].counters()
        assert counters.requests == 5
        assert counters.notifications == 1
        assert counters.inflight == 0
        assert counters.bad_requests == 0
