"""On which line of a TOML file each table, key and element stands.

Context: any; pure. Python's reader keeps no positions, and a mistake in a long file is found by
its line. The text has been read by `tomllib` before, so that it is TOML, and this walk only has
to know where things begin and end.
"""

from __future__ import annotations

import re
import tomllib
from typing import Final

__all__ = ["Place", "lines_of"]

# Keys from the top down; an element of a list, and of [[tables]], by its number.
Place = tuple[str | int, ...]

_BLANK: Final = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_KEY: Final = re.compile(r"""[ \t]*("(?:[^"\\]|\\.)*"|'[^']*'|[A-Za-z0-9_-]+)[ \t]*""")
_TEXT: Final = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}(?!")|' + r"'''.*?'{3,5}(?!')|" + r'"(?:[^"\\]|\\.)*"|' + r"'[^']*'",
    re.DOTALL,
)
_BARE: Final = re.compile(r"[^,\]}#\n]+")


def lines_of(text: str) -> dict[Place, int]:
    """Where things stand in a text that `tomllib` can read; lines count from 1."""
    walk = _Walk(text)
    walk.document()
    return walk.lines


class _Walk:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Place, int] = {}
        self._counts: dict[Place, int] = {}  # of [[tables]]

    def document(self) -> None:
        table: Place = ()
        self._skip()
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip()

    def _header(self) -> Place:
        start = self.at
        is_list = self.text.startswith("[[", self.at)
        self.at += 1 + is_list
        place = self._resolved(self._keys())
        self.at += 1 + is_list
        if is_list:
            number = self._counts.get(place, -1) + 1
            self._counts[place] = number
            self._note(place, start)
            place = (*place, number)
        self._note(place, start)
        return place

    def _resolved(self, keys: list[str]) -> Place:
        """[a.b] below [[a]] belongs to the last of those."""
        place: Place = ()
        for number, key in enumerate(keys):
            place = (*place, key)
            if place in self._counts and number < len(keys) - 1:
                place = (*place, self._counts[place])
        return place

    def _pair(self, table: Place) -> None:
        start = self.at
        place = table
        for key in self._keys():
            place = (*place, key)
            self._note(place, start)
        self.at += 1  # =
        self._value(place)

    def _keys(self) -> list[str]:
        found = []
        while match := _KEY.match(self.text, self.at):
            found.append(_spelled(match[1]))
            self.at = match.end()
            if self.text[self.at] != ".":
                break
            self.at += 1
        return found

    def _value(self, place: Place) -> None:
        self._skip()
        first = self.text[self.at]
        if first == "[":
            self._elements(place)
        elif first == "{":
            self.at += 1
            while self._more("}"):
                self._pair(place)
        elif (match := _TEXT.match(self.text, self.at)) or (
            match := _BARE.match(self.text, self.at)
        ):
            self.at = match.end()

    def _elements(self, place: Place) -> None:
        self.at += 1
        number = 0
        while self._more("]"):
            self._note((*place, number), self.at)
            self._value((*place, number))
            number += 1

    def _more(self, end: str) -> bool:
        """Whether another element follows; what closes the list or table is passed over."""
        self._skip()
        if self.text[self.at] == ",":
            self.at += 1
            self._skip()
        if self.text[self.at] == end:
            self.at += 1
            return False
        return True

    def _skip(self) -> None:
        match = _BLANK.match(self.text, self.at)
        self.at = self.at if match is None else match.end()

    def _note(self, place: Place, at: int) -> None:
        self.lines.setdefault(place, self.text.count("\n", 0, at) + 1)


def _spelled(key: str) -> str:
    """A key as the reader has it: without its quotes."""
    if key[0] not in "\"'":
        return key
    return next(iter(tomllib.loads(f"{key} = 0")))
