"""A disk's backend fails, does not answer, or is taken away, with guests' requests in flight.

The backend is a FUSE file whose answers the test gives; the target is a process of its own.
What the guest sees is what docs/architecture.md says.
"""

from __future__ import annotations

import errno
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.driver import BlkDriver, Kind, Pending, Session, Status
from tests.fakes.fuse import FuseFile
from tests.fakes.process import TargetProcess, wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_uring]

MIB = 1 << 20
DATA = bytes(range(256)) * (4 * MIB // 256)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TargetProcess]:
    target = TargetProcess(tmp_path_factory.mktemp("target"))
    try:
        target.malloc("Good0")
        target.controller("good", "Good0")
        yield target
        assert target.stop() == 0, target.log()[-4000:]
        assert "Traceback" not in target.log()
    finally:
        target.kill()


@pytest.fixture
def backend(target: TargetProcess, tmp_path: Path) -> Iterator[FuseFile]:
    """Behind bdev Bad0 and controller bad."""
    with FuseFile(tmp_path / "backend", DATA) as backend:
        add_disk(target, backend)
        yield backend
        backend.release()
        for method, params in (
            ("vhost_delete_controller", {"ctrlr": "bad", "force": True}),
            ("bdev_aio_delete", {"name": "Bad0"}),
        ):
            if "Bad0" in bdevs(target):
                target.rpc(method, **params)
        wait_until(lambda: target.guest_mappings() == 0, "every session's memory is given back")


def add_disk(target: TargetProcess, backend: FuseFile) -> Path:
    target.rpc("bdev_aio_create", name="Bad0", filename=str(backend.path), block_size=512)
    return target.controller("bad", "Bad0")


def bdevs(target: TargetProcess) -> list[str]:
    return [bdev["name"] for bdev in target.rpc("bdev_get_bdevs")]


def send(disk: BlkDriver, *kinds: Kind) -> list[Pending]:
    pending = [
        disk.queue(kind, 64 + 8 * i, b"new!" * 1024 if kind == Kind.OUT else b"", room=room(kind))
        for i, kind in enumerate(kinds)
    ]
    disk.publish()
    return pending


def room(kind: Kind) -> int:
    return 4096 if kind == Kind.IN else 0


def others_are_served(target: TargetProcess) -> None:
    with Session(target.folder / "good") as session:
        session.disk.write(0, b"\x07" * 512)
        assert session.disk.read(0, 512) == b"\x07" * 512


def test_an_error_reaches_the_guest_and_nothing_else_happens(
    target: TargetProcess, backend: FuseFile
) -> None:
    with Session(target.folder / "bad") as session:
        disk = session.disk
        backend.judge = lambda _operation, _offset, _length: -errno.EIO
        for kind in (Kind.IN, Kind.OUT, Kind.FLUSH):
            (pending,) = send(disk, kind)
            assert disk.wait(pending).status == Status.IOERR
        backend.judge = lambda _operation, _offset, length: length
        assert disk.read(0, 4096) == DATA[:4096]


def test_a_slow_backend_keeps_its_own_guest_waiting(
    target: TargetProcess, backend: FuseFile
) -> None:
    """No request times out here: the guest's driver has its own patience."""
    with Session(target.folder / "bad") as session:
        backend.hold()
        pending = send(session.disk, Kind.IN, Kind.IN, Kind.OUT)
        wait_until(lambda: backend.held == 3, "all requests are at the backend")
        others_are_served(target)
        session.disk.collect()
        assert [each.completion for each in pending] == [None] * 3
        backend.release()
        assert [session.disk.wait(each).status for each in pending] == [Status.OK] * 3
    assert backend.data[80 * 512 :][:4096] == b"new!" * 1024


def in_background(
    pool: ThreadPoolExecutor, target: TargetProcess, method: str, **params: Any
) -> Any:
    return pool.submit(target.rpc, method, **params)


def is_held_back(disk: BlkDriver, backend: FuseFile, slow: list[Pending]) -> Pending | None:
    """One more read, if it stays with the target; else it is a slow one at the backend."""
    before = backend.held
    (one,) = send(disk, Kind.IN)
    time.sleep(0.3)
    if backend.held == before:
        return one
    slow.append(one)
    return None


def test_a_disk_removed_while_its_backend_is_slow(target: TargetProcess, backend: FuseFile) -> None:
    """What is at the backend ends as the backend says; what comes later fails; then it is gone.

    The name is free a moment before the reactor hears of it, so the first late ones may be slow.
    """
    with Session(target.folder / "bad") as session, ThreadPoolExecutor() as pool:
        backend.hold()
        slow = send(session.disk, Kind.IN, Kind.OUT)
        wait_until(lambda: backend.held == 2, "all requests are at the backend")
        removal = in_background(pool, target, "bdev_aio_delete", name="Bad0")
        wait_until(lambda: "Bad0" not in bdevs(target), "the name is free")
        late = None
        while late is None:
            late = is_held_back(session.disk, backend, slow)
        others_are_served(target)
        assert not removal.done()
        backend.release()
        assert removal.result() is True
        assert [session.disk.wait(each).status for each in slow] == [Status.OK] * len(slow)
        assert session.disk.wait(late).status == Status.IOERR
        assert session.capacity() == 0
    target.rpc("vhost_delete_controller", ctrlr="bad")


def test_a_controller_deleted_while_its_backend_is_slow(
    target: TargetProcess, backend: FuseFile
) -> None:
    """The guest is cut off at once; its memory stays until the backend has answered."""
    with Session(target.folder / "bad") as session:
        backend.hold()
        send(session.disk, Kind.IN, Kind.OUT)
        wait_until(lambda: backend.held == 2, "all requests are at the backend")
        assert target.rpc("vhost_delete_controller", ctrlr="bad", force=True) is True
        assert session.front_end.hung_up()
    assert target.guest_mappings() > 0
    others_are_served(target)
    target.controller("bad", "Bad0")
    backend.release()
    with Session(target.folder / "bad") as again:
        assert again.disk.read(0, 512) == DATA[:512]


def test_the_target_ends_when_a_slow_backend_has_answered(tmp_path: Path) -> None:
    target = TargetProcess(tmp_path)
    try:
        with FuseFile(tmp_path / "backend", DATA) as backend:
            add_disk(target, backend)
            with Session(target.folder / "bad") as session:
                backend.hold()
                send(session.disk, Kind.OUT)
                wait_until(lambda: backend.held == 1, "the request is at the backend")
                target.process.send_signal(signal.SIGTERM)
                wait_until(session.front_end.hung_up, "the session ends")
                assert target.process.poll() is None
                backend.release()
                assert target.process.wait(30) == 0
                assert backend.data[64 * 512 :][:4096] == b"new!" * 1024
    finally:
        target.kill()
