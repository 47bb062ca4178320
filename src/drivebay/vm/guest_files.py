"""Files into a guest and out of it by its agent, for guests without a network or ssh server.

Context: a command in the foreground. The agent reads and writes as the guest's root, piece by
piece. On both sides a file gets its name only when it is whole. The guest is not trusted: what
it sends is bounded by what it said before.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from drivebay.disks.sizes import format_size
from drivebay.errors import DrivebayError, HostError, PeerError, StateError, UsageError
from drivebay.vm.images.formats import shown

if TYPE_CHECKING:
    from drivebay.vm.agent import Agent
    from drivebay.vm.images.store import Report

__all__ = ["copy_in", "copy_out"]

_PIECE: Final = 256 << 10  # as base64 it is one line of JSON
_SCRIPT_SECONDS: Final = 60.0
_GROWTH_MOST: Final = 64 << 20  # of a file that is written to while it is copied

# Prints the name under which FILE is written at first; $1 FILE or a folder, $2 its name there.
_BEGIN: Final = """umask 077
path=$1
if [ -d "$path" ]; then path=${path%/}/$2
elif [ "$3" = folder ]; then echo "'$path' is no folder" >&2; exit 1; fi
mktemp "$path.XXXXXX"
"""
_RANDOM_LETTERS: Final = 7
_END: Final = 'chmod "$1" "$2" && mv -f "$2" "$3"'


# ---- into the guest -----------------------------------------------------------------------------


def copy_in(agent: Agent, source: Path, path: str, report: Report, *, folder: bool) -> None:
    """Copy a file of this host to ``path``, which is a folder in any case if so said.

    Raises: UsageError, HostError, StateError, as `Agent.call`.
    """
    _check_path(path)
    with _reading(source) as file:
        status = os.fstat(file.fileno())
        begun = _script(agent, _BEGIN, path, source.name, "folder" if folder else "any")
        fresh = begun.removesuffix("\n")
        if not fresh.startswith("/") or len(fresh) <= _RANDOM_LETTERS:
            raise PeerError(f"the guest made a file {fresh!r:.80}, and not '{path}'")
        try:
            _write(agent, file, status.st_size, fresh, report)
            mode = f"{stat.S_IMODE(status.st_mode) & 0o755:o}"
            _script(agent, _END, mode, fresh, fresh[:-_RANDOM_LETTERS])
        except BaseException:
            with contextlib.suppress(DrivebayError):
                _script(agent, 'rm -f "$1"', fresh)
            raise


@contextlib.contextmanager
def _reading(source: Path) -> Iterator[IO[bytes]]:
    try:
        with source.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"'{source}' is no file")
            yield file
    except IsADirectoryError:
        raise UsageError(
            f"'{source}' is a folder, and the guest agent copies single files",
            hint="tar it first; or use ssh, which copies folders",
        ) from None
    except OSError as error:
        raise HostError(
            f"can't read '{source}'", error.errno or errno.EIO, path=str(source)
        ) from error


def _write(agent: Agent, file: IO[bytes], size: int, path: str, report: Report) -> None:
    with _opened(agent, path, "w") as handle:
        done = 0
        while piece := file.read(_PIECE):
            while piece:
                answer = agent.call("guest-file-write", handle=handle, buf_b64=_encoded(piece))
                count = _count(answer, "guest-file-write", len(piece))
                if count == 0:
                    raise StateError(f"the guest took no more of '{path}': its disk is full?")
                piece = piece[count:]
                done += count
            report("copying into the guest", done, max(size, done))
        agent.call("guest-file-flush", handle=handle)


# ---- out of the guest ---------------------------------------------------------------------------


def copy_out(agent: Agent, path: str, target: Path, report: Report) -> None:
    """Copy a file of the guest to this host, at once or not at all; into ``target`` if a folder.

    Raises: UsageError, HostError, StateError, PeerError, as `Agent.call`.
    """
    _check_path(path)
    if target.is_dir():
        target = target / path.rpartition("/")[2]
    mode, size = _look(agent, path)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with os.fdopen(os.open(fresh, flags, 0o600), "wb") as file:
                _read(agent, path, size, file.write, report)
                file.flush()
                os.fchmod(file.fileno(), mode & 0o755)
                os.fsync(file.fileno())
            fresh.replace(target)
        except OSError as error:
            raise HostError(
                f"can't write '{target}'", error.errno or errno.EIO, path=str(target)
            ) from error
    finally:
        fresh.unlink(missing_ok=True)


def _look(agent: Agent, path: str) -> tuple[int, int]:
    """A file's mode and size in the guest. Raises: StateError when it is not there."""
    said = _script(agent, 'stat -L -c "%f %s" -- "$1"', path)
    mode, _, size = said.strip().partition(" ")
    try:
        found = int(mode, 16), int(size)
    except ValueError:
        raise PeerError(f"the guest says of '{path}' {said[:80]!r}") from None
    if stat.S_ISDIR(found[0]):
        raise UsageError(
            f"'{path}' is a folder in the guest, and its agent copies single files",
            hint="tar it first; or use ssh, which copies folders",
        )
    return found


def _read(
    agent: Agent, path: str, size: int, write: Callable[[bytes], object], report: Report
) -> None:
    with _opened(agent, path, "r") as handle:
        done = 0
        at_end = False
        while not at_end:
            answer = agent.call("guest-file-read", handle=handle, count=_PIECE)
            count = _count(answer, "guest-file-read", _PIECE)
            piece = _decoded(answer.get("buf-b64", ""))
            at_end = answer.get("eof") is True
            if len(piece) != count or (count == 0 and not at_end):
                raise PeerError(
                    f"the guest agent promised {count} bytes of '{path}' and sent {len(piece)}"
                )
            write(piece)
            done += count
            if done > size + _GROWTH_MOST:
                raise StateError(
                    f"'{path}' had {format_size(size)} in the guest, and more than "
                    f"{format_size(done)} came: it grows, or has no end"
                )
            report("copying from the guest", done, max(size, done))


# ---- the agent's words --------------------------------------------------------------------------


def _check_path(path: str) -> None:
    if not path.startswith("/"):
        raise UsageError(
            f"'{path[:80]}' should begin with '/': the guest agent knows no home folder",
            hint="NAME:/root/FILE, say",
        )


@contextlib.contextmanager
def _opened(agent: Agent, path: str, mode: str) -> Iterator[int]:
    handle = agent.call("guest-file-open", path=path, mode=mode)
    if type(handle) is not int:
        raise PeerError(f"the guest agent answered 'guest-file-open' with {handle!r:.80}")
    try:
        yield handle
    except BaseException:
        with contextlib.suppress(DrivebayError):
            agent.call("guest-file-close", handle=handle)
        raise
    agent.call("guest-file-close", handle=handle)


def _script(agent: Agent, script: str, *words: str) -> str:
    """Run a shell script in the guest, with $1 and so on; what it printed. Raises: StateError."""
    output = agent.run(["/bin/sh", "-c", script, "sh", *words], _SCRIPT_SECONDS)
    if output.code != 0:
        lines = output.err.decode(errors="replace").strip().splitlines() or ["it gave no reason"]
        raise StateError(f"the guest refused: {shown(lines[-1][:200])}")
    return output.out.decode(errors="replace")


def _count(answer: Any, command: str, most: int) -> int:
    count = answer.get("count") if isinstance(answer, dict) else None
    if type(count) is not int or not 0 <= count <= most:
        raise PeerError(f"the guest agent answered '{command}' with {answer!r:.80}")
    return count


def _encoded(piece: bytes) -> str:
    return base64.b64encode(piece).decode()


def _decoded(text: object) -> bytes:
    try:
        return base64.b64decode(str(text), validate=True)
    except (binascii.Error, ValueError):
        raise PeerError(f"the guest agent sent {text!r:.80}, which is no base64") from None
