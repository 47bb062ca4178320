"""vm/guest_files.py and `vm cp --agent`: an agent that obeys in a folder of the test, that fails,
and that lies. Its scripts are run by this host's shell.
"""

from __future__ import annotations

import base64
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from drivebay.cli import vm_cp
from drivebay.cli.main import main
from drivebay.errors import DrivebayError, HostError, PeerError, StateError, UsageError
from drivebay.vm import guest_files
from drivebay.vm.agent import Agent, AgentRefused
from drivebay.vm.guest_files import copy_in, copy_out
from drivebay.vm.images.store import quiet
from drivebay.vm.spec import Forward
from drivebay.vm.ssh import SshSilent
from drivebay.vm.store import Vm
from tests.fakes.qemu_agent import FakeAgent, refuses, says
from tests.fakes.qemu_monitor import FakeMonitor
from tests.unit.vm_folder import make_vm, seem_to_run, spec_of
from tests.unit.vm_world import World, bare, idle_process

Heard = dict[str, Any]


class Guest:
    """Obeys as qemu-ga does."""

    def __init__(self, socket: Path) -> None:
        self.agent = FakeAgent(socket)
        self.open: dict[int, IO[bytes]] = {}
        self.most = 1 << 30  # bytes that one write takes
        self._ended: subprocess.CompletedProcess[bytes] | None = None
        for name in ("exec", "exec-status", "file-open", "file-read", "file-write", "file-flush",
                     "file-close"):  # fmt: skip
            obey = getattr(self, f"_{name.replace('-', '_')}")
            self.agent.will(f"guest-{name}", self._obeying(obey))

    def close(self) -> None:
        self.agent.close()
        for file in self.open.values():
            file.close()

    @staticmethod
    def _obeying(obey: Callable[[Heard], Any]) -> Callable[[Heard], bytes | None]:
        def answer(heard: Heard) -> bytes | None:
            try:
                return says(obey(heard["arguments"]))(heard)
            except OSError as error:
                return refuses(str(error))(heard)

        return answer

    def _exec(self, told: Heard) -> Any:
        self._ended = subprocess.run([told["path"], *told["arg"]], capture_output=True, check=False)
        return {"pid": 7}

    def _exec_status(self, told: Heard) -> Any:
        assert self._ended is not None
        return {
            "exited": True,
            "exitcode": self._ended.returncode,
            "out-data": base64.b64encode(self._ended.stdout).decode(),
            "err-data": base64.b64encode(self._ended.stderr).decode(),
        }

    def _file_open(self, told: Heard) -> Any:
        self.open[1000] = Path(told["path"]).open(told["mode"] + "b")  # noqa: SIM115
        return 1000

    def _file_read(self, told: Heard) -> Any:
        data = self.open[told["handle"]].read(told["count"])
        return {
            "count": len(data),
            "buf-b64": base64.b64encode(data).decode(),
            "eof": len(data) < told["count"],
        }

    def _file_write(self, told: Heard) -> Any:
        data = base64.b64decode(told["buf-b64"])[: self.most]
        return {"count": self.open[told["handle"]].write(data), "eof": False}

    def _file_flush(self, told: Heard) -> Any:
        self.open[told["handle"]].flush()
        return {}

    def _file_close(self, told: Heard) -> Any:
        self.open.pop(told["handle"]).close()
        return {}


@pytest.fixture
def guest(world: World) -> Iterator[Guest]:
    guest = Guest(world.folder / "agent.sock")
    yield guest
    guest.close()


@pytest.fixture
def agent(world: World, guest: Guest) -> Iterator[Agent]:
    with Agent(world.folder / "agent.sock", 5.0) as agent:
        yield agent


@pytest.fixture
def inside(world: World) -> Path:
    folder = world.folder / "inside"
    folder.mkdir()
    return folder


@pytest.fixture
def here(world: World) -> Path:
    folder = world.folder / "here"
    folder.mkdir()
    return folder


DATA = os.urandom(600_000)


def test_a_file_goes_in_with_its_mode(agent: Agent, guest: Guest, inside: Path, here: Path) -> None:
    (here / "a b").write_bytes(DATA)
    (here / "a b").chmod(0o777)
    told: list[tuple[int, int]] = []
    copy_in(agent, here / "a b", f"{inside}/it's", lambda what, *far: told.append(far),
            folder=False)  # fmt: skip
    assert (inside / "it's").read_bytes() == DATA
    assert (inside / "it's").stat().st_mode & 0o777 == 0o755, "what others may write is not"
    assert told[-1] == (len(DATA), len(DATA))
    assert len(told) > 1
    (here / "a b").write_bytes(b"new")
    copy_in(agent, here / "a b", f"{inside}/it's", quiet, folder=False)
    assert (inside / "it's").read_bytes() == b"new"
    assert [path.name for path in inside.iterdir()] == ["it's"]
    assert guest.open == {}


def test_a_folder_takes_files_by_their_names(agent: Agent, inside: Path, here: Path) -> None:
    (here / "f").write_bytes(b"x")
    for path in (str(inside), f"{inside}/"):
        copy_in(agent, here / "f", path, quiet, folder=True)
        assert (inside / "f").read_bytes() == b"x"
        (inside / "f").unlink()
    with pytest.raises(StateError, match="the guest refused: .* is no folder"):
        copy_in(agent, here / "f", f"{inside}/none", quiet, folder=True)
    with pytest.raises(StateError, match="the guest refused: "):
        copy_in(agent, here / "f", f"{inside}/none/f", quiet, folder=False)


def test_a_file_comes_out_with_its_mode(agent: Agent, inside: Path, here: Path) -> None:
    (inside / "it's").write_bytes(DATA)
    (inside / "it's").chmod(0o750)
    copy_out(agent, f"{inside}/it's", here / "new", quiet)
    assert (here / "new").read_bytes() == DATA
    assert (here / "new").stat().st_mode & 0o777 == 0o750
    copy_out(agent, f"{inside}/it's", here, quiet)
    (inside / "empty").touch()
    copy_out(agent, f"{inside}/empty", here / "new", quiet)
    assert (here / "new").read_bytes() == b""
    assert sorted(path.name for path in here.iterdir()) == ["it's", "new"]


def test_what_is_no_file_is_not_copied(agent: Agent, inside: Path, here: Path) -> None:
    with pytest.raises(UsageError, match="is a folder in the guest"):
        copy_out(agent, str(inside), here / "x", quiet)
    with pytest.raises(StateError, match="No such file"):
        copy_out(agent, f"{inside}/none", here / "x", quiet)
    with pytest.raises(UsageError, match="is a folder, and the guest agent"):
        copy_in(agent, here, str(inside), quiet, folder=False)
    with pytest.raises(UsageError, match="is no file"):
        copy_in(agent, Path("/dev/null"), str(inside), quiet, folder=False)
    with pytest.raises(HostError, match="No such file"):
        copy_in(agent, here / "none", str(inside), quiet, folder=False)
    with pytest.raises(UsageError, match="should begin with '/'"):
        copy_out(agent, "x", here, quiet)
    with pytest.raises(UsageError, match="should begin with '/'"):
        copy_in(agent, here / "none", "", quiet, folder=False)
    assert list(here.iterdir()) == list(inside.iterdir()) == []


def test_a_guest_that_takes_less_gets_the_rest(
    agent: Agent, guest: Guest, inside: Path, here: Path
) -> None:
    (here / "f").write_bytes(DATA)
    guest.most = 100_000
    copy_in(agent, here / "f", f"{inside}/f", quiet, folder=False)
    assert (inside / "f").read_bytes() == DATA


@pytest.mark.parametrize(
    ("command", "answer", "kind"),
    [
        ("guest-file-open", refuses("disabled"), AgentRefused),
        ("guest-file-open", says("1"), PeerError),
        ("guest-file-write", refuses("No space left on device"), AgentRefused),
        ("guest-file-write", says({"count": 0, "eof": False}), StateError),
        ("guest-file-write", says({"count": 1 << 40}), PeerError),
        ("guest-file-write", says(None), PeerError),
        ("guest-file-flush", refuses("No space left on device"), AgentRefused),
        ("guest-file-close", refuses("Input/output error"), AgentRefused),
    ],
)
def test_a_write_that_fails_leaves_nothing_in_the_guest(
    agent: Agent, guest: Guest, inside: Path, here: Path, command: str, answer: Any,
    kind: type[DrivebayError],
) -> None:  # fmt: skip
    (inside / "f").write_bytes(b"old")
    (here / "f").write_bytes(DATA)
    guest.agent.will(command, answer)
    with pytest.raises(kind):
        copy_in(agent, here / "f", f"{inside}/f", quiet, folder=False)
    assert [path.name for path in inside.iterdir()] == ["f"]
    assert (inside / "f").read_bytes() == b"old"


def piece(data: bytes, count: int | None = None, *, eof: bool = False) -> Any:
    encoded = base64.b64encode(data).decode()
    return says({"count": len(data) if count is None else count, "buf-b64": encoded, "eof": eof})


@pytest.mark.parametrize(
    ("answer", "kind", "sentence"),
    [
        (refuses("Input/output error"), AgentRefused, "Input/output"),
        (piece(b"xyz", 4), PeerError, "promised 4 bytes"),
        (piece(b""), PeerError, "promised 0 bytes"),
        (piece(b"", 1 << 30), PeerError, "answered 'guest-file-read'"),
        (says({"count": 3, "buf-b64": "?", "eof": True}), PeerError, "no base64"),
        (piece(bytes(200_000)), StateError, "it grows, or has no end"),
    ],
)
def test_a_read_that_fails_leaves_nothing_here(
    agent: Agent, guest: Guest, inside: Path, here: Path, answer: Any, kind: type[DrivebayError],
    sentence: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(guest_files, "_GROWTH_MOST", 1 << 20)
    (inside / "f").write_bytes(b"data")
    (here / "f").write_bytes(b"old")
    guest.agent.will("guest-file-read", answer)
    with pytest.raises(kind, match=sentence):
        copy_out(agent, f"{inside}/f", here / "f", quiet)
    assert [path.name for path in here.iterdir()] == ["f"]
    assert (here / "f").read_bytes() == b"old"
    assert guest.open == {}


def test_a_full_disk_here_has_no_half_file(agent: Agent, inside: Path, small_tmpfs: Path) -> None:
    (inside / "f").write_bytes(bytes(8 << 20))
    with pytest.raises(HostError, match="No space left"):
        copy_out(agent, f"{inside}/f", small_tmpfs / "f", quiet)
    assert list(small_tmpfs.iterdir()) == []


def test_what_the_guest_says_does_nothing_to_a_terminal(
    agent: Agent, guest: Guest, here: Path
) -> None:
    evil = {"exited": True, "exitcode": 1, "err-data": base64.b64encode(b"\x1b[2Jgone").decode()}
    guest.agent.will("guest-exec-status", says(evil))
    with pytest.raises(StateError) as caught:
        copy_out(agent, "/x", here / "f", quiet)
    assert str(caught.value) == "the guest refused: ?[2Jgone"


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture
def vm(world: World) -> Iterator[Vm]:
    """A VM without a network, which seems to run."""
    vm = world.vms.create(bare("web"), lambda vm: None)
    monitor = FakeMonitor(vm.monitor_socket)
    monitor.answers["query-chardev"] = [{"label": "agent", "frontend-open": True}]
    with idle_process() as process:
        seem_to_run(vm, process)
        yield vm
    monitor.close()


@pytest.fixture
def obeying(vm: Vm) -> Iterator[Guest]:
    """Its agent."""
    guest = Guest(vm.agent_socket)
    yield guest
    guest.close()


def test_without_a_network_the_agent_copies_and_that_is_said(
    obeying: Guest, inside: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "f").write_bytes(DATA)
    assert main(["vm", "cp", str(here / "f"), f"web:{inside}"]) == 0
    assert (inside / "f").read_bytes() == DATA
    assert "has no network, so ssh can't reach it; the guest agent copies, as root" in (
        capsys.readouterr().err
    )


def test_the_agent_copies_several_if_it_is_told_to(
    obeying: Guest, inside: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("f", "g"):
        (inside / name).write_text(name)
    paths = [f"web:{inside}/{name}" for name in ("f", "g")]
    assert main(["vm", "cp", "--agent", *paths, str(here)]) == 0
    assert [(here / name).read_text() for name in ("f", "g")] == ["f", "g"]
    assert capsys.readouterr().err == ""
    assert main(["vm", "cp", "--agent", *paths, str(here / "none")]) == 2
    assert "is no folder, and several files" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["-l", "joe"], []])
def test_nobody_else_copies_for_a_user_or_without_an_agent(
    vm: Vm, here: Path, words: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if not words:
        monkeypatch.setattr("drivebay.cli.vm_cp._agent_listens", lambda vm: False)
    assert main(["vm", "cp", "web:/x", str(here), *words]) == 1
    assert "has no network, so ssh can't reach it" in capsys.readouterr().err
    assert main(["vm", "cp", "--agent", "-l", "joe", "web:/x", str(here)]) == 2
    assert "leave --login out" in capsys.readouterr().err


def test_an_ssh_server_that_is_not_there_is_seen_and_the_agent_copies(
    world: World, inside: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = make_vm(spec_of("web", Forward(2222, 22)))
    guest = Guest(vm.agent_socket)
    (here / "f").write_bytes(b"x")

    def silent(vm: object, spec: object, command: list[str]) -> int:
        assert command[0] == "scp"
        raise SshSilent("no ssh server answers in VM 'web'")

    monkeypatch.setattr(vm_cp, "run_ssh", silent)
    monkeypatch.setattr(vm_cp, "_agent_listens", lambda vm: True)
    with idle_process() as process:
        seem_to_run(vm, process)
        assert main(["vm", "cp", str(here / "f"), f"web:{inside}/f"]) == 0
    guest.close()
    assert (inside / "f").read_bytes() == b"x"
