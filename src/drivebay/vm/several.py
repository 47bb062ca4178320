"""Several VMs at once: each is started, or stopped, beside the others.

Context: a short-lived process; a thread for each VM at work. One that fails keeps no other
from its turn: it is told with its error, and the rest goes on.

    names ──► a few threads, a VM each: lifecycle.start, lifecycle.stop ──► outcomes, as they come
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final, Generic, TypeVar

from drivebay.disks.starting import connect_or_start
from drivebay.errors import DrivebayError
from drivebay.vm import lifecycle
from drivebay.vm.kvm import choose_accelerator
from drivebay.vm.qemu import find_qemu
from drivebay.vm.store import Vms

__all__ = ["STARTS_AT_ONCE", "Outcome", "beside_each_other", "start_several", "stop_several"]

STARTS_AT_ONCE: Final = 4  # a start is mostly work for a processor, a stop is waiting

Result = TypeVar("Result")


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What became of one VM: a result, or the error that it failed with."""

    name: str
    result: Result | None = None
    error: DrivebayError | None = None


def start_several(
    vms: Vms, names: Sequence[str], socket: str | None = None
) -> Iterator[Outcome[lifecycle.Started]]:
    """Start VMs, some at a time; yields the outcome of each as soon as it is known.

    Raises: Unreachable, StateError, InUse when there is no target that their disks need, before
    any is started.
    """
    _make_ready(vms, names, socket)
    yield from beside_each_other(
        names, lambda name: lifecycle.start(vms, name, socket), STARTS_AT_ONCE
    )


def stop_several(
    vms: Vms,
    names: Sequence[str],
    *,
    force: bool = False,
    timeout_s: float = lifecycle.POWER_OFF_SECONDS,
) -> Iterator[Outcome[str | None]]:
    """Switch VMs off, all at the same time; the result is how each ended, as of `stop`."""
    yield from beside_each_other(
        names,
        lambda name: lifecycle.stop(vms, name, force=force, timeout_s=timeout_s),
        len(names),
        abandoned=True,
    )


def _make_ready(vms: Vms, names: Sequence[str], socket: str | None) -> None:
    """Do once what each start would do for itself, and all at the same time."""
    needs_target = False
    for name in names:
        with contextlib.suppress(DrivebayError):  # its own start says so
            spec = vms.load(name).spec
            needs_target = needs_target or any(disk.bdev is not None for disk in spec.disks)
            find_qemu(spec.qemu)
    choose_accelerator()
    if needs_target:
        connect_or_start(socket).close()


def beside_each_other(
    names: Sequence[str],
    act: Callable[[str], Result],
    at_once: int,
    *,
    abandoned: bool = False,
) -> Iterator[Outcome[Result]]:
    """Do something with each name, ``at_once`` at a time, begun in their order.

    A caller who is interrupted begins no further one, and waits for those at work, since half a
    start is a QEMU that nobody knows of; what may be ``abandoned`` is not waited for.
    """
    waiting = deque(names)
    done: SimpleQueue[Outcome[Result] | BaseException] = SimpleQueue()

    def work() -> None:
        with contextlib.suppress(IndexError):
            while True:
                name = waiting.popleft()
                done.put(_outcome(name, act))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(at_once, len(names)))]
    try:
        for thread in threads:
            thread.start()
        for _ in names:
            outcome = done.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
    finally:
        waiting.clear()
        for thread in threads if not abandoned else ():
            thread.join()


def _outcome(name: str, act: Callable[[str], Result]) -> Outcome[Result] | BaseException:
    try:
        return Outcome(name, act(name))
    except DrivebayError as error:
        return Outcome(name, error=error)
    except BaseException as error:  # noqa: BLE001 (it is raised where somebody sees it)
        return error
