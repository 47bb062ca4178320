"""vhost-user, "Ring states" and the messages that move a ring through them.

Against a real session on a real socket, with guest memory really mapped; the
queues are stand-ins that say what they were asked for. What a queue does then
is the data plane's own tests' business.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.descriptors import more_fds_than, open_fds
from tests.fakes.front_end import FrontEnd, HungUp, Refused, Request
from tests.fakes.memory import GuestMemory, Layout
from tests.unit.vhost_serving import (
    BIT_30,
    VERSION_1,
    Serving,
    negotiate,
    start_ring,
)


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    before = open_fds()
    with Serving(tmp_path, monkeypatch) as running:
        running.create()
        yield running
    assert not more_fds_than(before)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory() as guest:
        yield guest


def ready(serving: Serving, memory: GuestMemory, **more: int) -> FrontEnd:
    front = serving.connect()
    negotiate(front, **more)
    front.set_mem_table(memory)
    return front


def close(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)


def test_a_ring_starts_at_set_vring_kick_and_is_served_once_enabled(
    serving: Serving, memory: GuestMemory
) -> None:
    """ "[It] is initialized in a disabled state and is enabled by SET_VRING_ENABLE." """
    with ready(serving, memory) as front:
        fds = start_ring(front, memory, enable=False)
        (queue,) = serving.plane.queues
        assert queue.running
        assert queue.enabled is False
        front.set_vring_enable(0)
        assert queue.enabled is True
        front.set_vring_enable(0, False)
        assert queue.enabled is False
        assert queue.running
        close(fds)


def test_without_bit_30_rings_are_enabled_from_the_start(
    serving: Serving, memory: GuestMemory
) -> None:
    """ "If VHOST_USER_F_PROTOCOL_FEATURES has not been negotiated, the ring starts directly in
    the enabled state." """
    with serving.connect() as front:
        front.set_owner()
        front.set_features(VERSION_1)
        front.set_mem_table(memory)
        fds = start_ring(front, memory, index=3, enable=False)
        front.get_features()
        (queue,) = serving.plane.queues
        assert queue.running
        assert queue.enabled is True
        close(fds)


def test_set_features_never_disables_a_ring(serving: Serving, memory: GuestMemory) -> None:
    """A migration switches logging on and off with SET_FEATURES while rings run."""
    with ready(serving, memory) as front:
        fds = start_ring(front, memory)
        front.set_features(VERSION_1 | BIT_30)
        (queue,) = serving.plane.queues
        assert queue.enabled is True
        assert queue.running
        close(fds)


def test_enabling_is_remembered_while_a_ring_is_stopped(
    serving: Serving, memory: GuestMemory
) -> None:
    with ready(serving, memory) as front:
        fds = start_ring(front, memory)
        front.get_vring_base(0)
        more = start_ring(front, memory, enable=False)
        assert [queue.enabled for queue in serving.plane.queues] == [True, True]
        close(fds + more)


def test_set_vring_kick_on_a_running_ring_only_changes_the_descriptor(
    serving: Serving, memory: GuestMemory
) -> None:
    with ready(serving, memory) as front:
        fds = start_ring(front, memory)
        (queue,) = serving.plane.queues
        first = queue.fds["kick"]
        new = os.eventfd(0)
        front.set_vring_kick(0, new)
        assert len(serving.plane.queues) == 1
        assert queue.enabled is True
        assert queue.fds["kick"] != first
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(first)
        close((*fds, new))


def test_bit_8_starts_a_ring_that_is_polled(serving: Serving, memory: GuestMemory) -> None:
    """ "This signals that polling should be used instead of waiting for the kick." """
    with ready(serving, memory) as front:
        kick, call = start_ring(front, memory, index=1)
        front.set_vring_kick(1, None)
        front.set_vring_call(1, None)
        (queue,) = serving.plane.queues
        assert (queue.fds["kick"], queue.fds["call"]) == (-1, -1)
        close((kick, call))


def test_a_kick_before_the_addresses_starts_the_ring_when_they_come(
    serving: Serving, memory: GuestMemory
) -> None:
    with ready(serving, memory) as front:
        kick = os.eventfd(0)
        front.set_vring_kick(0, kick)
        assert not serving.plane.queues
        fds = start_ring(front, memory)
        assert len(serving.plane.queues) == 1
        assert serving.plane.queues[0].running
        close((kick, *fds))


def test_get_vring_base_stops_the_ring_and_tells_where(
    serving: Serving, memory: GuestMemory
) -> None:
    with ready(serving, memory) as front:
        fds = start_ring(front, memory, base=65530)
        (queue,) = serving.plane.queues
        assert queue.terms["base"] == 65530
        queue.stop_at = 7  # it ran on, and wrapped
        assert front.get_vring_base(0) == 7
        assert not queue.running
        close(fds)


def test_get_vring_base_never_resets_the_index(serving: Serving, memory: GuestMemory) -> None:
    """Asked again, and started again without SET_VRING_BASE, the ring is where it was."""
    with ready(serving, memory) as front:
        fds = start_ring(front, memory, base=100)
        serving.plane.queues[0].stop_at = 123
        assert front.get_vring_base(0) == 123
        assert front.get_vring_base(0) == 123
        front.set_vring_kick(0, fds[0])
        assert serving.plane.queues[1].terms["base"] == 123
        close(fds)


def test_get_vring_base_of_a_ring_that_never_ran(serving: Serving, memory: GuestMemory) -> None:
    with ready(serving, memory) as front:
        front.set_vring_base(9, 77)
        assert front.get_vring_base(9) == 77
        assert front.get_vring_base(10) == 0


def test_stopping_one_ring_leaves_the_others_running(serving: Serving, memory: GuestMemory) -> None:
    with ready(serving, memory) as front:
        fds = start_ring(front, memory, 0) + start_ring(front, memory, 1)
        front.get_vring_base(0)
        assert [queue.running for queue in serving.plane.queues] == [False, True]
        close(fds)


def test_get_vring_base_answers_only_when_nothing_is_in_flight(
    serving: Serving, memory: GuestMemory
) -> None:
    with ready(serving, memory) as front, serving.connect() as other:
        fds = start_ring(front, memory)
        serving.plane.hold = {"stop"}
        front.send(Request.GET_VRING_BASE, bytes(8))
        serving.plane.wait_for(lambda plane: bool(plane.held))
        negotiate(other)  # this session alone waits
        front.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            front.socket.recv(1)
        front.socket.settimeout(20)
        serving.call(serving.plane.release)
        assert front.receive().request == Request.GET_VRING_BASE
        close(fds)


@pytest.mark.parametrize("size", [0, 3, 2048, 1 << 31])
def test_ring_sizes_that_are_refused(serving: Serving, memory: GuestMemory, size: int) -> None:
    """virtio 1.3 §2.7: "Queue Size [is] always a power of 2"; here at most 1,024."""
    with ready(serving, memory) as front, pytest.raises(Refused):
        front.set_vring_num(0, size)


@pytest.mark.parametrize("request_", [Request.SET_VRING_NUM, Request.SET_VRING_BASE])
def test_size_and_base_of_a_started_ring_stand(
    serving: Serving, memory: GuestMemory, request_: Request
) -> None:
    with ready(serving, memory) as front:
        fds = start_ring(front, memory)
        with pytest.raises(Refused):
            front._vring_state(request_, 0, 32)
        close(fds)


def test_a_started_ring_may_hear_its_own_addresses_again(
    serving: Serving, memory: GuestMemory
) -> None:
    """Switching the dirty log on or off repeats SET_VRING_ADDR."""
    with ready(serving, memory) as front:
        where = [
            memory.user_addr(memory.allocate(size, 4096, one_region=True))
            for size in (1024, 134, 518)
        ]
        kick = os.eventfd(0)
        front.set_vring_num(0, 64)
        front.set_vring_addr(0, *where)
        front.set_vring_kick(0, kick)
        front.set_vring_addr(0, *where)
        where[0] += 4096
        with pytest.raises(Refused):
            front.set_vring_addr(0, *where)
        os.close(kick)


def test_a_ring_without_memory_is_refused(serving: Serving, memory: GuestMemory) -> None:
    with serving.connect() as front:
        negotiate(front)
        with pytest.raises(Refused):
            start_ring(front, memory)


def test_a_ring_outside_memory_is_refused(serving: Serving, memory: GuestMemory) -> None:
    kick = os.eventfd(0)
    with ready(serving, memory) as front:
        front.set_vring_num(0, 64)
        region = memory.regions[0]
        end = region.user_addr + region.size
        front.set_vring_addr(0, end - 1024, end - 134, end - 517)  # the used ring is a byte out
        with pytest.raises(Refused):
            front.set_vring_kick(0, kick)
    os.close(kick)


def test_a_driver_without_version_1_is_refused_when_its_ring_starts(
    serving: Serving, memory: GuestMemory
) -> None:
    with serving.connect() as front:
        negotiate(front)
        front.set_features(BIT_30)
        front.set_mem_table(memory)
        with pytest.raises(Refused):
            start_ring(front, memory)


def test_set_mem_table_while_running_switches_the_queues(
    serving: Serving, memory: GuestMemory
) -> None:
    """Memory hot-plug: the table comes anew, with the old regions and one more."""
    with ready(serving, memory) as front, GuestMemory([Layout(1 << 40, 1 << 21)]) as plugged:
        fds = start_ring(front, memory)
        (queue,) = serving.plane.queues
        before = queue.table
        plugged.regions[0].user_addr = 0x6F00_0000_0000
        front.set_mem_table([*memory.regions, *plugged.regions])
        assert queue.table is not before
        assert queue.calls[-1] == "set_table"
        assert queue.running
        assert len(queue.table.regions) == 3
        close(fds)


def test_a_ring_whose_memory_goes_away_goes_on_when_it_is_back(
    serving: Serving, memory: GuestMemory
) -> None:
    """QEMU replaces a region that changed by removing it and adding it."""
    with ready(serving, memory) as front:
        fds = start_ring(front, memory)
        serving.plane.queues[0].stop_at = 55
        front.rem_mem_reg(memory.regions[0])
        assert not serving.plane.queues[0].running
        front.add_mem_reg(memory.regions[0])
        assert serving.plane.queues[1].running
        assert serving.plane.queues[1].enabled is True
        assert serving.plane.queues[1].terms["base"] == 55
        close(fds)


def test_rem_mem_reg_answers_only_when_the_memory_is_used_no_more(
    serving: Serving, memory: GuestMemory
) -> None:
    with ready(serving, memory) as front:
        fds = start_ring(front, memory)
        serving.plane.hold = {"set_table"}
        front.send(Request.REM_MEM_REG, bytes(8) + _region(memory, 1), flags=1 | 8)
        serving.plane.wait_for(lambda plane: bool(plane.held))
        front.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            front.socket.recv(1)
        front.socket.settimeout(20)
        serving.call(serving.plane.release)
        assert front.receive().payload == bytes(8)
        close(fds)


def _region(memory: GuestMemory, number: int) -> bytes:
    region = memory.regions[number]
    fields = (region.guest_addr, region.size, region.user_addr, region.mmap_offset)
    return b"".join(field.to_bytes(8, "little") for field in fields)


def test_rem_mem_reg_may_bring_a_descriptor_and_must_match(
    serving: Serving, memory: GuestMemory
) -> None:
    """ "Close it unused. Regions match by guest address, user address and size." """
    with ready(serving, memory) as front:
        payload = bytes(8) + _region(memory, 1)
        front.tell(Request.REM_MEM_REG, payload, [memory.regions[1].fd])
        (session,) = serving.controllers.get("vhost.0").sessions
        assert session.surplus_fds == 1
        with pytest.raises(Refused):  # it is gone already
            front.tell(Request.REM_MEM_REG, payload)


def test_get_max_mem_slots_is_the_limit(serving: Serving) -> None:
    with serving.connect() as front:
        negotiate(front)
        slots = front.get_max_mem_slots()
        assert slots == 32
        layouts = [Layout(i << 24, 4096) for i in range(slots + 1)]
        with GuestMemory(layouts) as many:
            for region in many.regions[:slots]:
                front.add_mem_reg(region)
            with pytest.raises(Refused):
                front.add_mem_reg(many.regions[slots])


def test_reset_device_disables_all_rings_and_keeps_the_memory(
    serving: Serving, memory: GuestMemory
) -> None:
    """ "Disable all rings and reset all internal device state to the initial state." """
    with ready(serving, memory) as front:
        fds = start_ring(front, memory, 0) + start_ring(front, memory, 1)
        front.set_status(7)
        front.reset_device()
        assert not any(queue.running for queue in serving.plane.queues)
        assert front.get_status() == 0
        assert front.get_vring_base(0) == 0
        front.set_features(VERSION_1 | BIT_30)
        more = start_ring(front, memory, 0, enable=False)
        assert serving.plane.queues[-1].running
        assert serving.plane.queues[-1].enabled is False
        close(fds + more)


def test_status_0_stops_the_rings_and_forgets_no_index(
    serving: Serving, memory: GuestMemory
) -> None:
    """QEMU sends it before GET_VRING_BASE even when the guest is only paused."""
    with ready(serving, memory) as front:
        fds = start_ring(front, memory)
        serving.plane.queues[0].stop_at = 1234
        front.set_status(0)
        assert not serving.plane.queues[0].running
        front.set_vring_enable(0, False)
        assert front.get_vring_base(0) == 1234
        front.set_features(VERSION_1 | BIT_30)
        front.set_vring_base(0, 1234)
        front.set_vring_kick(0, fds[0])
        front.set_vring_enable(0)
        assert serving.plane.queues[1].terms["base"] == 1234
        close(fds)


def test_after_a_reset_a_ring_needs_new_features(serving: Serving, memory: GuestMemory) -> None:
    with ready(serving, memory) as front:
        fds = start_ring(front, memory)
        front.reset_device()
        with pytest.raises(Refused):
            front.set_vring_kick(0, fds[0])
        close(fds)


def test_reset_owner_is_ignored(serving: Serving, memory: GuestMemory) -> None:
    """ "It is recommended that back-ends either ignore this message, or [...]" """
    with ready(serving, memory) as front:
        fds = start_ring(front, memory)
        front.reset_owner()
        assert serving.plane.queues[0].running
        assert serving.plane.queues[0].enabled is True
        close(fds)


def test_a_hang_up_is_noticed_while_a_queue_drains(serving: Serving, memory: GuestMemory) -> None:
    controller = serving.controllers.get("vhost.0")
    front = ready(serving, memory)
    fds = start_ring(front, memory)
    serving.plane.hold = {"stop"}
    front.send(Request.GET_VRING_BASE, bytes(8))
    serving.plane.wait_for(lambda plane: bool(plane.held))
    front.close()
    serving.until(lambda: controller.describe().get("lingering") == 1)
    assert serving.call(controller.describe)["sessions"] == []
    serving.call(serving.plane.release)
    serving.until_empty()
    assert "lingering" not in serving.call(controller.describe)
    assert serving.registry.channels == []
    close(fds)


def test_descriptors_and_memory_outlive_the_session_until_its_queues_are_drained(
    serving: Serving, memory: GuestMemory
) -> None:
    from drivebay.memory.guest_memory import mapped_regions

    before = mapped_regions()
    front = ready(serving, memory)
    fds = start_ring(front, memory)
    (queue,) = serving.plane.queues
    serving.plane.hold = {"stop"}
    front.close()
    serving.plane.wait_for(lambda plane: bool(plane.held))
    os.fstat(queue.fds["kick"])
    assert mapped_regions() == before + 2
    serving.call(serving.plane.release)
    serving.until_empty()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(queue.fds["kick"])
    assert mapped_regions() == before
    close(fds)


def test_a_broken_ring_is_logged_once_and_shown_in_the_status(
    serving: Serving, memory: GuestMemory, caplog: pytest.LogCaptureFixture
) -> None:
    with ready(serving, memory) as front:
        fds = start_ring(front, memory, 2)
        err = os.eventfd(0)
        front.set_vring_err(2, err)
        (queue,) = serving.plane.queues
        serving.call(queue.break_ring, "the avail ring names descriptor 99")
        assert queue.fds["err"] >= 0
        (sentence,) = [text for text in caplog.messages if "given up" in text]
        for word in ("vhost.0", "vhost.0s0", "queue 2", "descriptor 99"):
            assert word in sentence
        assert front.get_status() & 0x40  # DEVICE_NEEDS_RESET
        close((*fds, err))


def test_a_kick_before_set_features_ends_the_session(
    serving: Serving, memory: GuestMemory, caplog: pytest.LogCaptureFixture
) -> None:
    kick = os.eventfd(0)
    with serving.connect() as front:
        front.set_vring_kick(0, kick)
        with pytest.raises(HungUp):
            front.get_features()
    serving.until_empty()
    assert "SET_VRING_KICK (12) came in state 'negotiating'" in caplog.text
    os.close(kick)
