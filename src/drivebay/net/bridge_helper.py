"""qemu-bridge-helper: how a plain user gets a TAP into a bridge.

Context: a short-lived process. The helper belongs to QEMU and has root's rights (set-uid). It reads
/etc/qemu/bridge.conf with the rights of the user who runs it, makes a TAP, puts it into the bridge
and hands its descriptor back through a socket. What it says when it refuses is of few words.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import socket
import stat
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from drivebay.errors import DrivebayError, HostError, NotFound, StateError
from drivebay.net.store import ROOTS
from drivebay.net.taps import Tap, open_vhost
from drivebay.system.terminal import harmless

__all__ = ["find_helper", "has_rights", "how_to_allow", "settings_of", "tap_by_helper"]

LIMIT_SECONDS: Final = 20.0
# Debian and Arch; Fedora, RHEL and SUSE; SUSE's older ones; a QEMU that was built here.
PLACES: Final = (
    Path("/usr/lib/qemu/qemu-bridge-helper"),
    Path("/usr/libexec/qemu-bridge-helper"),
    Path("/usr/lib/qemu-bridge-helper"),
    Path("/usr/local/libexec/qemu-bridge-helper"),
)
_TAIL_BYTES: Final = 1000
# linux/if_tun.h, and struct ifreq: the name's 16 bytes, and room to its 40.
_TUNGETIFF: Final = 0x800454D2
_REQUEST: Final = struct.Struct("16s24x")


def find_helper() -> Path:
    """QEMU's helper, with or without the rights that it needs. Raises: NotFound."""
    found = next((path for path in PLACES if path.is_file()), None)
    if found is None:
        raise NotFound(
            "there is no qemu-bridge-helper, by which a plain user's VM joins a bridge",
            hint="Debian, Ubuntu: apt install qemu-system-common; Fedora: dnf install qemu-common",
        )
    return found


def settings_of(helper: Path) -> Path:
    """The folder of the bridge.conf that it reads, which was set when it was built."""
    local = helper.is_relative_to("/usr/local")
    return Path("/usr/local/etc/qemu" if local else "/etc/qemu")


def has_rights(helper: Path) -> bool:
    """Whether it can do its work for a plain user: it is set-uid, or has a capability."""
    found = helper.stat()
    if os.statvfs(helper).f_flag & os.ST_NOSUID:
        return False
    if found.st_mode & stat.S_ISUID and found.st_uid == 0:
        return True
    with contextlib.suppress(OSError):
        return bool(os.getxattr(helper, "security.capability"))
    return False


def tap_by_helper(bridge: str, limit: float = LIMIT_SECONDS) -> Tap:
    """Have the helper make a TAP in a bridge; it has one queue.

    Raises: NotFound without a helper or such a bridge; StateError when the user may not; HostError.
    """
    helper = find_helper()
    ours, theirs = socket.socketpair()
    with ours, theirs, tempfile.TemporaryFile() as said:
        words = [str(helper), "--use-vnet", f"--fd={theirs.fileno()}", f"--br={bridge}"]
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=[theirs.fileno()],
            )
        except PermissionError as error:
            raise HostError(
                f"user '{_user()}' may not run '{helper}'",
                error.errno or 0,
                path=str(helper),
                hint=f"ls -l {helper}, to see which group may",
            ) from error
        except OSError as error:
            raise HostError(f"can't run '{helper}'", error.errno or 0, path=str(helper)) from error
        theirs.close()
        try:
            descriptor = _receive(ours, limit)
        except TimeoutError:
            raise StateError(
                f"'{helper}' gave no TAP in the bridge '{bridge}' within {limit:.0f} seconds",
                hint=f"ip link show master {bridge}",
            ) from None
        finally:
            _end(process)
        if descriptor is None:
            said.seek(0)
            answer = harmless(said.read(_TAIL_BYTES)).decode(errors="replace").strip()
            raise explained(helper, bridge, answer)
    return _as_tap(descriptor)


def _receive(ours: socket.socket, limit: float) -> int | None:
    """The descriptor that comes; None when the helper ends without one."""
    ours.settimeout(limit)
    _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    return descriptors[0] if descriptors else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """It has sent all that it sends, or is not waited for any longer."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
        return
    with contextlib.suppress(PermissionError):  # before it has given up root's rights
        process.kill()
        process.wait()


def _as_tap(descriptor: int) -> Tap:
    try:
        os.set_inheritable(descriptor, False)
        os.set_blocking(descriptor, False)
        answer = fcntl.ioctl(descriptor, _TUNGETIFF, _REQUEST.pack(b""))
        return Tap(_REQUEST.unpack(answer)[0].rstrip(b"\0").decode(), (descriptor,), open_vhost(1))
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):
            raise HostError("what qemu-bridge-helper gave is no TAP", error.errno or 0) from error
        raise


# ---- what its refusals mean ---------------------------------------------------------------------


def explained(helper: Path, bridge: str, said: str) -> DrivebayError:
    """The error for what the helper said, with the mend that fits to it."""
    user = _user()
    settings = settings_of(helper) / "bridge.conf"
    refused = f"user '{user}' may not put VMs into the bridge '{bridge}'"
    if "failed to parse default acl file" in said:
        quoted = said.partition("failed to parse")[0].split("\n")
        line = next((line.strip() for line in reversed(quoted) if line.strip()), None)
        if line is not None:
            return StateError(
                f"'{settings}' has a line that qemu-bridge-helper does not understand: {line}",
                hint=f"a line is 'allow BRIDGE', 'deny BRIDGE' or 'include FILE': {settings}",
            )
        if settings.exists() and not os.access(settings, os.R_OK):
            return StateError(
                f"{refused}: '{settings}' says who may, and this user can't read it",
                hint=f"sudo chmod 644 {settings}",
            )
        return StateError(f"{refused}: there is no '{settings}' yet", hint=_let(bridge, settings))
    if "access denied by acl file" in said:
        return StateError(f"{refused}: '{settings}' does not say so", hint=_let(bridge, settings))
    if "failed to create tun device" in said and not has_rights(helper):
        if os.statvfs(helper).f_flag & os.ST_NOSUID:
            return StateError(
                f"'{helper}' lies in a file system on which no program has its owner's rights "
                "(nosuid)",
                hint=f"findmnt -T {helper}",
            )
        return StateError(
            f"'{helper}' has no rights to make a TAP: it is not set-uid root",
            hint=f"sudo dpkg-statoverride --update --add root root 4755 {helper}; "
            f"where there is no dpkg: sudo chmod u+s {helper}",
        )
    if "failed to get mtu of bridge" in said:
        name = bridge.removeprefix("db-")
        hint = "the host's bridges: ip link show type bridge"
        if name != bridge:
            hint = f"sudo drivebay net start {name}"
        return NotFound(f"this host has no bridge '{bridge}'", hint=hint)
    if "failed to add interface" in said:
        return StateError(
            f"the interface '{bridge}' takes no TAP: {said}",
            hint="the host's bridges: ip link show type bridge",
        )
    return StateError(f"qemu-bridge-helper gave no TAP: {said or 'it said nothing'}")


def how_to_allow(network: str, user: str) -> str:
    """What root does so that a user may join a named network."""
    return (
        f"sudo drivebay net create {network} … --allow-user {user}; where it is there already, add "
        f'"{user}" to allow_users in {ROOTS / network / "network.toml"}, then sudo drivebay net '
        f"start {network}"
    )


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def _let(bridge: str, settings: Path) -> str:
    name = bridge.removeprefix("db-")
    if name == bridge:
        return f"echo 'allow {bridge}' | sudo tee -a {settings}, which lets everybody"
    return how_to_allow(name, _user())
