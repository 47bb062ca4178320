"""A Debian image, built from the mirror that this machine's own packages come from.

Context: any process, as root or not; one to three minutes, most of them mmdebstrap's. The
root file system is never packed and unpacked: mmdebstrap's last hook cleans it and fills the
disk's partition with it, as the user who is root there.

    mirrors of apt ──► mmdebstrap ── hook: clean, mke2fs ──► raw ◄── GRUB (bootable)

What the guest gets: systemd and networkd, cloud-init that asks nobody but a NoCloud disk,
sshd, QEMU's guest agent, a login on the serial port, and sources at deb.debian.org.
"""

from __future__ import annotations

import errno
import io
import os
import platform
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from drivebay.errors import HostError, NotFound, StateError, UsageError
from drivebay.vm.images.bootable import (
    add_loaders,
    check_tools,
    grub_config,
    last_line,
    make_table,
    root_filesystem,
    run_tool,
    tools_environment,
)
from drivebay.vm.images.store import BuiltImage, ImageFacts

__all__ = ["DEFAULT_SIZE", "PACKAGES", "Source", "build_debian", "machine_sources"]

Say = Callable[[str], None]

DEFAULT_SIZE: Final = 2 << 30  # cloud-init lets the system grow to the size of its disk
USER: Final = "debian"  # whom Debian's cloud-init makes unless it is told another
ARCHIVE: Final = "http://deb.debian.org/debian"
SECURITY_ARCHIVE: Final = "http://deb.debian.org/debian-security"
KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
ROOM_TO_BUILD: Final = 1500 << 20
ROOM_FOR_IMAGE: Final = 800 << 20
END_SECONDS: Final = 60.0

PACKAGES: Final = (
    "systemd-sysv", "dbus", "udev", "login", "e2fsprogs", "fdisk", "procps", "sudo", "less", "nano",
    "linux-image-cloud-amd64", "initramfs-tools", "zstd",
    "cloud-init", "cloud-guest-utils", "netplan.io", "systemd-resolved", "iproute2",
    "iputils-ping", "openssh-server", "ca-certificates", "qemu-guest-agent",
)  # fmt: skip

# Debian 12 would take the package that converts a system to a merged /usr, and Perl with it.
MERGED_FROM_THE_START: Final = """\
mkdir -p "$1/etc/apt/preferences.d" "$1/etc/initramfs-tools/conf.d"
printf 'Package: usrmerge\\nPin: release *\\nPin-Priority: -1\\n' > "$1/etc/apt/preferences.d/build"
printf 'COMPRESS=zstd\\nCOMPRESSLEVEL=1\\n' > "$1/etc/initramfs-tools/conf.d/build"
"""
MERGED_USR_HOOKS: Final = Path("/usr/share/mmdebstrap/hooks/merged-usr")
# Documents in other languages than C's, and manuals, would take up a third of the time.
DPKG_OPTIONS: Final = (
    "force-unsafe-io",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
)

# Runs as the root of the new system, in a mount namespace of its own, where empty folders cover
# what mmdebstrap has mounted and what it needs: in /tmp lies the file that makes its apt work on
# the new system and not on this machine. For the same reason mmdebstrap has to leave its own
# cleaning, which needs apt (--skip=cleanup).
FINISH: Final = """\
set -eu
chroot "$1" systemctl enable --quiet systemd-networkd.service
unshare --mount sh -eu -s "$1" <<'END'
cd "$1"
for folder in dev run; do mount -t tmpfs -o mode=755 none "$folder"; done
for folder in proc sys; do mount -t tmpfs -o mode=555 none "$folder"; done
mount -t tmpfs -o mode=1777 none tmp
rm -rf var/tmp/* var/lib/apt/lists/* var/cache/apt/* var/cache/ldconfig/* \\
    var/cache/debconf/*-old var/lib/dpkg/*-old etc/ssh/ssh_host_* etc/hostname~ etc/.pwd.lock \\
    etc/apt/sources.list etc/apt/sources.list.d/0000* etc/apt/preferences.d/build \\
    etc/apt/apt.conf.d/*mmdebstrap etc/dpkg/dpkg.cfg.d/99mmdebstrap \\
    etc/initramfs-tools/conf.d/build
find var/log -type f -delete
mkdir -p var/cache/apt/archives/partial var/lib/apt/lists/partial var/lib/dbus
: > etc/machine-id
ln -sf /etc/machine-id var/lib/dbus/machine-id
ln -sf ../run/systemd/resolve/stub-resolv.conf etc/resolv.conf
{root_filesystem}
END
"""

CLOUD_CONFIG: Final = """\
# Nobody on the network is asked what this guest should be.
datasource_list: [NoCloud, None]
# Keys of the kinds that every client has known for years; RSA's take long to make.
ssh_genkeytypes: [ed25519, ecdsa]
# GRUB was put there by us, and no package of it is there to be told of disks.
grub_dpkg: {enabled: false}
"""
WAIT_ONLINE: Final = """\
# A guest without a network starts without waiting two minutes for one.
[Service]
ExecStart=
ExecStart=/lib/systemd/systemd-networkd-wait-online --any --timeout=20
"""


@dataclass(frozen=True)
class Source:
    """An entry of apt's: an archive of Debian's and a suite in it."""

    uri: str
    suite: str


def build_debian(
    work: Path,
    say: Say,
    *,
    suite: str | None = None,
    packages: Sequence[str] = (),
    size: int = DEFAULT_SIZE,
) -> BuiltImage:
    """Build an image in the folder ``work``: of this machine's suite, or another one.

    ``packages`` are added to ours. Whatever ends it early leaves nothing.

    Raises: NotFound, StateError, UsageError for what is missing on this machine or wrong in
    the request; HostError when the building fails.
    """
    check_tools({"mmdebstrap": "mmdebstrap"})
    release = _host_release()
    suite = suite or release["VERSION_CODENAME"]
    _check_names(suite, packages)
    sources = [
        Source(source.uri, suite + source.suite.removeprefix(release["VERSION_CODENAME"]))
        for source in machine_sources(release["VERSION_CODENAME"])
    ]
    mode = _mode()
    temporary = Path(os.environ.get("TMPDIR") or "/var/tmp")
    _check_room(temporary, ROOM_TO_BUILD)
    _check_room(work, ROOM_FOR_IMAGE)
    with tempfile.TemporaryDirectory(dir=work) as closed:
        raw = Path(closed) / "debian.raw"
        make_table(raw, size)
        _fill(raw, size, suite, sources, [*PACKAGES, *packages], mode, temporary, say)
        say("adding the boot loaders")
        add_loaders(raw)
        raw = raw.rename(work / raw.name)
    version = release.get("VERSION_ID") if suite == release["VERSION_CODENAME"] else None
    day = time.strftime("%Y-%m-%d", time.gmtime())
    facts = ImageFacts(
        origin=f"built by drivebay: debian {suite}, {day}",
        os=f"Debian {version} ({suite})" if version else f"Debian ({suite})",
        user=USER,
        cloud_init=True,
    )
    return BuiltImage(raw, facts)


# ---- what this machine is -----------------------------------------------------------------------


def _host_release() -> dict[str, str]:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    if release.get("ID") != "debian" or not release.get("VERSION_CODENAME"):
        name = release.get("PRETTY_NAME", "of an unknown system")
        raise StateError(
            f"a Debian image is built from this machine's own mirror, and the machine is {name}, "
            "not Debian",
            hint="drivebay image pull debian-12",
        )
    return release


def _check_names(suite: str, packages: Iterable[str]) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,39}", suite, re.ASCII):
        raise UsageError(f"'{suite[:80]}' is no suite of Debian", hint="such as bookworm")
    for package in packages:
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]{1,127}", package, re.ASCII):
            raise UsageError(f"'{package[:80]}' can't be the name of a package")


def machine_sources(codename: str) -> list[Source]:
    """Return where apt gets this release's packages from, with updates and security.

    Only what calls itself Debian's counts: other archives' packages have no place in an image.
    Raises: NotFound without package lists.
    """
    form = "$(ORIGIN) $(COMPONENT) $(RELEASE) $(CODENAME) $(REPO_URI)"
    found = run_tool(["apt-get", "indextargets", "--format", form, "Created-By: Packages"])
    sources: dict[Source, None] = {}
    for line in found.decode(errors="replace").splitlines():
        words = line.split(" ")
        if len(words) != 5 or words[:2] != ["Debian", "main"]:
            continue
        names = {name for name in words[2:4] if name.startswith(codename)}
        for name in names & {codename, f"{codename}-updates", f"{codename}-security"}:
            sources[Source(words[4].rstrip("/"), name)] = None
    if not any(source.suite == codename for source in sources):
        raise NotFound(
            f"apt knows no archive of Debian {codename} on this machine", hint="sudo apt-get update"
        )
    return list(sources)


def _mode() -> str:
    """How mmdebstrap becomes root of the new system. Raises: NotFound, StateError."""
    if os.geteuid() == 0:
        return "root"
    user = pwd.getpwuid(os.geteuid()).pw_name
    if shutil.which("newuidmap", path=tools_environment()["PATH"]) is None:
        raise NotFound(
            "an ordinary user cannot build a Debian image without newuidmap, which lends the "
            "user numbers of a new system",
            hint="sudo apt-get install --no-install-recommends uidmap   (or build as root)",
        )
    for path in (Path("/etc/subuid"), Path("/etc/subgid")):
        lines = path.read_text().splitlines() if path.exists() else []
        if not any(line.split(":")[0] in (user, str(os.geteuid())) for line in lines):
            raise StateError(
                f"user {user} has no numbers in {path} to lend to a new system",
                hint=f"sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
            )
    return "unshare"


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise HostError(
            f"a Debian image needs {needed >> 20} MiB in {folder}, and {free >> 20} MiB are free",
            errno.ENOSPC,
            path=str(folder),
        )


# ---- mmdebstrap ---------------------------------------------------------------------------------


def _fill(
    raw: Path,
    size: int,
    suite: str,
    sources: Sequence[Source],
    packages: Sequence[str],
    mode: str,
    temporary: Path,
    say: Say,
) -> None:
    """Let mmdebstrap install the packages and fill the root partition of ``raw``."""
    root_uuid = str(uuid.uuid4())
    with tempfile.TemporaryDirectory(dir=temporary) as name, raw.open("r+b") as disk:
        folder = Path(name)
        listed = folder / "build.sources"
        listed.write_text(_sources_text(sources, KEYRING if Path(KEYRING).exists() else None))
        ours = folder / "ours.tar"
        ours.write_bytes(_our_files(suite, root_uuid))
        # In a user namespace root is another user for the host, who may open the image by
        # its descriptor; nobody else reaches it, since its folder is closed to others.
        at = f"/proc/self/fd/{disk.fileno()}"
        make = shlex.join(root_filesystem(".", at, size, root_uuid))
        words = ["mmdebstrap", "--verbose", f"--mode={mode}", "--variant=minbase"]
        words += ["--format=null", "--skip=cleanup", f"--include={','.join(packages)}"]
        words += ['--aptopt=APT::Install-Recommends "false"']
        words += [f"--aptopt={line}" for line in _ways_to_the_mirror()]
        words += [f"--dpkgopt={option}" for option in DPKG_OPTIONS]
        words += [f"--setup-hook={MERGED_FROM_THE_START}", f"--hook-dir={MERGED_USR_HOOKS}"]
        words += [f"--customize-hook=tar-in {shlex.quote(str(ours))} /"]
        words += [f"--customize-hook={FINISH.replace('{root_filesystem}', make)}"]
        words += [suite, os.devnull, str(listed)]
        before = raw.stat().st_mode
        raw.chmod(0o666 if mode == "unshare" else before)
        try:
            _run_mmdebstrap(words, disk.fileno(), temporary, say)
        finally:
            raw.chmod(before)


def _ways_to_the_mirror() -> list[str]:
    """apt's settings of proxies, which mmdebstrap does not take from this machine."""
    known = run_tool(["apt-config", "dump", "Acquire"]).decode(errors="replace")
    return re.findall(r"^Acquire::(?:https?::|Check-).*\".+\";$", known, re.MULTILINE)


def _sources_text(sources: Iterable[Source], keyring: str | None) -> str:
    signed = f"Signed-By: {keyring}\n" if keyring else ""
    return "\n".join(
        f"Types: deb\nURIs: {source.uri}\nSuites: {source.suite}\nComponents: main\n{signed}"
        for source in sources
    )


def _our_files(suite: str, root_uuid: str) -> bytes:
    """A tar with the files that make the system a guest; all are root's."""
    public = [Source(ARCHIVE, suite)]
    if suite != "sid":
        public += [
            Source(ARCHIVE, f"{suite}-updates"),
            Source(SECURITY_ARCHIVE, f"{suite}-security"),
        ]
    # An emulated processor that has to share its core is too late for the kernel's test of the
    # timer, which then gives up.
    words = "ro no_timer_check console=tty0 console=ttyS0,115200"
    files = {
        "boot/grub/grub.cfg": grub_config(f"Debian ({suite})", root_uuid, words),
        "etc/fstab": f"UUID={root_uuid} / ext4 errors=remount-ro 0 1\n",
        "etc/hostname": "debian\n",
        "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 debian\n::1 localhost ip6-localhost\n",
        "etc/default/locale": "LANG=C.UTF-8\n",
        "etc/apt/sources.list.d/debian.sources": _sources_text(public, KEYRING),
        "etc/cloud/cloud.cfg.d/90_drivebay.cfg": CLOUD_CONFIG,
        "etc/systemd/system/systemd-networkd-wait-online.service.d/drivebay.conf": WAIT_ONLINE,
    }
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for path, text in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(text.encode())
            entry.mtime = int(time.time())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return made.getvalue()


def _run_mmdebstrap(words: Sequence[str], disk: int, temporary: Path, say: Say) -> None:
    """Run it, and wait for its end in any case: it removes what it has unpacked and mounted.

    Raises: HostError.
    """
    progress = _Progress(say)
    with subprocess.Popen(
        ["setpriv", "--pdeathsig=TERM", "--", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**tools_environment(), "TMPDIR": str(temporary)},
        text=True,
        errors="replace",
        pass_fds=[disk],
        start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                progress.hear(line.rstrip())
            code = process.wait()
        except BaseException:
            _interrupt(process)
            raise
    if code != 0:
        raise HostError(
            f"mmdebstrap failed and said: {progress.complaint or last_line(progress.last)}",
            errno.EIO,
            hint="sudo apt-get update, and again",
        )


def _interrupt(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass
class _Progress:
    """What mmdebstrap says, told on in few words."""

    say: Say
    complaint: str = ""  # the first one; what follows are its consequences
    last: str = ""
    _what: str = "essential packages"
    _steps: int = 0  # each package is unpacked and set up; 0: not known yet
    _done: int = 0
    _told: int = 0

    def hear(self, line: str) -> None:
        if line.startswith("E: ") and not self.complaint:
            # When a hook fails, mmdebstrap quotes all of it, and the reason stands before.
            self.complaint = self.last if "command failed: " in line else line[3:]
        self.last = line or self.last
        if line.startswith("I: running apt-get update"):
            self.say("reading the mirror's lists")
        elif line.startswith("I: extracting archives"):
            self.say("unpacking the essential packages")
        elif line.startswith("I: installing remaining packages"):
            self._what = "packages"
        elif line.startswith("I: running --customize-hook in shell"):
            self.say("making the file system")
        elif match := re.search(r"(\d+) newly installed", line):
            self._steps, self._done, self._told = 2 * int(match[1]), 0, 0
        elif self._steps and line.startswith(("Unpacking ", "Setting up ")):
            self._done += 1
            percent = min(100, self._done * 100 // self._steps)
            if percent >= self._told + 10:
                self._told = percent // 10 * 10
                self.say(f"installing {self._what} ({self._told} %)")
