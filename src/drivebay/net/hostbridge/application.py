"""`apply`: the guardian first, then the moves; the first that fails takes all back.

Context: root, one short-lived process. A terminal that hangs up does not end it.
"""

from __future__ import annotations

import signal

from drivebay.net.hostbridge import guardian
from drivebay.net.hostbridge.change import MOVED, Change
from drivebay.net.hostbridge.clients import Client, move_clients
from drivebay.net.hostbridge.kernel import Kernel
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
        change.end_guardian()
        take_back(change, "a step failed")
        change.take_message()  # the error says it
        raise
    change.note(phase=MOVED)


def all_steps(kernel: Kernel, before: Before) -> list[Move]:
    """In order: the kernel's devices, and who looks after them."""
    steps = move_steps(kernel, before)
    found = [Client(**each) for each in before.clients]
    up, bridge = before.uplink.name, before.bridge
    steps.append(
        (
            "the DHCP client goes on",
            lambda: move_clients(up, bridge, found, lambda: settle(kernel, before)),
        )
    )
    return steps


def run(steps: list[Move]) -> None:
    for _, do in steps:
        do()
