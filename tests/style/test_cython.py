"""Rules for Cython on the path: no hidden use of the GIL, and three files for each module."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.style.tree import PACKAGE, ROOT, files, named, path_modules

_WITH_GIL = re.compile(r"^[^#\n]*\bwith\s+gil\b", re.MULTILINE)

_DOOR = re.compile(r"^(?:def|cpdef|class|cdef class|cdef public)\b", re.MULTILINE)


HINT = "performance hint"


def said_of(path: Path, builds: Path = ROOT / "build") -> list[str]:
    """What Cython said of a module in each build of this clone (tools/translate.py)."""
    texts = [said.read_text() for said in builds.rglob(f"{path.stem}.c.said")]
    return [text for text in texts if text.partition("\n")[0] == str(path.resolve())]


@pytest.mark.parametrize("path", path_modules(), ids=named)
def test_no_performance_hint(path: Path) -> None:
    if not (ROOT / "build").is_dir():
        pytest.skip("this clone was never built: make build")
    found = said_of(path)
    assert found, f"no build of this clone has said anything of {named(path)}: make build"
    assert not [text for text in found if HINT in text]


def test_a_performance_hint_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "slow.pyx"
    source.write_text("cdef void f() nogil:\n    pass\n\ncdef void g() noexcept nogil:\n    f()\n")
    words = [sys.executable, str(ROOT / "tools" / "translate.py"), "-3", "-Wextra"]
    words += [str(source), "--output-file", str(tmp_path / "slow.c")]
    done = subprocess.run(words, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    (text,) = said_of(source, tmp_path)
    assert HINT in text


@pytest.mark.parametrize("path", path_modules(), ids=named)
def test_no_gil_on_the_path(path: Path) -> None:
    assert not _WITH_GIL.search(path.read_text()), f"{named(path)} takes the GIL on the path"


def test_taking_the_gil_is_seen() -> None:
    assert _WITH_GIL.search("cdef void f() noexcept with gil:\n    pass\n")
    assert _WITH_GIL.search("    with gil:\n        pass\n")
    assert not _WITH_GIL.search("# never with gil here\n    with nogil:\n")


def incomplete(path: Path) -> list[str]:
    """The missing ones: a .pxd for Cython, and a .pyi where the module has a Python door."""
    has_door = _DOOR.search(path.read_text())
    wanted = (".pxd", ".pyi") if has_door else (".pxd",)
    return [
        path.with_suffix(suffix).name for suffix in wanted if not path.with_suffix(suffix).is_file()
    ]


@pytest.mark.parametrize("path", files(".pyx", below=PACKAGE), ids=named)
def test_each_module_has_its_interface_pages(path: Path) -> None:
    assert not incomplete(path), f"{named(path)} lacks {incomplete(path)}"


def test_a_missing_page_is_seen(tmp_path: Path) -> None:
    lone = tmp_path / "lone.pyx"
    lone.write_text("cdef int f() noexcept nogil:\n    return 0\n")
    assert incomplete(lone) == ["lone.pxd"]
    lone.write_text("cdef class Queue:\n    pass\n")
    assert incomplete(lone) == ["lone.pxd", "lone.pyi"]
