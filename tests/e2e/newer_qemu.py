"""A newer QEMU's tools, unpacked beside the system: vhost-user-blk clients that are not ours.

Debian 12's QEMU has no block driver that connects to a vhost-user socket; that of Debian 13's
backports has (through libblkio). Its packages are only extracted, into the user's cache, and
run by their own loader: nothing is installed, and root is not needed.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from drivebay.vm.places import cache_dir

SUITE = "trixie"
BACKPORTS = f"{SUITE}-backports"
PACKAGES = "qemu-utils,qemu-block-extra,libblkio1"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
UNPACK_SECONDS = 300


@dataclass(frozen=True)
class NewerQemu:
    """The unpacked tree; ``run`` starts one of its tools."""

    tree: Path

    def run(self, tool: str, *words: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        libraries = self.tree / LIBRARIES
        loader = libraries / "ld-linux-x86-64.so.2"
        return subprocess.run(
            [loader, "--library-path", libraries, self.tree / "usr/bin" / tool, *words],
            env={**os.environ, "QEMU_MODULE_DIR": str(libraries / "qemu")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


def newer_qemu() -> NewerQemu:
    """Return the tools; the first time takes about ten seconds and 110 MB of the cache."""
    home = cache_dir() / "newer-qemu"
    home.mkdir(exist_ok=True)
    tree = home / BACKPORTS
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.is_dir():
            with tempfile.TemporaryDirectory(prefix=".new-", dir=home) as name:
                _unpack(Path(name))
                (Path(name) / "tree").rename(tree)
    return NewerQemu(tree)


def _unpack(work: Path) -> None:
    """mmdebstrap's variant "extract" runs no maintainer script and needs no chroot."""
    sources = work / "trixie.sources"
    sources.write_text(
        f"Types: deb\nURIs: {_debian_mirror()}\nSuites: {SUITE} {BACKPORTS}\n"
        f"Components: main\nSigned-By: {KEYRING}\n"
    )
    command = ["mmdebstrap", "--variant=extract", "--mode=chrootless"]
    command += [f'--aptopt=APT::Default-Release "{BACKPORTS}"']
    command += ['--aptopt=APT::Install-Recommends "false"', f"--include={PACKAGES}"]
    done = subprocess.run(
        [*command, SUITE, "tree", sources],
        cwd=work,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=UNPACK_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"mmdebstrap failed: {done.stderr[-2000:]}"


def _debian_mirror() -> str:
    """Take the mirror that this machine's own packages come from."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(SUITE) $(CODENAME) $(COMPONENT)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    match = re.search(r"^(\S+/debian/?) \S+ bookworm main$", listed.stdout, re.MULTILINE)
    return match.group(1) if match else "http://deb.debian.org/debian"
