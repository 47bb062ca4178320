"""The target in the background: start it, find it again, end it.

Context: the command line's process, never the target's. One folder of the user
holds what is known of the one background target: `target.json` (which process,
which sockets), `target.log` (its standard error) and a lock that keeps two
starts apart. The record is believed only as long as the process with this id
and this start time lives, so a crash leaves nothing that has to be mended.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from drivebay.errors import DrivebayError, HostError, InUse, NotFound, StateError
from drivebay.system.processes import start_ticks, stat_fields

__all__ = [
    "BackgroundTarget",
    "ProcessTimes",
    "end_process",
    "find_background",
    "make_state_folder",
    "process_times",
    "start_background",
    "state_folder",
]

_START_LIMIT_S = 180.0  # a slow host, and disks whose last user has just been killed
_STOP_LIMIT_S = 60.0
_LOOK_EVERY_S = 0.01
_ROOTS_SESSION = "/run/user/0"
_ERROR_MARK = "drivebay: error: "
_HINT_MARK = "hint: "


@dataclass(frozen=True)
class BackgroundTarget:
    """What `target start` remembers of the process that it started."""

    pid: int
    start_ticks: int  # of the process, since boot: tells it from a later one with the same id
    rpc_socket: str
    socket_dir: str
    log_file: str


@dataclass(frozen=True)
class ProcessTimes:
    """A process's age and the processor time of all its threads, in seconds."""

    age: float
    cpu: float


def state_folder() -> Path:
    """Return where the record, the log and, by default, the sockets of this user's target lie."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    root = os.geteuid() == 0
    # Root's session has a folder of its own, which goes when root logs out.
    if runtime and Path(runtime).is_absolute() and not (root and runtime == _ROOTS_SESSION):
        return Path(runtime) / "drivebay"
    if root:
        return Path("/run/drivebay")
    return Path(f"/tmp/drivebay-{os.geteuid()}")


def find_background() -> BackgroundTarget | None:
    """Return the background target if it is alive."""
    try:
        record = json.loads((state_folder() / "target.json").read_text(encoding="utf-8"))
        found = BackgroundTarget(**record)
    except (OSError, ValueError, TypeError):
        return None  # never started, or a record that nobody can use
    return found if start_ticks(found.pid) == found.start_ticks else None


def start_background(
    arguments: Sequence[str], rpc_socket: str, socket_dir: str, answers: Callable[[], bool]
) -> BackgroundTarget:
    """Start `drivebay vhost ARGUMENTS` and wait until ``answers`` says that its RPC does.

    Raises: InUse when one runs; what the target itself said when it did not start.
    """
    folder = make_state_folder()
    with _lock(folder):
        running = find_background()
        if running is not None:
            raise InUse(
                f"a background target runs already: process {running.pid}, "
                f"RPC socket '{running.rpc_socket}'",
                hint="drivebay target stop",
            )
        log_file = folder / "target.log"
        process = _spawn(arguments, log_file)
        _wait_for_answer(process, log_file, answers)
        record = BackgroundTarget(
            pid=process.pid,
            start_ticks=start_ticks(process.pid) or 0,
            rpc_socket=str(Path(rpc_socket).absolute()),
            socket_dir=str(Path(socket_dir).absolute()),
            log_file=str(log_file),
        )
        _write_record(folder, record)
        return record


def end_process(pid: int) -> None:
    """Send SIGTERM and wait until the process is gone.

    Raises: NotFound, HostError; StateError when it has not ended within a minute.
    """
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        raise NotFound(f"process {pid} has ended already") from None
    try:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        ready, _, _ = select.select([handle], [], [], _STOP_LIMIT_S)
    except PermissionError as error:
        raise HostError(
            f"user {os.geteuid()} may not end process {pid}",
            error.errno or errno.EPERM,
            hint=f"sudo kill {pid}",
        ) from error
    finally:
        os.close(handle)
    if not ready:
        raise StateError(
            f"process {pid} was told to end {_STOP_LIMIT_S:.0f} s ago and still runs: "
            "a backend may be holding requests back",
            hint=f"see its log, or end it the hard way: kill -9 {pid}",
        )


def process_times(pid: int) -> ProcessTimes | None:
    """Return a process's age and processor time, or None when it is not visible."""
    fields = stat_fields(pid)
    if fields is None:
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / ticks
    return ProcessTimes(age=age, cpu=(int(fields[11]) + int(fields[12])) / ticks)


def make_state_folder() -> Path:
    """Make the state folder unless it is there; only its owner may look into it.

    Root's lets others pass through, to the sockets that were made for them: QEMU never runs as
    root. Raises: HostError.
    """
    folder = state_folder()
    try:
        folder.mkdir(mode=_state_mode(), parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise HostError(
            f"can't make the state folder '{folder}'",
            error.errno or errno.EIO,
            path=str(folder),
            hint="set XDG_RUNTIME_DIR to a folder of yours",
        ) from error
    # Below /tmp anybody could have made it first and would then own the log and the sockets.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise HostError(
            f"the state folder '{folder}' is not a folder of user {os.geteuid()}",
            errno.EPERM,
            path=str(folder),
            hint="set XDG_RUNTIME_DIR to a folder of yours",
        )
    if stat.S_IMODE(status.st_mode) != _state_mode():
        folder.chmod(_state_mode())  # an earlier Drivebay let nobody pass
    return folder


def _state_mode() -> int:
    return 0o711 if os.geteuid() == 0 else 0o700


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keep two starts apart; released with the descriptor, so a crash leaves no lock."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(
                "another 'drivebay target start' is at work", hint="drivebay target status"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _spawn(arguments: Sequence[str], log_file: Path) -> subprocess.Popen[bytes]:
    if log_file.exists():
        log_file.replace(log_file.with_suffix(".log.old"))
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        # -P: a folder 'drivebay' where the user happens to be must not be run as ours.
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "drivebay", "vhost", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
        )
    finally:
        os.close(descriptor)


def _wait_for_answer(
    process: subprocess.Popen[bytes], log_file: Path, answers: Callable[[], bool]
) -> None:
    began = time.monotonic()
    while process.poll() is None:
        if answers():
            return
        waited = time.monotonic() - began
        if waited > _START_LIMIT_S:
            process.terminate()
            process.wait()
            raise StateError(
                f"the target did not answer within {_START_LIMIT_S:.0f} s and was ended",
                hint=f"its log: {log_file}",
            )
        time.sleep(_LOOK_EVERY_S + waited / 50)  # a slow processor is left to the target
    raise _reason(log_file, process.returncode)


def _reason(log_file: Path, code: int) -> DrivebayError:
    """Make an error of what the target printed before it ended."""
    message = f"the target ended at once, with exit code {code}"
    hint = f"its log: {log_file}"
    for line in log_file.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(_ERROR_MARK):
            message = line.removeprefix(_ERROR_MARK)
        elif line.startswith(_HINT_MARK):
            hint = line.removeprefix(_HINT_MARK)
    return StateError(message, hint=hint)


def _write_record(folder: Path, record: BackgroundTarget) -> None:
    fresh = folder / "target.json.new"
    fresh.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    fresh.replace(folder / "target.json")
