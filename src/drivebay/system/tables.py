"""A table of TOML that a person wrote: keys taken one by one, and sentences for what is wrong.

Context: any; looks at no file.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from drivebay.errors import UsageError

__all__ = ["Table"]


_KINDS: Final = {str: "a text", int: "a number", bool: "true or false", list: "a list",
                 dict: "a table", datetime: "a date and time"}  # fmt: skip


@dataclass
class Table:
    """Keys are taken one by one; what is left at the end is unknown.

    ``where`` begins the sentences: "vm.toml of 'web', [[disk]] 2".
    """

    where: str
    values: dict[str, Any]
    known: list[str] = field(default_factory=list)

    def take(self, key: str, kind: type, default: Any = None, *, required: bool = False) -> Any:
        """The value of a key, which has to be of that kind. Raises: UsageError."""
        self.known.append(key)
        if key not in self.values:
            if required:
                raise UsageError(f"{self.where} has no '{key}'", field=key)
            return default
        value = self.values.pop(key)
        if type(value) is not kind:
            raise UsageError(
                f"{self.where}: '{key}' is {value!r:.80}, and should be {_KINDS[kind]}", field=key
            )
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts. Raises: UsageError."""
        found = self.take(key, list, [])
        if not all(isinstance(item, str) for item in found):
            raise UsageError(f"{self.where}: '{key}' should be a list of texts", field=key)
        return tuple(found)

    def one_of(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        """One of some words. Raises: UsageError."""
        value = str(self.take(key, str, default))
        if value not in allowed:
            raise UsageError(
                f"{self.where}: '{key}' is '{value[:80]}', and should be one of "
                f"{', '.join(allowed)}",
                field=key,
            )
        return value

    def end(self) -> None:
        """Raises: UsageError for a key that nobody took, with the one that may be meant."""
        if self.values:
            key = next(iter(self.values))
            near = difflib.get_close_matches(key, self.known, 1)
            raise UsageError(
                f"{self.where} has a key that is unknown: '{key[:80]}'",
                hint=f"is '{near[0]}' meant?" if near else f"known are {', '.join(self.known)}",
                field=key,
            )
