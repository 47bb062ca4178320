"""The systemd unit that brings the target, and the VMs that are marked, back with the host.

Context: a short-lived process. Root's unit is the system's; any other user's is of their own
systemd. Its text lies in data/drivebay.service, where each line has its reason.

    host starts ──► drivebay.service ──► the target, with what it has kept ──► marked VMs
    host ends ────► all VMs that run, at the same time ──► the target
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Final

from drivebay.disks.plan import Plan
from drivebay.errors import AlreadyExists, HostError, NotFound, StateError

__all__ = ["NAME", "is_installed", "plan_installation", "systemctl", "unit_path", "unit_text"]

NAME: Final = "drivebay.service"
_SYSTEM_UNITS: Final = Path("/etc/systemd/system")
_RUNS_HERE: Final = Path("/run/systemd/system")  # sd_booted(3)
_OURS: Final = "# Made by `drivebay vm autostart --install`"
_SYSTEMCTL_SECONDS: Final = 60.0
# Where VMs and pools lie, and which QEMU runs them, is told by these.
_KEPT: Final = ("XDG_DATA_HOME", "DRIVEBAY_QEMU")


def unit_path() -> Path:
    """Where this user's unit lies, or will."""
    if _is_system():
        return _SYSTEM_UNITS / NAME
    named = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    base = named if named.is_absolute() else Path.home() / ".config"
    return base / "systemd/user" / NAME


def is_installed() -> bool:
    """Whether it is there; a person may still have disabled it."""
    return unit_path().exists()


def unit_text() -> str:
    """The unit for this user and this Drivebay."""
    kept = [(name, os.environ[name]) for name in _KEPT if os.environ.get(name)]
    # -P: a folder 'drivebay' where systemd happens to be must not be run as ours.
    command = " ".join(_quoted(word) for word in (sys.executable, "-P", "-m", "drivebay"))
    order = "# Machines are switched off before what their disks, folders and ports need.\n"
    order += "After=network.target remote-fs.target"
    values = {
        "@ORDER@": order if _is_system() else "",
        "@ENVIRONMENT@": "\n".join(
            f"Environment={_quoted(f'{name}={value}')}" for name, value in kept
        ),
        "@DRIVEBAY@": command,
        "@CONFINED@": _data("drivebay-system.conf").rstrip() if _is_system() else "",
        "@WANTED@": "multi-user.target" if _is_system() else "default.target",
    }
    lines = []
    for line in _data(NAME).splitlines():
        filled = line
        for mark, value in values.items():
            filled = filled.replace(mark, value)
        if filled or not line:
            lines.append(filled)
    return "\n".join(lines) + "\n"


def systemctl() -> list[str]:
    """The words that speak to the systemd that has the unit."""
    return ["systemctl"] if _is_system() else ["systemctl", "--user"]


def plan_installation(plan: Plan) -> None:
    """Plan to write the unit and to enable it; it is not started.

    Raises: StateError, AlreadyExists, HostError.
    """
    if not _RUNS_HERE.is_dir():
        raise StateError(
            "this host was not started by systemd, which would have to start the unit",
            hint="drivebay vm autostart --unit prints it",
        )
    path = unit_path()
    before = _present(path)
    text = unit_text()
    if before == text:
        plan.facts.append(f"'{path}' is there already")
    else:
        plan.add(f"write the unit '{path}'", lambda: _write(path, text),
                 lambda: path.unlink() if before is None else _write(path, before))  # fmt: skip
    plan.add("let systemd read it", lambda: _call("daemon-reload"))
    plan.add("have it started with the host", lambda: _call("enable", NAME))


def _is_system() -> bool:
    return os.geteuid() == 0


def _data(name: str) -> str:
    return resources.files("drivebay.vm").joinpath("data", name).read_text(encoding="utf-8")


def _quoted(word: str) -> str:
    """A word of a command line or an assignment, as systemd.syntax(7) reads it back."""
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return (
        text if text.replace("/", "").replace("-", "").replace(".", "").isalnum() else f'"{text}"'
    )


def _present(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError(f"can't read '{path}'", error.errno or 0, path=str(path)) from error
    if not text.startswith(_OURS):
        raise AlreadyExists(
            f"there is a unit '{path}' that drivebay has not made",
            hint="move it away, and what it has of its own into: systemctl edit drivebay",
        )
    return text


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8")
        fresh.chmod(0o644)
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise HostError(f"can't write '{path}'", error.errno or 0, path=str(path)) from error


def _call(*words: str) -> None:
    command = [*systemctl(), *words]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SYSTEMCTL_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise NotFound("there is no systemctl, which belongs to systemd") from None
    except subprocess.TimeoutExpired as error:
        raise StateError(
            f"'{' '.join(command)}' did not end in {_SYSTEMCTL_SECONDS:.0f} s"
        ) from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise StateError(f"'{' '.join(command)}' failed: {said[-1][:300]}")
