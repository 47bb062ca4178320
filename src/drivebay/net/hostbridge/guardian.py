"""The guardian: a process in a session of its own that takes a change back unless it is confirmed.

Context: started by `apply` before anything moves; survives the login that started it. It knows
only the files of ``change``, and so does whoever confirms.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from drivebay.errors import DrivebayError, StateError
from drivebay.net.hostbridge.change import CONFIRMING, MOVING, Change
from drivebay.net.hostbridge.kernel import Kernel
from drivebay.net.hostbridge.return_trip import take_back
from drivebay.net.hostbridge.state import boot_seconds

__all__ = ["main", "start"]

LOG: Final = "guardian.log"
_LOOK_EVERY_S: Final = 0.2
_MOVING_SECONDS: Final = 60.0  # they take milliseconds, and in an emulated host seconds
_START_SECONDS: Final = 60.0
_AGAIN_SECONDS: Final = 5.0
_TRIES: Final = 100


def start(change: Change, seconds: float) -> None:
    """Start it, and wait until it watches. Raises: StateError; then nothing may be moved."""
    (change.folder / "guardian.json").unlink(missing_ok=True)
    log = change.folder / LOG
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "drivebay.net.hostbridge.guardian", str(change.folder),
             str(seconds)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            cwd="/", env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + _START_SECONDS
    while change.guarded() is None:
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace").strip().rpartition("\n")[2]
            with contextlib.suppress(OSError):
                process.kill()
            raise StateError(f"no guardian, so nothing was changed; it said: {said or 'nothing'}")
        time.sleep(0.02)
    process.returncode = 0  # it outlives us


def main(folder: str, seconds: str) -> None:
    """Watch, and take the change back when its time is over or its command has died."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    change = Change(Path(folder))
    with Kernel():  # all that restoring needs is read from the disk now
        pass
    change.guard(float(seconds))
    why = _wait(change)
    if why is None:
        return
    for _ in range(_TRIES):
        try:
            change.end_mover()
            with change.locked():
                if change.waits() and change.phase() != CONFIRMING:
                    take_back(change, why)
            return
        except DrivebayError as error:
            print(f"{error}; trying again", flush=True)
            time.sleep(_AGAIN_SECONDS)


def _wait(change: Change) -> str | None:
    """Until the change has to be taken back: returns why; None when it is confirmed or undone."""
    moving_until = boot_seconds() + _MOVING_SECONDS
    while True:
        time.sleep(_LOOK_EVERY_S)
        if not change.waits():
            return None
        if change.broken_off():
            return "its command was broken off"
        if change.phase() == MOVING and boot_seconds() > moving_until:
            return f"its moves were not done after {_MOVING_SECONDS:.0f} seconds"
        if change.guarded() == 0:
            return "nobody confirmed it in time"


if __name__ == "__main__":
    main(*sys.argv[1:])
