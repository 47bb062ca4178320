"""The folder of a change that waits for confirmation, and of those that were confirmed.

Context: root's commands, each of which may be a new login, and the guardian. All that they
know of each other is in these files:

    before.json      what to restore; written first, removed last
    change.json      how far it is, which process is at it, which files `confirm` has written
    guardian.json    the guardian: pid, start ticks, for how many seconds after the moves
    undone           why the last change was taken back, for the next command to say
    confirmed-IFACE/ before.json and change.json of a confirmed change, for `undo`
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from drivebay.disks.places import data_folder
from drivebay.errors import HostError, NotFound, StateError
from drivebay.net.hostbridge.state import Before, boot_seconds
from drivebay.system.files import refusal, write_private
from drivebay.system.locks import held
from drivebay.system.processes import boot_id, start_ticks

__all__ = ["CONFIRMING", "MOVED", "MOVING", "Change"]

MOVING: Final = "moving"
MOVED: Final = "moved"
CONFIRMING: Final = "confirming"

_LOCK_SECONDS: Final = 15.0
_END_SECONDS: Final = 5.0


class Change:
    """At most one waits at a time."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or data_folder() / "host-bridge"

    def prepare(self) -> None:
        """Raises: HostError."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise refusal("can't make", self.folder, error) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time changes anything. Raises: InUse when that takes too long."""
        self.prepare()
        busy = "another command is at the host's uplink"
        with held(self.folder / ".lock", busy, wait_s=_LOCK_SECONDS):
            yield

    # ---- what waits -----------------------------------------------------------------------------

    def waits(self) -> bool:
        return (self.folder / "before.json").exists()

    def before(self) -> Before:
        """Raises: NotFound when no change waits; UsageError, HostError."""
        return _read_before(self.folder)

    def confirmed(self, uplink: str) -> Before:
        """The state before a confirmed change. Raises: NotFound, UsageError, HostError."""
        return _read_before(self.confirmed_folder(uplink))

    def begin(self, before: Before) -> None:
        """From now on this can be restored, by whoever comes."""
        (self.folder / "undone").unlink(missing_ok=True)
        self.note(phase=MOVING, pid=os.getpid(), ticks=start_ticks(os.getpid()), moved=None)
        write_private(self.folder / "before.json", before.to_json().encode())

    def phase(self) -> str:
        return str(_read(self.folder / "change.json").get("phase", MOVING))

    def noted(self) -> dict[str, Any]:
        return _read(self.folder / "change.json")

    def note(self, **what: Any) -> None:
        """Write down how far it is."""
        write_private(
            self.folder / "change.json",
            json.dumps({**_read(self.folder / "change.json"), **what}, indent=1).encode(),
        )

    def note_moved(self) -> None:
        """All is in the bridge: from now on somebody has to confirm it."""
        self.note(phase=MOVED, moved=boot_seconds())

    def broken_off(self) -> bool:
        """Whether the process that was moving things has ended before it was done."""
        noted = _read(self.folder / "change.json")
        if noted.get("phase") != MOVING:
            return False
        pid = noted.get("pid")
        return not isinstance(pid, int) or start_ticks(pid) != noted.get("ticks")

    def another_boot(self, before: Before) -> bool:
        """Whether the host has started anew since, which restored everything."""
        return before.boot != boot_id()

    def end(self, why: str | None = None) -> None:
        """Nothing waits any more; ``why`` is what the next command says about it."""
        if why is not None:
            write_private(self.folder / "undone", why.encode())
        for name in ("before.json", "change.json", "guardian.json"):
            (self.folder / name).unlink(missing_ok=True)

    def take_message(self) -> str | None:
        """What the guardian wanted somebody to know; said once."""
        try:
            text = (self.folder / "undone").read_text(encoding="utf-8")
            (self.folder / "undone").unlink()
        except OSError:
            return None
        return text

    # ---- the guardian ---------------------------------------------------------------------------

    def guard(self, seconds: float) -> None:
        """Write down that this process is the guardian."""
        pid = os.getpid()
        found = {"pid": pid, "ticks": start_ticks(pid), "seconds": seconds}
        write_private(self.folder / "guardian.json", json.dumps(found).encode())

    def guarded(self) -> float | None:
        """The seconds that the guardian still waits, which count from the end of the moves; None
        when there is no guardian.
        """
        found = _read(self.folder / "guardian.json")
        pid = found.get("pid")
        if not isinstance(pid, int) or start_ticks(pid) != found.get("ticks"):
            return None
        moved = _read(self.folder / "change.json").get("moved")
        waited = 0.0 if moved is None else boot_seconds() - float(moved)
        return max(0.0, float(found.get("seconds", 0.0)) - waited)

    def end_guardian(self) -> None:
        """Raises: StateError when it does not end."""
        self._kill("guardian.json", "the guardian")

    def end_mover(self) -> None:
        """End the process that hangs in the middle of a change."""
        if self.phase() == MOVING:
            self._kill("change.json", "the command that was moving the uplink")

    def _kill(self, name: str, what: str) -> None:
        found = _read(self.folder / name)
        pid, ticks = found.get("pid"), found.get("ticks")
        if not isinstance(pid, int) or pid == os.getpid() or start_ticks(pid) != ticks:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + _END_SECONDS
        while start_ticks(pid) == ticks:
            if time.monotonic() > deadline:
                raise StateError(f"{what} (process {pid}) does not end", hint=f"kill -9 {pid}")
            time.sleep(0.02)

    # ---- after confirm --------------------------------------------------------------------------

    def confirmed_folder(self, uplink: str) -> Path:
        return self.folder / f"confirmed-{uplink}"

    def keep(self, uplink: str) -> None:
        """The change is confirmed: what `undo` needs goes aside."""
        kept = self.confirmed_folder(uplink)
        try:
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir(mode=0o700)
            shutil.copy2(self.folder / "change.json", kept)
            (self.folder / "before.json").rename(kept / "before.json")
        except OSError as error:
            raise refusal("can't keep what was before in", kept, error) from error
        self.end()

    def written_when_confirmed(self, uplink: str) -> list[dict[str, Any]]:
        """The files that `confirm` has written, and what of them was new."""
        found: list[dict[str, Any]] = _read(self.confirmed_folder(uplink) / "change.json").get(
            "written", []
        )
        return found

    def forget(self, uplink: str) -> None:
        """A confirmed change was undone."""
        shutil.rmtree(self.confirmed_folder(uplink), ignore_errors=True)


def _read(path: Path) -> dict[str, Any]:
    """A file of ours; an empty one when it is not there or was cut short."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_before(folder: Path) -> Before:
    try:
        return Before.from_json((folder / "before.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(
            "no change of this uplink waits, and none was confirmed",
            hint="drivebay net host-bridge plan IFACE",
        ) from None
    except OSError as error:
        raise refusal("can't read", folder / "before.json", error) from error


def refuse_without_root() -> None:
    """Raises: HostError for everybody else."""
    if os.geteuid() != 0:
        raise HostError(
            "only root may change the host's uplink", 1, hint="sudo drivebay net host-bridge …"
        )
