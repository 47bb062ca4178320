"""`--vnc`, `--vnc-password-file` and `--vnc-tls` of `vm create` and `vm set`.

Context: a short-lived process.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from drivebay.cli.output import print_warning
from drivebay.errors import UsageError
from drivebay.vm.ports import check_vnc_free, free_vnc_port
from drivebay.vm.spec import VncSpec
from drivebay.vm.store import Vm
from drivebay.vm.vnc import (
    PASSWORD_BYTES,
    check_certificates,
    check_vnc,
    read_address,
    read_password,
)

__all__ = ["read_vnc", "vnc_words"]

_NONE = "none"


def read_vnc(
    found: argparse.Namespace, before: VncSpec | None, others: Sequence[Vm]
) -> VncSpec | None:
    """What was said, on top of what was there before.

    Raises: UsageError, InUse, HostError for a file that QEMU could not use either.
    """
    said = (found.vnc, found.vnc_password_file, found.vnc_tls)
    if said == (None, None, None):
        return before
    if found.vnc == _NONE:
        if said[1:] != (None, None):
            raise UsageError("--vnc none needs neither a password nor certificates")
        return None
    if found.vnc is None and before is None:
        raise UsageError("--vnc-password-file and --vnc-tls need --vnc")
    vnc = before or VncSpec("127.0.0.1", 0)
    if found.vnc is not None:
        address, port = read_address(found.vnc)
        vnc = replace(vnc, address=address, port=vnc.port if port is None else port)
    if not vnc.port:
        vnc = replace(vnc, port=free_vnc_port(others))
    if found.vnc_password_file is not None:
        vnc = replace(vnc, password_file=_path(found.vnc_password_file))
    if found.vnc_tls is not None:
        vnc = replace(vnc, tls=_path(found.vnc_tls))
    check_vnc(vnc, "--vnc")
    check_vnc_free(vnc, others)
    if vnc.tls is not None:
        check_certificates(Path(vnc.tls))
    if vnc.password_file is not None:
        _say_of_password(len(read_password(Path(vnc.password_file))), encrypted=vnc.tls is not None)
    return vnc


def _say_of_password(length: int, *, encrypted: bool) -> None:
    words = f"VNC uses {PASSWORD_BYTES} characters of a password"
    words += f", and this one has {length}" if length > PASSWORD_BYTES else ""
    words += "" if encrypted else "; what is seen and typed is not encrypted"
    print_warning(words)


def vnc_words(vnc: VncSpec) -> str:
    """For people: '127.0.0.1:5901, …'."""
    host = f"[{vnc.address}]" if ":" in vnc.address else vnc.address
    words = f"{host}:{vnc.port}"
    words += f", password in {vnc.password_file}" if vnc.password_file else ""
    return words + (f", encrypted with {vnc.tls}" if vnc.tls else "")


def _path(text: str) -> str | None:
    return None if text == _NONE else str(Path(text).absolute())
