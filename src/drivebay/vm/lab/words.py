"""What the readers of a lab's tables share: names that count up, and mistakes with their lines.

Context: any; pure.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection, Iterator, Sequence
from typing import Final

from drivebay.disks.sizes import read_size
from drivebay.errors import DrivebayError, UsageError
from drivebay.vm.lab.lines import Place
from drivebay.vm.lab.model import LabMistake, LabPool, Source

__all__ = ["choose_pool", "keyed", "located", "nearest", "numbered", "whole_mebibytes"]

_MIB: Final = 1 << 20


def numbered(name: str, count: int | None) -> list[str]:
    """NAME, or NAME-1 to NAME-N when there is a count, also when that is 1."""
    return [name] if count is None else [f"{name}-{number + 1}" for number in range(count)]


def nearest(name: str, known: Collection[str]) -> str | None:
    """A hint that names what may be meant, or what there is."""
    near = difflib.get_close_matches(name, known, 1)
    if near:
        return f"is '{near[0]}' meant?"
    return f"there are {', '.join(known)}" if known else None


def choose_pool(
    source: Source, place: Place, named: str | None, pools: Sequence[LabPool]
) -> str | None:
    """The pool that was named, or the lab's only one; None: the pool 'default' of this user.

    Raises: LabMistake.
    """
    names = [pool.name for pool in pools]
    if named is None:
        if len(names) > 1:
            raise source.mistake(
                place,
                f"the lab has several pools, so name one: {', '.join(names)}",
                hint=f'pool = "{names[0]}"',
            )
        return names[0] if names else None
    if named in names:
        return named
    if named == "default":
        return None
    raise source.mistake(
        place, f"there is no [pool.{named[:80]}] in this file", hint=nearest(named, names)
    )


def whole_mebibytes(text: str) -> int:
    """Read a size, of which all there are in a lab are whole MiB. Raises: UsageError."""
    size = read_size(text)
    if size <= 0 or size % _MIB:
        raise UsageError(f"'{text[:80]}' is no whole number of MiB")
    return size


@contextlib.contextmanager
def keyed(key: str) -> Iterator[None]:
    """Say to which key a value's mistake belongs. Raises: UsageError."""
    try:
        yield
    except DrivebayError as error:
        raise UsageError(str(error), field=key, hint=error.hint) from error


@contextlib.contextmanager
def located(source: Source, place: Place) -> Iterator[None]:
    """Give what is wrong within a table the line of its key, or of the table."""
    try:
        yield
    except LabMistake:
        raise
    except DrivebayError as error:
        key = getattr(error, "field", None)
        where = place if key is None else (*place, key)
        raise source.mistake(where, str(error), hint=error.hint) from error
