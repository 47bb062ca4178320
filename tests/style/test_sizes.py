"""Modules and functions stay short enough to be read whole."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.style.tree import files, named

MODULE_LINES = 500
FUNCTION_LINES = 70

_CYTHON_FUNCTION = re.compile(
    r"^(?P<indent> *)(?:async )?(?:(?:def|cpdef|cdef)\b(?!.*\b(?:class|struct|enum|extern)\b).*\()"
)
_NAME = re.compile(r"(\w+)\s*\(")


def python_functions(source: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def cython_functions(source: str) -> Iterator[tuple[str, int]]:
    """By indentation: a function ends before the next line that is not deeper than its own."""
    lines = source.splitlines()
    for number, line in enumerate(lines):
        match = _CYTHON_FUNCTION.match(line)
        if match is None:
            continue
        last = body = number
        depth = 0
        for offset, text in enumerate(lines[number:]):
            here = number + offset
            inside = depth > 0  # still within the parentheses of the signature
            depth += text.count("(") - text.count(")")
            if here > number and not inside and text.strip():
                if (
                    len(text) - len(text.lstrip()) <= len(match["indent"])
                    and text.strip()[0] != ")"
                ):
                    break
                body = here
            last = max(last, body)
        name = _NAME.search(line)
        yield (name[1] if name else line.strip()), last - number + 1


def long_functions(path: Path, source: str) -> list[str]:
    functions = cython_functions if path.suffix in {".pyx", ".pxd"} else python_functions
    return [
        f"{path.name}: '{name}' has {length} lines (limit {FUNCTION_LINES})"
        for name, length in functions(source)
        if length > FUNCTION_LINES
    ]


@pytest.mark.parametrize("path", files(".py", ".pyx", ".pxd", ".pyi"), ids=named)
def test_sizes(path: Path) -> None:
    source = path.read_text()
    length = len(source.splitlines())
    assert length <= MODULE_LINES, f"{named(path)} has {length} lines (limit {MODULE_LINES})"
    assert not long_functions(path, source)


@pytest.mark.parametrize("suffix", [".py", ".pyx"])
def test_the_rule_can_fail(suffix: str) -> None:
    body = "    x = 1\n" * FUNCTION_LINES
    path = Path("made_up" + suffix)
    assert long_functions(path, f"def f():\n{body}")
    assert not long_functions(path, f"def f():\n{body[10:]}\n\ndef g():\n    pass\n")


def test_cython_functions_are_measured() -> None:
    source = (
        "cdef struct a_t:\n    int x\n\n"
        "cdef inline int one(\n    int x,\n) noexcept nogil:\n    return x\n\n"
        "cdef class C:\n    def two(self):\n        pass\n\n        pass\n\n    cdef int y\n"
    )
    assert list(cython_functions(source)) == [("one", 4), ("two", 4)]
