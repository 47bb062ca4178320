"""What both `vm create` and `vm set` read from the command line: disks, networks, cloud-init.

Context: a short-lived process.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from drivebay.disks.sizes import read_size
from drivebay.errors import UsageError
from drivebay.vm.creation import DiskWish
from drivebay.vm.net_words import read_nets
from drivebay.vm.nets import with_short_forms
from drivebay.vm.public_key import read_public_key
from drivebay.vm.shares import read_share
from drivebay.vm.spec import BUSES, DHCP, CloudInit, Forward, NetSpec, ShareSpec, read_forward

__all__ = [
    "read_cloud_init",
    "read_disk",
    "read_forwards",
    "read_interfaces",
    "read_iso",
    "read_qemu",
    "read_shares",
]

_NO_ISO = "none"
_NO_SHARE = "none"


def read_disk(text: str) -> DiskWish:
    """Read '20G', 'pool=P,size=20G' or 'bdev=B', with 'name=', 'bus=' and 'shared'.

    Raises: UsageError.
    """
    wish = DiskWish()
    for word in text.split(","):
        key, equals, value = word.partition("=")
        match key:
            case "shared" if not equals:
                wish = replace(wish, shared=True)
            case "size" if value:
                wish = replace(wish, size=read_size(value))
            case "pool" if value:
                wish = replace(wish, pool=value)
            case "bdev" if value:
                wish = replace(wish, bdev=value)
            case "name" if value:
                wish = replace(wish, name=value)
            case "bus" if value in BUSES:
                wish = replace(wish, bus=value)
            case "bus":
                raise UsageError(f"there is no bus '{value[:40]}'", hint=", ".join(BUSES))
            case _ if not equals and key[:1].isdigit():
                wish = replace(wish, size=read_size(key))
            case _:
                raise UsageError(
                    f"'{word[:80]}' in --disk '{text[:80]}' is not understood",
                    hint="write 20G, pool=P,size=20G or bdev=B; and name=N, bus=BUS, shared",
                )
    return wish


def read_qemu(text: str | None) -> str | None:
    """A QEMU as vm.toml names it: a path means the same wherever the next command is typed."""
    return str(Path(text).absolute()) if text is not None and "/" in text else text


def read_iso(text: str | None) -> Path | None:
    """The ISO that was named; 'none' is none."""
    return None if text in (None, _NO_ISO) else Path(text).absolute()


def read_interfaces(
    found: argparse.Namespace, before: Sequence[NetSpec] = ()
) -> tuple[NetSpec, ...]:
    """The interfaces as the command line has them; without --net, those ``before``.

    Raises: UsageError.
    """
    nets = tuple(before) if before and found.net is None else read_nets(found.net)
    forward = None if found.forward is None else read_forwards(found.forward)
    return with_short_forms(nets, forward, found.address, found.gateway, found.dns)


def read_forwards(texts: Sequence[str] | None) -> tuple[Forward, ...]:
    """Raises: UsageError."""
    return tuple(read_forward(text) for text in texts or ())


def read_shares(texts: Sequence[str]) -> tuple[ShareSpec, ...]:
    """Read --share: 'none', or folders. Raises: UsageError, NotFound, HostError."""
    if list(texts) == [_NO_SHARE]:
        return ()
    return tuple(read_share(text) for text in texts)


def read_cloud_init(found: argparse.Namespace, before: CloudInit) -> CloudInit:
    """The settings with what was said on the command line. Raises: UsageError, HostError."""
    changed = before
    if found.hostname is not None:
        changed = replace(changed, hostname=found.hostname)
    if found.user is not None:
        changed = replace(changed, user=found.user)
    if found.ssh_key is not None:
        changed = replace(
            changed, ssh_keys=tuple(read_public_key(Path(name)) for name in found.ssh_key)
        )
    if found.packages is not None:
        changed = replace(changed, packages=tuple(filter(None, found.packages.split(","))))
    if found.password or found.password_file is not None:
        from drivebay.vm.password import hash_password, read_password

        path = None if found.password_file is None else Path(found.password_file)
        changed = replace(changed, password_hash=hash_password(read_password(path)))
    return changed


def said_of_guest(found: argparse.Namespace) -> list[str]:
    """The options given that only cloud-init can carry out."""
    names = ("hostname", "user", "ssh_key", "packages", "password_file")
    said = [name for name in names if getattr(found, name) is not None]
    said += ["password"] if found.password else []
    said += ["address"] if found.address not in (None, DHCP) else []
    return [f"--{name.replace('_', '-')}" for name in said]
