#!/usr/bin/env python3
"""Run Cython for the build, and keep what it said of a module beside what it made of it.

    tools/translate.py [OPTIONS] module.pyx --output-file module.c   also makes module.c.said

A build hides the words of a compiler that succeeds, and a performance hint is only words: the
style tests read them here. The first line of the file is the module's path.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main(words: list[str]) -> int:
    command = [sys.executable, "-m", "cython", *words]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    sys.stderr.write(done.stdout)
    *_, source, _, output = words
    Path(f"{output}.said").write_text(f"{Path(source).resolve()}\n{done.stdout}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
