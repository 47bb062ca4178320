"""Words and forms that must not be committed, and folders that say what they hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.style.tree import PACKAGE, ROOT, files, named

# The brackets keep this line itself from being found.
FORBIDDEN = re.compile(
    r"\b(?:T[O]DO|F[I]XME|X[X]X)\b|^\s*except\s*:|^\s*except\s+Exception\b(?!Group)",
    re.MULTILINE,
)
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}


@pytest.mark.parametrize(
    "path", files(".py", ".pyx", ".pxd", ".pyi", ".h", ".md", ".toml", ".build"), ids=named
)
def test_no_forbidden_words(path: Path) -> None:
    found = FORBIDDEN.search(path.read_text())
    assert not found, f"{named(path)}: '{found[0].strip()}'"
    assert path.stem not in VAGUE_NAMES, f"{named(path)}: name it after what it does"


@pytest.mark.parametrize(
    "text",
    ["# " + "todo".upper(), "try:\n    f()\nexcept:\n    pass", "except Exception as error:"],
)
def test_a_forbidden_word_is_seen(text: str) -> None:
    assert FORBIDDEN.search(text)


def test_every_folder_of_the_package_has_a_docstring() -> None:
    folders = {path.parent for path in files(".py", ".pyx", below=PACKAGE)}
    bare = [
        named(folder)
        for folder in sorted(folders)
        if not (folder / "__init__.py").is_file()
        or not (folder / "__init__.py").read_text().startswith('"""')
    ]
    assert not bare, f"without an __init__.py that says what they hold: {bare}"


def test_the_tree_is_found() -> None:
    assert ROOT / "README.md" in files(".md")
