"""What both `vm create` and `vm set` read from the command line: disks, networks, cloud-init.

Context: a short-lived process.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from drivebay.disks.sizes import read_size
from drivebay.errors import HostError, UsageError
from drivebay.vm.creation import DiskWish
from drivebay.vm.spec import BUSES, DHCP, CloudInit, Forward, read_forward

__all__ = ["USER_NET", "read_cloud_init", "read_disk", "read_forwards", "read_qemu"]

# QEMU's user network: the addresses at which it serves.
USER_NET = ("10.0.2.", "10.0.2.2", "10.0.2.3")
_KEY_BYTES_MOST = 65536


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


def read_forwards(texts: Sequence[str] | None) -> tuple[Forward, ...]:
    """Raises: UsageError."""
    return tuple(read_forward(text) for text in texts or ())


def read_cloud_init(found: argparse.Namespace, before: CloudInit) -> CloudInit:
    """The settings with what was said on the command line. Raises: UsageError, HostError."""
    changed = before
    if found.hostname is not None:
        changed = replace(changed, hostname=found.hostname)
    if found.user is not None:
        changed = replace(changed, user=found.user)
    if found.ssh_key is not None:
        changed = replace(changed, ssh_keys=tuple(_read_key(Path(name)) for name in found.ssh_key))
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


def _read_key(path: Path) -> str:
    try:
        if path.stat().st_size > _KEY_BYTES_MOST:
            raise UsageError(f"'{path}' is too long for a public key")
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise HostError(
            f"can't read the public key '{path}'", getattr(error, "errno", None) or 0,
            path=str(path),
        ) from error  # fmt: skip
    if "PRIVATE KEY" in text:
        raise UsageError(
            f"'{path}' is a private key, which must not leave this host", hint=f"use {path}.pub"
        )
    return text
