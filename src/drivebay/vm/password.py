"""The password of a guest's user: asked for or read from a file, and kept only as a hash.

Context: a command in the foreground. A password is never a word of a command line, which all
users of a host can see.
"""

from __future__ import annotations

import errno as errno_codes
import getpass
import subprocess
import sys
from pathlib import Path
from typing import Final

from drivebay.errors import DrivebayError, HostError, StateError, UsageError

__all__ = ["hash_password", "read_password"]

BYTES_MOST: Final = 256  # openssl silently leaves out what is more
HASH_SECONDS: Final = 30.0


def hash_password(password: str) -> str:
    """Return the SHA-512 hash of crypt(5), with a salt of its own.

    Raises: UsageError for a password that nobody could type; StateError without openssl.
    """
    encoded = password.encode()
    if not password or not password.isprintable():
        raise UsageError("a password is one line of letters, digits and signs, and not empty")
    if len(encoded) > BYTES_MOST:
        raise UsageError(f"a password has at most {BYTES_MOST} bytes, not {len(encoded)}")
    try:
        done = subprocess.run(
            ["openssl", "passwd", "-6", "-stdin"],
            input=encoded + b"\n",
            capture_output=True,
            timeout=HASH_SECONDS,
        )
    except FileNotFoundError:
        raise StateError(
            "there is no openssl to hash the password",
            hint="sudo apt install openssl   (Fedora, AlmaLinux, openEuler: sudo dnf install "
            "openssl)",
        ) from None
    except subprocess.TimeoutExpired:
        raise DrivebayError(f"openssl did not end in {HASH_SECONDS:g} s") from None
    hashed = done.stdout.decode(errors="replace").strip()
    if done.returncode != 0 or not hashed.startswith("$6$"):
        said = done.stderr.decode(errors="replace").strip()[:200]
        raise DrivebayError(f"openssl did not hash the password: {said}")
    return hashed


def read_password(path: Path | None) -> str:
    """Return the first line of a file, or ask twice at the terminal.

    Raises: HostError, StateError, UsageError.
    """
    if path is None:
        return _asked()
    try:
        with path.open(encoding="utf-8") as file:
            return file.readline(2 * BYTES_MOST).rstrip("\n")
    except UnicodeDecodeError:
        raise UsageError(f"the password in '{path}' is not UTF-8") from None
    except OSError as error:
        code = error.errno or errno_codes.EIO
        raise HostError(f"can't read a password from '{path}'", code, path=str(path)) from error


def _asked() -> str:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise StateError(
            "nobody can be asked for a password without a terminal", hint="add --password-file FILE"
        )
    first = getpass.getpass("password of the guest's user: ")
    if getpass.getpass("once more: ") != first:
        raise UsageError("the two passwords differ, so none was set")
    return first
