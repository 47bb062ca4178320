"""A port of this host for VNC programs: its rules, its password, its certificates.

Context: any; only `read_password` and `check_certificates` look at files.

A screen is a keyboard, too: whoever reaches it may restart the guest and log in. So a port that
other machines reach is refused without a password or certificates. VNC's own password is weak: it
has eight characters, and nothing is encrypted behind it.
"""

from __future__ import annotations

import errno
import ipaddress
import stat
from pathlib import Path
from typing import Final

from drivebay.errors import HostError, UsageError
from drivebay.vm.spec import VncSpec

__all__ = [
    "CERTIFICATES",
    "FIRST_PORT",
    "PASSWORD_BYTES",
    "check_certificates",
    "check_vnc",
    "read_address",
    "read_password",
]

FIRST_PORT: Final = 5900  # QEMU counts its displays from this port on
PASSWORD_BYTES: Final = 8  # RFC 6143, 7.2.2: it is the key of a DES cipher
_FILE_BYTES_MOST: Final = 4096

# The names that QEMU reads in the folder of a server's certificates.
CERTIFICATES: Final = ("ca-cert.pem", "server-cert.pem", "server-key.pem")


def read_address(text: str) -> tuple[str, int | None]:
    """Read 'ADDRESS', 'ADDRESS:PORT', ':PORT' or '[IPV6]:PORT'. Raises: UsageError.

    >>> read_address("0.0.0.0:5901")
    ('0.0.0.0', 5901)
    """
    if text.startswith("["):
        address, closed, port = text[1:].partition("]")
        whole = bool(closed) and (not port or port.startswith(":"))
        port = port.removeprefix(":")
    elif text.count(":") > 1:
        address, port, whole = text, "", True
    else:
        address, colon, port = text.partition(":")
        whole = not colon or bool(port)
    try:
        read = str(ipaddress.ip_address(address or "127.0.0.1"))
    except ValueError:
        whole, read = False, ""
    if not whole or (port and not (port.isascii() and port.isdigit() and len(port) <= 5)):
        raise UsageError(
            f"'{text[:80]}' is no address for VNC",
            hint="write --vnc, --vnc ADDRESS or --vnc ADDRESS:PORT, such as 127.0.0.1:5901",
        )
    return read, int(port) if port else None


def check_vnc(vnc: VncSpec, where: str) -> None:
    """Raises: UsageError, which begins with ``where``."""
    try:
        address = ipaddress.ip_address(vnc.address)
    except ValueError:
        raise UsageError(
            f"{where}: '{vnc.address[:80]}' is no IP address", field="address"
        ) from None
    if not FIRST_PORT <= vnc.port <= 65535:
        raise UsageError(
            f"{where}: port {vnc.port} is none for QEMU's VNC, which takes {FIRST_PORT} to 65535",
            field="port",
        )
    for name, path in (("password_file", vnc.password_file), ("tls", vnc.tls)):
        if path is not None and not path.startswith("/"):
            raise UsageError(
                f"{where}: '{name}' is '{path[:80]}', and should begin with '/'", field=name
            )
    if not address.is_loopback and vnc.password_file is None and vnc.tls is None:
        raise UsageError(
            f"{where}: other machines reach {address}, and nothing would keep them from the screen",
            hint="add --vnc-tls DIR or --vnc-password-file FILE; or leave it at 127.0.0.1, and "
            "reach it through ssh",
        )


def read_password(path: Path) -> bytes:
    """The first line of a file that only its owner may read. Raises: UsageError, HostError."""
    try:
        with path.open("rb") as file:
            mode = path.stat().st_mode
            line = file.readline(_FILE_BYTES_MOST).rstrip(b"\r\n")
    except OSError as error:
        raise _unreadable(path, error) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"other users may read the password in '{path}'", hint=f"chmod 600 {path}")
    if not line or not line.isascii() or not line.decode().isprintable():
        raise UsageError(f"the first line of '{path}' is no password in letters, digits and signs")
    return line


def check_certificates(folder: Path) -> None:
    """Raises: HostError for one that is not there, or can't be read."""
    for name in CERTIFICATES:
        try:
            with (folder / name).open("rb"):
                pass
        except OSError as error:
            raise _unreadable(folder / name, error) from error


def _unreadable(path: Path, error: OSError) -> HostError:
    return HostError(f"can't read '{path}'", error.errno or errno.EIO, path=str(path))
