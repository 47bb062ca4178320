"""`drivebay vm cp`: files into a VM and out of it, by scp or, where that can't be, its agent."""

from __future__ import annotations

import argparse
from pathlib import Path

from drivebay.cli.output import DONE, print_warning
from drivebay.cli.progress import Phases
from drivebay.cli.vm_ssh import as_started, run_ssh
from drivebay.errors import DrivebayError, StateError, UsageError
from drivebay.vm import run
from drivebay.vm.agent import Agent
from drivebay.vm.guest_files import copy_in, copy_out
from drivebay.vm.ssh import SshSilent, remote_paths, scp_command
from drivebay.vm.stillness import somebody_has_opened
from drivebay.vm.store import Vm, Vms

__all__ = ["copy"]


def copy(found: argparse.Namespace) -> int:
    """Copy files; which side is in a guest its NAME: says."""
    vm = Vms().load(_name(found))
    spec = as_started(vm)
    paths = remote_paths(spec, found.sources, found.target)
    target = Path(found.target)
    if found.agent and found.login is not None:
        raise UsageError("the guest agent copies as the guest's root: leave --login out")
    if paths[-1] is None and len(found.sources) > 1 and not target.is_dir():
        raise UsageError(f"'{target}' is no folder, and several files can't go to one")
    if not found.agent:
        try:
            return run_ssh(
                vm, spec, scp_command(spec, vm.keys, found.sources, found.target, found.login)
            )
        except (SshSilent, StateError) as error:
            if found.login is not None or not _agent_listens(vm):
                raise
            print_warning(f"{error}; the guest agent copies, as root")
    with Agent(vm.agent_socket) as agent, Phases() as phases:
        for source, path in zip(found.sources, paths, strict=False):
            if path is not None:
                copy_out(agent, path, target, phases)
            else:
                copy_in(agent, Path(source), paths[-1] or "", phases,
                        folder=len(found.sources) > 1)  # fmt: skip
    return DONE


def _name(found: argparse.Namespace) -> str:
    """The VM that one of the paths names."""
    words = [*found.sources, found.target]
    present = set(Vms().names())
    named = [word.partition(":")[0] for word in words if ":" in word]
    names: list[str] = [name for name in named if name in present]
    if not names:
        raise UsageError(
            f"none of these is a path in a VM: {', '.join(words)[:200]}",
            hint="write NAME:PATH; drivebay vm list has the names",
        )
    return names[0]


def _agent_listens(vm: Vm) -> bool:
    try:
        with run.monitor(vm) as qmp:
            return somebody_has_opened(qmp, "agent")
    except DrivebayError:
        return False
