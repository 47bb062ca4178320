"""Shared folders: a virtiofsd for each, started before QEMU and gone with it.

Context: a short-lived process. virtiofsd serves one connection, and ends with it. We make that
connection, and QEMU inherits it: there is no socket in the file system that somebody else could
connect to, and whatever becomes of QEMU or of us, no virtiofsd stays behind.

    listening socket ──► share_jail ──► virtiofsd      (its sandbox; the folder is all it sees)
          ▲ we connect, ask whether it serves, and remove the name
    connection ────────► QEMU                          (vhost-user-fs)
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from drivebay.errors import HostError, NotFound, StateError, UsageError
from drivebay.system.processes import Child, start
from drivebay.vm.hardware import check_socket_path
from drivebay.vm.run import turn_over
from drivebay.vm.spec import ShareSpec, VmSpec
from drivebay.vm.store import Vm
from drivebay.vm.virtiofsd import Virtiofsd, find_virtiofsd

__all__ = [
    "Served",
    "check_directory",
    "check_shares",
    "how_to_mount",
    "read_share",
    "serve_shares",
    "share_log",
]

ANSWER_SECONDS: Final = 20.0
# A header of vhost-user: request, flags (version 1), size of what follows. The answer has a u64.
_GET_FEATURES: Final = struct.pack("<III", 1, 0x1, 0)
_ANSWER_BYTES: Final = 20
_FILES_MOST: Final = 1 << 20
_READ_ONLY: Final = ",ro"


@dataclass
class Served:
    """Connections to virtiofsds, by tag, for QEMU to inherit."""

    connections: dict[str, int] = field(default_factory=dict)
    _children: list[Child] = field(default_factory=list)

    def let_go(self) -> None:
        """QEMU has the connections: what is at their other ends lives as long as it."""
        for child in self._children:
            child.let_go()
        self._children.clear()


def how_to_mount(spec: VmSpec, share: ShareSpec) -> str:
    """Where the guest has it, or what to type there."""
    if spec.cloud_init is not None:
        return f"{share.directory} is /mnt/{share.tag} in the guest"
    return f"{share.directory}; in the guest: mount -t virtiofs {share.tag} /mnt"


def share_log(vm: Vm, share: ShareSpec) -> Path:
    """Where its virtiofsd says what it has to say."""
    return vm.folder / f"share-{share.tag}.log"


def read_share(text: str) -> ShareSpec:
    """Read 'DIRECTORY[:TAG][,ro]'; the tag is the folder's name unless there is another.

    A symbolic link is followed now: who may change it must not decide what a guest gets.
    Raises: UsageError, NotFound, HostError.
    """
    place = text.removesuffix(_READ_ONLY)
    directory, colon, tag = place.rpartition(":")
    if not colon or "/" in tag:
        directory, tag = place, ""
    if not directory:
        raise UsageError(f"the share '{text[:80]}' names no folder", hint="write DIRECTORY:TAG")
    path = Path(directory).absolute()
    check_directory(str(path), f"the share '{text[:80]}'")
    path = path.resolve()
    tag = tag or re.sub(r"[^A-Za-z0-9_.-]+", "-", path.name).strip("-._")[:36]
    if not tag:
        raise UsageError(
            f"the folder '{path}' needs a tag, by which its guest mounts it", hint=f"{path}:TAG"
        )
    return ShareSpec(str(path), tag, text.endswith(_READ_ONLY))


def check_directory(directory: str, what: str) -> None:
    """Raises: NotFound, UsageError, HostError for what can't be shared; ``what`` is to have it."""
    path = Path(directory)
    if os.path.realpath(path) == "/":
        raise UsageError(
            f"'/' of {what} is all of this host, which no guest should get",
            hint="share the folders that it needs",
        )
    try:
        os.listdir(path)
    except FileNotFoundError:
        raise NotFound(
            f"the folder '{path}' of {what} is not there", hint=f"mkdir {path}"
        ) from None
    except NotADirectoryError:
        raise UsageError(f"'{path}' of {what} is no folder") from None
    except OSError as error:
        raise HostError(
            f"can't look into the folder '{path}' of {what}", error.errno or errno.EIO,
            path=directory, hint=f"ls -ld {path}",
        ) from error  # fmt: skip


def check_shares(vm: Vm) -> None:
    """Raises: NotFound, UsageError, HostError when a folder or virtiofsd is not there."""
    for share in vm.spec.shares:
        check_directory(share.directory, f"VM '{vm.name}'")
    if vm.spec.shares:
        find_virtiofsd(f"VM '{vm.name}' with --share")


@contextlib.contextmanager
def serve_shares(vm: Vm) -> Iterator[Served]:
    """Serve a VM's folders; those whom nobody let go are ended. Raises: HostError, StateError."""
    served = Served()
    with ExitStack() as stack:
        if vm.spec.shares:
            program = find_virtiofsd(f"VM '{vm.name}' with --share")
            stack.callback(lambda: [child.stop() for child in served._children])
            for share in vm.spec.shares:
                connection = stack.enter_context(_serve(vm, share, program, served._children))
                served.connections[share.tag] = connection.fileno()
        yield served


def _serve(vm: Vm, share: ShareSpec, program: Virtiofsd, children: list[Child]) -> socket.socket:
    """Start one, and return a connection to it, which is the only one that it ever serves."""
    path = vm.folder / "share.sock"  # for a moment
    check_socket_path(path)
    log = share_log(vm, share)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listening:
            path.unlink(missing_ok=True)
            listening.bind(str(path))
            listening.listen(1)
            connection.connect(str(path))
            path.unlink()
            turn_over(log)
            command = _command(share, program, listening.fileno())
            child = start("virtiofsd", command, log, pass_fds=[listening.fileno()],
                          outlives_us=True)  # fmt: skip
        children.append(child)
        _wait_until_it_serves(vm, share, child, connection)
    except OSError as error:
        connection.close()
        raise HostError(
            f"can't share '{share.directory}' with VM '{vm.name}'", error.errno or errno.EIO
        ) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _command(share: ShareSpec, program: Virtiofsd, listening: int) -> list[str]:
    directory = os.path.realpath(share.directory)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _FILES_MOST if most == resource.RLIM_INFINITY else min(most, _FILES_MOST)
    jail = Path(__file__).with_name("share_jail.py")
    return [
        *(sys.executable, "-I", "-S", str(jail), "ro" if share.read_only else "rw", directory),
        *program.command(directory, listening, files),
    ]


def _wait_until_it_serves(
    vm: Vm, share: ShareSpec, child: Child, connection: socket.socket
) -> None:
    """Ask what QEMU asks first. It answers from inside its sandbox, or ends with a message."""
    connection.settimeout(ANSWER_SECONDS)
    missing = _ANSWER_BYTES
    with contextlib.suppress(TimeoutError, ConnectionError):
        connection.sendall(_GET_FEATURES)
        while missing and (received := len(connection.recv(missing))):
            missing -= received
    connection.settimeout(None)
    if not missing:
        return
    child.stop()
    raise StateError(
        f"the folder '{share.directory}' can't be shared with VM '{vm.name}': virtiofsd said: "
        f"{child.last_words()}",
        hint=_mend(vm, share, child),
    )


def _mend(vm: Vm, share: ShareSpec, child: Child) -> str:
    if os.geteuid() != 0 and os.strerror(errno.EPERM) in child.log.read_text(errors="replace"):
        return (
            "without root it needs user namespaces: sudo sysctl "
            "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), or start the VM as root"
        )
    return f"its log: {share_log(vm, share)}"
