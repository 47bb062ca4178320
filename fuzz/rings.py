"""Rings in shared memory that lie, through the same doors that the vhost plane uses.

What is checked after each round: memory outside the buffers that the device was given is as
it was; a queue is either given up with a sentence or serves; after a stop a new queue on the
same place serves; a neighbour on the same reactor reads what it wrote. Built with sanitizers
(`make asan`), whatever they find ends the process.

Two benches: one is moved by hand, so an input does the same each time. On the other a reactor
thread polls while this thread writes into the ring under its hands.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from drivebay.bdev.base import Bdev
from drivebay.bdev.file import FileBdev
from drivebay.bdev.malloc import MallocBdev
from drivebay.dataplane.blk_queue import BlkQueue
from drivebay.dataplane.dirty_log import DirtyLog
from drivebay.dataplane.inflight import InflightRegion
from drivebay.errors import PeerError
from drivebay.memory.guest_memory import MemoryTable, Region, mapped_regions
from fuzz.chains import make_chain
from fuzz.choices import Choices
from fuzz.guest import LAYOUTS, Guest
from fuzz.packed_ring import PackedRing
from fuzz.side_memory import InflightFile, LogFile
from fuzz.split_ring import SplitRing
from tests.fakes.driver import BlkDriver, EventPort
from tests.fakes.stepped import Machine
from tests.fakes.threaded import ThreadedMachine

__all__ = ["Rings"]

DISK_BYTES = 1 << 16
SIZES = (8, 16, 4, 64, 1, 2, 256, 1024)
RINGS: tuple[type[SplitRing] | type[PackedRing], ...] = (SplitRing, PackedRing)
F_INDIRECT, F_EVENT_IDX, F_VERSION_1, F_RING_PACKED = 1 << 28, 1 << 29, 1 << 32, 1 << 34
TURNS = (2, 1, 4, 8)
PATIENCE_TURNS = 20_000


class Bench:
    """A reactor with two disks to fuzz, and a neighbour on a third one."""

    def __init__(self, machine: Machine, folder: Path, *, threaded: bool) -> None:
        self.machine = machine
        self.threaded = threaded
        self.guest = Guest()
        self.port = EventPort()
        self.log = LogFile()
        self.inflight = InflightFile()
        self.disks: list[Bdev] = [MallocBdev("Fuzzed", None, 512, DISK_BYTES // 512)]
        path = folder / f"disk-{threaded}"
        path.write_bytes(bytes(DISK_BYTES))
        self.disks.append(FileBdev("FuzzedFile", None, str(path), 512))
        self.channels = [disk.open_channel(machine.reactor) for disk in self.disks]
        for channel in self.channels:
            machine.settle(channel.activate())
        self.neighbour: BlkDriver = machine.add_queue(16)
        self.rounds = 0

    def expect_neighbour_served(self) -> None:
        self.rounds += 1
        data = self.rounds.to_bytes(8, "little") * 64
        self.neighbour.write(self.rounds % 64, data)
        if self.neighbour.read(self.rounds % 64, 512) != data:
            raise AssertionError("the neighbour read something else than it wrote")
        if self.machine.broken:
            raise AssertionError(f"the neighbour was given up: {self.machine.broken[0].broken}")

    def close(self) -> None:
        for channel, disk in zip(self.channels, self.disks, strict=True):
            self.machine.settle(channel.close())
            disk.close()
        self.machine.close()
        self.port.close()
        self.log.close()
        self.inflight.close()
        self.guest.close()


class Rings:
    """The target for Explorer."""

    name = "rings"

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(dir="/dev/shm")
        folder = Path(self._folder.name)
        self._stepped = Bench(Machine(), folder, threaded=False)
        self._threaded = Bench(ThreadedMachine(poll_us=2000), folder, threaded=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:  # after a failure queues may still run on it
            self.close()

    def close(self) -> None:
        self._stepped.close()
        self._threaded.close()
        self._folder.cleanup()

    def run(self, data: bytes) -> frozenset[str]:
        choices = Choices(data)
        bench = choices.pick((self._stepped,) * 7 + (self._threaded,))
        mapped = mapped_regions()
        seen = Life(bench, choices).play()
        bench.expect_neighbour_served()
        if mapped_regions() != mapped:
            raise AssertionError(f"{mapped_regions() - mapped} regions are still mapped")
        return frozenset(seen)


class Life:
    """One queue from its start to its end, and a good one after it in the same place."""

    def __init__(self, bench: Bench, choices: Choices) -> None:
        self.bench = bench
        self.choices = choices
        self.machine = bench.machine
        self.guest = bench.guest
        self.guest.reset(choices.pick(LAYOUTS))
        self.channel = choices.pick(bench.channels)
        features = (F_INDIRECT | F_EVENT_IDX, F_INDIRECT, F_EVENT_IDX, 0)
        self.features = F_VERSION_1 | choices.pick(features)
        self.kind = choices.pick(RINGS)
        if self.kind is PackedRing:
            self.features |= F_RING_PACKED
        self.readonly = choices.rarely(10)
        self.size = choices.pick(SIZES)
        self.base = self.kind.first_base(choices, self.size)
        self.tables: list[MemoryTable] = []
        self.log: DirtyLog | None = None
        self.logs_rings = False
        self.region: InflightRegion | None = None
        self.region_lies = False
        self.over = False
        self.broken: list[BlkQueue] = []
        self.given: list[tuple[int, int]] | None = []  # what the device may write; None: anything
        self.seen = {f"size {self.size}", f"features {self.features:x}"}
        if bench.threaded:
            self.seen.add("threaded")

    def play(self) -> set[str]:
        self.ring = self.kind(self.guest, self.choices, self.size, self.base)
        try:
            self.table = self.new_table()
            self.make_region()
            self.queue = self.start(self.ring, self.base)
        except PeerError as error:
            self.note(str(error))
        else:
            self.use_and_stop()
            self.expect_a_good_queue_serves()
        finally:
            for table in self.tables:
                table.release()
            if self.log is not None:
                self.log.release()
            self.release_region()
        return self.seen

    def use_and_stop(self) -> None:
        for _ in range(1 + self.choices.below(8)):
            self.round()
            if self.choices.left == 0 or self.over:
                break
        if not self.over:
            self.stop()

    def stop(self) -> None:
        before = self.guest.snapshot()
        self.give()
        self.base = self.machine.settle(self.queue.stop())
        self.expect_unchanged(before)
        self.settle_broken()
        self.given = []

    def give(self) -> None:
        """Note what the device may write from here on. Requests in flight keep theirs."""
        anything = self.bench.threaded or self.region_lies
        now = None if anything else self.ring.device_writes()
        if now is None or self.given is None:
            self.given = None
        else:
            self.given = [*self.given, *now]

    def note(self, sentence: str) -> None:
        self.seen.add(re.sub(r"0x[0-9a-f]+|\d+", "n", sentence))

    # Starting ---------------------------------------------------------------------------

    def new_table(self) -> MemoryTable:
        previous = self.tables[-1] if self.tables else None
        regions = [
            Region(p.guest_addr, p.size, p.user_addr, p.offset, self.guest.fd)
            for p in self.guest.pieces
        ]
        self.tables.append(MemoryTable(regions, previous))
        return self.tables[-1]

    def start(self, ring: SplitRing | PackedRing, base: int) -> BlkQueue:
        """Raises: PeerError."""
        queue = BlkQueue(
            self.channel,
            self.table,
            index=1,
            size=self.size,
            **ring.parts,
            base=base,
            features=self.features,
            readonly=self.readonly,
            write_through=self.choices.rarely(4),
            serial=b"fuzzed",
            on_broken=self.broken.append,
            inflight=self.region.queue(0) if self.region is not None else None,
        )
        port = self.bench.port
        self.machine.settle(queue.start(port.kick_fd, port.call_fd, port.err_fd))
        self.machine.settle(queue.set_enabled(True))
        return queue

    # Rounds -----------------------------------------------------------------------------

    def round(self) -> None:
        """The driver does something, the device answers it, and the memory is looked at."""
        choices = self.choices
        for _ in range(choices.below(min(self.size, 6) + 1)):
            self.ring.add(make_chain(self.guest, choices), choices)
        self.ring.publish(choices)
        for _ in range(choices.pick((0, 0, 0, 1, 4))):
            self.ring.scramble(choices)
        if self.region is not None and choices.rarely(12):
            self.bench.inflight.scramble(choices)
            self.region_lies = True
        self.ring.ask_for_calls(choices)
        self.give()  # control's questions let the device work, too
        self.act()
        before = self.guest.snapshot()
        self.give()
        self.bench.port.kick()
        if self.bench.threaded:
            self.write_under_its_hands()
        else:
            self.machine.step(choices.pick(TURNS))
        self.expect_unchanged(before)
        self.look()

    def act(self) -> None:
        """What control may ask of a queue that runs."""
        match self.choices.below(20):
            case 15:
                self.table = self.new_table()
                self.machine.settle(self.queue.set_table(self.table))
                self.seen.add("new table")
            case 16:
                self.machine.settle(self.queue.set_enabled(self.choices.rarely(2)))
            case 17:
                port = self.bench.port
                call = self.choices.pick((port.call_fd, -1))
                self.machine.settle(self.queue.set_notifiers(port.kick_fd, call, port.err_fd))
            case 18:
                self.machine.settle(self.queue.set_write_through(self.choices.rarely(2)))
            case 19:
                self.restart()
            case 14 | 13:
                self.change_log()
            case 12:
                self.die_and_come_back()

    def change_log(self) -> None:
        """A migration begins, or ends, or gets another log."""
        old, self.log = self.log, None
        self.machine.settle(self.queue.set_log(None, False))
        if old is not None:
            self.bench.log.expect_unchanged_outside()
            old.release()
            if self.choices.rarely(2):
                return
        try:
            log = self.bench.log.make(self.choices)
        except PeerError as error:
            self.note(str(error))
            return
        self.logs_rings = self.choices.rarely(2)
        self.machine.settle(self.queue.set_log(log, self.logs_rings))
        self.log = log
        self.seen.add("log")

    def make_region(self) -> None:
        """An inflight region for some; perhaps an earlier target left nonsense in it."""
        if not self.choices.rarely(4):
            return
        packed = self.kind is PackedRing
        self.region = self.bench.inflight.make(self.choices, self.size, packed)
        self.seen.add(f"inflight region, packed {packed}")
        if self.choices.rarely(3):
            self.bench.inflight.scramble(self.choices)
            self.region_lies = True

    def release_region(self) -> None:
        if self.region is not None:
            self.region.release()
            self.region = None

    def die_and_come_back(self) -> None:
        """A new target finds the memory as it was when the old one was killed."""
        if self.bench.threaded:
            return
        guest, inflight = bytes(self.guest.bytes), bytes(self.bench.inflight.bytes)
        self.stop()
        self.guest.bytes[:], self.bench.inflight.bytes[:] = guest, inflight
        if self.region is not None and self.choices.rarely(4):
            self.bench.inflight.scramble(self.choices)
            self.region_lies = True
        if self.kind is PackedRing:
            self.region_lies = True  # its chains need not stand in the ring any more
        self.seen.add("killed")
        self.start_again()

    def restart(self) -> None:
        """Stop it wherever it is, and start again there."""
        self.stop()
        self.seen.add("restart")
        self.start_again()

    def start_again(self) -> None:
        """Where it stopped, or where its inflight region says; that may be refused."""
        self.give()
        try:
            self.queue = self.start(self.ring, self.base)
        except PeerError as error:
            self.note(str(error))
            self.over = True
            return
        if self.log is not None:
            self.machine.settle(self.queue.set_log(self.log, self.logs_rings))

    def write_under_its_hands(self) -> None:
        """Bound: as long as it takes; the reactor's thread polls meanwhile."""
        plan = [(self.choices.number(2), self.choices.raw(4)) for _ in range(32)]
        spans = self.ring.spans()
        for _ in range(20):
            for place, value in plan:
                base, length = spans[place % len(spans)]
                self.guest.write(base + place % length, value)
            self.machine.control.drain()
        self.machine.step()

    # Oracles ----------------------------------------------------------------------------

    def expect_unchanged(self, before: bytearray) -> None:
        allowed = self.given
        if allowed is None:  # nobody can tell what it was given, but its regions are known
            allowed = self.guest.all_of_it()
            self.seen.add("self-written")
        self.expect_logged(before)
        if self.region is not None:
            self.bench.inflight.expect_unchanged_outside()
        changed = self.guest.changed_outside(before, allowed)
        if changed:
            raise AssertionError(
                f"{len(changed)} bytes changed that the device was not given, the first at "
                f"{changed[0]:#x} of the file; regions {self.guest.pieces}"
            )

    def expect_logged(self, before: bytearray) -> None:
        """Whatever the device changed is marked; nobody else wrote on the stepped bench."""
        if self.log is None:
            return
        self.bench.log.expect_unchanged_outside()
        if not self.bench.threaded:
            free = [] if self.logs_rings else self.ring.spans()
            changed = self.guest.changed_outside(bytearray(before), free)
            self.bench.log.expect_marked(self.guest, changed, self.log)

    def look(self) -> None:
        counters = self.queue.counters()
        if counters.bad_requests:
            self.seen.add("bad requests")
        if counters.inflight:
            self.seen.add("inflight")
        elif not self.bench.threaded:
            self.given = []
        if self.queue.broken is not None:
            self.note(self.queue.broken)
        self.seen.add(f"requests {counters.requests.bit_length()}")
        if counters.inflight > self.size:
            raise AssertionError(f"{counters.inflight} in flight on a ring of {self.size}")

    def settle_broken(self) -> None:
        """A queue that gave up said so, and only then."""
        self.machine.control.drain()
        if (self.queue.broken is not None) != (self.queue in self.broken):
            raise AssertionError(f"broken: {self.queue.broken}, told: {self.broken}")
        if self.queue.counters().inflight:
            raise AssertionError("stopped with requests in flight")
        self.broken.clear()

    def expect_a_good_queue_serves(self) -> None:
        self.guest.reset(self.guest.pieces)
        self.release_region()
        behave = Choices(b"")
        ring = self.kind(self.guest, behave, self.size, self.base)
        self.readonly = False
        self.queue = self.start(ring, self.base)
        for served in (1, 2, 3):
            # On the smallest rings a request is cut short, and still answered.
            ring.add(make_chain(self.guest, behave)[: self.size], behave)
            ring.publish(behave)
            self.bench.port.kick()
            if not self.came_back(ring):
                raise AssertionError(
                    f"a good queue does not serve request {served}: {self.queue.broken}, "
                    f"{self.queue.counters()}, from base {self.base:#x}"
                )
        self.machine.settle(self.queue.stop())

    def came_back(self, ring: SplitRing | PackedRing) -> bool:
        """Bound: far more turns than a request takes."""
        for _ in range(PATIENCE_TURNS):
            if ring.take_used():
                return True
            self.machine.step()
        return False
