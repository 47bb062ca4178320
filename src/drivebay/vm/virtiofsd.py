"""Which virtiofsd serves shared folders, and what it calls its options.

Context: any. There are two programs of this name: QEMU's own, in C, until QEMU 7.2 (Debian 12),
and since then one in Rust with a package of its own. Asked for its help, each says which it is.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from drivebay.errors import NotFound
from drivebay.vm.packages import everywhere, install_command

__all__ = ["Virtiofsd", "find_virtiofsd"]

# Distributions keep it from PATH: Fedora, Debian 13; Arch; Debian 12, Ubuntu 22.04.
ELSEWHERE: Final = (
    "/usr/libexec/virtiofsd",
    "/usr/lib/virtiofsd",
    "/usr/lib/qemu/virtiofsd",
)
_ASK_SECONDS: Final = 10.0
_OF_RUST: Final = "--shared-dir"


@dataclass(frozen=True)
class Virtiofsd:
    """The program; ``in_rust`` is the newer one."""

    path: Path
    in_rust: bool

    def command(self, directory: str, descriptor: int, files: int) -> Sequence[str]:
        """The words that serve ``directory`` on the listening socket ``descriptor``.

        It may have so many ``files`` open. A guest makes no device nodes: whoever may read the
        folder could reach the host's devices by them.
        """
        words = [str(self.path), f"--fd={descriptor}", f"--rlimit-nofile={files}"]
        if self.in_rust:
            words += [f"--shared-dir={directory}", "--sandbox=namespace", "--modcaps=-mknod"]
            return [*words, "--cache=auto"]
        source = directory.replace("\\", "\\\\").replace(",", "\\,")
        return [*words, "-o", f"source={source},sandbox=namespace,modcaps=-mknod,cache=auto"]


def find_virtiofsd(what: str) -> Virtiofsd:
    """Return the one on PATH, or where a distribution keeps it. Raises: NotFound."""
    for candidate in ("virtiofsd", *ELSEWHERE):
        found = shutil.which(candidate)
        if found is not None:
            return Virtiofsd(Path(found), _OF_RUST in _help(found))
    raise NotFound(
        f"{what} needs virtiofsd, which is not installed",
        hint=install_command("virtiofsd") or f"install {everywhere('virtiofsd')}",
    )


def _help(program: str) -> str:
    try:
        done = subprocess.run(
            [program, "--help"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_ASK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotFound(f"'{program}' does not say what it is: {error}") from error
    if "virtiofsd" not in done.stdout:
        last = done.stdout.strip().splitlines()[-1:] or ["it said nothing"]
        raise NotFound(f"'{program}' is no virtiofsd that runs: {last[0][:200]}")
    return done.stdout
