"""Whatever can be given a case and says how fast it was: targets, and the limits they face.

The limits: a loop that only copies (nothing that serves malloc disks can be faster), and
fio's io_uring engine on the very file (what the kernel gives without a guest in between).
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import subprocess
import sys
import sysconfig
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from spdk_peer import run_bdevperf
from targets import DISK_BYTES, LOAD_CORE, PACKED, TARGET_CORE, Target

from drivebay.engines.vhost_user_client import VhostUserBlk
from drivebay.engines.vhost_user_workload import LoadParams, LoadResult, Workload, run_load
from drivebay.errors import DrivebayError
from drivebay.wire.virtio_blk import BlkFeature

BLOCK_BYTES = 4096


@dataclass(frozen=True)
class Case:
    """One line of a table."""

    workload: str
    rw: str  # randread, randwrite
    depth: int


@dataclass
class Sample:
    """One measurement. Times in microseconds and nanoseconds, as their names say."""

    iops: float
    p50_us: float | None = None
    p99_us: float | None = None
    p99_9_us: float | None = None
    cpu_ns: float | None = None  # processor time of the target for each request
    busy_ns: float | None = None  # what its reactors call work of that
    agreed: str = ""  # what was negotiated


class Contender(Protocol):
    """What is measured."""

    @property
    def name(self) -> str: ...

    @property
    def target(self) -> Target | None:
        """The process that must run meanwhile."""

    def takes(self, case: Case) -> bool: ...

    def run(self, case: Case, seconds: float, rate: float | None) -> Sample: ...


@dataclass
class Served:
    """A vhost-user target under our own load."""

    target: Target
    load: dict[str, Any] = field(default_factory=dict)  # more of LoadParams
    suffix: str = ""  # of its name
    packed: bool = False
    _chooses: dict[str, bool] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.target.name + self.suffix

    def takes(self, case: Case) -> bool:
        return self._disk(case) in self.target.sockets

    def _disk(self, case: Case) -> str:
        return case.workload + (PACKED if self.packed else "")

    def run(self, case: Case, seconds: float, rate: float | None) -> Sample:
        busy, cpu = self.target.busy_seconds(), self.target.cpu_seconds()
        result = run_load(self.params(case, seconds, rate))
        cpu = self.target.cpu_seconds() - cpu
        after = self.target.busy_seconds()
        worked = None if busy is None or after is None else after - busy
        return sample_of(result, cpu, worked)

    def params(self, case: Case, seconds: float, rate: float | None) -> LoadParams:
        path = self.target.sockets[self._disk(case)]
        return LoadParams(
            str(path),
            Workload(case.rw),
            depth=case.depth,
            core=LOAD_CORE,
            runtime_s=seconds,
            rate=rate,
            write_cache=True if self._has_choice(case.workload, path) else None,
            **self.load,
        )

    def _has_choice(self, workload: str, path: Path) -> bool:
        """Whether the driver may ask for write-back; all that can do so shall."""
        if workload not in self._chooses:
            with VhostUserBlk(str(path)) as disk:
                cache = disk.has(BlkFeature.CONFIG_WCE) and disk.has(BlkFeature.FLUSH)
            self._chooses[workload] = cache
        return self._chooses[workload]


def sample_of(result: LoadResult, cpu_s: float, busy_s: float | None) -> Sample:
    if result.errors:
        raise DrivebayError(f"'{result.params.socket}': requests failed: {result.errors}")
    done = max(result.reads + result.writes, 1)
    cache = "write-back" if result.write_cache else "write-through or no cache"
    ring = "packed" if result.packed else "split"
    agreed = [f"{ring} ring of {result.queue_size}", cache]
    agreed.append("inflight" if "INFLIGHT_SHMFD" in result.protocol_features else "no inflight")
    agreed.append(" ".join(result.features))
    latency = result.latency_us
    return Sample(
        iops=result.iops,
        p50_us=latency.p50,
        p99_us=latency.p99,
        p99_9_us=latency.p99_9,
        cpu_ns=cpu_s / done * 1e9,
        busy_ns=None if busy_s is None else busy_s / done * 1e9,
        agreed=", ".join(agreed),
    )


@dataclass
class Bdevperf:
    """SPDK's target under SPDK's own load: shows whether our load generator holds it back."""

    target: Target
    program: Path
    name: str = "spdk under bdevperf"

    def takes(self, case: Case) -> bool:
        return case.workload in ("null", "malloc") and case.workload in self.target.sockets

    def run(self, case: Case, seconds: float, rate: float | None) -> Sample:
        folder = self.target.log.parent
        path = self.target.sockets[case.workload]
        return Sample(run_bdevperf(self.program, path, folder, case.rw, case.depth, seconds))


@dataclass
class Fio:
    """fio's io_uring engine on a file that a target serves, on the target's core."""

    files: dict[str, Path]
    name: str = "fio io_uring"
    target: Target | None = None

    def takes(self, case: Case) -> bool:
        return case.workload in self.files and case.workload.startswith("file")

    def run(self, case: Case, seconds: float, rate: float | None) -> Sample:
        command = fio_command(self.files[case.workload], case, seconds)
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
        if done.returncode != 0:
            raise DrivebayError("fio failed", hint=done.stderr[-1000:])
        return parse_fio(done.stdout)


def fio_command(file: Path, case: Case, seconds: float) -> list[str]:
    """Its fast way: registered file, a few requests a system call, the cache left alone."""
    options = {
        "name": "limit",
        "filename": file,
        "ioengine": "io_uring",
        "rw": case.rw,
        "bs": BLOCK_BYTES,
        "iodepth": case.depth,
        "iodepth_batch_submit": min(case.depth, 8),
        "iodepth_batch_complete_min": 1,
        "iodepth_batch_complete_max": min(case.depth, 32),
        "direct": int(case.workload == "file direct"),
        "runtime": seconds,
        "time_based": 1,
        "invalidate": 0,
        "norandommap": 1,
        "randrepeat": 0,
        "registerfiles": 1,
        "fixedbufs": 0,
        "cpus_allowed": TARGET_CORE,
        "thread": 1,
        "output-format": "json",
    }
    return ["fio", *(f"--{key}={value}" for key, value in options.items())]


def parse_fio(text: str) -> Sample:
    """Raises: DrivebayError for something that is not fio's report of one job."""
    try:
        job = json.loads(text[text.index("{") :])["jobs"][0]
        side = max(job["read"], job["write"], key=lambda one: float(one["iops"]))
        done = max(float(side["total_ios"]), 1.0)
        percentiles = side["clat_ns"].get("percentile", {})
        share = (float(job["usr_cpu"]) + float(job["sys_cpu"])) / 100
        return Sample(
            iops=float(side["iops"]),
            p50_us=percentiles.get("50.000000", 0) / 1000,
            p99_us=percentiles.get("99.000000", 0) / 1000,
            p99_9_us=percentiles.get("99.900000", 0) / 1000,
            cpu_ns=share * float(job["job_runtime"]) * 1e6 / done,
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DrivebayError(f"fio's report cannot be read: {error!r}", hint=text[:500]) from error


class CopyLoop:
    """4 KiB at random places of a disk's memory to buffers of a guest, or back; nothing else."""

    name = "copy loop"
    target: Target | None = None

    def __init__(self, folder: Path) -> None:
        self._loop = build_copy_loop(folder)
        self._disk = mmap.mmap(-1, DISK_BYTES)
        self._disk.madvise(mmap.MADV_HUGEPAGE)  # as a malloc disk has it
        self._disk.write(os.urandom(1 << 20) * (DISK_BYTES >> 20))
        descriptor = os.memfd_create("copy-loop")
        os.ftruncate(descriptor, 1 << 20)
        self._guest = mmap.mmap(descriptor, 1 << 20)  # shared, as a guest's memory is
        os.close(descriptor)

    def takes(self, case: Case) -> bool:
        return case.workload == "malloc"

    def run(self, case: Case, seconds: float, rate: float | None) -> Sample:
        found: list[float] = []

        def pinned() -> None:
            os.sched_setaffinity(0, {TARGET_CORE})  # of this thread only
            write = case.rw == "randwrite"
            found.append(self._loop(self._disk, self._guest, case.depth, write, seconds))

        thread = threading.Thread(target=pinned)
        thread.start()
        thread.join()
        return Sample(found[0])


def build_copy_loop(folder: Path) -> Any:
    """Compile copy_loop.pyx with the compiler that built the package; returns its function."""
    source = Path(__file__).with_name("copy_loop.pyx")
    folder.mkdir(parents=True, exist_ok=True)
    c_file = folder / "copy_loop.c"
    module = folder / f"copy_loop{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = sysconfig.get_path("include")
    for command in (
        [sys.executable, "-m", "cython", "-3", str(source), "-o", str(c_file)],
        ["cc", "-shared", "-fPIC", "-O2", f"-I{include}", str(c_file), "-o", str(module)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise DrivebayError("the copy loop cannot be built", hint=done.stderr[-1000:])
    spec = importlib.util.spec_from_file_location("copy_loop", module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded.copy_loop
