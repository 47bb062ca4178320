"""What the style tests look at: the files of this clone, and the folders of the package."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "drivebay"

# Folders whose Cython runs for every I/O (docs/architecture.md).
PATH_FOLDERS = ("memory", "reactor", "dataplane", "bdev", "engines")

# Environments, builds and caches lie in the clone and are not part of it.
_FOREIGN = {".git", ".venv", ".venv-dev", ".venv-asan", "build", "dist", "node_modules"}


def files(*suffixes: str, below: Path = ROOT) -> list[Path]:
    """The clone's own files with one of these suffixes."""
    return sorted(
        path
        for path in below.rglob("*")
        if path.suffix in suffixes
        and path.is_file()
        and not _FOREIGN.intersection(path.relative_to(ROOT).parts)
        and not any(part.endswith("_cache") for part in path.relative_to(ROOT).parts)
    )


def named(path: Path) -> str:
    """A path as a message shows it."""
    return path.relative_to(ROOT).as_posix()


def path_modules() -> list[Path]:
    """Each .pyx whose code runs for every I/O."""
    return [path for folder in PATH_FOLDERS for path in files(".pyx", below=PACKAGE / folder)]
