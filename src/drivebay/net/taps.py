"""TAPs: interfaces of the host whose other end is a program, here QEMU.

Context: a short-lived process, which hands the descriptors to QEMU. A TAP that we make is not
persistent: the kernel removes it with the last descriptor, whatever happens to QEMU or to us.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from drivebay.errors import HostError, InUse, NotFound, StateError
from drivebay.net.links import netlink

if TYPE_CHECKING:
    from pyroute2 import IPRoute

__all__ = [
    "QUEUES_MOST",
    "Tap",
    "alias_of",
    "check_bridge",
    "exists",
    "open_named_tap",
    "open_tap",
    "open_vhost",
    "set_persistent",
]

QUEUES_MOST: Final = 8  # a guest's driver takes one for each of its CPUs
NAMES: Final = "dbtap%d"  # the kernel puts in the first number that is free
_TUN: Final = "/dev/net/tun"
_VHOST: Final = "/dev/vhost-net"

# linux/if_tun.h, and struct ifreq: the name's 16 bytes, the flags, and room to its 40.
_TUNSETIFF: Final = 0x400454CA
_TUNSETPERSIST: Final = 0x400454CB
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
_REQUEST: Final = struct.Struct("16sH22x")


@dataclass(frozen=True)
class Tap:
    """An open TAP. ``descriptors`` has one for each queue, ``vhost`` too, or none."""

    interface: str
    descriptors: tuple[int, ...]
    vhost: tuple[int, ...] = ()

    def close(self) -> None:
        """Let go of it here; with nobody else's descriptor it is gone."""
        for descriptor in (*self.descriptors, *self.vhost):
            os.close(descriptor)


def alias_of(vm: str, index: int) -> str:
    """What a TAP is marked with in the kernel: whose it is, and which of a VM's interfaces."""
    return f"drivebay VM {vm}, net {index}"


def open_tap(bridge: str, *, queues: int, alias: str, mtu: int | None = None) -> Tap:
    """Make a TAP in a bridge, and switch it on; ``mtu`` None is the bridge's. Root only.

    Raises: NotFound when there is no such bridge, StateError when it is something else; HostError.
    """
    with netlink(f"put a TAP into the bridge '{bridge}'") as ipr:
        master, its_mtu = find_bridge(ipr, bridge)
        tap = _open(NAMES, queues, several=queues > 1)
        with _closed_on_error(tap):
            (index,) = ipr.link_lookup(ifname=tap.interface)
            # A bridge without a MAC of its own has the lowest of its ports', and the host's
            # address in a LAN hangs on it: ours is above each that a card can have.
            mac = f"fe:{os.urandom(5).hex(':')}"
            ipr.link("set", index=index, ifalias=alias, address=mac, mtu=mtu or its_mtu)
            ipr.link("set", index=index, master=master, state="up")
    return tap


def open_named_tap(ifname: str, *, queues: int, alias: str) -> Tap:
    """Open a TAP of that name; one that is missing is made, switched on, and gone with us.

    Raises: InUse, StateError when it is no TAP; HostError.
    """
    with netlink(f"open the TAP '{ifname}'") as ipr:
        if ipr.link_lookup(ifname=ifname):
            return _open_present(ifname, queues)
        tap = _open(ifname, queues, several=queues > 1)
        with _closed_on_error(tap):
            (index,) = ipr.link_lookup(ifname=ifname)
            ipr.link("set", index=index, ifalias=alias, state="up")
    return tap


def exists(ifname: str) -> bool:
    """Whether the host has an interface of that name. Raises: HostError."""
    with netlink(f"look for the interface '{ifname}'") as ipr:
        return bool(ipr.link_lookup(ifname=ifname))


def check_bridge(name: str) -> None:
    """Raises: NotFound, StateError when it is no bridge; HostError."""
    with netlink(f"look at the bridge '{name}'") as ipr:
        find_bridge(ipr, name)


def find_bridge(ipr: IPRoute, name: str) -> tuple[int, int]:
    """Index and MTU of a bridge. Raises: NotFound, StateError when it is no bridge."""
    found = ipr.link_lookup(ifname=name)
    if not found:
        raise NotFound(
            f"this host has no bridge '{name}'",
            hint="those that there are: ip link show type bridge",
        )
    (link,) = ipr.get_links(found[0])
    information = link.get_attr("IFLA_LINKINFO")
    kind = None if information is None else information.get_attr("IFLA_INFO_KIND")
    if kind != "bridge":
        raise StateError(
            f"the interface '{name}' is no bridge, so no VM can join it",
            hint="the host's bridges: ip link show type bridge; to make one of an uplink: "
            f"drivebay net host-bridge plan {name}",
        )
    return found[0], int(link.get_attr("IFLA_MTU"))


def _open_present(ifname: str, queues: int) -> Tap:
    """A TAP that is there has one queue or may have several, and is opened as what it is."""
    several = queues > 1
    try:
        return _open(ifname, queues, several=several)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    try:
        return _open(ifname, 1, several=not several)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise StateError(
            f"the interface '{ifname}' is no TAP, so no VM can have its other end",
            hint=f"ip -details link show {ifname}",
        ) from error


def _open(name: str, queues: int, *, several: bool) -> Tap:
    """Raises: HostError, InUse; OSError with EINVAL for an interface of another kind."""
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if several else 0)
    descriptors: list[int] = []
    try:
        for _ in range(queues):
            descriptors.append(os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            request = _REQUEST.pack(name.encode(), flags)
            answer = fcntl.ioctl(descriptors[-1], _TUNSETIFF, request)
            name = _REQUEST.unpack(answer)[0].rstrip(b"\0").decode()
        return Tap(name, tuple(descriptors), open_vhost(queues))
    except BaseException as error:
        for descriptor in descriptors:
            os.close(descriptor)
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise _refusal(name, error) from error
        raise


def open_vhost(queues: int) -> tuple[int, ...]:
    """The kernel's own end of each queue, where it has one; without, QEMU copies each packet."""
    found: list[int] = []
    try:
        for _ in range(queues):
            descriptor = os.open(_VHOST, os.O_RDWR | os.O_CLOEXEC)
            found.append(descriptor)
    except OSError:
        for descriptor in found:
            os.close(descriptor)
        return ()
    return tuple(found)


def _refusal(name: str, error: OSError) -> HostError | InUse:
    shown = "a TAP" if name == NAMES else f"the TAP '{name}'"
    if error.errno == errno.EBUSY:
        return InUse(f"another program has {shown} open", hint="give each interface its own TAP")
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        hint = "sudo modprobe tun   (in a container: let it have /dev/net/tun)"
        return HostError("this kernel has no TAPs", error.errno, path=_TUN, hint=hint)
    forbidden = error.errno in (errno.EPERM, errno.EACCES) and name != NAMES
    hint = f"let root make it once: sudo ip tuntap add dev {name} mode tap user $USER"
    return HostError(f"can't open {shown}", error.errno or errno.EIO, path=_TUN,
                     hint=hint if forbidden else None)  # fmt: skip


def set_persistent(tap: Tap, on: bool) -> None:
    """Whether a TAP outlives its descriptors. Raises: HostError."""
    try:
        fcntl.ioctl(tap.descriptors[0], _TUNSETPERSIST, int(on))
    except OSError as error:
        raise _refusal(tap.interface, error) from error


@contextlib.contextmanager
def _closed_on_error(tap: Tap) -> Iterator[None]:
    try:
        yield
    except BaseException:
        tap.close()
        raise
