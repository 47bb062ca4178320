"""One real target for all hostile tests, a neighbour on it, and the proof that neither noticed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.driver import Session
from tests.fakes.process import RpcError, TargetProcess
from tests.hostile.vhost_user.neighbour import Neighbour

numbers = itertools.count()

OPEN_FILES = 1024  # what the target may have


class Victim:
    """A controller made for one test: its name, socket, and where the log began."""

    def __init__(self, target: TargetProcess, name: str, path: Path) -> None:
        self.target = target
        self.name = name
        self.path = path
        self.mark = target.mark()

    def expect_sentence(self, pattern: str = r" ends: ") -> str:
        """A logged line about this controller: the bad one ended with a reason."""
        return self.target.wait_for_line(rf"'{self.name}(s\d+)?'.*{pattern}", self.mark)

    def expect_end(self, pattern: str = "") -> str:
        """A sentence other than that the front end went away by itself."""
        return self.expect_sentence(rf" ends: (?!the front end hung up$).*{pattern}")


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TargetProcess]:
    target = TargetProcess(tmp_path_factory.mktemp("target"), open_files=OPEN_FILES)
    try:
        target.malloc("Good0")
        target.malloc("Bad0")
        image = target.folder / "bad.img"
        image.write_bytes(bytes(8 << 20))
        target.rpc("bdev_aio_create", name="File0", filename=str(image), block_size=512)
        # A reactor keeps its io_uring once it has one: what follows is measured after that.
        with Session(target.controller("warm", "File0")) as session:
            session.disk.read(0, 512)
        yield target
        assert target.stop() == 0, target.log()[-4000:]
        assert "Traceback" not in target.log(), "a hostile session found a fault of our own"
    finally:
        target.kill()


@pytest.fixture(scope="session")
def neighbour(target: TargetProcess) -> Iterator[Neighbour]:
    neighbour = Neighbour(target.controller("good", "Good0"))
    try:
        neighbour.expect_progress()
        yield neighbour
    finally:
        neighbour.stop()


@pytest.fixture(autouse=True)
def nobody_notices(target: TargetProcess, neighbour: Neighbour) -> Iterator[None]:
    """After each test: the neighbour goes on, the target lives, and nothing leaked."""
    before = target.holds()
    yield
    target.expect_alive()
    neighbour.expect_progress()
    target.expect_holds(before)


@pytest.fixture
def victim(target: TargetProcess, nobody_notices: None) -> Iterator[Victim]:
    """A controller of its own for the hostile session, on a disk that may be spoilt."""
    name = f"bad{next(numbers)}"
    yield Victim(target, name, target.controller(name, "Bad0"))
    try:
        target.rpc("vhost_delete_controller", ctrlr=name)
    except RpcError:
        target.rpc("vhost_delete_controller", ctrlr=name, force=True)
