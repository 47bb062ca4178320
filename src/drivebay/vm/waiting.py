"""Waiting until a VM is as far as somebody needs it: by ssh, its agent, its console, its end.

Context: a command in the foreground. Nothing is changed, neither here nor in the guest; a VM
that ends meanwhile ends the waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from drivebay.errors import HostError, PeerError, StateError, UsageError
from drivebay.vm.agent import Agent, AgentSilent
from drivebay.vm.logs import new_bytes
from drivebay.vm.run import Running, running, wait_for_end
from drivebay.vm.spec import VmSpec
from drivebay.vm.spec_file import read_spec
from drivebay.vm.ssh import SshSilent, read_banner
from drivebay.vm.store import Vm

__all__ = ["GOALS", "nearest_goal", "running_or_refuse", "started_spec", "wait_for"]

GOALS: Final = ("ssh", "agent", "console", "stopped")
_EVERY_S: Final = 0.3
_ONE_TRY_S: Final = 5.0

# Whether the VM is that far; it may take that many seconds to see.
_Look = Callable[[float], bool]


def running_or_refuse(vm: Vm) -> Running:
    """The VM's QEMU. Raises: StateError when it does not run."""
    found = running(vm)
    if found is None:
        raise StateError(f"VM '{vm.name}' is not running", hint=f"drivebay vm start {vm.name}")
    return found


def started_spec(vm: Vm, found: Running) -> VmSpec:
    """What the VM is as it runs, whatever was changed for its next start."""
    return read_spec(vm.name, found.text)


def nearest_goal(vm: Vm) -> str:
    """What is waited for when nothing was named: ssh if something leads there, else the agent.

    Raises: StateError when the VM does not run.
    """
    spec = started_spec(vm, running_or_refuse(vm))
    forwards = any(forward.leads_to_ssh for net in spec.nets for forward in net.forward)
    outside = any(net.kind != "user" for net in spec.nets)
    return "ssh" if forwards or outside else "agent"


def wait_for(vm: Vm, goal: str, timeout_s: float, text: str | None = None) -> float:
    """Wait for one of GOALS, or for ``text`` on the console; return the seconds it took.

    Raises: StateError when the time is over, or the VM is not running or ends; UsageError.
    """
    began = time.monotonic()
    if goal == "stopped":
        _wait_for_end(vm, timeout_s)
        return time.monotonic() - began
    found = running_or_refuse(vm)
    look = _look(vm, found, goal, text)
    what = f"'{text}' on the console" if goal == "console" else goal
    while True:
        left = began + timeout_s - time.monotonic()
        alive = found.alive()  # before the look: its last words count
        if look(max(left, _EVERY_S)):
            return time.monotonic() - began
        if not alive:
            raise StateError(
                f"VM '{vm.name}' ended before there was {what}", hint=f"drivebay vm log {vm.name}"
            )
        if left <= 0:
            raise _too_late(vm, timeout_s, f"there was no {what}")
        time.sleep(min(_EVERY_S, left))


def _wait_for_end(vm: Vm, timeout_s: float) -> None:
    found = running(vm)
    if found is not None and not wait_for_end(found, timeout_s):
        raise _too_late(vm, timeout_s, "it still runs")


def _too_late(vm: Vm, timeout_s: float, why: str) -> StateError:
    return StateError(
        f"VM '{vm.name}' was waited for in vain: after {timeout_s:g} s {why}",
        hint=f"drivebay vm log {vm.name}",
    )


def _look(vm: Vm, found: Running, goal: str, text: str | None) -> _Look:
    if goal == "ssh":
        spec = started_spec(vm, found)
        return lambda left: _ssh_answers(vm, spec, min(left, _ONE_TRY_S))
    if goal == "agent":
        return lambda left: _agent_answers(vm.agent_socket, min(left, _ONE_TRY_S))
    if goal == "console":
        if not text:
            raise UsageError("which text is waited for?", hint="--for console TEXT")
        return _on_console(vm.console_log, text.encode())
    raise UsageError(f"'{goal[:80]}' can't be waited for", hint=f"one of {', '.join(GOALS)}")


def _ssh_answers(vm: Vm, spec: VmSpec, timeout_s: float) -> bool:
    try:
        read_banner(spec, timeout_s, vm.agent_socket)
    except SshSilent:
        return False
    return True


def _agent_answers(path: Path, timeout_s: float) -> bool:
    try:
        with Agent(path, timeout_s) as agent:
            agent.ping()
    except (AgentSilent, HostError, PeerError):
        return False
    return True


def _on_console(log: Path, wanted: bytes) -> _Look:
    pieces = new_bytes(log)
    kept = b""

    def look(left: float) -> bool:
        nonlocal kept
        while piece := next(pieces):
            kept += piece  # the text may come in two pieces
            if wanted in kept:
                return True
            kept = kept[-len(wanted) :]
        return False

    return look
