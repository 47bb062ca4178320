"""What end-to-end tests share: a target per module, guests, and their logs when a test fails."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from drivebay.vm.guest_image import GuestImage, prepare_guest
from drivebay.vm.hardware import Disk
from drivebay.vm.kvm import choose_accelerator
from drivebay.vm.machine import Machine, MachineSpec
from drivebay.vm.qemu import find_qemu
from drivebay.vm.target import TargetProcess
from tests.e2e import debian_guest
from tests.e2e.bay import Bay
from tests.e2e.net_bay import NetBay, net_bay_in
from tests.e2e.vm_bay import VmBay

BUILDING = pytest.StashKey[subprocess.Popen[bytes] | None]()
LOGS_SHOWN = pytest.StashKey[dict[str, Path]]()
LOG_TAIL_BYTES = 4000

BootGuest = Callable[[str, Sequence[Disk]], Machine]


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    return prepare_guest(print)


@pytest.fixture(scope="session")
def debian_image() -> Path:
    """A Debian with cloud-init on a raw disk, not to be written to."""
    return debian_guest.debian_image()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="drivebay-e2e-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder whose name leaves room for socket names, and which QEMU's own user may enter."""
    with _folder() as path:
        yield path


@pytest.fixture
def own_folder() -> Iterator[Path]:
    """The same for one test. Not below pytest's, which another pytest closes when it starts."""
    with _folder() as path:
        yield path


@pytest.fixture(scope="module")
def logs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("logs")
    request.config.stash.setdefault(LOGS_SHOWN, {})[request.module.__name__] = path
    return path


@pytest.fixture(scope="module")
def target(folder: Path, logs: Path) -> Iterator[TargetProcess]:
    """A target of our own; at the module's end it must still be alive, and end well."""
    with TargetProcess(folder, logs / "target.log") as process:
        yield process
        assert not process.ended(), f"the target died: {process.log.read_text()[-500:]}"
        assert process.stop() == 0


@pytest.fixture(scope="module")
def boot_guest(guest_image: GuestImage, folder: Path, logs: Path) -> Iterator[BootGuest]:
    """Start a guest with these disks; wait for it with ``wait_ready``. Ended with the module."""
    with ExitStack() as stack:

        def boot(name: str, disks: Sequence[Disk]) -> Machine:
            spec = MachineSpec(disks, cpus=2)
            accelerator = choose_accelerator()
            machine = Machine(find_qemu(), accelerator, guest_image, spec, folder / name, logs)
            return stack.enter_context(machine)

        yield boot


@pytest.fixture
def bay(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Bay]:
    with tempfile.TemporaryDirectory(prefix="drivebay-", dir="/var/tmp") as name:
        monkeypatch.setenv("XDG_DATA_HOME", f"{name}/data")
        bay = Bay(Path(name), capsys)
        try:
            yield bay
        finally:
            bay.end()


@pytest.fixture(scope="module")
def vm_bay() -> Iterator[VmBay]:
    """A user without VMs, images or a target; whatever a module's tests make ends with it."""
    with (
        tempfile.TemporaryDirectory(prefix="drivebay-", dir="/var/tmp") as name,
        pytest.MonkeyPatch.context() as environment,
    ):
        folder = Path(name)
        folder.chmod(0o711)  # QEMU's own user passes through to the sockets of its disks
        (folder / "run").mkdir(mode=0o711)
        environment.setenv("XDG_DATA_HOME", f"{name}/data")
        environment.setenv("XDG_RUNTIME_DIR", f"{name}/run")
        bay = VmBay(folder)
        try:
            yield bay
        finally:
            bay.end()


@pytest.fixture(scope="module")
def net_bay() -> Iterator[NetBay]:
    """A host in a network namespace of its own; whatever a module's tests make ends with it."""
    with tempfile.TemporaryDirectory(prefix="drivebay-", dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o711)  # dnsmasq and QEMU are nobody, and pass through to their files
        with net_bay_in(folder) as bay:
            yield bay


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin with the Debian image at once if a test wants it, since it takes two minutes."""
    wanted = any("debian_image" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly:
        session.config.stash[BUILDING] = debian_guest.start_building()


def pytest_sessionfinish(session: pytest.Session) -> None:
    building = session.config.stash.get(BUILDING, None)
    if building is not None:
        debian_guest.end_building(building)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the ends of the module's logs to a failure: on CI nobody can look at the files."""
    report = yield
    folders = item.config.stash.get(LOGS_SHOWN, {})
    module = getattr(item, "module", None)
    if report.failed and module is not None and module.__name__ in folders:
        for path in sorted(folders[module.__name__].iterdir()):
            tail = path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
            report.sections.append((path.name, tail))
    return report
