"""Bring in a class from somebody's file: it runs as this process, so it must be trusted.

Context: a worker thread. What is checked is the open file, and that very file is loaded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import stat
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from drivebay.errors import DrivebayError, HostError, UsageError

__all__ = ["construct", "load_class"]

_MOST_BYTES: Final = 64 << 20
_numbers = count(1)
_loading = threading.Lock()
# A compiled module can be loaded once in a process: (device, inode, time of change) -> module
_compiled: dict[tuple[int, int, int], ModuleType] = {}


def load_class(path: str, name: str) -> type[Any]:
    """The class ``name`` of a Python file, read anew, or of a compiled module.

    Raises: UsageError, HostError: for who may not write such a file, see open_trusted().
    """
    with open_trusted(path) as file:
        load = _load_compiled if path.endswith(tuple(EXTENSION_SUFFIXES)) else _load_source
        try:
            module = load(Path(path), file)
        except BaseException as error:
            raise UsageError(f"'{path}' can't be loaded: {_told(error)}", field="module") from error
    found = getattr(module, name, None)
    if not isinstance(found, type):
        raise UsageError(f"'{path}' has no class '{name[:80]}'", field="class")
    return found


def construct(kind: type[Any], *values: Any, **params: Any) -> Any:
    """Call a class; whatever it raises becomes a sentence. Raises: DrivebayError."""
    try:
        return kind(*values, **params)
    except DrivebayError:
        raise
    except OSError as error:
        text = f"the class {kind.__name__} gave up at '{error.filename}'"
        raise HostError(text, error.errno or 5) from error
    except BaseException as error:
        raise UsageError(
            f"the class {kind.__name__} can't be made: {_told(error)}", field="params"
        ) from error


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


@contextlib.contextmanager
def open_trusted(path: str) -> Iterator[int]:
    """Open a file that nobody but root and this user could have written.

    Raises: UsageError for another one, HostError when it can't be opened.
    """
    if not path.startswith("/"):
        raise UsageError(f"'{path}' is not a path from the root", field="module", hint="/…/X.py")
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        code = error.errno if isinstance(error, OSError) and error.errno else 22
        raise HostError(f"cannot open '{path}'", code, path=path) from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise UsageError(f"'{path}' is not a file", field="module")
        _require_trust(path, os.fstat(file))
        folder = Path(path).resolve().parent
        _require_trust(str(folder), folder.stat())
        yield file
    finally:
        os.close(file)


def _require_trust(path: str, info: os.stat_result) -> None:
    if info.st_uid not in (0, os.geteuid()):
        raise UsageError(
            f"'{path}' belongs to user {info.st_uid}; what runs here must belong to root or to "
            f"user {os.geteuid()}",
            field="module",
            hint=f"chown {os.geteuid()} {path}",
        )
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not info.st_mode & stat.S_ISVTX:
        raise UsageError(
            f"'{path}' can be written by others, and what is in it runs here",
            field="module",
            hint=f"chmod go-w {path}",
        )


def _load_source(path: Path, file: int) -> ModuleType:
    size = os.fstat(file).st_size
    if size > _MOST_BYTES:
        raise ValueError(f"it has {size} bytes")
    with os.fdopen(os.dup(file), "rb") as source:
        code = compile(source.read(), str(path), "exec", dont_inherit=True)
    module = ModuleType(f"drivebay_disk_{next(_numbers)}_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and others look there
    try:
        exec(code, module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _load_compiled(path: Path, file: int) -> ModuleType:
    info = os.fstat(file)
    key = (info.st_dev, info.st_ino, info.st_mtime_ns)
    with _loading:
        if key not in _compiled:
            name = path.name.partition(".")[0]
            opened = f"/proc/self/fd/{file}"
            loader = ExtensionFileLoader(name, opened)
            module = importlib.util.module_from_spec(ModuleSpec(name, loader, origin=opened))
            module.__file__ = str(path)
            loader.exec_module(module)
            _compiled[key] = module
        return _compiled[key]
