"""qemu-img on files that anybody may have made: bounded, told the format, its words as ours.

Context: a short-lived process. It gets absolute paths (so that no name is taken for a protocol),
and at most so much memory, processor time and length of a file as an honest image needs. Started
by root, it is the user nobody, who may read everything and write one file. It ends with us, even
when we are killed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from drivebay.errors import DrivebayError, HostError, InUse, NotFound, StateError
from drivebay.system.processes import Identity, unprivileged
from drivebay.vm.images.store import Report, host_errors, quiet

__all__ = ["Extent", "check", "convert", "extents", "virtual_size"]

# It has up to 64 threads, whose stacks and heaps count although nothing is in them: at less than
# 1 GiB it could not convert.
_MEMORY_BYTES: Final = 4 << 30
# To look at an image; what writes one may take as long as there is data.
_LOOK_S: Final = 900
_WORDS_BYTES: Final = 1 << 20  # its error messages are in a file, too
_PROGRESS: Final = re.compile(rb"\((\d+\.\d+)/100%\)")
_CAP_DAC_READ_SEARCH: Final = 2
_CORRUPT: Final = 2
_LEAKS: Final = 3
_UNSUPPORTED: Final = 63


@dataclass(frozen=True)
class Extent:
    """A part of the disk that holds data; ``offset`` is where in the file, None if packed."""

    length: int
    offset: int | None


def virtual_size(path: Path, kind: str, called: str) -> int:
    """How large the disk in an image is. Raises: StateError, InUse, HostError, NotFound."""
    found = _json(_run(called, "info", "--output=json", "-f", kind, str(path.absolute())))
    size = found.get("virtual-size")
    others = found.get("backing-filename") or found.get("encrypted")
    if type(size) is not int or size < 0 or others:
        raise StateError(f"qemu-img says of '{called}' what can't be: {found!r:.200}")
    return size


def check(path: Path, kind: str, called: str) -> None:
    """Have the image's own tables checked. Raises: StateError when they are broken."""
    words = ["check", "--output=json", "-f", kind, str(path.absolute())]
    found = _json(_run(called, *words, accepted=(0, _CORRUPT, _LEAKS, _UNSUPPORTED)))
    wrong = sum(int(found.get(key) or 0) for key in ("corruptions", "check-errors"))
    if wrong:
        raise StateError(
            f"'{called}' is damaged or cut off: qemu-img check finds {wrong} errors in its tables",
            hint="fetch or copy it again",
        )


def extents(path: Path, kind: str, called: str) -> Iterator[Extent]:
    """What holds data. Bound: as many as there are runs of blocks. Raises: as virtual_size."""
    words = ["map", "--output=json", "-f", kind, str(path.absolute())]
    with _started(called, words, _reader()) as output:
        for line in output:
            text = line.strip().strip(b"[],")
            if text:
                found = _json(text)
                if found.get("data"):
                    yield Extent(int(found["length"]), found.get("offset"))


def convert(
    source: Path,
    kind: str,
    target: Path,
    to: str,
    called: str,
    *,
    size_most: int,
    report: Report = quiet,
    ours: bool = False,
) -> None:
    """Write what an image holds into a new file. Raises: HostError, StateError, InUse.

    ``ours``: the source is one that we made, and the target may lie where there are no owners.
    """
    words = ["convert", "-p", "-S", "4k", "-f", kind, "-O", to]
    words += [str(source.absolute()), str(target.absolute())]
    what = f"converting {called}"
    user = None if ours else _reader()
    with host_errors(f"can't make '{target}'", target):
        target.touch(0o666 if ours else 0o600, exist_ok=False)
        if user is not None:
            user.take(target)
    with _started(called, words, user, size_most=size_most, look=False) as output:
        while piece := output.read1(4096):  # type: ignore[attr-defined]
            for match in _PROGRESS.finditer(piece):
                report(what, round(float(match[1]) * 100), 10000)
    if user is not None:
        os.chown(target, os.geteuid(), os.getegid())


def _json(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise StateError(f"qemu-img answered {text!r:.200}, which is no JSON object")
    return found


def _run(called: str, *words: str, accepted: tuple[int, ...] = (0,)) -> bytes:
    with _started(called, list(words), _reader(), accepted=accepted) as output:
        return output.read()


@contextmanager
def _started(
    called: str,
    words: list[str],
    user: Identity | None,
    *,
    size_most: int = 0,
    look: bool = True,
    accepted: tuple[int, ...] = (0,),
) -> Iterator[IO[bytes]]:
    """Run qemu-img; the block reads what it prints. Raises: what it died of, in a sentence."""
    limits = [f"--as={_MEMORY_BYTES}", f"--fsize={size_most + _WORDS_BYTES}"]
    limits += [f"--cpu={_LOOK_S}"] if look else []
    command = ["prlimit", *limits, "--", "setpriv", "--pdeathsig=KILL", *_drop(user), "--"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*command, _tool(), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # Ctrl-C reaches us alone, and we end it
        )
        assert process.stdout is not None
        try:
            yield process.stdout
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if code not in accepted:
            errors.seek(0)
            raise _failure(called, words[0], code, errors.read(20000).decode(errors="replace"))


def _reader() -> Identity | None:
    """Whom root's qemu-img becomes; None for others, who have nothing to drop.

    Also None for a root that lacks the one right that nobody needs to read any file, as in some
    containers: it is confined there.
    """
    status = Path("/proc/self/status").read_text()
    rights = int(status.partition("CapEff:")[2].split()[0], 16)
    return unprivileged() if rights >> _CAP_DAC_READ_SEARCH & 1 else None


def _drop(user: Identity | None) -> list[str]:
    """The words by which setpriv leaves it the right to read files, and no other."""
    if user is None:
        return []
    return [
        *(f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups", "--no-new-privs"),
        *("--bounding-set=-all,+dac_read_search", "--inh-caps=-all,+dac_read_search"),
        "--ambient-caps=+dac_read_search",
    ]


def _tool() -> str:
    found = shutil.which("qemu-img")
    if found is None:
        raise NotFound("there is no qemu-img on PATH", hint="apt install qemu-utils")
    return found


def _failure(called: str, verb: str, code: int, said: str) -> DrivebayError:
    if "No space left on device" in said:
        return HostError(f"can't {verb} '{called}'", errno.ENOSPC, hint="df -h")
    if said.startswith(("setpriv:", "prlimit:")):
        return StateError(f"qemu-img can't be confined, so it was not run: {said.strip()[:300]}")
    lines = [line.removeprefix("qemu-img: ").strip() for line in said.splitlines() if line.strip()]
    if "lock" in said and "Failed to get" in said:
        return InUse(
            f"'{called}' is in use: somebody writes to it, perhaps a running machine",
            hint="stop the machine first",
        )
    words = next((line for line in lines if "rror" in line), lines[-1] if lines else "nothing")
    if code < 0:
        words = f"it was ended by signal {-code}, as at a limit of its time or memory"
    if verb == "check":
        return StateError(
            f"'{called}' is damaged or cut off: {words[:300]}", hint="fetch or copy it again"
        )
    return StateError(f"qemu-img can't {verb} '{called}': {words[:300]}")
