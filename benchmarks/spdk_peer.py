"""SPDK's vhost and bdevperf, where a person has built them: found, checked, started.

Neither is installed by anything here. Both need huge pages; what is missing is said with
the command that mends it.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from targets import LOAD_CORE, TARGET_CORE, Target

from drivebay.errors import DrivebayError, HostError

VHOST_MB = 768
BDEVPERF_MB = 320
QUIET = ("--no-pci", "--num-trace-entries", "0")  # no devices, no trace left in memory
_MEMINFO = re.compile(r"^(HugePages_Free|Hugepagesize):\s+(\d+)", re.MULTILINE)
# "Total : 1196123.00 4672.36 ..." closes bdevperf's table: IOPS, MiB/s, then latencies.
_TOTAL = re.compile(r"^\s*(?:\S+\s+)?Total\s*:\s+([\d.]+)", re.MULTILINE)


def spdk_vhost(program: Path, folder: Path, bdevperf: bool) -> Target:
    """Its target, without disks. Raises: HostError, what it needs and how to give it."""
    check_program(program)
    check_hugepages(VHOST_MB + (BDEVPERF_MB if bdevperf else 0))
    rpc = folder / "rpc.sock"
    command = [str(program), "-S", str(folder), "-r", str(rpc), "-m", hex(1 << TARGET_CORE)]
    command += ["-s", str(VHOST_MB), *QUIET]
    return Target("spdk", command, folder / "log", rpc=rpc)


def check_program(program: Path) -> None:
    if not program.is_file():
        raise HostError(f"'{program}' is not a program", 2, path=str(program))


def check_hugepages(wanted_mb: int, meminfo: str | None = None) -> None:
    """Raises: HostError when less memory is free in huge pages."""
    text = Path("/proc/meminfo").read_text() if meminfo is None else meminfo
    found = {name: int(value) for name, value in _MEMINFO.findall(text)}
    size_kb = found.get("Hugepagesize", 2048)
    free_mb = found.get("HugePages_Free", 0) * size_kb >> 10
    if free_mb < wanted_mb:
        pages = -(-wanted_mb * 1024 // size_kb)
        raise HostError(
            f"SPDK needs {wanted_mb} MiB of free huge pages, and there are {free_mb}",
            12,
            hint=f"as root: echo {pages} > /proc/sys/vm/nr_hugepages",
        )


def run_bdevperf(
    program: Path, socket: Path, folder: Path, rw: str, depth: int, seconds: float
) -> float:
    """Requests a second of SPDK's own load generator on a vhost-user-blk socket."""
    config = folder / "bdevperf.json"
    config.write_text(json.dumps(bdevperf_config(socket)))
    command = [str(program), "-m", hex(1 << LOAD_CORE), "-c", str(config), "-q", str(depth)]
    command += ["-o", "4096", "-w", rw, "-t", str(max(1, round(seconds)))]
    # One file of huge pages: its vhost-user client describes at most eight to the target.
    command += ["-g", "-s", str(BDEVPERF_MB), *QUIET, "-r", str(folder / "bdevperf.sock")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    if done.returncode != 0:
        output = (done.stdout + done.stderr)[-1500:]
        raise DrivebayError(f"bdevperf ended with exit code {done.returncode}", hint=output)
    return parse_bdevperf(done.stdout + done.stderr)


def bdevperf_config(socket: Path) -> dict[str, object]:
    """A virtio disk over the socket; the ring is large enough for any depth that is measured."""
    params = {
        "name": "Virtio0",
        "trtype": "user",
        "traddr": str(socket),
        "dev_type": "blk",
        "vq_count": 2,  # SPDK looks for partitions with a queue of its own, perhaps still
        "vq_size": 512,
    }
    call = {"method": "bdev_virtio_attach_controller", "params": params}
    return {"subsystems": [{"subsystem": "bdev", "config": [call]}]}


def parse_bdevperf(text: str) -> float:
    """Requests a second, of what it prints. Raises: DrivebayError."""
    found = _TOTAL.search(text)
    if found is None:
        raise DrivebayError("bdevperf printed no total", hint=text[-1500:])
    return float(found[1])
