"""`drivebay vm console|ssh|…` on a VM that seems to run; ssh and scp say what they were told."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.cli.completion import candidates
from drivebay.cli.vm import main
from drivebay.cli.vm_access import wait_until_ready
from drivebay.errors import NotFound, StateError, UsageError
from drivebay.vm.spec import Forward
from drivebay.vm.ssh import SshSilent
from drivebay.vm.store import Vm, Vms
from tests.fakes.qemu_agent import FakeAgent, done, says
from tests.unit.vm_folder import UUID, make_vm, seem_to_run, spec_of

# Says its words, one a line, and ends as the test wants.
PROGRAM = """#!/bin/sh
printf '%s\\n' "${0##*/}" "$@" > "$SSH_SAID"
exit "$SSH_CODE"
"""


def drivebay_vm(*arguments: str) -> int:
    return main(list(arguments))


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


@pytest.fixture
def vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: subprocess.Popen[bytes]) -> Vm:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    vm = make_vm(spec_of("web", Forward(2222, 22)))
    seem_to_run(vm, process)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ssh", "scp"):
        (programs / name).write_text(PROGRAM)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SSH_SAID", str(tmp_path / "said"))
    monkeypatch.setenv("SSH_CODE", "0")
    return vm


def said(tmp_path: Path) -> list[str]:
    return (tmp_path / "said").read_text().splitlines()


# ---- ssh ----------------------------------------------------------------------------------------


def test_ssh_is_told_where_and_whom(vm: Vm, tmp_path: Path) -> None:
    assert drivebay_vm("ssh", "web", "-l", "root", "--", "ls", "-l", "--", "x") == 0
    words = said(tmp_path)
    assert words[0] == "ssh"
    assert {"Port=2222", "User=root", f"HostKeyAlias=drivebay-{UUID}"} <= set(words)
    assert words[words.index("--") :] == ["--", "127.0.0.1", "ls", "-l", "--", "x"]


def test_the_port_is_that_of_the_running_vm(vm: Vm, tmp_path: Path) -> None:
    Vms().save(vm, spec_of("web", Forward(3333, 22)))
    assert drivebay_vm("ssh", "web") == 0
    assert "Port=2222" in said(tmp_path)


@pytest.mark.parametrize("code", [1, 7, 254])
def test_the_guests_exit_code_is_ours(vm: Vm, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setenv("SSH_CODE", str(code))
    assert drivebay_vm("ssh", "web", "--", "false") == code


@pytest.mark.parametrize("command", [["ssh", "web"], ["cp", "a", "web:"]])
def test_when_ssh_fails_a_guest_without_server_is_found_out(
    vm: Vm,
    monkeypatch: pytest.MonkeyPatch,
    process: subprocess.Popen[bytes],
    command: list[str],
) -> None:
    monkeypatch.setenv("SSH_CODE", "255")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        seem_to_run(Vms().save(vm, spec_of("web", Forward(port, 22))), process)
    with pytest.raises(SshSilent, match="no ssh server answers in VM 'web'"):
        drivebay_vm(*command)


def test_a_program_that_is_missing_is_named(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(StateError, match="there is no ssh on this host") as caught:
        drivebay_vm("ssh", "web")
    assert "openssh-client" in str(caught.value.hint)


def test_the_vm_of_a_copy_is_found_by_its_name(vm: Vm, tmp_path: Path) -> None:
    assert drivebay_vm("cp", "a:b", "c", "web:/tmp", "-l", "root") == 0
    words = said(tmp_path)
    assert words[0] == "scp"
    assert "User=root" in words
    assert words[words.index("--") :] == ["--", "./a:b", "./c", "127.0.0.1:/tmp"]


def test_a_copy_without_a_vm_is_refused(vm: Vm) -> None:
    with pytest.raises(UsageError, match="none of these is a path in a VM: a, db:b"):
        drivebay_vm("cp", "a", "db:b")


def test_the_configuration_is_of_the_vm_as_it_will_be(
    vm: Vm, capsys: pytest.CaptureFixture[str]
) -> None:
    Vms().save(vm, spec_of("web", Forward(3333, 22)))
    assert drivebay_vm("ssh-config", "web") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Host web\n")
    assert "    Port 3333\n" in printed


@pytest.mark.parametrize(
    "command", [["ssh", "web"], ["cp", "a", "web:"], ["console", "web"], ["exec", "web", "--", "x"]]
)
def test_a_vm_that_is_off_is_started_first(
    vm: Vm, process: subprocess.Popen[bytes], command: list[str]
) -> None:
    process.kill()
    process.wait()
    with pytest.raises(StateError, match="'web' is not running") as caught:
        drivebay_vm(*command)
    assert caught.value.hint == "drivebay vm start web"


# ---- guest agent --------------------------------------------------------------------------------


@pytest.fixture
def agent(vm: Vm) -> Iterator[FakeAgent]:
    agent = FakeAgent(vm.agent_socket)
    agent.will("guest-exec", says({"pid": 1}))
    agent.will("guest-exec-status", done(exitcode=3, **{"out-data": "aGkK", "err-data": "ISEK"}))
    agent.will("guest-ping", says({}))
    yield agent
    agent.close()


def test_a_program_leaves_its_words_and_code(
    agent: FakeAgent, capfd: pytest.CaptureFixture[str]
) -> None:
    assert drivebay_vm("exec", "web", "--", "cp", "--json", "x") == 3
    assert capfd.readouterr() == ("hi\n", "!!\n")
    started = next(heard for heard in agent.heard if heard["execute"] == "guest-exec")
    assert (started["arguments"]["path"], started["arguments"]["arg"]) == ("cp", ["--json", "x"])


def test_a_program_as_json(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    assert drivebay_vm("exec", "web", "--json", "--", "x") == 0
    assert json.loads(capsys.readouterr().out) == {
        "code": 3, "out": "hi\n", "err": "!!\n", "truncated": False
    }  # fmt: skip


def test_output_that_was_cut_off_is_said(
    agent: FakeAgent, capfd: pytest.CaptureFixture[str]
) -> None:
    agent.will("guest-exec-status", done(signal=200, **{"out-truncated": True}))
    assert drivebay_vm("exec", "web", "--", "x") == 255
    assert "cut off" in capfd.readouterr().err


def test_exec_without_a_program_is_refused(vm: Vm) -> None:
    with pytest.raises(UsageError, match="no program was named"):
        drivebay_vm("exec", "web")


# ---- log and wait -------------------------------------------------------------------------------


def test_a_log_is_printed_as_it_is(vm: Vm, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    vm.console_log.write_bytes(b"\x1b[2Jlogin: \xff")
    vm.qemu_log.write_bytes(b"qemu: warning\n")
    assert drivebay_vm("log", "web") == 0
    assert drivebay_vm("log", "web", "--qemu") == 0
    assert capfdbinary.readouterr().out == b"\x1b[2Jlogin: \xffqemu: warning\n"


def test_a_terminal_is_spared(
    vm: Vm, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    vm.console_log.write_bytes(b"a\x1b[2Jb\nlogin\x1b[6n: ")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert drivebay_vm("log", "web") == 0
    assert capfdbinary.readouterr().out == b"ab\nlogin: "


def test_a_log_is_followed(
    vm: Vm, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    more = [b"one\n", b"two\n"]

    def sleep(seconds: float) -> None:
        if not more:
            raise KeyboardInterrupt
        with vm.console_log.open("ab") as log:
            log.write(more.pop(0))

    monkeypatch.setattr("drivebay.cli.vm_access.time.sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        drivebay_vm("log", "web", "--follow")
    assert capfdbinary.readouterr().out == b"one\ntwo\n"


def test_a_vm_that_never_ran_has_no_log(vm: Vm) -> None:
    with pytest.raises(NotFound, match="never started"):
        drivebay_vm("log", "web")


def test_waiting_says_how_long_it_took(
    agent: FakeAgent, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drivebay_vm("wait", "web", "--for", "agent", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["name"], printed["for"]) == ("web", "agent")
    assert 0 <= printed["seconds"] < 60


def test_a_text_is_waited_for(vm: Vm, capsys: pytest.CaptureFixture[str]) -> None:
    vm.console_log.write_bytes(b"web login: ")
    assert drivebay_vm("wait", "web", "--for", "console", "login:", "--timeout", "30") == 0
    assert capsys.readouterr().out.startswith("VM 'web' has said it, after ")


def test_ready_is_when_somebody_can_log_in(
    vm: Vm,
    process: subprocess.Popen[bytes],
    agent: FakeAgent,
    capsys: pytest.CaptureFixture[str],
) -> None:
    vm = Vms().save(vm, spec_of("web"))
    seem_to_run(vm, process)
    wait_until_ready(vm)
    assert capsys.readouterr().out.startswith("VM 'web' has its guest agent up, after ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--for", "agent", "x"],
        ["--for", "console", "x", "y"],
        ["--for", "lunch"],
        ["--timeout", "-1"],
        ["--timeout", "nan"],
        ["--timeout", "soon"],
    ],
)
def test_waiting_for_what_is_nothing_is_refused(vm: Vm, arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        drivebay_vm("wait", "web", *arguments)


def test_names_are_completed(vm: Vm) -> None:
    assert candidates(["vm", "ssh", ""]) == ["web"]
    assert candidates(["vm", "ssh", "x"]) == []
    assert candidates(["vm", "create", ""]) == []


def test_words_for_nobody_are_refused(vm: Vm) -> None:
    with pytest.raises(UsageError, match="unrecognized arguments: x"):
        drivebay_vm("ssh-config", "web", "--", "x")
    with pytest.raises(UsageError, match="unrecognized arguments: ls"):
        drivebay_vm("ssh", "web", "ls")
