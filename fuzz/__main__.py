"""Run the fuzzers.

    python -m fuzz short                        corpus, fixed seeds and a fresh one: make test
    python -m fuzz rings --seconds 600          one of them: rings or messages
    python -m fuzz guided --seconds 600         messages, kept for the branches they reach
    python -m fuzz rings --seed 7               with a seed of yours
    python -m fuzz rings FILE...                inputs from files, such as one that was found

An input that makes a target fail is saved below build/fuzz, with the words that run it again.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from fuzz.explorer import HERE, CurrentInput, save_input

ROOT = HERE.parent
SCRATCH = ROOT / "build" / "fuzz"
TARGETS = ("rings", "messages")
FIXED_SEEDS = (1, 2)
FIXED_INPUTS = 150
FRESH_SECONDS = 4.0
START_S = 300.0  # a worker that says nothing for so long after its time hangs


def fresh_seed() -> int:
    return random.SystemRandom().randrange(1 << 32)


def run_worker(name: str, seed: int | None, words: list[str], limit_s: float) -> bool:
    """False: it failed; the input is saved, and how to run it again is printed."""
    current = SCRATCH / f"{name}-current-{os.getpid()}"
    placed = [str(current) if word == "CURRENT" else word for word in words]
    print(f"fuzz: {name}" + (f", seed {seed}" if seed is not None else ""), flush=True)
    command = [sys.executable, "-m", "fuzz.worker", name, *placed]
    try:
        passed = subprocess.run(command, cwd=ROOT, timeout=limit_s).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"fuzz: {name} did not end within {limit_s:.0f} s", flush=True)
        passed = False
    if not passed and current.exists():
        found = save_input(CurrentInput.read(current), SCRATCH / "found", name)
        print(f"fuzz: {name} FAILED, seed {seed}; once more:", flush=True)
        print(f"  {sys.executable} -m fuzz {name} {found}", flush=True)
    current.unlink(missing_ok=True)
    return passed


def explore(name: str, seed: int, seconds: float, inputs: int = 0, keep: str = "") -> bool:
    words = [str(seed), str(seconds), str(inputs), "CURRENT", *([keep] if keep else [])]
    return run_worker(name, seed, words, seconds + START_S)


def replay(name: str, files: list[str]) -> bool:
    return run_worker(name, None, ["replay", "CURRENT", *files], START_S)


def guided(seconds: float, seed: int) -> bool:
    """The message decoder, by the branches that it takes."""
    if importlib.util.find_spec("atheris") is None:
        print("fuzz: no atheris for this Python; messages are kept for what they make happen")
        return explore("messages", seed, seconds)
    print(f"fuzz: messages, guided by coverage, seed {seed}", flush=True)
    command = [sys.executable, "-m", "fuzz.coverage", str(seconds), str(seed), str(SCRATCH)]
    return subprocess.run(command, cwd=ROOT, timeout=seconds + START_S).returncode == 0


def short() -> bool:
    passed = True
    for name in TARGETS:
        for seed in FIXED_SEEDS:
            passed &= explore(name, seed, START_S, FIXED_INPUTS)
        passed &= explore(name, fresh_seed(), FRESH_SECONDS)
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("what", choices=("short", "guided", *TARGETS))
    parser.add_argument("files", nargs="*", help="inputs to run, instead of new ones")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--keep", metavar="FOLDER", default="", help="save inputs worth keeping")
    wanted = parser.parse_args()
    SCRATCH.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    seed = wanted.seed if wanted.seed is not None else fresh_seed()
    if wanted.what == "short":
        passed = short()
    elif wanted.what == "guided":
        passed = guided(wanted.seconds, seed)
    elif wanted.files:
        passed = replay(wanted.what, [str(Path(name).resolve()) for name in wanted.files])
    else:
        passed = explore(wanted.what, seed, wanted.seconds, keep=wanted.keep)
    print(f"fuzz: {'passed' if passed else 'FAILED'} in {time.monotonic() - started:.1f} s")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
