"""The driver's virtqueue, looked at from the device's side."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from drivebay.engines.vhost_user_memory import GUEST_BASE, DriverMemory, QueueLayout
from drivebay.engines.vhost_user_queue import DriverQueue
from drivebay.errors import PeerError, StateError, UsageError
from tests.fakes.device import FLUSH, IN, OUT, Buffer, Device, eventfd
from tests.fakes.packed_device import PackedDevice

SLOTS, SLOT_BYTES, SEGMENT = 8, 8192, 4096
RINGS = {
    "split": {},
    "packed": {"packed": True},
    "indirect": {"packed": True, "indirect": True},
}


class Pair:
    """A driver's queue and the device at its other end."""

    def __init__(self, event_idx: bool, ring: str = "split") -> None:
        self.memory = DriverMemory(1 << 20)
        self.packed = ring != "split"
        self.layout = QueueLayout.plan(0, SLOTS, SLOT_BYTES, SEGMENT, **RINGS[ring])
        self.kick, self.call = eventfd(), eventfd()
        self.queue = DriverQueue(
            self.memory.map, self.layout, GUEST_BASE, event_idx, self.kick, self.call
        )
        layout = self.layout
        self.device = (PackedDevice if self.packed else Device)(
            self.memory.map,
            GUEST_BASE,
            layout.size,
            layout.desc,
            layout.avail,
            layout.used,
            bytearray(1 << 20),
        )

    def close(self) -> None:
        os.close(self.kick)
        os.close(self.call)
        self.memory.close()

    def kicked(self) -> bool:
        try:
            return os.eventfd_read(self.kick) > 0
        except BlockingIOError:
            return False

    def set_avail_event(self, value: int) -> None:
        self.device.set_u16(self.layout.used + 4 + 8 * self.layout.size, value)

    def used_event(self) -> int:
        return self.device.u16(self.layout.avail + 4 + 2 * self.layout.size)


@pytest.fixture(params=RINGS)
def ring(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["flags", "event_idx"])
def pair(request: pytest.FixtureRequest, ring: str) -> Iterator[Pair]:
    pair = Pair(request.param, ring)
    yield pair
    pair.close()


@pytest.fixture
def flags() -> Iterator[Pair]:
    pair = Pair(event_idx=False)
    yield pair
    pair.close()


@pytest.fixture
def events() -> Iterator[Pair]:
    pair = Pair(event_idx=True)
    yield pair
    pair.close()


@pytest.fixture(params=["packed", "indirect"])
def packed(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(event_idx=True, ring=request.param)
    yield pair
    pair.close()


def test_the_parts_of_a_queue_do_not_overlap(ring: str) -> None:
    layout = QueueLayout.plan(100, 32, 4096, 1 << 20, **RINGS[ring])
    areas = (4, 4) if layout.packed else (6 + 2 * layout.size, 6 + 8 * layout.size)
    parts = [
        (layout.desc, 16 * layout.size),
        (layout.avail, areas[0]),
        (layout.used, areas[1]),
        *([(layout.chains, 16 * 32 << layout.chain_shift)] if layout.packed else []),
        (layout.headers, 16 * 32),
        (layout.statuses, 32),
        (layout.data, 32 * 4096),
    ]
    for (start, length), (following, _) in zip(parts, [*parts[1:], (layout.end, 0)], strict=True):
        assert start + length <= following
    assert layout.desc % 16 == layout.avail % 2 == layout.used % 4 == layout.data % 4096 == 0


def test_a_depth_that_needs_too_long_a_ring_is_refused() -> None:
    assert QueueLayout.plan(0, 256, 4096, 4096).size == 1024
    with pytest.raises(UsageError, match="ring of 2048"):
        QueueLayout.plan(0, 257, 4096, 4096)


def test_a_request_never_needs_more_descriptors_than_its_chain_has() -> None:
    layout = QueueLayout.plan(0, 2, 3 * 512, 512)
    memory = DriverMemory(layout.end)
    kick = eventfd()
    queue = DriverQueue(memory.map, layout, GUEST_BASE, False, kick, kick)
    assert len(queue.data(0)) == 3 * 512
    queue.put(0, IN, 0, 3 * 512)
    with pytest.raises(UsageError, match="do not fit a slot of 1536"):
        queue.put(1, IN, 0, 4 * 512)
    os.close(kick)
    memory.close()


def test_a_read_is_header_data_status(pair: Pair) -> None:
    pair.queue.put(3, IN, 40, SLOT_BYTES)
    assert pair.device.waiting() == []
    pair.queue.publish()
    (head,) = pair.device.waiting()
    header, first, second, status = pair.device.chain(head)
    assert (header.length, header.writable) == (16, False)
    data = pair.layout.data + 3 * pair.layout.data_stride
    assert first == Buffer(data, SEGMENT, True)
    assert second == Buffer(data + SEGMENT, SEGMENT, True)
    assert (status.length, status.writable) == (1, True)


def test_a_chain_changes_its_shape_with_the_request(pair: Pair) -> None:
    shapes = [(IN, 512), (OUT, 512), (FLUSH, 0), (OUT, 8192), (IN, 8192), (FLUSH, 0), (IN, 512)]
    for kind, length in shapes:
        pair.queue.put(0, kind, 0, length)
        pair.queue.publish()
        (head,) = pair.device.waiting()
        _, *data, status = pair.device.chain(head)
        assert sum(buffer.length for buffer in data) == length
        assert all(buffer.writable == (kind == IN) for buffer in data)
        assert status.writable
        pair.device.complete(head)
        assert pair.queue.take() is not None


def test_data_go_there_and_back_past_the_wrap_of_the_index(pair: Pair) -> None:
    turns = 1_540 if pair.packed else 65_540  # its index wraps with the ring
    for turn in range(turns):
        slot = turn % SLOTS
        if turn % 500 == 0:
            pair.queue.data(slot)[:512] = turn.to_bytes(2, "little") * 256
            pair.queue.put(slot, OUT, turn % 100, 512)
        else:
            pair.queue.put(slot, FLUSH, 0, 0)
        pair.queue.publish()
        assert pair.device.serve() == 1
        assert pair.queue.take() == (slot, 0, 1)
    pair.queue.put(0, IN, 0, 512)
    pair.queue.publish()
    pair.device.serve()
    assert pair.queue.take() == (0, 0, 1)
    assert bytes(pair.queue.data(0)[:512]) == (turns // 500 * 500).to_bytes(2, "little") * 256


def test_completions_may_come_in_any_order(pair: Pair) -> None:
    for slot in range(SLOTS):
        pair.queue.put(slot, FLUSH, 0, 0)
    pair.queue.publish()
    for head in reversed(pair.device.waiting()):
        pair.device.complete(head)
    taken = [pair.queue.take() for _ in range(SLOTS)]
    assert [found and found[0] for found in taken] == list(reversed(range(SLOTS)))
    assert pair.queue.take() is None


def test_a_status_that_nobody_wrote_is_told(pair: Pair) -> None:
    pair.queue.put(0, FLUSH, 0, 0)
    pair.queue.publish()
    pair.device.complete(pair.device.waiting()[0])
    assert pair.queue.take() == (0, 0xFF, 0)


@pytest.mark.parametrize("wrong", [1, SLOTS << 3, 0xFFFF, 1 << 3])
def test_a_head_that_is_not_in_flight_is_an_error(pair: Pair, wrong: int) -> None:
    pair.queue.put(0, FLUSH, 0, 0)
    pair.queue.publish()
    pair.device.complete(wrong)
    with pytest.raises(PeerError, match=str(wrong)):
        pair.queue.take()


def test_a_head_that_comes_twice_is_an_error(pair: Pair) -> None:
    pair.queue.put(0, FLUSH, 0, 0)
    pair.queue.publish()
    (head,) = pair.device.waiting()
    pair.device.complete(head)
    pair.device.complete(head)
    assert pair.queue.take() is not None
    with pytest.raises(PeerError):
        pair.queue.take()


def test_a_slot_is_used_once_at_a_time(pair: Pair) -> None:
    pair.queue.put(0, FLUSH, 0, 0)
    with pytest.raises(StateError, match="in flight"):
        pair.queue.put(0, FLUSH, 0, 0)
    with pytest.raises(UsageError, match="slot 8"):
        pair.queue.put(SLOTS, FLUSH, 0, 0)
    with pytest.raises(UsageError, match="8193"):
        pair.queue.put(1, IN, 0, SLOT_BYTES + 1)


def test_one_kick_for_a_batch_and_none_without_news(pair: Pair) -> None:
    for slot in range(4):
        pair.queue.put(slot, FLUSH, 0, 0)
    pair.queue.publish()
    assert os.eventfd_read(pair.kick) == 1
    pair.queue.publish()
    assert not pair.kicked()
    assert pair.queue.kicks == 1


def test_virtio13_2_7_10_flags_say_whether_to_kick(flags: Pair) -> None:
    flags.device.set_u16(flags.layout.used, 1)
    flags.queue.put(0, FLUSH, 0, 0)
    flags.queue.publish()
    assert not flags.kicked()
    flags.device.set_u16(flags.layout.used, 0)
    flags.queue.put(1, FLUSH, 0, 0)
    flags.queue.publish()
    assert flags.kicked()


def test_virtio13_2_7_10_with_event_idx_flags_are_ignored(events: Pair) -> None:
    events.device.set_u16(events.layout.used, 1)
    events.queue.put(0, FLUSH, 0, 0)
    events.queue.publish()
    assert events.kicked()


def test_virtio13_2_7_10_avail_event_says_when_to_kick(events: Pair) -> None:
    events.set_avail_event(2)
    for slot in range(2):
        events.queue.put(slot, FLUSH, 0, 0)
        events.queue.publish()
        assert not events.kicked()
    events.queue.put(2, FLUSH, 0, 0)
    events.queue.publish()
    assert events.kicked()


def test_calls_are_asked_for_only_when_somebody_waits(flags: Pair) -> None:
    assert flags.device.u16(flags.layout.avail) == 1
    assert not flags.queue.arm()
    assert flags.device.u16(flags.layout.avail) == 0
    flags.queue.silence()
    assert flags.device.u16(flags.layout.avail) == 1


def test_used_event_is_the_next_completion_when_somebody_waits(events: Pair) -> None:
    assert events.used_event() == 0xFFFF
    events.queue.put(0, FLUSH, 0, 0)
    events.queue.publish()
    assert not events.queue.arm()
    assert events.used_event() == 0
    events.device.serve()
    assert events.queue.arm(), "a completion that came before arming must be seen"


# --- packed rings


def test_virtio13_2_8_1_the_wrap_counter_changes_at_the_rings_end(packed: Pair) -> None:
    """A ring of 128 is passed many times, by chains that end anywhere in it."""
    for turn in range(1000):
        lengths = [512 * (1 + (turn + slot) % 16) for slot in range(3)]
        for slot, length in enumerate(lengths):
            packed.queue.put(slot, IN, turn, length)
        packed.queue.publish()
        ids = packed.device.waiting()
        assert ids == [0, 1, 2]
        for one, length in zip(ids, lengths, strict=True):
            assert sum(part.length for part in packed.device.chain(one)[1:-1]) == length
        for one in reversed(ids):
            packed.device.complete(one, turn)
        assert [packed.queue.take() for _ in range(4)] == [
            *((one, 0xFF, turn) for one in reversed(ids)),
            None,
        ]


def test_virtio13_2_8_a_batch_is_shown_at_once(packed: Pair) -> None:
    for slot in range(SLOTS):
        packed.queue.put(slot, FLUSH, 0, 0)
        assert packed.device.waiting() == []
    packed.queue.publish()
    assert packed.device.waiting() == list(range(SLOTS))


def test_virtio13_2_8_8_only_the_first_entry_of_a_chain_has_its_own_place() -> None:
    pair = Pair(event_idx=True, ring="indirect")
    pair.queue.put(5, IN, 0, SLOT_BYTES)
    pair.queue.publish()
    assert isinstance(pair.device, PackedDevice)
    address, length, buffer_id, flags = pair.device.descriptor(0)
    assert address - GUEST_BASE == pair.layout.chains + 5 * (16 << pair.layout.chain_shift)
    assert (length, buffer_id) == (4 * 16, 5)
    assert flags == 4 | 1 << 7  # INDIRECT, available in the first lap
    pair.close()


@pytest.mark.parametrize(
    ("flags", "kicked"), [(0, [True] * 3), (1, [False] * 3), (2, [False, False, True])]
)
def test_virtio13_2_8_10_the_device_says_when_to_kick(
    packed: Pair, flags: int, kicked: list[bool]
) -> None:
    """Enabled, disabled, or from a descriptor on: the third request's first."""
    entries = 1 if packed.layout.indirect else 2
    packed.device.set_u16(packed.layout.used, 2 * entries | 1 << 15)
    packed.device.set_u16(packed.layout.used + 2, flags)
    seen = []
    for slot in range(3):
        packed.queue.put(slot, FLUSH, 0, 0)
        packed.queue.publish()
        seen.append(packed.kicked())
    assert seen == kicked


def test_virtio13_2_8_10_an_event_in_the_next_lap(packed: Pair) -> None:
    """The device waits for entry 3 of the second lap; the first lap passes without a kick."""
    packed.device.set_u16(packed.layout.used, 3)
    packed.device.set_u16(packed.layout.used + 2, 2)
    entries = 1 if packed.layout.indirect else 2
    at = 0
    for _ in range(packed.layout.size + 8):
        packed.queue.put(0, FLUSH, 0, 0)
        packed.queue.publish()
        passed = at <= packed.layout.size + 3 < at + entries
        assert packed.kicked() is passed
        at += entries
        if passed:
            return
        assert packed.device.serve() == 1
        assert packed.queue.take() is not None
    raise AssertionError("never kicked")


def test_virtio13_2_8_10_calls_are_asked_for_at_the_next_used_descriptor(packed: Pair) -> None:
    event = packed.layout.avail
    assert packed.device.u16(event + 2) == 1
    assert not packed.queue.arm()
    assert (packed.device.u16(event), packed.device.u16(event + 2)) == (1 << 15, 2)
    packed.queue.put(0, FLUSH, 0, 0)
    packed.queue.publish()
    packed.device.serve()
    assert packed.queue.arm(), "a completion that came before arming must be seen"
    packed.queue.silence()
    assert packed.device.u16(event + 2) == 1


def test_virtio13_2_8_10_without_event_idx_calls_are_just_enabled() -> None:
    pair = Pair(event_idx=False, ring="packed")
    assert not pair.queue.arm()
    assert pair.device.u16(pair.layout.avail + 2) == 0
    pair.close()
