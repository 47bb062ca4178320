"""A file whose backend is slow or fails.

The backend is a file system of ours, so each case comes when the test wants it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from drivebay.bdev.file import FileBdev
from tests.fakes.driver import BlkDriver, Kind, Pending, Status
from tests.fakes.fuse import FuseFile
from tests.fakes.memory import Layout
from tests.fakes.stepped import Machine, malloc_bdev

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_uring]

MIB = 1 << 20
SIZE = 8 * MIB
PATTERN = (bytes(range(1, 252)) * (SIZE // 251 + 1))[:SIZE]


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[FuseFile]:
    with FuseFile(tmp_path / "backend", PATTERN) as made:
        yield made


@pytest.fixture
def machine(backend: FuseFile) -> Iterator[Machine]:
    bdev = FileBdev("File0", None, str(backend.path), 512)
    with Machine(bdev, layouts=[Layout(0, 64 * MIB)]) as made:
        yield made
        backend.release()


@pytest.fixture
def disk(machine: Machine) -> BlkDriver:
    return machine.add_queue(64)


def start(disk: BlkDriver, kind: Kind, sector: int) -> Pending:
    if kind == Kind.OUT:
        pending = disk.queue(kind, sector, b"n" * 4096)
    else:
        pending = disk.queue(kind, sector, room=4096 * (kind == Kind.IN))
    disk.publish()
    return pending


def step_until(machine: Machine, condition: Callable[[], bool]) -> None:
    for _ in range(1_000_000):
        if condition():
            return
        machine.step()
    raise AssertionError("it did not come")


# ---- errors ---------------------------------------------------------------------------------


def test_a_transfer_of_nothing_is_an_error(disk: BlkDriver, backend: FuseFile) -> None:
    """Asked again it would be answered so for ever."""
    backend.judge = lambda _operation, _offset, _length: 0
    assert disk.request(Kind.IN, 0, room=4096).status == Status.IOERR


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ENOMEM, errno.ETIMEDOUT])
@pytest.mark.parametrize("kind", [Kind.IN, Kind.OUT, Kind.FLUSH])
def test_an_error_of_the_backend_is_one_requests_error(
    machine: Machine, disk: BlkDriver, backend: FuseFile, kind: Kind, code: int
) -> None:
    """The request that met it fails; those around it, and the queue, do not notice."""
    bad = {Kind.IN: "read", Kind.OUT: "write", Kind.FLUSH: "flush"}[kind]
    at = 0 if kind == Kind.FLUSH else 8 * 512
    backend.judge = lambda operation, offset, length: (
        -code if operation == bad and offset == at else length
    )
    around = [start(disk, Kind.IN, 100 + 8 * i) for i in range(4)]
    failed = start(disk, kind, 8)
    around += [start(disk, Kind.IN, 200 + 8 * i) for i in range(4)]
    assert disk.wait(failed).status == Status.IOERR
    assert {disk.wait(each).status for each in around} == {Status.OK}
    stats = machine.channel.stats()
    assert stats[bad].errors == 1
    assert stats["read"].ops == 8
    backend.judge = lambda _operation, _offset, length: length
    assert disk.wait(start(disk, kind, 8)).status == Status.OK


def test_an_error_after_a_part_was_moved_is_an_error(disk: BlkDriver, backend: FuseFile) -> None:
    backend.judge = lambda _operation, offset, _length: 512 if offset == 0 else -errno.EIO
    assert disk.request(Kind.IN, 0, room=4096).status == Status.IOERR


# ---- a slow backend -------------------------------------------------------------------------


def test_a_backend_that_does_not_answer_holds_up_its_own_disk_only(
    machine: Machine, disk: BlkDriver, backend: FuseFile
) -> None:
    kept, machine.channel = machine.channel, malloc_bdev().open_channel(machine.reactor)
    machine.settle(machine.channel.activate())
    other = machine.add_queue()
    other_channel, machine.channel = machine.channel, kept
    backend.hold()
    slow = [start(disk, kind, 8 * i) for i, kind in enumerate([Kind.IN, Kind.IN, Kind.OUT])]
    step_until(machine, lambda: backend.held == 3)
    for sector in range(50):
        other.write(sector, bytes([sector]) * 512)
        assert other.read(sector, 512) == bytes([sector]) * 512
    disk.collect()
    assert [each.completion for each in slow] == [None] * 3
    backend.release()
    assert [disk.wait(each).status for each in slow] == [Status.OK] * 3
    machine.stop_queue(1)
    machine.settle(other_channel.close())


@pytest.mark.parametrize("how", ["gate", "remove", "close", "stop"])
def test_who_waits_for_a_slow_backend_waits_until_it_has_answered(
    machine: Machine, disk: BlkDriver, backend: FuseFile, how: str
) -> None:
    """Its answer goes into guest memory: nothing may be given back before."""
    backend.hold()
    slow = start(disk, Kind.IN, 0)
    step_until(machine, lambda: backend.held == 1)
    asked = machine.queues[0].stop if how == "stop" else getattr(machine.channel, how)
    answer = asked()
    machine.step(1000)
    assert not answer.done
    backend.release()
    machine.settle(answer)
    disk.collect()
    assert slow.completion is not None
    assert slow.completion.status == Status.OK


def test_a_removed_disk_fails_what_comes_while_a_slow_request_is_waited_for(
    machine: Machine, disk: BlkDriver, backend: FuseFile
) -> None:
    backend.hold()
    slow = start(disk, Kind.OUT, 0)
    step_until(machine, lambda: backend.held == 1)
    removed = machine.channel.remove()
    machine.step()
    assert disk.request(Kind.IN, 8, room=4096).status == Status.IOERR
    assert not removed.done
    backend.release()
    machine.settle(removed)
    assert disk.wait(slow).status == Status.OK
