"""A target for a command that needs one: the one that runs, or one that is started for it.

Context: a short-lived process. The started target is that of `drivebay target start`: in the
background, with its state kept, and ended by `drivebay target stop`. Its RPC socket lies in this
user's state folder, since the usual one may be another user's.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from drivebay.disks.connection import connect
from drivebay.errors import InUse, StateError, Unreachable
from drivebay.target.daemon import make_state_folder

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["connect_or_start"]

_START_SECONDS = 240.0


def connect_or_start(named: str | None) -> Client:
    """Connect to the target; without a socket that was named, start one when none answers.

    Raises: Unreachable; StateError with what the target said when it does not start.
    """
    try:
        return connect(named)
    except Unreachable:
        if named is not None:
            raise
    # -P: a folder 'drivebay' where the user happens to be must not be run as ours.
    command = [sys.executable, "-P", "-m", "drivebay", "target", "start"]
    command += ["-r", str(make_state_folder() / "rpc.sock")]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_START_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise StateError(
            f"the target did not start within {_START_SECONDS:.0f} s", hint="drivebay target status"
        ) from error
    if done.returncode == 0:
        return connect(None)
    try:
        return connect(None)  # another command was quicker
    except Unreachable:
        raise InUse(
            "no target runs, and none could be started: "
            + (done.stderr.strip().removeprefix("drivebay: error: ") or "it said nothing"),
            hint="drivebay target start",
        ) from None
