"""What targets cost while nobody asks anything: start, memory, processor; and idle neighbours."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from contenders import Case, Sample, Served
from targets import Target, alone, drivebay, running

from drivebay.engines.vhost_user_client import VhostUserBlk

Make = Callable[[Path, Sequence[str]], Target]  # a target with null disks of these names


@contextmanager
def idle_sessions(target: Target, workloads: Sequence[str]) -> Iterator[None]:
    """A session on each of these disks, which has read once and now rests."""
    with ExitStack() as stack:
        for workload in workloads:
            path = str(target.sockets[workload])
            session = stack.enter_context(VhostUserBlk(path, slots=1, slot_bytes=4096))
            session.read(0, 4096)
        yield


def rest(make: Make, folder: Path, disks: int, seconds: float) -> dict[str, float]:
    """One target with null disks, first without a session, then with one on each."""
    names = [f"null{number}" for number in range(disks)]
    target = make(folder, names)
    with running([target]):
        target.resume()
        found = {"resident_mib": target.resident_bytes() / 2**20}
        if target.first_answer_s is not None:
            found["first_answer_s"] = target.first_answer_s
        with idle_sessions(target, names):
            time.sleep(min(1.0, seconds))  # what polls after the last request has ended by then
            before = target.cpu_seconds()
            time.sleep(seconds)
            found["idle_percent"] = 100 * (target.cpu_seconds() - before) / seconds
    return found


def first_answers(make: Make, folder: Path, repeat: int) -> float:
    """Seconds from the start to the first RPC answer, without disks."""
    times = []
    for number in range(repeat):
        target = make(folder / str(number), [])
        with running([target]):
            assert target.first_answer_s is not None
            times.append(target.first_answer_s)
    return statistics.median(times)


def with_disks(target: Target, names: Sequence[str]) -> Target:
    """Start it and give it null disks, over its RPC."""
    try:
        target.start()
        for name in names:
            target.add_disk(name)
    except BaseException:
        target.stop()
        raise
    return target


def among_idle(folder: Path, idle: int, repeat: int, seconds: float) -> tuple[float, float]:
    """Requests a second of one busy null disk: alone, and among idle ones on the same reactor."""
    names = [f"null{number}" for number in range(idle + 1)]
    lone = with_disks(drivebay(folder / "alone"), names[:1])
    crowd = with_disks(drivebay(folder / "crowd"), names)
    targets = [lone, crowd]
    case = Case("null0", "randread", 32)
    found: dict[int, list[Sample]] = {id(target): [] for target in targets}
    with running(targets):
        crowd.resume()
        with idle_sessions(crowd, names[1:]):
            for _ in range(repeat):
                for target in targets:
                    with alone(target, targets):
                        found[id(target)].append(Served(target).run(case, seconds, None))
            crowd.resume()
    lone_iops, crowd_iops = (
        statistics.median(sample.iops for sample in found[id(target)]) for target in targets
    )
    return lone_iops, crowd_iops
