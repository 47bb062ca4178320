#!/usr/bin/env python3
"""How long people wait for their VMs: a start and a clone, beside the same by hand.

    start   `drivebay vm start`, from the typed line to QEMU running, beside QEMU alone with the
            same words until its monitor answers
    clone   `drivebay vm clone` of a VM with a disk of 10 GiB that holds data, beside a sparse copy
            of a file with as much

Both in turns, in one run. The VMs live in a folder of their own, which goes at the end.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from report import main, parse, parser_of, save

from drivebay.errors import DrivebayError
from drivebay.vm.qmp import Qmp

DRIVEBAY = [sys.executable, "-m", "drivebay"]
GOAL_S = 1.0
MIB = 1 << 20
ANSWER_S = 30.0


def drivebay(*words: str) -> str:
    done = subprocess.run([*DRIVEBAY, *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DrivebayError(f"drivebay {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


@contextmanager
def own_folders() -> Iterator[Path]:
    """A user without VMs, whose target and VMs end with the block."""
    with tempfile.TemporaryDirectory(prefix="drivebay-", dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o711)
        os.environ |= {"XDG_DATA_HOME": f"{name}/data", "XDG_RUNTIME_DIR": f"{name}/run"}
        (folder / "run").mkdir(mode=0o711)
        try:
            yield folder
        finally:
            for vm in json.loads(drivebay("vm", "list", "--json")):
                drivebay("vm", "delete", vm["name"], "--force", "--yes")
            drivebay("target", "stop", "--force")


def start_by_hand(folder: Path) -> float:
    """The same machine by QEMU's words alone, until its monitor answers."""
    line = json.loads(drivebay("vm", "qemu-command", "one", "--json"))
    monitor = folder / "data/drivebay/vms/one/monitor.sock"
    monitor.unlink(missing_ok=True)
    began = time.monotonic()
    with subprocess.Popen(line, stderr=subprocess.DEVNULL) as qemu:
        try:
            while True:
                try:
                    with Qmp(monitor) as qmp:
                        qmp.call("query-status")
                    return time.monotonic() - began
                except OSError:
                    if time.monotonic() - began > ANSWER_S:
                        raise
                    time.sleep(0.005)
        finally:
            qemu.kill()


def measure_start(folder: Path, repeat: int) -> dict[str, list[float]]:
    drivebay("vm", "create", "one", "--image", "none", "--disk", "1G", "--memory", "256M")
    found: dict[str, list[float]] = {"ours": [], "by hand": []}
    for _ in range(repeat):
        found["ours"].append(timed(partial(drivebay, "vm", "start", "one")))
        drivebay("vm", "stop", "one", "--force")
        found["by hand"].append(start_by_hand(folder))
    return found


def measure_clone(folder: Path, repeat: int, data_mib: int) -> dict[str, list[float]]:
    raw = folder / "disk.raw"
    with raw.open("wb") as file:
        for _ in range(data_mib):
            file.write(os.urandom(MIB))
        file.truncate(10 << 30)
    drivebay("image", "import", str(raw), "--name", "ten", "--format", "raw")
    drivebay("vm", "create", "ten", "--image", "ten", "--memory", "256M")
    found: dict[str, list[float]] = {"ours": [], "by hand": []}
    for number in range(repeat):
        name = f"ten-{number}"
        found["ours"].append(timed(partial(drivebay, "vm", "clone", "ten", name)))
        copy = ["cp", "--reflink=never", "--sparse=always", raw, folder / "copy.raw"]
        found["by hand"].append(timed(partial(subprocess.run, copy, check=True)))
        (folder / "copy.raw").unlink()
    raw.unlink()
    return found


def show(what: str, found: dict[str, list[float]]) -> dict[str, Any]:
    medians = {who: statistics.median(times) for who, times in found.items()}
    for who, times in found.items():
        print(f"{what:6} {who:8} {medians[who]:.3f} s ({min(times):.3f} to {max(times):.3f})")
    ratio = medians["ours"] / medians["by hand"]
    met = "met" if medians["ours"] < GOAL_S else "missed"
    print(f"{what:6} ours / by hand: {ratio:.2f}; under {GOAL_S:g} s: {met}", flush=True)
    return {"medians": medians, "times": found, "ratio": ratio}


def run() -> None:
    parser = parser_of(__doc__, runtime=0, repeat=7, quick="one start, and a clone of little data")
    options = parse(parser, sys.argv[1:])
    with own_folders() as folder:
        results = {
            "start": show("start", measure_start(folder, options.repeat)),
            "clone": show(
                "clone", measure_clone(folder, options.repeat, 16 if options.quick else 1024)
            ),
        }
    print(save(options.out, "vm_times", results))


if __name__ == "__main__":
    sys.exit(main(run))
