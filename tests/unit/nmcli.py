"""NetworkManager's command `nmcli`, unpacked beside the system where it is not installed.

Installed, NetworkManager would begin to manage the machine's own interfaces. `nmcli --offline`
needs nothing of it but the library, which Debian has in a package of its own.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import tempfile
from pathlib import Path

from drivebay.vm.places import cache_dir


def nmcli() -> str:
    """The program's path."""
    found = shutil.which("nmcli")
    if found is not None:
        return found
    home = cache_dir() / "nmcli"
    home.mkdir(exist_ok=True)
    program = home / "tree/usr/bin/nmcli"
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            _unpack(home)
    return str(program)


def _unpack(home: Path) -> None:
    with tempfile.TemporaryDirectory(dir=home) as name:
        _run("apt-get", "download", "-qq", "network-manager", cwd=name)
        (package,) = Path(name).glob("*.deb")
        _run("dpkg-deb", "--extract", str(package), "tree", cwd=name)
        (Path(name) / "tree").rename(home / "tree")


def _run(*command: str, cwd: str) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
