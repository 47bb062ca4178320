"""A clone without cloud-init becomes itself: its guest agent does what cloud-init would.

Context: a command in the foreground. A clone whose original's agent answered has a mark in its
folder until that is done, which the first start looks for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from drivebay.errors import DrivebayError, StateError
from drivebay.vm.agent import Agent
from drivebay.vm.identity import NEW_MACHINE_ID
from drivebay.vm.store import Vm
from drivebay.vm.waiting import wait_for

__all__ = ["MARK", "commands", "is_pending", "mark", "renew"]

AGENT_SECONDS: Final = 300.0
_SCRIPT_SECONDS: Final = 60.0
MARK: Final = "identity-to-renew"


def commands(name: str) -> list[str]:
    """What makes a guest itself, line by line, for its root's shell."""
    return [
        NEW_MACHINE_ID.removesuffix("; exit 0"),
        f"echo {name} > /etc/hostname",
        "rm -f /etc/ssh/ssh_host_*; ! command -v ssh-keygen > /dev/null || ssh-keygen -A",
        "reboot",
    ]


def mark(folder: Path) -> None:
    """Remember that the VM in ``folder`` still is its original."""
    (folder / MARK).touch(mode=0o600)


def is_pending(vm: Vm) -> bool:
    """Whether a VM still is its original."""
    return (vm.folder / MARK).exists()


def renew(vm: Vm) -> None:
    """Wait for the guest's agent, give the guest an identity of its own, and restart it.

    Raises: StateError when the agent does not come, or the guest could not do it; the mark
    stays then.
    """
    wait_for(vm, "agent", AGENT_SECONDS)
    *steps, restart = commands(vm.name)
    try:
        with Agent(vm.agent_socket) as agent:
            done = agent.run_script("\n".join(["set -e", *(f"( {step} )" for step in steps)]),
                                    _SCRIPT_SECONDS)  # fmt: skip
            if done.code != 0:
                raise StateError(
                    f"VM '{vm.name}' could not be given an identity of its own: "
                    f"{done.err.decode(errors='replace').strip()[:200] or 'no reason was given'}"
                )
            (vm.folder / MARK).unlink(missing_ok=True)
            agent.run_script(f"( sleep 1; {restart} ) > /dev/null 2>&1 &", _SCRIPT_SECONDS)
    except (DrivebayError, OSError) as error:
        raise StateError(
            f"VM '{vm.name}' still has the identity of its original: {error}",
            hint=f"in the guest, as root: {'; '.join(commands(vm.name))}",
        ) from error
