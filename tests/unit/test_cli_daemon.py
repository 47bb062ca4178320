"""What is remembered of a background target, and when it is not believed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from drivebay.errors import HostError, NotFound
from drivebay.system.processes import start_ticks
from drivebay.target import daemon
from drivebay.target.daemon import BackgroundTarget
from tests.fakes.process import wait_until


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return daemon.make_state_folder()


def record(folder: Path, **changes: object) -> BackgroundTarget:
    """Write a record of this very process, but for the changes."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    target = BackgroundTarget(
        pid=os.getpid(),
        start_ticks=int(fields[19]),
        rpc_socket="/r",
        socket_dir="/s",
        log_file="/l",
    )
    (folder / "target.json").write_text(json.dumps({**asdict(target), **changes}))
    return target


def test_the_state_folder_is_the_users_own(folder: Path, tmp_path: Path) -> None:
    assert folder == tmp_path / "drivebay"
    # QEMU, which is never root, passes through root's to the sockets that were made for it.
    assert folder.stat().st_mode & 0o777 == (0o711 if os.geteuid() == 0 else 0o700)
    mode = folder.stat().st_mode
    folder.chmod(0o755)
    assert daemon.make_state_folder() == folder
    assert folder.stat().st_mode == mode


def test_a_relative_runtime_folder_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "run")
    assert daemon.state_folder().is_absolute()


def test_a_live_process_is_found(folder: Path) -> None:
    assert daemon.find_background() is None
    assert record(folder) == daemon.find_background()


# Its first thread ends, and the other one holds the port until a line comes.
HALF_OVER = """
import ctypes, os, socket, sys, threading
held = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=lambda: (sys.stdin.readline(), os._exit(0))).start()
print(flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_lives_until_its_last_thread_ended() -> None:
    words = [sys.executable, "-c", HALF_OVER]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        wait_until(lambda: state(process.pid) == "Z", "the end of its first thread", 20)
        assert start_ticks(process.pid) is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        wait_until(lambda: start_ticks(process.pid) is None, "its end", 20)
        assert state(process.pid) == "Z"  # nobody has waited for it yet


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("change", [{"start_ticks": 1}, {"pid": 0}, {"surplus": 1}])
def test_another_process_with_the_same_id_is_not_ours(
    folder: Path, change: dict[str, object]
) -> None:
    record(folder, **change)
    assert daemon.find_background() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "{}", "\xff"])
def test_a_damaged_record_is_no_target(folder: Path, text: str) -> None:
    (folder / "target.json").write_bytes(text.encode("latin-1"))
    assert daemon.find_background() is None


def test_a_foreign_state_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "drivebay").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(HostError, match="is not a folder of user"):
        daemon.make_state_folder()


def test_a_process_that_has_ended_can_not_be_stopped() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    with pytest.raises(NotFound, match=f"process {process.pid} has ended already"):
        daemon.end_process(process.pid)


def test_times_of_a_process() -> None:
    before = daemon.process_times(os.getpid())
    assert before is not None
    total = sum(range(3_000_000))
    after = daemon.process_times(os.getpid())
    assert after is not None
    assert total
    assert after.age >= before.age > 0
    assert after.cpu >= before.cpu > 0
    assert daemon.process_times(0) is None
