#!/usr/bin/env python3
"""Run Python with AddressSanitizer and UndefinedBehaviorSanitizer loaded before all else.

    .venv-asan/bin/python tools/sanitized.py -m pytest tests/unit

The interpreter is built without them, so their run-time libraries are preloaded. Faults of
memory are left to the program: SIGBUS is how truncated guest memory is met, and faulthandler
shows the rest. Python itself frees little at its end, so leaks are counted by the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LIBRARIES = ("libasan.so", "libubsan.so")
ASAN = "detect_leaks=0:handle_segv=0:handle_sigbus=0:detect_stack_use_after_return=1"
UBSAN = "print_stacktrace=1:halt_on_error=1"


def environment() -> dict[str, str]:
    """Ours, and what the sanitizers need."""
    found = [
        subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()
        for name in LIBRARIES
    ]
    return {
        **os.environ,
        # What a test calls by its name is of the same build.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": ASAN,
        "UBSAN_OPTIONS": UBSAN,
    }


if __name__ == "__main__":
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())
