"""Which VMs start with the host, and which run.

Context: a short-lived process; `unit` has the systemd unit that starts them.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

from drivebay.disks.plan import Plan
from drivebay.errors import DrivebayError, StateError
from drivebay.vm import renewal, run
from drivebay.vm.store import Vm, Vms

__all__ = ["marked", "plan_mark", "running_names"]


def plan_mark(plan: Plan, vms: Vms, vm: Vm, on: bool) -> None:
    """Plan to mark a VM, or no longer. Raises: StateError."""
    if on and renewal.is_pending(vm):
        raise StateError(
            f"VM '{vm.name}' is a clone that still has the identity of its original, which a start "
            "with the host could not change",
            hint=f"drivebay vm start {vm.name} once",
        )
    if vm.spec.autostart == on:
        return
    word = "with the host" if on else "no longer with the host"
    plan.add(
        f"have VM '{vm.name}' start {word}",
        lambda: vms.save(vm, replace(vm.spec, autostart=on)),
    )


def marked(vms: Vms) -> tuple[list[str], list[DrivebayError]]:
    """The marked VMs that do not run; and what is wrong with those that nobody can read."""
    names, errors = [], []
    for name in vms.names():
        try:
            vm = vms.load(name)
        except DrivebayError as error:
            errors.append(error)
            continue
        if vm.spec.autostart and run.running(vm) is None:
            names.append(name)
    return names, errors


def running_names(vms: Vms) -> list[str]:
    """The VMs that run, also those whose vm.toml was broken since."""
    found = []
    for name in vms.names():
        with contextlib.suppress(DrivebayError):
            if run.running(run.load_running(vms, name)) is not None:
                found.append(name)
    return found
