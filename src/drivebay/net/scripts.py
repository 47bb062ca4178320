"""A person's own ifup and ifdown scripts: whether one may be run, and what went wrong in it.

Context: a short-lived process. QEMU is sandboxed and runs nothing, so a script is run by the
command that starts a VM, as its user, with the interface's name as its one argument, as QEMU
did. QEMU said "failed with status 256" of everything that can go wrong: here each has its own
sentence.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from drivebay.errors import HostError, StateError, UsageError
from drivebay.system.terminal import harmless

__all__ = ["check", "run"]

LIMIT_SECONDS: Final = 30.0
_HEAD_BYTES: Final = 256  # what the kernel reads of a script to find its interpreter
_TAIL_BYTES: Final = 2000
_TAIL_LINES: Final = 5
_LINKS_MOST: Final = 40


def run(path: str, ifname: str, vm: str, limit: float = LIMIT_SECONDS) -> None:
    """Run a script for an interface of a VM, and wait for it.

    What it leaves in the background goes on. Raises: UsageError, StateError, HostError.
    """
    check(path)
    what = f"'{path}' for {ifname} of VM '{vm}'"
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                [path, ifname],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        except OSError as error:
            raise HostError(f"can't run {what}", error.errno or 0, path=path) from error
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            _end(process)
            raise StateError(
                f"{what} was not done after {limit:.0f} seconds, and was ended{_last_words(said)}",
                hint=f"sh -x {shlex.quote(path)} {ifname}, to see where it waits; let it put into "
                "the background what is to stay",
            ) from None
        except BaseException:  # Ctrl-C does not reach it, since its session is another
            _end(process)
            raise
        if code:
            raise StateError(
                f"{what} {_how_it_ended(code)}{_last_words(said)}",
                hint=f"try it: {shlex.quote(path)} {ifname}; echo $?",
            )


def check(path: str) -> None:
    """Refuse a script that can't be run, or that root should not run.

    Raises: UsageError, StateError, HostError.
    """
    if not path.startswith("/"):
        raise UsageError(
            f"the script '{path[:80]}' should be given with its whole path",
            hint=f"script={Path.cwd() / path}",
        )
    found = _status(path)
    if not stat.S_ISREG(found.st_mode):
        raise StateError(f"the script '{path}' is no file", hint=f"ls -ld {shlex.quote(path)}")
    if os.geteuid() == 0:
        _refuse_writers(path, "the script")
    if not os.access(path, os.X_OK):
        _refuse_not_executable(path, found)
    _check_interpreter(path)


def _status(path: str) -> os.stat_result:
    try:
        return Path(path).stat()
    except FileNotFoundError as error:
        if Path(path).is_symlink():
            raise StateError(
                f"the script '{path}' is a link to '{Path(path).readlink()}', which is not there",
                hint=f"ls -l {shlex.quote(path)}",
            ) from error
        raise StateError(
            f"there is no script '{path}'",
            hint="script=no for none; QEMU's own /etc/qemu-ifup is not used here",
        ) from error
    except OSError as error:
        raise HostError(
            f"can't look at the script '{path}'",
            error.errno or 0,
            path=path,
            hint=f"namei -l {shlex.quote(path)}",
        ) from error


def _refuse_not_executable(path: str, found: os.stat_result) -> None:
    if os.statvfs(path).f_flag & os.ST_NOEXEC:
        raise StateError(
            f"the script '{path}' lies in a file system from which nothing may be executed "
            "(noexec)",
            hint=f"install -m 755 {shlex.quote(path)} /usr/local/sbin/",
        )
    raise StateError(
        f"the script '{path}' is not executable for this user (mode {found.st_mode & 0o7777:o})",
        hint=f"chmod 755 {shlex.quote(path)}",
    )


def _check_interpreter(path: str) -> None:
    """Refuse a first line of which the kernel would say "exec format error", or less."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise HostError(
            f"can't read the script '{path}', which its interpreter has to",
            error.errno or 0,
            path=path,
            hint=f"chmod 755 {shlex.quote(path)}",
        ) from error
    if head.startswith(b"\x7fELF"):
        return
    quoted = shlex.quote(path)
    if not head.startswith(b"#!"):
        raise StateError(
            f"the script '{path}' does not say which program reads it: its first line should "
            "begin with '#!'",
            hint=f"sed -i '1i #!/bin/sh' {quoted}",
        )
    line = head[2:].partition(b"\n")[0]
    interpreter = os.fsdecode((line.split() or [b""])[0])
    if line.endswith(b"\r"):
        raise StateError(
            f"the script '{path}' has the line ends of Windows, so '{interpreter}' is not found",
            hint=f"sed -i 's/\\r$//' {quoted}",
        )
    if not interpreter.startswith("/"):
        raise StateError(
            f"the script '{path}' should name its interpreter with the whole path, and says "
            f"'{_clean(interpreter)}'",
            hint=f"sed -i '1s|.*|#!/bin/sh|' {quoted}",
        )
    if not os.access(interpreter, os.X_OK):
        why = "can't be executed" if Path(interpreter).exists() else "is not there"
        raise StateError(
            f"the script '{path}' is read by '{_clean(interpreter)}', which {why}",
            hint="install that program, or name another in the first line",
        )
    if os.geteuid() == 0:
        _refuse_writers(interpreter, f"'{path}', which is read by")


# ---- who else could write what root runs --------------------------------------------------------


def _refuse_writers(path: str, what: str) -> None:
    """Refuse what somebody beside root could replace: the file, or a folder on the way to it."""
    for part in _way(path):
        found = part.lstat()
        if stat.S_ISLNK(found.st_mode):
            continue  # who may replace it is said by its folder, and what it names comes next
        others = _others(found)
        if others is None:
            continue
        quoted = shlex.quote(path)
        where = "" if part == Path(path) else f"since '{part}' is "
        raise StateError(
            f"root does not run {what} '{path}': {where}writable {others}",
            hint=f"chmod 755 {quoted}"
            if part == Path(path) and found.st_uid == 0
            else f"sudo install -o root -g root -m 755 {quoted} /usr/local/sbin/",
        )


def _others(found: os.stat_result) -> str | None:
    """Who beside root may write what is there; in words, or None."""
    if found.st_uid:
        return f"by its owner, user {found.st_uid}"
    if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:
        return None  # as /tmp: nobody removes or renames there what belongs to root
    mode = found.st_mode & 0o7777
    if mode & stat.S_IWOTH:
        return f"by everybody (mode {mode:o})"
    if mode & stat.S_IWGRP:
        return f"by group {found.st_gid} (mode {mode:o})"
    return None


def _way(path: str) -> Iterator[Path]:
    """Each folder and link that the kernel passes on its way to a file, and the file."""
    left = [*Path(path).parts[1:]]
    at, links = Path("/"), 0
    yield at
    while left:
        name = left.pop(0)
        if name == "..":
            at = at.parent
            continue
        here = at / name
        yield here
        if not here.is_symlink():
            at = here
            continue
        links += 1
        if links > _LINKS_MOST:
            raise StateError(f"'{path}' goes through more than {_LINKS_MOST} links")
        target = here.readlink()
        left[:0] = target.parts[1:] if target.is_absolute() else target.parts
        at = Path("/") if target.is_absolute() else at


# ---- what went wrong ----------------------------------------------------------------------------


def _how_it_ended(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a script with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(said: IO[bytes]) -> str:
    """The end of what it said, in a form to be put after a sentence."""
    size = said.seek(0, os.SEEK_END)
    said.seek(max(0, size - _TAIL_BYTES))
    lines = [_clean(line) for line in said.read().decode(errors="replace").splitlines()]
    spoken = [line for line in lines if line.strip()][-_TAIL_LINES:]
    return "".join(["; it said:", *(f"\n    {line}" for line in spoken)]) if spoken else ""


def _clean(text: str) -> str:
    return harmless(text.encode()).decode(errors="replace").rstrip()
