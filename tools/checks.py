#!/usr/bin/env python3
"""Run the checks and tests, part by part; each part prints its time.

    tools/checks.py check           the fast ones
    tools/checks.py test            all of them
    tools/checks.py asan            those that reach the data plane, under sanitizers
    tools/checks.py test asan       both, what CI runs
    tools/checks.py soak            the crash tests for half an hour instead of half a minute
    tools/checks.py lint unit       only these parts

Every part runs even when one before it failed, so that one run shows all. A part
that takes far too long is stopped: a hung test must end as a failure.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable, "-m"]
PYTHON_FILES = [
    name for name in ("src", "tests", "tools", "benchmarks", "fuzz") if (ROOT / name).is_dir()
]


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    limit_s: int = 300
    settings: Mapping[str, str] = field(default_factory=dict)  # of its environment
    beside: bool = False  # runs beside those that come after it; its output comes last


def pytest_part(folder: str, limit_s: int = 300, *more: str) -> Part:
    return Part(folder, [*PYTHON, "pytest", "-q", *more, f"tests/{folder}"], limit_s)


CHECK = [
    Part("format", [*PYTHON, "ruff", "format", "--quiet", "--check", "."]),
    Part("lint", [*PYTHON, "ruff", "check", "--quiet", "."]),
    Part(
        "cython-lint",
        [str(Path(sys.executable).with_name("cython-lint")), "--ban-relative-imports", "src"],
    ),
    Part("types", [*PYTHON, "mypy", *PYTHON_FILES]),
    pytest_part("style"),
    pytest_part("unit", 600),
]
TEST = [
    # Guests that boot under emulation take minutes, in which most other tests need one core.
    Part(
        "vms",
        [
            *("nice", "-n", "10", *PYTHON, "pytest", "-q", "-p", "no:cacheprovider"),
            *("-o", "faulthandler_timeout=900"),
            *sorted(str(path) for path in ROOT.glob("tests/e2e/test_vm_*.py")),
        ],
        2300,
        beside=True,
    ),
    *CHECK,
    pytest_part("spec"),
    pytest_part("property"),
    pytest_part("hostile", 600),
    Part("fuzz", [*PYTHON, "fuzz", "short"]),
    pytest_part("e2e", 1200, "--ignore-glob=tests/e2e/test_vm_*"),
]
# Tests of the tools, which are Python and reach a target only over its socket; and those whose
# work is in Python, for which the path below is what others try it for.
FAR = [
    *(f"--ignore-glob=tests/unit/test_{who}*.py" for who in
      ("vm_", "cli_", "disks_", "host_", "net_", "doctor", "rpc_jsonrpc")),
    *(f"--ignore=tests/{path}.py" for path in
      ("hostile/test_images", "spec/test_rpc_many", "property/test_rpc_any_input",
       "property/test_python_disk_model", "property/test_lvol_crash", "property/test_lvol_damage",
       "property/test_lvol_model", "property/test_lvol_torn")),
]  # fmt: skip
SANITIZED = [str(ROOT / ".venv-asan" / "bin" / "python"), "tools/sanitized.py", "-m"]


def asan_part(folder: str, *, beside: bool = False) -> Part:
    command = [*SANITIZED, "pytest", "-q", "-p", "no:cacheprovider", *FAR, f"tests/{folder}"]
    return Part(f"asan-{folder}", command, 900, beside=beside)


ASAN = [
    Part("asan-build", [sys.executable, "tools/setup.py", "asan"], 900),
    asan_part("unit", beside=True),
    asan_part("property", beside=True),
    asan_part("spec"),
    asan_part("hostile"),
    Part("asan-fuzz", [*SANITIZED, "fuzz", "short"], 600),
]
SOAK = Part(
    "soak",
    [
        *(*PYTHON, "pytest", "-q", "-o", "faulthandler_timeout=1800"),
        "tests/e2e/test_target_crash.py",
    ],
    5400,
    {"DRIVEBAY_SOAK": "1"},
)


RUNNING: set[subprocess.Popen[bytes]] = set()


def run_part(part: Part, output: IO[bytes] | None = None) -> tuple[bool, float]:
    """Run it to its end or its limit; it prints where we do, or into ``output``."""
    if output is None:
        print(f"\n== {part.name}: {' '.join(part.command[1:])}", flush=True)
    started = time.monotonic()
    # Tools call each other by name (cython-lint does), and must find those of our environment.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, **part.settings}
    # A group of its own, so that a stopped part leaves no children.
    process = subprocess.Popen(
        part.command, cwd=ROOT, env=env, start_new_session=True, stdout=output, stderr=output
    )
    RUNNING.add(process)
    try:
        passed = process.wait(part.limit_s) == 0
    except subprocess.TimeoutExpired:
        print(f"{part.name}: stopped after {part.limit_s} s", flush=True)
        passed = False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        RUNNING.discard(process)
    return passed, time.monotonic() - started


def chosen(words: list[str]) -> list[Part]:
    by_name = {part.name: [part] for part in [*TEST, *ASAN, SOAK]}
    by_name |= {"check": CHECK, "test": TEST, "asan": ASAN}
    unknown = [word for word in words if word not in by_name]
    if unknown or not words:
        sys.exit(f"checks: no part {unknown}; there are: {' '.join(by_name)}")
    parts = [part for word in words for part in by_name[word]]
    # The same inputs, and each slip is seen there.
    return [part for part in parts if not (part.name == "fuzz" and "asan" in words)]


def end_all() -> None:
    for process in list(RUNNING):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def run_parts(parts: Sequence[Part]) -> list[tuple[str, bool, float]]:
    """Run parts in their order, but for those that run beside the ones after them."""
    results = []
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(max_workers=4))
        stack.callback(end_all)  # before the pool waits for them: Ctrl-C ends all at once
        waiting = []
        for part in parts:
            if part.beside:
                output = stack.enter_context(tempfile.TemporaryFile())
                waiting.append((part, output, pool.submit(run_part, part, output)))
            else:
                results.append((part.name, *run_part(part)))
        for part, output, running in waiting:
            results.append((part.name, *running.result()))
            print(f"\n== {part.name}, beside others: {' '.join(part.command[1:])}", flush=True)
            output.seek(0)
            print(output.read().decode(errors="replace"), flush=True)
    return results


def main() -> int:
    results = run_parts(chosen(sys.argv[1:]))
    print()
    for name, passed, seconds in results:
        print(f"{name:12} {'passed' if passed else 'FAILED':8} {seconds:6.1f} s")
    return 0 if all(passed for _, passed, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
