"""Places and devices that unit tests of disks need: a folder on a disk, one in memory, a loop
device, huge pages, a web server. What only root may make is skipped for others, except on CI.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.fakes.web_server import WebServer
from tests.unit.vm_world import World, made_world

HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
ROOT = Path(__file__).resolve().parent.parent.parent


def run(*command: str) -> str:
    """Run a command; its output. A failure shows what it said."""
    done = subprocess.run(command, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
    return done.stdout.strip()


def file_system_of(path: Path) -> str:
    return run("stat", "-f", "-c", "%T", str(path))


@pytest.fixture
def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may make devices and mounts")


@pytest.fixture
def disk_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system that keeps its files on a disk."""
    if file_system_of(tmp_path) != "tmpfs":
        yield tmp_path
        return
    for place in (Path("/var/tmp"), ROOT):
        if os.access(place, os.W_OK) and file_system_of(place) != "tmpfs":
            folder = Path(tempfile.mkdtemp(prefix="drivebay-test-", dir=place))
            yield folder
            shutil.rmtree(folder)
            return
    pytest.skip("every folder that may be written is in memory")


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder on tmpfs."""
    folder = Path(tempfile.mkdtemp(prefix="drivebay-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """Threads of Python take turns as often as they can, so that their races are run."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


LoopDevice = Callable[..., Path]


@pytest.fixture
def loop_device(needs_root: None, disk_folder: Path) -> Iterator[LoopDevice]:
    """Makes loop devices: loop_device(size, *options of losetup)."""
    made: list[str] = []

    def make(size: int, *options: str) -> Path:
        backing = disk_folder / f"loop{len(made)}"
        with backing.open("wb") as file:
            file.truncate(size)
        made.append(run("losetup", "--find", "--show", *options, str(backing)))
        return Path(made[-1])

    yield make
    for device in made:
        run("losetup", "--detach", device)


@pytest.fixture
def small_tmpfs(needs_root: None, tmp_path: Path) -> Iterator[Path]:
    """A file system that is soon full: 4 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place))
    yield place
    run("umount", str(place))


@pytest.fixture
def huge_pages() -> Callable[[int], AbstractContextManager[None]]:
    """Reserves huge pages of 2 MiB for as long as a test needs them."""

    @contextmanager
    def reserve(count: int) -> Iterator[None]:
        before = int(HUGE_PAGES.read_text())
        if before < count and not os.access(HUGE_PAGES, os.W_OK):
            pytest.skip("no huge pages are reserved, and only root may reserve them")
        HUGE_PAGES.write_text(str(before + count))
        try:
            assert int(HUGE_PAGES.read_text()) == before + count, "no room for huge pages"
            yield
        finally:
            HUGE_PAGES.write_text(str(before))

    return reserve


@pytest.fixture
def web_server() -> Iterator[WebServer]:
    """A web server that does what a test tells it, wrong things, too."""
    served = WebServer()
    yield served
    served.close()


@pytest.fixture
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and cache of this test alone; no proxy; no target."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(
        "drivebay.disks.connection.find_socket", lambda named: named or str(tmp_path / "none")
    )


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """VMs, images and a model of a target, all of this test alone."""
    with made_world(monkeypatch) as made:
        yield made
