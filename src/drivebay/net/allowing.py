"""Plain users on a network: what qemu-bridge-helper needs in order to let them.

Context: a short-lived process of root, which holds the network's lock.

    /etc/qemu/bridge.conf            include /etc/qemu/drivebay-alice.conf     readable by all
    /etc/qemu/drivebay-alice.conf    allow db-lan                              by alice alone
    qemu-bridge-helper               set-uid

The helper reads with its user's rights, and passes over an include that it can't read: so a file's
readers are the users that it allows. `deny` anywhere counts more than `allow`. In bridge.conf only
our own lines come and go, at its beginning, so that all others stay as they are, byte for byte.
"""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import stat
import struct
import subprocess
from pathlib import Path
from typing import Final

from drivebay.errors import HostError, NotFound, StateError, UsageError
from drivebay.net.bridge_helper import find_helper, has_rights, settings_of
from drivebay.net.journal import Journal
from drivebay.net.model import Network
from drivebay.net.store import Networks
from drivebay.system.files import refusal

__all__ = ["JOURNAL_KIND", "allow", "check", "disallow", "missing"]

JOURNAL_KIND: Final = "allowed"
_SET_UID: Final = 0o4755
_MADE_FILE: Final = b"# Made by Drivebay, and removed when nobody needs it.\n"
_MADE_BOTH: Final = b"# Made by Drivebay with its folder, and removed when nobody needs it.\n"

# linux/posix_acl_xattr.h: a version, then tag, permissions, id of each entry.
_ACL: Final = "system.posix_acl_access"
_ACL_VERSION: Final = struct.pack("<I", 2)
_ENTRY: Final = struct.Struct("<HHI")
_OWNER, _USER, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
_READ, _WRITE, _NOBODY = 4, 2, 0xFFFFFFFF


def check(network: Network) -> None:
    """Whether its users can be let, before anything is made.

    Raises: UsageError, NotFound for a user or the helper; StateError, HostError.
    """
    if not network.allow_users:
        return
    helper = find_helper()
    settings = settings_of(helper) / "bridge.conf"
    for user in network.allow_users:
        _check_user(user)
        if settings.exists() and not _can(user, "-r", settings):
            raise StateError(
                f"user '{user}' can't read '{settings}', in which qemu-bridge-helper looks up with "
                "that user's rights who may join a network",
                hint=f"chmod 644 {settings}",
            )
        if not _can(user, "-x", helper):
            raise StateError(f"user '{user}' may not run '{helper}'", hint=f"ls -l {helper}")
    if not has_rights(helper):
        _check_rights(helper)


def missing(networks: Networks, network: Network) -> list[str]:
    """What `allow` would do, each as a step's text; found by looking only.

    A user who is no more is passed over. Raises: NotFound without a helper; HostError.
    """
    earlier, wanted = _users(networks, network)
    steps = [f"let user '{user}' put VMs into it no more" for user in sorted(earlier - wanted)]
    if not wanted:
        return steps
    helper = find_helper()
    folder = settings_of(helper)
    steps += [
        f"let user '{user}' put VMs into it ({_file_of(folder, user)})"
        for user in sorted(wanted)
        if not _is_let(folder, user, network.bridge)
    ]
    if not has_rights(helper):
        steps.append(f"make '{helper}' set-uid, so that it can put TAPs into bridges")
    return steps


def allow(networks: Networks, network: Network) -> None:
    """Let its users, and no others of ours; what is so already stays.

    Raises: NotFound without a helper; StateError, HostError.
    """
    earlier, wanted = _users(networks, network)
    if not wanted:
        disallow(networks, network)
        return
    journal = Journal(networks.of(network.name))
    helper = find_helper()
    folder = settings_of(helper)
    with networks.all_locked():
        facts = {"mode_before": _mode_before(networks, network, helper)}
        journal.note(JOURNAL_KIND, str(helper), users=sorted(earlier | wanted), **facts)
        for user in wanted:
            _let(folder, user, network.bridge)
        for user in earlier - wanted:
            _end(networks, network, folder, user)
        if not has_rights(helper):
            _check_rights(helper)
            _give_rights(helper)
        journal.note(JOURNAL_KIND, str(helper), users=sorted(wanted), **facts)


def disallow(networks: Networks, network: Network) -> None:
    """Take back all that `allow` did for a network. Raises: StateError, HostError."""
    journal = Journal(networks.of(network.name))
    made = journal.find(JOURNAL_KIND)
    if made is None:
        return
    helper = Path(made.name)
    folder = settings_of(helper)
    with networks.all_locked():
        for user in made.facts["users"]:
            _end(networks, network, folder, user)
        before = made.facts["mode_before"]
        if before is not None and not _needed(networks, network, folder):
            _take_rights(helper, int(before))
        journal.strike(JOURNAL_KIND)


def _users(networks: Networks, network: Network) -> tuple[set[str], set[str]]:
    """Whom we have let, and whom we should."""
    made = Journal(networks.of(network.name)).find(JOURNAL_KIND)
    earlier = set() if made is None else {str(user) for user in made.facts["users"]}
    return earlier, {user for user in network.allow_users if _known(user)}


# ---- users --------------------------------------------------------------------------------------


def _check_user(user: str) -> None:
    if not _known(user):
        raise NotFound(
            f"there is no user '{user}', whom --allow-user could let", hint="getent passwd"
        )
    if pwd.getpwnam(user).pw_uid == 0:
        raise UsageError("root may join each network, and needs no --allow-user")


def _known(user: str) -> bool:
    try:
        return bool(pwd.getpwnam(user))
    except KeyError:
        return False


def _can(user: str, what: str, path: Path) -> bool:
    """Whether a user may read or run a file; asked with that user's rights, groups and all."""
    found = pwd.getpwnam(user)
    drop = [f"--reuid={found.pw_uid}", f"--regid={found.pw_gid}", "--init-groups"]
    command = ["setpriv", *drop, "test", what, str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# ---- the files ----------------------------------------------------------------------------------


def _file_of(folder: Path, user: str) -> Path:
    return folder / f"drivebay-{user}.conf"


def _is_let(folder: Path, user: str, bridge: str) -> bool:
    path = _file_of(folder, user)
    return bridge in _allowed(path) and included(_read(folder / "bridge.conf") or b"", path)


def _let(folder: Path, user: str, bridge: str) -> None:
    """Write a bridge into a user's file, and have bridge.conf include it."""
    if _is_let(folder, user, bridge):
        return
    path = _file_of(folder, user)
    settings = folder / "bridge.conf"
    present = _read(settings)
    if present is None:
        present = _MADE_FILE
        if not folder.is_dir():
            folder.mkdir(0o755)
            folder.chmod(0o755)
            present = _MADE_BOTH
    _write_user_file(path, user, sorted({*_allowed(path), bridge}))
    _write_settings(settings, with_include(present, path))


def _end(networks: Networks, network: Network, folder: Path, user: str) -> None:
    """Take a bridge out of a user's file, unless another network has the same; and with the last
    bridge the file, and with the last file what we made."""
    for other in networks.others(network.name):
        if other.bridge == network.bridge and user in other.allow_users:
            return
    path = _file_of(folder, user)
    left = [bridge for bridge in _allowed(path) if bridge != network.bridge]
    if left and _known(user):
        _write_user_file(path, user, left)
        return
    settings = folder / "bridge.conf"
    present = _read(settings)
    if present is not None:
        rest = without_include(present, path)
        if rest in (_MADE_FILE, _MADE_BOTH):
            settings.unlink()
        elif rest != present:
            _write_settings(settings, rest)
    else:
        rest = b""
    path.unlink(missing_ok=True)
    if rest == _MADE_BOTH and not any(folder.iterdir()):
        folder.rmdir()


def included(text: bytes, path: Path) -> bool:
    """Whether a bridge.conf includes a file."""
    return _include(path) in [line.strip() for line in text.splitlines()]


def with_include(text: bytes, path: Path) -> bytes:
    """A bridge.conf that includes a file, with all else as it was."""
    if included(text, path):
        return text
    return _mark(path) + _include(path) + b"\n" + text


def without_include(text: bytes, path: Path) -> bytes:
    """A bridge.conf that does not include a file any more, with all else as it was."""
    left: list[bytes] = []
    for line in text.splitlines(keepends=True):
        if line.strip() != _include(path):
            left.append(line)
        elif left and left[-1] == _mark(path):
            left.pop()
    return b"".join(left)


def _include(path: Path) -> bytes:
    return f"include {path}".encode()


def _mark(path: Path) -> bytes:
    user = path.stem.removeprefix("drivebay-")
    return f"# Drivebay: networks with --allow-user {user}\n".encode()


def _allowed(path: Path) -> list[str]:
    """The bridges in a user's file."""
    lines = (_read(path) or b"").decode(errors="replace").splitlines()
    return [line.removeprefix("allow ") for line in lines if line.startswith("allow ")]


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise refusal("can't read", path, error) from error


def _write_user_file(path: Path, user: str, bridges: list[str]) -> None:
    """One that root writes, and that user alone may read: by an ACL, since a group has others."""
    text = "".join(
        [f"# Drivebay: the networks of this host with --allow-user {user}\n",
         *(f"allow {bridge}\n" for bridge in bridges)]
    )  # fmt: skip
    acl = _ACL_VERSION + b"".join(
        _ENTRY.pack(*entry)
        for entry in (
            (_OWNER, _READ | _WRITE, _NOBODY),
            (_USER, _READ, pwd.getpwnam(user).pw_uid),
            (_GROUP, 0, _NOBODY),
            (_MASK, _READ, _NOBODY),
            (_OTHER, 0, _NOBODY),
        )
    )
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.unlink(missing_ok=True)
        _write_down(fresh, text.encode(), 0o600)
        os.setxattr(fresh, _ACL, acl)
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        if error.errno == errno.ENOTSUP:
            raise HostError(
                f"the file system of '{path.parent}' has no ACLs, by which user '{user}' alone "
                "could read a file",
                error.errno,
                path=str(path),
                hint=f"mount it with them; see: findmnt -T {path.parent}",
            ) from error
        raise refusal("can't write", path, error) from error


def _write_settings(path: Path, text: bytes) -> None:
    """Write bridge.conf at once; its owner, mode and ACL stay as they are."""
    path = path.resolve()  # a link stays one
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.unlink(missing_ok=True)
        _write_down(fresh, text, 0o644)
        if path.exists():
            status = path.stat()
            shutil.copystat(path, fresh)
            os.chown(fresh, status.st_uid, status.st_gid)
            os.utime(fresh)
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise refusal("can't write", path, error) from error


def _write_down(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # whatever the umask is
        file.write(data)
        file.flush()
        os.fsync(descriptor)


# ---- the helper's rights ------------------------------------------------------------------------


def _check_rights(helper: Path) -> None:
    """Raises: StateError when they can't be given, or somebody has decided that it has none."""
    if os.statvfs(helper).f_flag & os.ST_NOSUID:
        raise StateError(
            f"'{helper}' lies in a file system on which no program has its owner's rights (nosuid)",
            hint=f"findmnt -T {helper}",
        )
    override = _override(helper)
    if override is not None:
        raise StateError(
            f"'{helper}' should be set-uid, and this host has decided otherwise: dpkg-statoverride "
            f"says '{override}'",
            hint=f"dpkg-statoverride --remove {helper}, if that may be",
        )


def _give_rights(helper: Path) -> None:
    """Make it set-uid, in a way that an update of its package keeps. Raises: HostError."""
    if shutil.which("dpkg-statoverride"):
        _run("dpkg-statoverride", "--update", "--add", "root", "root", f"{_SET_UID:o}", str(helper))
    else:
        helper.chmod(_SET_UID)


def _take_rights(helper: Path, before: int) -> None:
    """Give it the mode that it had before us, unless somebody has decided on another."""
    override = _override(helper)
    if override is not None and override.split()[:3] == ["root", "root", f"{_SET_UID:o}"]:
        _run("dpkg-statoverride", "--remove", str(helper))
        override = None
    if override is None and helper.exists() and has_rights(helper):
        helper.chmod(before)


def _override(helper: Path) -> str | None:
    """What dpkg has been told of the helper's mode: OWNER GROUP MODE PATH."""
    if shutil.which("dpkg-statoverride") is None:
        return None
    done = subprocess.run(
        ["dpkg-statoverride", "--list", str(helper)], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StateError(
            f"'{' '.join(command)}' failed: {done.stderr.strip()[:500] or done.returncode}"
        )


def _mode_before(networks: Networks, network: Network, helper: Path) -> int | None:
    """The helper's mode before we made it set-uid; None when it was so already."""
    for name in [network.name, *(other.name for other in networks.others(network.name))]:
        made = Journal(networks.of(name)).find(JOURNAL_KIND)
        if made is not None and made.facts["mode_before"] is not None:
            return int(made.facts["mode_before"])
    return None if has_rights(helper) else stat.S_IMODE(helper.stat().st_mode)


def _needed(networks: Networks, network: Network, folder: Path) -> bool:
    """Whether somebody else uses the helper: another network, or lines that are not ours."""
    if any(
        Journal(networks.of(other.name)).find(JOURNAL_KIND)
        for other in networks.others(network.name)
    ):
        return True
    lines = (_read(folder / "bridge.conf") or b"").splitlines()
    return any(line.strip().startswith((b"allow", b"include")) for line in lines)
