"""A scene that is cut off between any two instructions, and what must come out of it after all.

One queue, a RAM disk, a discard and four writes that tell each other apart by sector and content.
The discard is so long that it is in flight while the others come and go in the places that they
leave in the ring. Whoever goes on from a cut must do what was not answered, in order, and nothing
else.
Imports drivebay, as stepped does. Context: tests.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from drivebay.dataplane.blk_queue import BlkQueue
from drivebay.dataplane.inflight import InflightRegion
from tests.fakes.driver import STATUS_UNTOUCHED, AnyRing, Kind, make_ring, segment_bytes
from tests.fakes.memory import MIB
from tests.fakes.packed_ring import PackedRing
from tests.fakes.ring import Segment
from tests.fakes.single_step import Mark, Stepped
from tests.fakes.stepped import FEATURES, PACKED, SERIAL, Machine, malloc_bdev

SIZE: Final = 8  # of the ring
SECTOR: Final = 512
# Sector and length of each request. The RAM disk clears 1 MiB in a turn; the discard is the first.
REQUESTS: Final = (
    (1024, 5 * MIB // 2),
    (0, SECTOR),
    (8, 2 * SECTOR),
    (16, SECTOR),
    (24, SECTOR),
)
DISK_BYTES: Final = 4 * MIB
HEADER: Final = struct.Struct("<IIQ")


MARK_AT: Final = REQUESTS[0][0] + REQUESTS[0][1] // SECTOR - 1  # the last sector of the discard
MARK_DATA: Final = b"still here" + bytes(SECTOR - 10)


def content(number: int) -> bytes:
    return bytes([number + 1]) * REQUESTS[number][1]


def request(number: int) -> bytes:
    """What the device reads."""
    sector, length = REQUESTS[number]
    if number == 0:
        return HEADER.pack(Kind.DISCARD, 0, 0) + segment_bytes(sector, length // SECTOR)
    return HEADER.pack(Kind.OUT, 0, sector) + content(number)


@dataclass(frozen=True)
class Cut:
    """What a kill left: the ring, the region, what the driver had shown and taken."""

    areas: tuple[bytes, bytes, bytes]
    region: bytes
    shown: tuple[tuple[int, int], ...]  # number of the request, its head or id; in order
    taken: tuple[int, ...]


class Scene:
    """A machine with one queue whose requests are kept in a region."""

    def __init__(self, *, packed: bool, start: int, cut: Cut | None = None) -> None:
        self.packed = packed
        features = PACKED if packed else FEATURES
        self.machine = Machine(malloc_bdev(size_bytes=DISK_BYTES), features=features)
        memory = self.machine.memory
        self.ring: AnyRing = make_ring(features, memory, SIZE, start)
        self.buffers = []
        for number in range(len(REQUESTS)):
            data = request(number) + bytes([STATUS_UNTOUCHED])
            self.buffers.append(memory.allocate(len(data)))
            memory.write(self.buffers[number], data)
        self.fd = os.memfd_create("region")
        os.ftruncate(self.fd, 4096)
        if cut is not None:
            for address, data in zip(self._places(), cut.areas, strict=True):
                memory.write(address, data)
            os.pwrite(self.fd, cut.region, 0)
        self.region = InflightRegion(
            fd=self.fd, mmap_size=4096, mmap_offset=0, num_queues=1, queue_size=SIZE, packed=packed
        )
        self.port = self.machine.make_port()
        self.machine.ports.append(self.port)
        self.queue = self._start()

    def _places(self) -> tuple[int, int, int]:
        return (self.ring.desc, self.ring.avail, self.ring.used)

    def _start(self) -> BlkQueue:
        """As after a SET_VRING_BASE that means nothing, if the region was in use before."""
        memory, machine = self.machine.memory, self.machine
        desc, avail, used = (memory.user_addr(address) for address in self._places())
        queue = BlkQueue(
            machine.channel,
            machine.table,
            index=0,
            size=SIZE,
            desc=desc,
            avail=avail,
            used=used,
            base=self.ring.base,
            features=machine.features,
            readonly=False,
            write_through=False,
            serial=SERIAL,
            on_broken=machine.broken.append,
            inflight=self.region.queue(0),
        )
        machine.queues.append(queue)
        return queue

    def begin(self) -> None:
        machine, port = self.machine, self.port
        machine.settle(self.queue.start(port.kick_fd, port.call_fd, port.err_fd))
        machine.settle(self.queue.set_enabled(True))

    def look(self) -> tuple[bytes, bytes, bytes, bytes]:
        """The ring's areas and the region, now."""
        memory = self.machine.memory
        lengths = (16 * SIZE, 4, 4) if self.packed else (16 * SIZE, 6 + 2 * SIZE, 6 + 8 * SIZE)
        desc, avail, used = (
            memory.read(address, length)
            for address, length in zip(self._places(), lengths, strict=True)
        )
        return desc, avail, used, os.pread(self.fd, 1024, 0)

    def close(self) -> None:
        self.machine.close()
        self.region.release()
        os.close(self.fd)


def play(*, packed: bool, start: int) -> Iterator[Cut]:
    """Every cut of the scene that differs from the one before."""
    scene = Scene(packed=packed, start=start)
    scene.begin()
    memory = scene.machine.memory
    notes = memory.allocate(256)
    memory.write(notes, bytes(256))
    with Stepped(lambda mark: _act(scene, notes, mark)) as child:
        before: tuple[bytes, ...] | None = None
        while True:
            child.run_to_mark()
            shown, taken, last = _read_notes(scene, notes)
            for _ in child.instructions():
                now = scene.look()
                if now != before:
                    before = now
                    yield Cut(now[:3], now[3], shown, taken)
            if last:
                break
        child.run_to_end()
    scene.close()


def _act(scene: Scene, notes: int, mark: Mark) -> None:
    """The child: driver and device by turns; what stands between two marks is the device."""
    shown: list[tuple[int, int]] = []
    taken: list[int] = []

    def show(*numbers: int) -> None:
        for number in numbers:
            at, length = scene.buffers[number], len(request(number))
            readable = [Segment(at, length, False)]
            writable = [Segment(at + length, 1, True)]
            shown.append((number, scene.ring.add([*readable, *writable])))
        scene.ring.publish()
        scene.port.kick()

    def take() -> None:
        heads = [used.head for used in scene.ring.take_used()]
        taken.extend(next(n for n, own in reversed(shown) if own == head) for head in heads)

    for numbers in ((0, 1, 2), (3,), (4,), ()):
        if numbers:
            show(*numbers)
        last = not numbers
        text = json.dumps([shown, taken, last]).encode()
        scene.machine.memory.write(notes, text.ljust(256))
        mark()
        scene.machine.step(4 if last else 1)
        mark()
        take()


def _read_notes(
    scene: Scene, notes: int
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...], bool]:
    shown, taken, last = json.loads(scene.machine.memory.read(notes, 256))
    return tuple((n, head) for n, head in shown), tuple(taken), last


# --- after the cut ---------------------------------------------------------------------------


def answered(scene: Scene, cut: Cut, areas: tuple[bytes, bytes, bytes], start: int) -> list[int]:
    """The requests whose used elements the driver has taken, or can see; in order."""
    found = list(cut.taken)
    still_open = [(n, head) for n, head in cut.shown if n not in cut.taken]
    heads = _used_heads(scene, cut, areas, start)
    for head in heads:
        number = next((n for n, other in still_open if other == head), None)
        if number is None:
            raise AssertionError(f"used element {head} names no request of {still_open}")
        still_open.remove((number, head))
        found.append(number)
    return found


def _used_heads(
    scene: Scene, cut: Cut, areas: tuple[bytes, bytes, bytes], start: int
) -> Iterator[int]:
    if not isinstance(scene.ring, PackedRing):
        used = areas[2]
        (idx,) = struct.unpack_from("<H", used, 2)
        at = (start + len(cut.taken)) & 0xFFFF
        while at != idx:
            yield struct.unpack_from("<I", used, 4 + 8 * (at % SIZE))[0]
            at = (at + 1) & 0xFFFF
        return
    at = start + 2 * len(cut.taken)  # each takes two descriptors
    for _ in range(SIZE // 2):
        _addr, _len, buffer_id, flags = struct.unpack_from("<QIHH", areas[0], 16 * (at % SIZE))
        wrap = scene.ring.wrap(at)
        if bool(flags & 0x80) != wrap or bool(flags & 0x8000) != wrap:
            return
        yield buffer_id
        at += 2


def go_on(cut: Cut, *, packed: bool, start: int) -> None:
    """The next target: checks that each request is done exactly once, and by whom."""
    scene = Scene(packed=packed, start=start, cut=cut)
    try:
        before = answered(scene, cut, cut.areas, start)
        disk = scene.machine.add_queue(16)
        disk.write(MARK_AT, MARK_DATA)
        scene.begin()
        scene.machine.step(8)
        assert scene.queue.broken is None, scene.queue.broken
        after = answered(scene, cut, scene.look()[:3], start)
        assert after[: len(before)] == before
        again = after[len(before) :]
        assert sorted(after) == sorted(number for number, _head in cut.shown)
        # The discard comes first and is done last, because it goes on in pieces.
        assert [n for n in again if n] == [n for n, _head in cut.shown if n in again and n]
        assert disk.read(MARK_AT, SECTOR) == (bytes(SECTOR) if 0 in again else MARK_DATA)
        for number, (sector, length) in list(enumerate(REQUESTS))[1:]:
            expected = content(number) if number in again else bytes(length)
            assert disk.read(sector, length) == expected, f"request {number}, after {before}"
    finally:
        scene.close()


# --- kept for later versions -----------------------------------------------------------------


def save(cut: Cut, path: Path, **how: Any) -> None:
    fields = {
        "areas": [_pack(area) for area in cut.areas],
        "region": _pack(cut.region),
        "shown": cut.shown,
        "taken": cut.taken,
        **how,
    }
    path.write_text(json.dumps(fields, indent=1) + "\n")


def load(path: Path) -> tuple[Cut, bool, int]:
    """The cut, whether its ring is packed, and where it had started."""
    fields = json.loads(path.read_text())
    desc, avail, used = (_unpack(area) for area in fields["areas"])
    shown = tuple((n, head) for n, head in fields["shown"])
    cut = Cut((desc, avail, used), _unpack(fields["region"]), shown, tuple(fields["taken"]))
    return cut, fields["packed"], fields["start"]


def _pack(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _unpack(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))
