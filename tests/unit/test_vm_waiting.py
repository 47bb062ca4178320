"""vm/waiting.py: goals that are there, come, never come, or end before they come."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.errors import StateError, UsageError
from drivebay.vm.run import Running
from drivebay.vm.spec import Forward
from drivebay.vm.store import Vm
from drivebay.vm.waiting import _on_console, nearest_goal, wait_for
from tests.fakes.qemu_agent import FakeAgent, says
from tests.unit.vm_folder import make_vm, seem_to_run, spec_of

LONG = 60.0


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr("drivebay.vm.waiting._EVERY_S", 0.01)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def running_vm(process: subprocess.Popen[bytes], *forwards: Forward) -> Vm:
    vm = make_vm(spec_of("web", *forwards))
    seem_to_run(vm, process)
    return vm


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def test_ssh_is_there_when_its_server_names_itself(process: subprocess.Popen[bytes]) -> None:
    """The first connection is QEMU's alone: no server is up in the guest yet."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for banner in (b"", b"SSH-2.0-x\r\n"):
                connection, _ = server.accept()
                with connection:
                    connection.sendall(banner)

        thread = threading.Thread(target=serve)
        thread.start()
        vm = running_vm(process, Forward(server.getsockname()[1], 22))
        assert nearest_goal(vm) == "ssh"
        assert 0 < wait_for(vm, "ssh", LONG) < LONG
        thread.join(LONG)


def test_without_a_port_no_time_helps(process: subprocess.Popen[bytes]) -> None:
    vm = running_vm(process)
    assert nearest_goal(vm) == "agent"
    with pytest.raises(StateError, match="no port of this host leads"):
        wait_for(vm, "ssh", LONG)


def test_the_agent_is_there_when_it_answers(process: subprocess.Popen[bytes]) -> None:
    vm = running_vm(process)
    agent = FakeAgent(vm.agent_socket)
    agent.will("guest-ping", says({}))
    try:
        wait_for(vm, "agent", LONG)
    finally:
        agent.close()
    assert agent.commands() == ["guest-ping"]


def test_a_text_may_come_in_pieces(tmp_path: Path) -> None:
    log = tmp_path / "log"
    look = _on_console(log, b"login:")
    assert not look(LONG)
    for piece in (b"web lo", b"g", b"in"):
        with log.open("ab") as file:
            file.write(piece)
        assert not look(LONG)
    with log.open("ab") as file:
        file.write(b": ")
    assert look(LONG)


def test_last_words_count(
    process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VM says them and ends between two looks."""
    vm = running_vm(process)
    looks = iter(["it is found", "it lives"])

    def alive(found: Running) -> bool:
        if next(looks, None) is None:
            vm.console_log.write_bytes(b"reboot: Power down\r\n")
            return False
        return True

    monkeypatch.setattr(Running, "alive", alive)
    wait_for(vm, "console", LONG, "Power down")


def test_a_vm_that_ends_ends_the_waiting(process: subprocess.Popen[bytes]) -> None:
    vm = running_vm(process)
    killer = threading.Timer(0.05, end, [process])
    killer.start()
    with pytest.raises(StateError, match="ended before there was 'login:' on the console"):
        wait_for(vm, "console", LONG, "login:")
    killer.join()


@pytest.mark.parametrize(
    ("goal", "why"),
    [("agent", "there was no agent"), ("console", "no 'x' on the console"), ("stopped", "still")],
)
def test_time_is_over_some_time(process: subprocess.Popen[bytes], goal: str, why: str) -> None:
    vm = running_vm(process)
    with pytest.raises(StateError, match=f"in vain: after 0.02 s .*{why}") as caught:
        wait_for(vm, goal, 0.02, "x")
    assert caught.value.hint == "drivebay vm log web"


def test_what_has_stopped_is_not_waited_for(process: subprocess.Popen[bytes]) -> None:
    vm = running_vm(process)
    end(process)
    wait_for(vm, "stopped", 0.0)
    with pytest.raises(StateError, match="'web' is not running") as caught:
        wait_for(vm, "agent", LONG)
    assert caught.value.hint == "drivebay vm start web"


def test_an_end_is_noticed(process: subprocess.Popen[bytes]) -> None:
    vm = running_vm(process)
    killer = threading.Timer(0.05, end, [process])
    killer.start()
    wait_for(vm, "stopped", LONG)
    killer.join()


@pytest.mark.parametrize(("goal", "text"), [("lunch", None), ("console", None), ("console", "")])
def test_a_goal_that_is_none_is_refused(
    process: subprocess.Popen[bytes], goal: str, text: str | None
) -> None:
    with pytest.raises(UsageError):
        wait_for(running_vm(process), goal, LONG, text)
