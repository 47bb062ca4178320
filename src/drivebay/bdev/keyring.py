"""The keys of encrypted bdevs, by name. Context: control; read_key_file() blocks.

What a key is made of is seen only by whoever saves the configuration or asks for it by
accel_crypto_keys_get, as SPDK has it; a key that came from a file is saved as the file's name.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from drivebay.errors import AlreadyExists, HostError, NotFound, UsageError

if TYPE_CHECKING:
    from drivebay.bdev.crypto import CryptoKey

__all__ = ["Keyring", "NamedKey", "read_key_file"]

_log = logging.getLogger(__name__)
_MOST_BYTES: Final = 1024
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


@dataclass(eq=False)
class NamedKey:
    """One key, and how it was given."""

    key: CryptoKey
    key_file: str | None = None
    tweak_mode: str | None = None
    owner: str | None = None  # the bdev that it was given with, and goes with

    def params(self) -> dict[str, Any]:
        """The parameters of accel_crypto_key_create that give it again."""
        shown: dict[str, Any] = {"name": self.key.name, "cipher": self.key.cipher}
        if self.key_file is not None:
            shown["key_file"] = self.key_file
        else:
            shown["key"], shown["key2"] = self.key.digits()
        if self.tweak_mode is not None:
            shown["tweak_mode"] = self.tweak_mode
        return shown


class Keyring:
    """All keys, in the order in which they came."""

    def __init__(self) -> None:
        self._keys: dict[str, NamedKey] = {}
        self._warned = False

    def __iter__(self) -> Iterator[NamedKey]:
        return iter(list(self._keys.values()))

    def add(self, named: NamedKey) -> None:
        """Raises: AlreadyExists."""
        if named.key.name in self._keys:
            raise AlreadyExists(f"a key called '{named.key.name[:80]}' exists already")
        self._keys[named.key.name] = named

    def get(self, name: str) -> NamedKey:
        """Raises: NotFound."""
        try:
            return self._keys[name]
        except KeyError:
            hint = "make it with accel_crypto_key_create"
            raise NotFound(f"no key is called '{name[:80]}'", hint=hint) from None

    def remove(self, name: str) -> None:
        """Wiped when its last bdev is gone."""
        self._keys.pop(name, None)

    def calls(self) -> list[dict[str, Any]]:
        """What save_config says about keys; a warning, once, when that shows one."""
        plain = [named.key.name for named in self if named.key_file is None]
        if plain and not self._warned:
            self._warned = True
            _log.warning(
                "key '%s' is in the saved configuration, readable: give it by key_file instead",
                plain[0],
            )
        return [{"method": "accel_crypto_key_create", "params": named.params()} for named in self]


def read_key_file(path: str) -> tuple[str, str]:
    """Return both halves of a key: two hexadecimal words in a file for nobody else.

    Raises: HostError, UsageError.
    """
    try:
        # Not blocking: it might be a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        code = getattr(error, "errno", None) or errno.EINVAL
        raise HostError(f"can't read the key file '{path[:200]}'", code, path=path) from error
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        _check(Path(path), found)
        words = file.read(_MOST_BYTES + 1).split()
    if found.st_size > _MOST_BYTES or len(words) != 2:
        raise UsageError(
            f"the key file '{path[:200]}' must hold two words, the key and the second key",
            field="key_file",
        )
    # What is not a digit is refused by its place, not shown.
    return words[0].decode("latin-1"), words[1].decode("latin-1")


def _check(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(f"the key file '{path}' is not a regular file", field="key_file")
    if found.st_uid not in (os.geteuid(), 0):
        raise UsageError(f"the key file '{path}' belongs to another user", field="key_file")
    if found.st_mode & _OTHERS:
        raise UsageError(
            f"others may use the key file '{path}': its mode is {found.st_mode & 0o777:04o}",
            field="key_file",
            hint=f"chmod 0600 '{path}'",
        )
