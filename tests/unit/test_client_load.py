"""The load generator's loop against a device in Python that can be told to misbehave."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from drivebay.engines.vhost_user_load import Load, tick_rate
from drivebay.engines.vhost_user_memory import GUEST_BASE, DriverMemory, QueueLayout
from drivebay.engines.vhost_user_queue import DriverQueue
from drivebay.errors import UsageError
from tests.fakes.device import FLUSH, IN, IOERR, OUT, Device, eventfd
from tests.fakes.packed_device import PackedDevice

BLOCK = 1024
BLOCKS = 32
DEPTH = 4
FIRST_SECTOR = 100


class Bench:
    """A queue, a device behind it, and a load on it."""

    def __init__(self, *, packed: bool = False, **settings: object) -> None:
        self.memory = DriverMemory(1 << 20)
        layout = QueueLayout.plan(0, DEPTH, BLOCK, 1 << 20, packed=packed)
        self.kick, self.call = eventfd(), eventfd()
        self.queue = DriverQueue(self.memory.map, layout, GUEST_BASE, False, self.kick, self.call)
        self.disk = bytearray((FIRST_SECTOR * 512) + BLOCKS * BLOCK)
        self.device = (PackedDevice if packed else Device)(
            self.memory.map,
            GUEST_BASE,
            layout.size,
            layout.desc,
            layout.avail,
            layout.used,
            self.disk,
        )
        options = {
            "first_sector": FIRST_SECTOR,
            "num_blocks": BLOCKS,
            "block_bytes": BLOCK,
            "random": True,
            "read_share": 32768,
            "flush_every": 0,
            "verify": False,
            "self_check": False,
            "run": 0x1234_5678_9ABC_DEF1,
        }
        self.load = Load([self.queue], **{**options, **settings})  # type: ignore[arg-type]

    def close(self) -> None:
        os.close(self.kick)
        os.close(self.call)
        self.memory.close()

    def recorded(self, part: int) -> list[int]:
        """Kinds (0) or sectors (1) of the requests, as the device will see them."""
        seen: list[int] = []

        def status(*request: int) -> int:
            seen.append(request[part])
            return 0

        self.device.status = status
        return seen

    def run(self, requests: int, interval_ticks: float = 0.0, ns_per_tick: float = 0.0) -> None:
        """Run the load in its thread until the device has served so many requests."""
        hour = int(3600 * tick_rate())
        self._serve(lambda: self.load.run(hour, interval_ticks, 0, ns_per_tick), requests)

    def reread(self) -> None:
        self._serve(self.load.reread, 1 << 30)

    def _serve(self, work: Callable[[], None], requests: int) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        served = 0
        try:
            while thread.is_alive():
                served += self.device.serve()
                if served >= requests:
                    self.load.stop()
        except BaseException:
            self.load.abandon()
            raise
        finally:
            thread.join()


@contextmanager
def bench(*, packed: bool = False, **settings: object) -> Iterator[Bench]:
    made = Bench(packed=packed, **settings)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_stopped_load_leaves_nothing_in_flight_and_counts_all(packed: bool) -> None:
    with bench(packed=packed) as it:
        it.run(500)
        counters = it.load.counters()
        done = counters["reads"] + counters["writes"]
        assert done >= 500
        assert counters["inflight"] == it.load.inflight == 0
        assert it.load.completions == done
        assert [one.count for one in it.load.latency] == [counters["reads"], counters["writes"], 0]
        assert counters["errors"] == {}
        assert counters["reads"] > 150
        assert counters["writes"] > 150


@pytest.mark.parametrize("share", [0, 65536])
def test_a_pure_load_is_pure(share: int) -> None:
    with bench(read_share=share) as it:
        it.run(100)
        counters = it.load.counters()
        assert counters["reads" if share else "writes"] >= 100
        assert counters["writes" if share else "reads"] == 0


def test_a_sequential_load_goes_through_the_range_in_order() -> None:
    with bench(random=False, read_share=65536) as it:
        seen = it.recorded(1)
        it.run(3 * BLOCKS)
    order = [FIRST_SECTOR + i % BLOCKS * (BLOCK // 512) for i in range(len(seen))]
    assert seen == order


def test_a_random_load_touches_every_block_of_the_range_and_no_other() -> None:
    with bench(read_share=65536) as it:
        seen = it.recorded(1)
        it.run(20 * BLOCKS)
    whole = {FIRST_SECTOR + i * (BLOCK // 512) for i in range(BLOCKS)}
    assert set(seen) == whole


def test_errors_are_counted_by_status() -> None:
    with bench() as it:
        it.device.status = lambda kind, _sector: IOERR if kind == OUT else 0
        it.run(200)
        counters = it.load.counters()
        assert list(counters["errors"]) == [IOERR]
        assert counters["errors"][IOERR] > 40
        assert counters["writes"] == 0


def test_a_flush_comes_after_every_n_writes() -> None:
    with bench(read_share=0, flush_every=3) as it:
        kinds = it.recorded(0)
        it.run(200)
        assert it.load.counters()["flushes"] == kinds.count(FLUSH)
    assert kinds[:8] == [OUT, OUT, OUT, FLUSH, OUT, OUT, OUT, FLUSH]


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_used_ring_that_names_no_request_ends_the_load(packed: bool) -> None:
    with bench(packed=packed) as it:

        def serve() -> int:
            if it.device.waiting():
                it.device.complete(777)
            return 0

        it.device.serve = serve  # type: ignore[method-assign]
        it.run(1)
        assert it.load.counters()["broken_ring"]


def test_an_abandoned_load_ends_with_requests_in_flight() -> None:
    with bench() as it:
        thread = threading.Thread(target=it.load.run, args=(1 << 62, 0.0, 0))
        thread.start()
        it.load.abandon()
        thread.join(30)
        assert not thread.is_alive()


def test_an_open_loop_issues_no_more_than_is_due() -> None:
    with bench() as it:
        interval = tick_rate() / 1000
        it.run(20, interval)
        counters = it.load.counters()
        issued = counters["reads"] + counters["writes"]
        assert issued <= counters["elapsed_ticks"] / interval + 1


def test_an_open_loop_counts_latency_from_when_a_request_was_due() -> None:
    stall_s = 0.1
    with bench() as it:
        execute = it.device.execute

        def stalling(head: int) -> int:
            if it.load.completions == 0:
                time.sleep(stall_s)
            return execute(head)

        it.device.execute = stalling  # type: ignore[method-assign]
        # Some 100 requests fall due while the first ones are held up, far more than the
        # depth: a closed loop would see four slow ones, an open loop sees them all.
        it.run(200, tick_rate() / 1000)
        slow = stall_s / 4 * tick_rate()
        reads, writes, _ = it.load.latency
        assert max(reads.percentile(90), writes.percentile(90)) > slow
        assert max(reads.max, writes.max) > 2 * slow


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_load_that_sleeps_is_woken_by_calls(packed: bool) -> None:
    """The device calls when it is asked to, once for all that it completes in a go."""
    with bench(packed=packed) as it:
        serve = it.device.serve
        asleep = 0

        def serve_and_call() -> int:
            nonlocal asleep
            served = serve()
            flags = it.device.u16(it.device.avail + (2 if packed else 0))
            if served and flags == 0:
                asleep += 1
                os.eventfd_write(it.call, 1)
            return served

        it.device.serve = serve_and_call  # type: ignore[method-assign]
        it.run(500, ns_per_tick=1e9 / tick_rate())
        counters = it.load.counters()
        assert counters["reads"] + counters["writes"] >= 500
        assert asleep > 0
        # It looks ten times a second without a call too: one that never came would show.
        assert counters["elapsed_ticks"] < 20 * tick_rate()


def test_a_block_that_does_not_fit_a_slot_is_refused() -> None:
    with pytest.raises(UsageError, match="at most 1024"), bench(block_bytes=BLOCK + 512):
        pass


# --- verification


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_right_device_verifies(packed: bool) -> None:
    with bench(packed=packed, verify=True) as it:
        it.run(600)
        assert it.load.counters()["verified"] > 50
        assert it.load.first_mismatch() is None
        it.reread()
        assert it.load.first_mismatch() is None
        assert [one.count for one in it.load.latency[1:]] == [0, 0]
        assert BLOCKS // 2 < it.load.latency[0].count <= BLOCKS


def test_blocks_carry_their_address_and_how_often_they_were_written() -> None:
    with bench(verify=True, read_share=0, random=False) as it:
        it.run(2 * BLOCKS)
        for sector in range(FIRST_SECTOR, FIRST_SECTOR + BLOCKS * (BLOCK // 512)):
            words = struct.unpack_from("<8sQQQ", it.disk, 512 * sector)
            assert words[:2] == (b"DRIVEBAY", 512 * sector)
            assert words[2] in (2, 3)
            assert words[3] == 0x1234_5678_9ABC_DEF1


def test_requests_in_flight_never_overlap() -> None:
    with bench(verify=True, num_blocks=DEPTH + 1) as it:
        open_blocks: set[int] = set()

        def serve() -> int:
            heads = it.device.waiting()
            for head in heads:
                header = it.device.chain(head)[0]
                sector = struct.unpack_from("<Q", it.memory.map, header.offset + 8)[0]
                assert sector not in open_blocks
                open_blocks.add(sector)
            for head in heads:
                it.device.complete(head, it.device.execute(head))
            open_blocks.clear()
            return len(heads)

        it.device.serve = serve  # type: ignore[method-assign]
        it.run(400)
        assert it.load.first_mismatch() is None


def first_mismatch_of(damage: Callable[[int, bytearray], None]) -> dict[str, int]:
    with bench(verify=True) as it:
        it.device.damage = damage
        it.run(400)
        found = it.load.first_mismatch()
        assert found is not None
        return dict(found)  # type: ignore[arg-type]


def test_a_flipped_bit_is_reported_where_it_is() -> None:
    def damage(_at: int, data: bytearray) -> None:
        data[512 + 80] ^= 1

    found = first_mismatch_of(damage)
    assert found["word"] == 10
    assert found["address"] % BLOCK == (FIRST_SECTOR * 512 + 512 + 80) % BLOCK
    assert found["expected"] ^ found["got"] == 1


def test_a_read_that_transfers_nothing_is_found() -> None:
    with bench(verify=True) as it:
        execute = it.device.execute

        def lazy(head: int) -> int:
            header, *_, status = it.device.chain(head)
            if struct.unpack_from("<I", it.memory.map, header.offset)[0] != IN:
                return execute(head)
            it.memory.map[status.offset] = 0
            return 1

        it.device.execute = lazy  # type: ignore[method-assign]
        it.run(400)
        counters = it.load.counters()
        assert counters["verified"] == counters["mismatches"] > 0


def test_a_lost_write_shows_the_sequence_before() -> None:
    with bench(verify=True, read_share=0, random=False) as it:
        seen = it.recorded(1)
        serve = it.device.serve
        before = bytearray()

        def serve_and_copy() -> int:
            served = serve()
            if len(seen) >= BLOCKS and not before:
                before.extend(it.disk)
            return served

        it.device.serve = serve_and_copy  # type: ignore[method-assign]
        it.run(2 * BLOCKS)
        it.disk[:] = before
        it.reread()
        found = it.load.first_mismatch()
        assert found is not None
        assert found["word"] == 2
        assert found["expected"] > found["got"] > 0
        assert found["sequence"] == found["expected"]


def test_after_a_failed_write_a_block_is_not_judged() -> None:
    with bench(verify=True, random=False) as it:
        it.device.status = lambda kind, _sector: IOERR if kind == OUT else 0
        it.run(300)
        counters = it.load.counters()
        assert counters["errors"][IOERR] > 0
        assert counters["verified"] == 0


def test_a_reading_load_checks_blocks_of_an_earlier_run() -> None:
    with bench(verify=True, read_share=0, random=False) as writer:
        writer.run(2 * BLOCKS)
        with bench(verify=True, read_share=65536, self_check=True, run=77) as reader:
            reader.disk[:] = writer.disk
            reader.run(100)
            assert reader.load.counters()["verified"] >= 100
            assert reader.load.first_mismatch() is None
            reader.disk[FIRST_SECTOR * 512 : FIRST_SECTOR * 512 + BLOCK] = writer.disk[-BLOCK:]
        with bench(verify=True, read_share=65536, self_check=True, random=False) as reader2:
            reader2.disk[:] = reader.disk
            reader2.run(BLOCKS)
            found = reader2.load.first_mismatch()
            assert found is not None
            assert found["word"] == 1
