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


def cythonize(sources: list[Path], folder: Path) -> str:
    """Translate modules afresh, as meson.build does; returns what the compiler said.

    Afresh, because a build shows its hints only once; in one run, because each run reads
    the interface pages again.
    """
    command = [sys.executable, "-m", "cython", "-3", "-Wextra", "-I", str(ROOT / "src")]
    for name in ("boundscheck", "wraparound", "initializedcheck"):
        command += ["-X", f"{name}=False"]
    command += ["-X", "cdivision=True", "-o", str(folder), *map(str, sources)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_no_performance_hint(tmp_path: Path) -> None:
    said = cythonize(path_modules(), tmp_path)
    assert "performance hint" not in said, said


def test_a_performance_hint_is_seen(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source = tmp_path / "slow.pyx"
    source.write_text("cdef void f() nogil:\n    pass\n\ncdef void g() noexcept nogil:\n    f()\n")
    assert "performance hint" in cythonize([source], tmp_path / "out")


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
