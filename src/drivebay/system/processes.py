"""Programs: started and ended, as a user without rights if need be, and known again later.

Context: any. A child gets a session of its own, so that Ctrl-C reaches us alone and we
end the parts in order.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "GATE",
    "Child",
    "Identity",
    "boot_id",
    "start",
    "start_ticks",
    "stat_fields",
    "unprivileged",
]

STOP_SECONDS = 10.0
# A shell that becomes the program as soon as it is told to, and ends when nobody can tell it.
GATE = 'read -r go && exec "$@" </dev/null'
LOG_TAIL_BYTES = 2000


@dataclass(frozen=True)
class Identity:
    """Whom a child runs as: the numbers, and extra groups it keeps."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    def take(self, path: Path) -> None:
        """Hand a file or socket to this user."""
        os.chown(path, self.uid, self.gid)


def unprivileged(device: Path | None = None) -> Identity | None:
    """Return whom root's children become; None when we are not root and have nothing to drop.

    The child keeps the group of ``device``, which it must open for itself.
    """
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    groups = () if device is None else (device.stat().st_gid,)
    return Identity(nobody.pw_uid, nobody.pw_gid, groups)


@dataclass(frozen=True)
class Child:
    """A running program and the file its words go to."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def ended(self) -> bool:
        return self.process.poll() is not None

    def last_words(self) -> str:
        """Return the last line of its log, which says why it ended."""
        lines = self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").split("\n")
        spoken = [line.strip() for line in lines if line.strip()]
        return spoken[-1] if spoken else "nothing"

    def let_go(self) -> None:
        """Leave it running when we end, which Popen would otherwise complain about."""
        self.process.returncode = 0

    def stop(self) -> int:
        """End it, by force when it does not listen; return its exit code. Harmless twice."""
        self.process.terminate()
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def start(
    name: str,
    command: Sequence[str],
    log: Path,
    *,
    pass_fds: Sequence[int] = (),
    identity: Identity | None = None,
    outlives_us: bool = False,
    noted: Callable[[int], object] | None = None,
) -> Child:
    """Start ``command``; with an identity it has that user, no capabilities and no way back.

    Unless it ``outlives_us`` the kernel ends it with the thread that started it. ``noted`` gets
    its process id and writes it down: should we be killed before, the program never begins.
    """
    drop = [] if outlives_us else ["--pdeathsig=TERM"]
    if identity is not None:
        groups = ",".join(str(group) for group in identity.groups)
        drop += [f"--reuid={identity.uid}", f"--regid={identity.gid}"]
        drop += [f"--groups={groups}"] if groups else ["--clear-groups"]
        drop += ["--bounding-set=-all", "--inh-caps=-all"]
    gate = [] if noted is None else ["sh", "-c", GATE, "sh"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*gate, "setpriv", *drop, "--no-new-privs", "--", *command],
            stdin=subprocess.DEVNULL if noted is None else subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds,
            start_new_session=True,
        )
    if noted is not None:
        _note_and_open(process, noted)
    return Child(name, process, log)


def _note_and_open(process: subprocess.Popen[bytes], noted: Callable[[int], object]) -> None:
    """Let the program begin once it is written down; without us its input just ends."""
    assert process.stdin is not None
    try:
        noted(process.pid)
        with contextlib.suppress(BrokenPipeError):  # it is gone already, and its log says why
            process.stdin.write(b"go\n")
            process.stdin.flush()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the command's name (proc(5)): [0] is the state."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def start_ticks(pid: int) -> int | None:
    """When a process began, since boot, which tells it from a later one with its id; None if it
    has ended.

    Its first thread may be over before the others, which then still hold its ports and files.
    """
    fields = stat_fields(pid)
    if fields is None or (fields[0] in "ZX" and int(fields[17]) <= 1):
        return None
    return int(fields[19])


def boot_id() -> str:
    """Which start of this host it is (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
