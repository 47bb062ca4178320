"""A tiny Linux guest from two Debian packages, downloaded and unpacked but never installed.

Context: any process, as root or not; may take seconds, and runs apt-cache, apt-get and
dpkg-deb. It writes below the user's cache only: one folder per pair of versions, made
in a temporary place and renamed when complete, so a half-made one is never used.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from drivebay.errors import HostError, NotFound
from drivebay.vm import initramfs
from drivebay.vm.places import cache_dir

__all__ = ["GuestImage", "guest_script", "prepare_guest", "unpack_packages"]

KERNEL_METAPACKAGE = "linux-image-cloud-amd64"
BUSYBOX_PACKAGE = "busybox-static"
MODULES = ("virtio_pci", "virtio_blk")
APT_SECONDS = 300

Progress = Callable[[str], None]


@dataclass(frozen=True)
class GuestImage:
    """What a guest is booted from, without its initramfs: that depends on the scripts."""

    kernel: Path
    busybox: Path
    modules: Path
    version: str

    def initrd(
        self, scripts: Mapping[str, bytes] | None = None, modules: Sequence[str] = MODULES
    ) -> bytes:
        """Return an initramfs with our init, and ``scripts`` at their guest paths beside it."""
        ordered = initramfs.modules_in_loading_order(self.modules, modules)
        everything = {"/init": guest_script("init.sh"), **(scripts or {})}
        return initramfs.pack(self.busybox.read_bytes(), ordered, everything)


@dataclass(frozen=True)
class Package:
    """A package and its version, which ``apt-get download`` takes as name=version."""

    name: str
    version: str

    @property
    def spec(self) -> str:
        return f"{self.name}={self.version}"


def guest_script(name: str) -> bytes:
    """Return one of the scripts that are part of this package."""
    return resources.files("drivebay.vm").joinpath("data", name).read_bytes()


def prepare_guest(progress: Progress) -> GuestImage:
    """Return the guest for the packages that apt knows now; download them only when new.

    Without package lists the newest guest that is already there does.
    """
    home = cache_dir() / "guests"
    home.mkdir(exist_ok=True)
    with _locked(home / "lock"):
        packages = _candidates()
        if packages is None:
            return _newest(home)
        folder = home / "+".join(_file_name(package) for package in packages)
        if not folder.is_dir():
            progress(f"downloading {' and '.join(package.name for package in packages)}")
            _make(folder, packages)
    return _opened(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _file_name(package: Package) -> str:
    return re.sub(r"[^A-Za-z0-9.+~_-]", "_", f"{package.name}_{package.version}")


def _candidates() -> list[Package] | None:
    """Ask apt for the kernel behind the metapackage, and busybox; None without package lists."""
    if shutil.which("apt-cache") is None:
        return None
    command = ["apt-cache", "show", "--no-all-versions", KERNEL_METAPACKAGE, BUSYBOX_PACKAGE]
    known = {
        fields["Package"]: fields
        for paragraph in _run(command, Path("/")).stdout.split("\n\n")
        if "Package" in (fields := _control_fields(paragraph))
    }
    kernel, busybox = known.get(KERNEL_METAPACKAGE, {}), known.get(BUSYBOX_PACKAGE, {})
    match = re.search(r"(linux-image-\S+) \(= (\S+)\)", kernel.get("Depends", ""))
    if match is None or "Version" not in busybox:
        return None
    return [
        Package(match.group(1), match.group(2)),
        Package(BUSYBOX_PACKAGE, busybox["Version"]),
    ]


def _control_fields(paragraph: str) -> dict[str, str]:
    pairs = (line.split(": ", 1) for line in paragraph.splitlines() if ": " in line)
    return {pair[0]: pair[1] for pair in pairs}


def _newest(home: Path) -> GuestImage:
    made = [path for path in home.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if not made:
        raise NotFound(
            f"apt knows no package '{KERNEL_METAPACKAGE}' and '{BUSYBOX_PACKAGE}', "
            "of which the guest is made",
            hint="sudo apt-get update   (on Debian 12, amd64)",
        )
    return _opened(max(made, key=lambda path: path.stat().st_mtime))


def _make(folder: Path, packages: Sequence[Package]) -> None:
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as name:
        tree = unpack_packages(Path(name), [package.spec for package in packages])
        _opened(tree)
        tree.rename(folder)


def unpack_packages(work: Path, packages: Sequence[str]) -> Path:
    """Download Debian packages ('name' or 'name=version') and unpack them below ``work``.

    Returns: the folder that holds their files. Raises: HostError.
    """
    # apt hands downloads to its own user, who may not enter the cache of root.
    sandbox = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    done = _run(["apt-get", "-q", *sandbox, "download", *packages], work)
    if done.returncode != 0:
        raise HostError(
            f"cannot download {' and '.join(packages)}; apt-get said: {_last_line(done.stderr)}",
            errno.ENETUNREACH,
            hint="sudo apt-get update, and try again",
        )
    tree = work / "tree"
    for archive in sorted(work.glob("*.deb")):
        done = _run(["dpkg-deb", "-x", str(archive), str(tree)], work)
        if done.returncode != 0:
            raise HostError(
                f"cannot unpack {archive.name}; dpkg-deb said: {_last_line(done.stderr)}",
                errno.EIO,
            )
    return tree


def _opened(tree: Path) -> GuestImage:
    """Find the parts in an unpacked tree; Debian may or may not put them below /usr."""
    kernel = _first(tree, "boot/vmlinuz-*")
    busybox = _first(tree, "bin/busybox", "usr/bin/busybox")
    modules = _first(tree, "lib/modules/*", "usr/lib/modules/*")
    if kernel is None or busybox is None or modules is None:
        raise NotFound(
            f"the unpacked packages in {tree} hold no kernel, modules or busybox",
            hint=f"rm -r {tree}, and try again",
        )
    return GuestImage(kernel, busybox, modules, kernel.name.removeprefix("vmlinuz-"))


def _first(tree: Path, *patterns: str) -> Path | None:
    return next((path for pattern in patterns for path in tree.glob(pattern)), None)


def _run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=APT_SECONDS,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise HostError(
            f"{command[0]} did not end within {APT_SECONDS} s", errno.ETIMEDOUT
        ) from error


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "nothing"
