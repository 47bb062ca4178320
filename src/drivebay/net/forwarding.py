"""Whether the host passes packets on: turned on for the networks that need it, and back again.

Context: a short-lived process of root, which holds the lock of what networks share. The value
before is written down before it is changed. It counts for one boot: what a later boot has set by
itself is the host's own wish.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Final

from drivebay.net.store import Networks
from drivebay.system.files import refusal, write_private
from drivebay.system.processes import boot_id

__all__ = ["is_on", "turn_back", "turn_on"]

_SWITCH: Final = Path("/proc/sys/net/ipv4/ip_forward")
_FILE: Final = "forwarding.json"


def is_on() -> bool:
    """Raises: HostError."""
    try:
        return _SWITCH.read_text().strip() != "0"
    except OSError as error:
        raise refusal("can't read", _SWITCH, error) from error


def turn_on(networks: Networks) -> None:
    """Let the host pass packets on, and remember that it was we. Raises: HostError."""
    if not is_on():
        note = json.dumps({"before": "0", "boot": boot_id()})
        write_private(networks.folder / _FILE, note.encode())
        _write("1")


def turn_back(networks: Networks, without: str) -> None:
    """Turn it off again if we turned it on, and no network but ``without`` needs it.

    Raises: HostError.
    """
    if turns_back(networks, without) and is_on():
        _write("0")
    if not any(other.forwards for other in networks.others(without)):
        with contextlib.suppress(FileNotFoundError):
            (networks.folder / _FILE).unlink()


def turns_back(networks: Networks, without: str) -> bool:
    """Whether the end of network ``without`` turns forwarding off."""
    if any(other.forwards for other in networks.others(without)):
        return False
    try:
        note = json.loads((networks.folder / _FILE).read_text())
        return bool(note["boot"] == boot_id())
    except (OSError, ValueError, TypeError, KeyError):
        return False  # it was on before us


def _write(value: str) -> None:
    try:
        _SWITCH.write_text(value)
    except OSError as error:
        raise refusal("can't write", _SWITCH, error) from error
