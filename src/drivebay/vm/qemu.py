"""Which QEMU runs a machine, and what each version of it calls things.

Context: any. Asks the binary for its version; starts no machine.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from drivebay.errors import NotFound
from drivebay.vm.places import cache_dir

__all__ = ["Qemu", "Version", "find_qemu"]

BINARY = "qemu-system-x86_64"
VERSION_SECONDS = 20

Version = tuple[int, int]

# Options that changed their name: the first entry whose version is not above the binary's.
BY_VERSION: dict[str, list[tuple[Version, str]]] = {
    "reconnect": [((9, 2), "reconnect-ms=1000"), ((0, 0), "reconnect=1")],
}


@dataclass(frozen=True)
class Qemu:
    """A QEMU binary and what it can do."""

    path: Path
    version: Version

    def option(self, name: str) -> str:
        """Return the words for ``name`` in this version."""
        return next(words for since, words in BY_VERSION[name] if since <= self.version)


def find_qemu() -> Qemu:
    """Return the QEMU on PATH; its version is remembered by path and modification time."""
    found = shutil.which(BINARY)
    if found is None:
        raise NotFound(
            f"{BINARY} is not installed",
            hint="sudo apt-get install --no-install-recommends qemu-system-x86",
        )
    path = Path(found).resolve()
    key = f"{path} {path.stat().st_mtime_ns}"
    memory = cache_dir() / "qemu.json"
    try:
        saved = json.loads(memory.read_text())
        if saved["key"] == key:
            return Qemu(path, (int(saved["version"][0]), int(saved["version"][1])))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        memory.unlink(missing_ok=True)
    version = _ask_version(path)
    memory.write_text(json.dumps({"key": key, "version": version}))
    return Qemu(path, version)


def _ask_version(path: Path) -> Version:
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=VERSION_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotFound(f"{path} does not run: {error}") from error
    match = re.search(r"version (\d+)\.(\d+)", done.stdout)
    if match is None:
        raise NotFound(f"{path} --version names no version: {done.stdout[:80]!r}")
    return int(match.group(1)), int(match.group(2))
