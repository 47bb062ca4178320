#!/usr/bin/env python3
"""Print the package's source files below a folder, one relative path a line, sorted.

Run by meson when it configures; see src/drivebay/meson.build for the reason.
"""

import sys
from pathlib import Path

SUFFIXES = {
    ".py", ".pyi", ".pyx", ".pxd", ".h", ".sh", ".toml", ".service", ".conf",
    ".html", ".css", ".js",
}  # fmt: skip


def main() -> None:
    root = Path(sys.argv[1])
    for path in sorted(root.rglob("*")):
        if path.suffix in SUFFIXES or path.name == "py.typed":
            print(path.relative_to(root).as_posix())


if __name__ == "__main__":
    main()
