"""vm/run.py: QEMUs that die, hang or listen to nobody, and what they inherit; shell scripts and
stand-ins, since the real one does nothing of that when it is asked to.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from drivebay.errors import HostError, InUse, StateError, UsageError
from drivebay.system.processes import GATE, Identity, start_ticks
from drivebay.vm import run
from drivebay.vm.hardware import Hardware, Listener, Memory
from drivebay.vm.kvm import Accelerator
from drivebay.vm.qemu import Qemu
from drivebay.vm.spec import DiskSpec
from drivebay.vm.spec_file import read_spec
from drivebay.vm.store import Vm
from drivebay.vm.vnc import CERTIFICATES
from tests.fakes.process import wait_until
from tests.fakes.qemu import script
from tests.fakes.qemu_monitor import FakeMonitor
from tests.unit.vm_folder import seem_to_run
from tests.unit.vm_world import World, idle_process

NOBODY = Identity(65534, 65534)


@pytest.fixture
def vm(world: World) -> Vm:
    return world.vm("web")


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with idle_process() as process:
        yield process


@pytest.fixture
def monitor(vm: Vm) -> Iterator[FakeMonitor]:
    fake = FakeMonitor(vm.monitor_socket)
    yield fake
    fake.close()


# ---- finding it again ---------------------------------------------------------------------------


def record(vm: Vm, **values: Any) -> None:
    values = {"accelerator": "tcg", "qemu": "/q", "text": vm.text, **values}
    vm.running_file.write_text(json.dumps(values))


def test_a_running_vm_is_found_by_its_process(vm: Vm, process: subprocess.Popen[bytes]) -> None:
    assert run.running(vm) is None
    seem_to_run(vm, process)
    found = run.running(vm)
    assert found is not None
    assert (found.pid, found.text) == (process.pid, vm.text)
    process.kill()
    # A zombie is not alive.
    wait_until(lambda: run.running(vm) is None, "its end", 20)


def test_another_process_with_its_number_is_not_believed(
    vm: Vm, process: subprocess.Popen[bytes]
) -> None:
    ticks = start_ticks(process.pid)
    assert ticks is not None
    record(vm, pid=process.pid, start_ticks=ticks + 1)
    assert run.running(vm) is None
    record(vm, pid=os.getpid(), start_ticks=ticks)
    assert run.running(vm) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "null", '{"pid": 1}', "\xff", '{"pid": 1, "more": 2}'],
)
def test_a_record_that_nobody_can_use(vm: Vm, text: str) -> None:
    vm.running_file.write_text(text, encoding="latin-1")
    assert run.running(vm) is None


@pytest.mark.parametrize("pid", [4194305, "x", None, [], -1, 0])
def test_a_record_without_a_process(vm: Vm, pid: Any) -> None:
    record(vm, pid=pid, start_ticks=None)
    assert run.running(vm) is None
    record(vm, pid=pid, start_ticks=0)
    assert run.running(vm) is None


def test_a_monitor_that_is_gone_is_said(vm: Vm) -> None:
    with pytest.raises(StateError, match="monitor of VM 'web' does not answer: No such file"):
        run.monitor(vm)


# ---- what it inherits ---------------------------------------------------------------------------


def flags_of(descriptor: int) -> int:
    text = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    return int(text.split("flags:")[1].split()[0], 8)


def test_files_by_descriptor(vm: Vm) -> None:
    path = vm.folder / "file"
    path.touch()
    with ExitStack() as stack:
        inherited = run.Descriptors(vm, None, stack)
        assert inherited.file(path) == "/dev/fdset/1"
        assert inherited.file(path, os.O_RDWR) == "/dev/fdset/2"
        modes = [(number, flags_of(fd) & os.O_ACCMODE) for fd, number in inherited.files]
        assert sorted(modes) == [(1, os.O_RDONLY), (2, os.O_RDONLY), (2, os.O_RDWR)]
        descriptors = [fd for fd, _ in inherited.files]
        assert sorted(inherited.inherited) == sorted(descriptors)
        assert all(flags_of(fd) & os.O_CLOEXEC for fd in descriptors)
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_a_file_that_is_not_there(vm: Vm) -> None:
    with ExitStack() as stack, pytest.raises(HostError, match="can't open '/none' for VM 'web'"):
        run.Descriptors(vm, None, stack).file(Path("/none"))


def test_a_listener_is_for_us_alone(vm: Vm) -> None:
    vm.console_socket.touch()  # of a run before
    with ExitStack() as stack:
        inherited = run.Descriptors(vm, None, stack)
        listener = inherited.listener(vm.console_socket, vm.console_log)
        assert listener == Listener(inherited.inherited[0], "/dev/fdset/1")
        assert stat.S_IMODE(vm.console_socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(vm.console_log.stat().st_mode) == 0o600
        ((log, _),) = inherited.files
        assert flags_of(log) & (os.O_APPEND | os.O_ACCMODE) == os.O_APPEND | os.O_WRONLY
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(vm.console_socket))
    with pytest.raises(ConnectionRefusedError), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(vm.console_socket))


def test_a_listener_that_cannot_be(vm: Vm) -> None:
    vm.console_socket.mkdir()
    with ExitStack() as stack:
        inherited = run.Descriptors(vm, None, stack)
        with pytest.raises(HostError, match=r"can't make the socket '.*console.sock'"):
            inherited.listener(vm.console_socket)
        with pytest.raises(UsageError, match="the kernel takes at most 107"):
            inherited.listener(vm.folder / ("x" * 100))


def test_a_kernel_has_its_own_path_for_our_own_qemu(vm: Vm) -> None:
    with ExitStack() as stack:
        assert run.Descriptors(vm, None, stack).readable(Path("/none")) == "/none"


def test_a_kernel_is_copied_for_another_user(vm: Vm, needs_root: None) -> None:
    kernel = vm.folder / "kernel"
    kernel.write_bytes(b"kernel")
    with ExitStack() as stack:
        inherited = run.Descriptors(vm, NOBODY, stack)
        before = sorted(path.name for path in vm.folder.iterdir())
        name = inherited.readable(kernel)
        (descriptor,) = inherited.inherited
        assert name == f"/proc/self/fd/{descriptor}"
        assert os.pread(descriptor, 100, 0) == b"kernel"
        status = os.fstat(descriptor)
        assert (status.st_uid, status.st_mode & 0o077) == (NOBODY.uid, 0)
        assert sorted(path.name for path in vm.folder.iterdir()) == before
        with pytest.raises(HostError, match="can't read '/none' for VM 'web'"):
            inherited.readable(Path("/none"))


@pytest.mark.parametrize("owner", [None, NOBODY])
def test_a_password_and_certificates_are_copied_for_the_start_alone(
    vm: Vm, owner: Identity | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if owner is not None:
        request.getfixturevalue("needs_root")
    secret = tmp_path / "secret"
    secret.write_text("secret\n")
    secret.chmod(0o600)
    for name in CERTIFICATES:
        (tmp_path / name).write_text(name)
    before = sorted(path.name for path in vm.folder.iterdir())
    uid = os.geteuid() if owner is None else owner.uid
    with ExitStack() as stack:
        inherited = run.Descriptors(vm, owner, stack)
        assert Path(inherited.secret(secret)).read_bytes() == b"secret"
        folder = Path(inherited.certificates(tmp_path))
        assert len(inherited.inherited) == 2
        for path in (Path(inherited.secret(secret)), folder, folder / "server-key.pem"):
            status = path.stat()
            assert (status.st_uid, status.st_mode & 0o077) == (uid, 0)
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            name: name for name in CERTIFICATES
        }
    assert sorted(path.name for path in vm.folder.iterdir()) == before


# ---- starting -----------------------------------------------------------------------------------


def launch(vm: Vm, text: str) -> run.Running:
    qemu = Qemu(script(vm.folder / "qemu", text), (9, 2))
    hardware = Hardware("web", Memory(65536), Listener(vm.monitor_socket), [])
    return run.launch(vm, qemu, Accelerator("tcg", ""), hardware, [], None)


def children() -> list[int]:
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [pid for pid in map(int, text.split()) if start_ticks(pid) is not None]


def test_one_that_answers_is_written_down(vm: Vm, monitor: FakeMonitor) -> None:
    vm.qemu_log.write_text("before")
    found = launch(vm, "echo hello; exec sleep 600")
    try:
        assert run.running(vm) == found
        assert (found.accelerator, found.text) == ("tcg", vm.text)
        assert found.qemu == str(vm.folder / "qemu")
        assert stat.S_IMODE(vm.running_file.stat().st_mode) == 0o600
        assert (vm.folder / "qemu.log.1").read_text() == "before"
        while vm.qemu_log.read_text() != "hello\n":
            assert found.alive()
        assert stat.S_IMODE(vm.qemu_log.stat().st_mode) == 0o600
        assert "query-status" in monitor.commands()
        with pytest.raises(InUse, match="VM 'web' runs already"):
            launch(vm, "exit 1")
    finally:
        run.end_by_force(vm, found)
    assert run.running(vm) is None


def test_one_that_still_starts_is_written_down_already(
    vm: Vm, monitor: FakeMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the tool is killed now, the next one finds it."""
    seen = []
    monkeypatch.setattr(run, "_wait_for_monitor", lambda vm, child: seen.append(run.running(vm)))
    found = launch(vm, "exec sleep 600")
    run.end_by_force(vm, found)
    assert seen == [found]


def test_one_that_was_not_written_down_never_begins(vm: Vm) -> None:
    """As when the tool is killed before: its end of the pipe is closed, and nothing is read."""
    (vm.folder / ".running.json.new").mkdir()
    with pytest.raises(HostError):
        launch(vm, f"touch {vm.folder}/begun")
    line = ["sh", "-c", GATE, "sh", "touch", str(vm.folder / "begun")]
    assert subprocess.run(line, stdin=subprocess.DEVNULL, check=False).returncode != 0
    assert not (vm.folder / "begun").exists()
    assert subprocess.run(line, input=b"go\n", check=False).returncode == 0
    assert (vm.folder / "begun").exists()


@pytest.mark.parametrize(
    ("words", "said", "mend"),
    [
        ("qemu-system-x86_64: -device x: no x", "'web': -device x: no x$", "its log: "),
        ("something else", "'web': something else$", "its log: "),
        (
            "qemu-system-x86_64: -netdev u: Could not set up host forwarding rule 'tcp'",
            "Could not set up",
            "drivebay vm set web --forward HOSTPORT:GUESTPORT",
        ),
        ("cannot set up guest memory 'm': Cannot allocate memory", "memory", "--memory SIZE"),
    ],
)
def test_one_that_dies_has_the_last_word(vm: Vm, words: str, said: str, mend: str) -> None:
    with pytest.raises(StateError, match=said) as caught:
        launch(vm, f'echo first; echo "{words}" >&2; exit 1')
    assert mend in str(caught.value.hint)
    assert not vm.running_file.exists()


def test_one_that_hangs_is_ended(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ANSWER_SECONDS", 0.1)
    before = children()
    with pytest.raises(StateError, match="did not answer within 0 s, and was ended") as caught:
        launch(vm, "exec sleep 600")
    assert children() == before
    assert str(caught.value.hint) == f"its log: {vm.qemu_log}"
    assert not vm.running_file.exists()


def test_one_that_cannot_be_written_down_is_ended(vm: Vm, monitor: FakeMonitor) -> None:
    (vm.folder / ".running.json.new").mkdir()
    before = children()
    with pytest.raises(HostError, match=r"can't write '.*running.json': Is a directory"):
        launch(vm, "exec sleep 600")
    assert children() == before


def test_a_host_that_cannot_start_anything(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostError, match=r"can't start QEMU of VM 'web' \('sh'\): No such"):
        launch(vm, "exit 1")


def test_a_disk_that_comes_and_goes_is_noted(vm: Vm, process: subprocess.Popen[bytes]) -> None:
    run.note_disk(vm, "d", DiskSpec("d", "p/x"))
    assert not vm.running_file.exists()
    seem_to_run(vm, process)
    run.note_disk(vm, "d", DiskSpec("d", "p/x"))
    run.note_disk(vm, "e", DiskSpec("e", "p/y"))
    run.note_disk(vm, "d", None)
    found = run.running(vm)
    assert found is not None
    assert read_spec("web", found.text).disks == (DiskSpec("e", "p/y"),)


# ---- ending -------------------------------------------------------------------------------------


def as_running(process: subprocess.Popen[Any]) -> run.Running:
    return run.Running(process.pid, start_ticks(process.pid) or 0, "tcg", "/q", "")


def test_one_that_ignores_the_first_signal_is_killed(
    vm: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "END_SECONDS", 0.1)
    command = ["sh", "-c", "trap '' TERM; echo; while :; do sleep 0.01; done"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        run.end_by_force(vm, as_running(process))
        assert process.wait(20) == -9


def test_one_that_listens_is_not_killed(vm: Vm) -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        run.end_by_force(vm, as_running(process))
        assert process.wait(20) == -15


def test_another_process_is_never_ended(vm: Vm, process: subprocess.Popen[bytes]) -> None:
    wrong = run.Running(process.pid, 1, "tcg", "/q", "")
    run.end_by_force(vm, wrong)
    assert process.poll() is None
    gone = run.Running(4194305, 1, "tcg", "/q", "")
    run.end_by_force(vm, gone)


def test_one_that_cannot_be_ended_is_said(
    vm: Vm, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = as_running(process)
    monkeypatch.setattr(run, "END_SECONDS", 0.0)
    monkeypatch.setattr("drivebay.vm.run.signal.pidfd_send_signal", lambda *words: None)
    with pytest.raises(StateError, match=f"process {process.pid}, QEMU of VM 'web', can't be"):
        run.end_by_force(vm, found)

    def refuse(*words: object) -> None:
        raise PermissionError

    monkeypatch.setattr("drivebay.vm.run.signal.pidfd_send_signal", refuse)
    with pytest.raises(HostError, match="can't end QEMU of VM 'web'") as caught:
        run.end_by_force(vm, found)
    assert caught.value.hint == f"sudo kill {process.pid}"


def test_waiting_has_an_end(process: subprocess.Popen[bytes]) -> None:
    found = as_running(process)
    assert not run.wait_for_end(found, 0)
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    assert run.wait_for_end(found, 20)


def test_the_power_button(vm: Vm, monitor: FakeMonitor) -> None:
    run.press_power_button(vm)
    assert monitor.commands() == ["system_powerdown"]
