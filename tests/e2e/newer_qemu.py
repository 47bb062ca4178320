"""A newer QEMU, unpacked beside the system: another version to run VMs with, and its tools.

The tools are vhost-user-blk clients that are not ours: Debian 12's QEMU has no block driver
that connects to a vhost-user socket; that of Debian 13's backports has (through libblkio). The
packages are only extracted and run by their own loader: nothing is installed, and root is not
needed. They lie below /var/tmp and not in the cache, which is closed to the user `nobody` that
root's QEMU runs as.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SUITE = "trixie"
BACKPORTS = f"{SUITE}-backports"
PACKAGES = "qemu-utils,qemu-block-extra,libblkio1,qemu-system-x86,virtiofsd"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
UNPACK_SECONDS = 300
WRAPPER = """\
#!/bin/sh
export QEMU_MODULE_DIR={libraries}/qemu
exec {libraries}/ld-linux-x86-64.so.2 --library-path {libraries} \\
    {tree}/usr/bin/qemu-system-x86_64 -L {tree}/usr/share/qemu -L {tree}/usr/share/seabios "$@"
"""

VIRTIOFSD_WRAPPER = """\
#!/bin/sh
exec {libraries}/ld-linux-x86-64.so.2 --library-path {libraries} {tree}/usr/libexec/virtiofsd "$@"
"""


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


def system_emulator() -> Path:
    """Return a program that is qemu-system-x86_64, for `--qemu`; anybody may run it."""
    return newer_qemu().tree / "qemu-system-x86_64"


def virtiofsd_in_rust() -> Path:
    """Return a folder for PATH with the virtiofsd that follows QEMU's own."""
    return newer_qemu().tree / "virtiofsd"


def newer_qemu() -> NewerQemu:
    """Return the tools; the first time takes about 20 seconds and 230 MB of /var/tmp."""
    home = _home()
    recipe = hashlib.sha256((PACKAGES + WRAPPER + VIRTIOFSD_WRAPPER).encode()).hexdigest()
    tree = home / f"{BACKPORTS}-{recipe[:8]}"
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.is_dir():
            with tempfile.TemporaryDirectory(prefix=".new-", dir=home) as name:
                _unpack(Path(name))
                _wrap(Path(name) / "tree", tree)
                (Path(name) / "tree").rename(tree)
    return NewerQemu(tree)


def _home() -> Path:
    """A folder of ours where anybody could have made one of that name."""
    home = Path(f"/var/tmp/drivebay-newer-qemu-{os.geteuid()}")
    home.mkdir(mode=0o755, exist_ok=True)
    found = home.lstat()
    assert stat.S_ISDIR(found.st_mode), f"{home} is no folder"
    assert found.st_uid == os.geteuid(), f"{home} belongs to user {found.st_uid}"
    assert not found.st_mode & 0o022, f"{home} can be written to by others"
    return home


def _wrap(tree: Path, final: Path) -> None:
    (tree / "virtiofsd").mkdir()
    for name, text in (
        ("qemu-system-x86_64", WRAPPER),
        ("virtiofsd/virtiofsd", VIRTIOFSD_WRAPPER),
    ):
        wrapper = tree / name
        wrapper.write_text(text.format(tree=final, libraries=final / LIBRARIES))
        wrapper.chmod(0o755)
    tree.chmod(0o755)


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
