"""`apply`: the guardian first, then the moves; the first that fails takes all back.

Context: root, one short-lived process. A terminal that hangs up does not end it.
"""

from __future__ import annotations

import signal
from functools import partial

from drivebay.net.hostbridge import guardian
from drivebay.net.hostbridge.change import Change
from drivebay.net.hostbridge.clients import Client, keep, move_clients
from drivebay.net.hostbridge.kernel import Kernel
from drivebay.net.hostbridge.managers import Manager, hold_bridge, let_go
from drivebay.net.hostbridge.moves import Move, move_steps, settle
from drivebay.net.hostbridge.plan import HostPlan
from drivebay.net.hostbridge.return_trip import take_back
from drivebay.net.hostbridge.state import Before

__all__ = ["carry_out"]


def carry_out(kernel: Kernel, change: Change, plan: HostPlan, seconds: float) -> None:
    """Move the uplink. The caller holds the lock.

    Raises: what a move raises, after everything was taken back; StateError when there is no
    guardian.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    change.begin(plan.before)
    try:
        guardian.start(change, seconds)
        run(all_steps(kernel, plan.before))
    except BaseException:
        take_back(change, "a step failed")  # should it fail, the guardian tries again
        change.take_message()  # the error says it
        raise
    change.note_moved()


def all_steps(kernel: Kernel, before: Before) -> list[Move]:
    """In order: the kernel's devices, between those who look after them."""
    up, bridge = before.uplink.name, before.bridge
    found = [Client(**each) for each in before.clients]
    manager = Manager(**before.manager)
    steps: list[Move] = []
    if manager.daemon:
        text = f"{manager.daemon} leaves '{bridge}' alone"
        steps.append((text, partial(hold_bridge, manager, bridge)))
    steps += move_steps(kernel, before)
    if manager.daemon or manager.dns:
        text = " and ".join(
            [*([f"{manager.daemon} leaves '{up}' alone"] if manager.daemon else []),
             *(["its name servers go along"] if manager.dns else [])]
        )  # fmt: skip
        steps.append((text, partial(let_go, manager, up, bridge)))
    if found:
        names = ", ".join(each.kind for each in found)
        text = f"{names} looks after '{bridge}' instead of '{up}'"
        steps.append((text, partial(move_clients, up, bridge, found)))
    if found or manager.daemon:
        text = "wait until they are done, and see to the addresses meanwhile"
        steps.append((text, partial(keep, partial(settle, kernel, before))))
    return steps


def run(steps: list[Move]) -> None:
    for _, do in steps:
        do()
