"""A disk in plain Python: data, faults, calls that hang, removal, and who completes what."""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from drivebay.bdev.python_bdev import PythonBdev
from drivebay.bdev.python_disk import Faults, PythonDisk
from drivebay.bdev.registry import BdevRegistry
from drivebay.errors import HostError, UsageError
from tests.fakes.driver import Kind, Status
from tests.fakes.stepped import Machine
from tests.fakes.threaded import running_reactor

MIB = 1 << 20
PATTERN = (bytes(range(1, 252)) * (4 * MIB // 251 + 1))[: 4 * MIB]
PATIENCE_S = 20.0


class Memory(PythonDisk):
    """All methods, on a bytearray; notes each call."""

    num_blocks = 8 * MIB // 512

    def __init__(self) -> None:
        self.content = bytearray(8 * MIB)
        self.calls: list[tuple[str, int, int]] = []
        self.callers: set[str] = set()
        self.closed = False

    def note(self, method: str, offset: int, length: int) -> None:
        self.calls.append((method, offset, length))
        self.callers.add(threading.current_thread().name)

    def read(self, offset: int, length: int) -> memoryview:
        self.note("read", offset, length)
        return memoryview(self.content)[offset : offset + length]

    def write(self, offset: int, data: bytes) -> None:
        self.note("write", offset, len(data))
        self.content[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.note("flush", 0, 0)

    def unmap(self, offset: int, length: int) -> None:
        self.note("unmap", offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        self.note("write_zeroes", offset, length)
        self.content[offset : offset + length] = bytes(length)

    def close(self) -> None:
        self.closed = True


class Gated(Memory):
    """Reads of the first block wait for ``gate``."""

    threads = 2

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.waiting = threading.Event()
        self.inside = 0
        self.most_inside = 0

    def read(self, offset: int, length: int) -> memoryview:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        if offset == 0:
            self.waiting.set()
            assert self.gate.wait(PATIENCE_S)
        found = super().read(offset, length)
        self.inside -= 1
        return found


def scene(test: Callable[[BdevRegistry], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test(BdevRegistry())

    asyncio.run(limited())


def test_a_guest_reads_and_writes_it() -> None:
    disk = Memory()
    with Machine(PythonBdev("P0", None, disk)) as machine:
        driver = machine.add_queue()
        driver.write(8, PATTERN[:65536])
        assert driver.read(8, 65536) == PATTERN[:65536]
        assert disk.content[4096 : 4096 + 65536] == PATTERN[:65536]
        assert driver.request(Kind.FLUSH).status == Status.OK
        assert {name for name, _, _ in disk.calls} == {"read", "write", "flush"}
        assert disk.callers == {"P0_0"}
    assert disk.closed


def test_long_requests_come_in_calls_of_a_mebibyte() -> None:
    async def test(registry: BdevRegistry) -> None:
        disk = Memory()
        bdev = PythonBdev("P0", None, disk)
        registry.add(bdev)
        async with running_reactor() as reactor:
            async with registry.access(bdev, reactor) as access:
                await access.write(512, PATTERN[: 3 * MIB + 512], fua=True)
                assert await access.read(512, 3 * MIB + 512) == PATTERN[: 3 * MIB + 512]
                await access.write_zeroes(0, 5 * MIB)
                await access.unmap(4096, 8192)
            assert bdev.iostat()["write"].bytes == 3 * MIB + 512
            await registry.close()
        pieces = [(512 + n * MIB, MIB if n < 3 else 512) for n in range(4)]
        assert disk.calls == [
            *(("write", *piece) for piece in pieces),
            ("flush", 0, 0),  # FUA on a disk with a cache
            *(("read", *piece) for piece in pieces),
            ("write_zeroes", 0, 5 * MIB),
            ("unmap", 4096, 8192),
        ]

    scene(test)


def test_what_a_class_lacks_the_guest_does_not_get() -> None:
    class Numbers(PythonDisk):
        num_blocks = 100

        def read(self, offset: int, length: int) -> bytes:
            return offset.to_bytes(8, "little") * (length // 8)

    bdev = PythonBdev("N0", None, Numbers())
    assert bdev.io_types == {"read"}
    assert bdev.readonly
    assert not bdev.write_cache
    with Machine(bdev, readonly=True) as machine:
        driver = machine.add_queue()
        assert driver.read(3, 512) == (1536).to_bytes(8, "little") * 64
        assert driver.request(Kind.OUT, 3, bytes(512)).status == Status.IOERR


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_blocks": 0}, "is no size"),
        ({"num_blocks": 8, "block_size": 1000}, "power of two"),
        ({"num_blocks": 8, "threads": 0}, "0 threads"),
        ({"num_blocks": 8, "threads": 65}, "65 threads"),
    ],
)
def test_a_disk_that_makes_no_sense_is_refused(attributes: dict[str, int], message: str) -> None:
    disk = Memory()
    for name, value in attributes.items():
        setattr(disk, name, value)
    with pytest.raises(UsageError, match=message):
        PythonBdev("P0", None, disk)


def test_a_disk_must_be_one_and_must_read() -> None:
    class Silent(PythonDisk):
        num_blocks = 8

    with pytest.raises(UsageError, match="no method read"):
        PythonBdev("P0", None, Silent())
    with pytest.raises(UsageError, match="no PythonDisk"):
        PythonBdev("P0", None, object())  # type: ignore[arg-type]


class Faulty(Memory):
    """Fails as told."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: BaseException | object | None = None

    def read(self, offset: int, length: int) -> memoryview:
        if isinstance(self.fault, BaseException):
            raise self.fault
        if self.fault is not None:
            return self.fault  # type: ignore[return-value]
        return super().read(offset, length)


@pytest.mark.parametrize(
    ("fault", "code", "named"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC, "OSError"),
        (OSError("no number"), errno.EIO, "OSError"),
        (OSError(-5, "a wrong number"), errno.EIO, "OSError"),
        (KeyError("x"), errno.EIO, "KeyError"),
        (SystemExit(3), errno.EIO, "SystemExit"),
        (b"short", errno.EIO, r"read\(4096, 512\) gave 5 bytes"),
        (bytes(513), errno.EIO, "gave 513 bytes"),
        ("text", errno.EIO, "bytes-like"),
        (memoryview(bytes(1024))[::2], errno.EIO, "BufferError"),
    ],
)
def test_a_fault_ends_its_io_only(
    caplog: pytest.LogCaptureFixture, fault: object, code: int, named: str
) -> None:
    async def test(registry: BdevRegistry) -> None:
        disk = Faulty()
        bdev = PythonBdev("P0", None, disk)
        registry.add(bdev)
        async with running_reactor() as reactor:
            async with registry.access(bdev, reactor) as access:
                for _ in range(3):
                    disk.fault = fault
                    with pytest.raises(HostError) as caught:
                        await access.read(4096, 512)
                    assert caught.value.errno == code
                    disk.fault = None
                    await access.write(4096, PATTERN[:512])
                    assert await access.read(4096, 512) == PATTERN[:512]
            assert bdev.driver_specific()["python"]["failed_calls"] == 3
            assert bdev.iostat()["read"].errors == 3
            await registry.close()

    with caplog.at_level(logging.ERROR):
        scene(test)
    [record] = [record for record in caplog.records if record.name == "drivebay.bdev.python_disk"]
    assert "Python disk 'P0': read failed" in record.getMessage()
    assert caplog.text.count("Traceback") == 1
    assert re.search(named, caplog.text)


def test_each_kind_of_fault_is_told_once_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    faults = Faults("disk")
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            assert faults.add("read", OSError(errno.EIO, "x")) == errno.EIO
            assert faults.add("write", ValueError()) == errno.EIO
        assert len(caplog.records) == 2
        now[0] += 61
        faults.add("read", OSError(errno.EIO, "x"))
        assert "4 more like it before" in caplog.records[-1].getMessage()
        for number in range(100, 200):  # a disk that always finds another number
            faults.add("read", OSError(number, "x"))
    assert len(caplog.records) == 3 + 30
    assert faults.count == 111


def test_a_call_that_hangs_holds_up_nothing_else() -> None:
    disk = Gated()
    with Machine(PythonBdev("P0", None, disk)) as machine:
        driver = machine.add_queue()
        stuck = driver.queue(Kind.IN, 0, room=512)
        driver.publish()
        machine.step(5)
        assert disk.waiting.wait(PATIENCE_S)
        for n in range(1, 9):
            driver.write(n, PATTERN[:512])
            assert driver.read(n, 512) == PATTERN[:512]
        assert stuck.completion is None
        disk.gate.set()
        assert driver.wait(stuck).status == Status.OK
        assert disk.most_inside == 2


def test_more_than_there_are_requests_wait_and_all_come_back() -> None:
    """With one thread calls never overlap, and the order is that of the requests."""

    async def test(registry: BdevRegistry) -> None:
        disk = Gated()
        disk.threads = 1
        bdev = PythonBdev("P0", None, disk)
        registry.add(bdev)
        async with running_reactor() as reactor:
            async with registry.access(bdev, reactor) as access:
                reads = [asyncio.create_task(access.read(512 * n, 512)) for n in range(600)]
                await asyncio.to_thread(disk.waiting.wait, PATIENCE_S)
                await asyncio.sleep(0.02)
                assert not any(read.done() for read in reads)
                disk.gate.set()
                assert await asyncio.gather(*reads) == [bytes(512)] * 600
            await registry.close()
        assert disk.calls == [("read", 512 * n, 512) for n in range(600)]
        assert disk.most_inside == 1

    scene(test)


@pytest.mark.usefixtures("restless_threads")
def test_no_io_is_lost_between_many_threads_and_two_reactors() -> None:
    async def load(registry: BdevRegistry, bdev: PythonBdev, first: int) -> None:
        async with running_reactor() as reactor, registry.access(bdev, reactor) as access:

            async def one(block: int) -> None:
                offset = 4096 * block
                data = PATTERN[block : block + 4096]
                for _ in range(20):
                    await access.write(offset, data)
                    assert await access.read(offset, 4096) == data
                    await asyncio.sleep(0)

            await asyncio.gather(*(one(block) for block in range(first, first + 24)))

    async def test(registry: BdevRegistry) -> None:
        disk = Memory()
        disk.threads = 5
        bdev = PythonBdev("P0", None, disk)
        registry.add(bdev)
        await asyncio.gather(load(registry, bdev, 0), load(registry, bdev, 100))
        assert bdev.iostat()["read"].ops == bdev.iostat()["write"].ops == 2 * 24 * 20
        await registry.close()

    scene(test)


def test_removal_waits_for_the_call_in_progress() -> None:
    async def test(registry: BdevRegistry) -> None:
        disk = Gated()
        bdev = PythonBdev("P0", None, disk)
        registry.add(bdev)
        async with running_reactor() as reactor:
            async with registry.access(bdev, reactor) as access:
                reads = [asyncio.create_task(access.read(0, 512)) for _ in range(4)]
                await asyncio.to_thread(disk.waiting.wait, PATIENCE_S)
                removal = asyncio.create_task(registry.remove("P0"))
                await asyncio.sleep(0.05)
                assert not removal.done()
                with pytest.raises(HostError) as caught:
                    await access.read(512, 512)
                assert caught.value.errno == errno.ENODEV
                disk.gate.set()
                await removal
                assert await asyncio.gather(*reads) == [bytes(512)] * 4
                assert not disk.closed
            await registry.close()
        assert disk.closed
        assert not [t for t in threading.enumerate() if t.name.startswith("P0_")]

    scene(test)


def test_without_threads_it_does_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    bdev = PythonBdev("P0", None, Memory())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(HostError, match="no thread for bdev 'P0'"):
            bdev.start()
    bdev.start()
    bdev.close()


def test_a_close_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Clinging(Memory):
        def close(self) -> None:
            raise OSError(errno.EBUSY, "not yet")

    bdev = PythonBdev("P0", None, Clinging())
    with caplog.at_level(logging.ERROR):
        bdev.close()
    assert "close failed with OSError" in caplog.text
