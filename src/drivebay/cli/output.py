"""Printing and exit codes of the command line, in one place.

Every command returns one of the four codes below. Results go to standard
output, as text or with ``--json`` as JSON; everything about what went wrong
goes to standard error, as ``drivebay: error: …`` and a ``hint: …`` line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from drivebay.errors import DrivebayError, Unreachable, UsageError

__all__ = [
    "DONE",
    "REFUSED",
    "UNREACHABLE",
    "USAGE",
    "print_error",
    "print_json",
    "print_table",
    "print_warning",
    "table_lines",
]

DONE = 0
REFUSED = 1
USAGE = 2
UNREACHABLE = 3


def print_error(error: DrivebayError) -> int:
    """Print an error and its hint to standard error; returns the exit code it asks for."""
    print(f"drivebay: error: {error}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    if isinstance(error, Unreachable):
        return UNREACHABLE
    if isinstance(error, UsageError):
        return USAGE
    return REFUSED


def print_warning(message: str) -> None:
    """Say something that does not stop the command."""
    print(f"drivebay: warning: {message}", file=sys.stderr)


def print_json(value: Any) -> None:
    """Print a result as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows in columns."""
    print("\n".join(table_lines(header, rows)))


def table_lines(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Rows in columns as wide as their widest cell; numbers stand on the right."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    numeric = [
        bool(rows) and all(isinstance(row[column], int | float) for row in rows)
        for column in range(len(header))
    ]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    ]
