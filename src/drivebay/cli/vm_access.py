"""`drivebay vm console|ssh|ssh-config|exec|cp|log|wait`: into a running VM, and what it says.

Context: a command in the foreground. The exit codes of ssh, of scp and of programs in the guest
are ours.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from drivebay.cli.arguments import Parser, parse_seconds
from drivebay.cli.output import DONE, print_json, print_warning
from drivebay.errors import NotFound, UsageError

if TYPE_CHECKING:
    from drivebay.vm.store import Vm

__all__ = [
    "add_parsers",
    "open_console",
    "run",
    "split_words",
    "wait_until_ready",
]

EXEC_SECONDS: Final = 600.0
WAIT_SECONDS: Final = 300.0
_LAST_CODE: Final = 255  # of a process
_FOLLOW_EVERY_S: Final = 0.2


class Adder(Protocol):
    """Makes the parser of one subcommand, with the VM's name as its first word."""

    def __call__(self, name: str, text: str, *, named: bool = True) -> Parser: ...


def split_words(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split at the first ``--`` what has words for the guest behind it.

    argparse would look for options of ours among them.
    """
    if arguments[:1] not in (["ssh"], ["exec"]) or "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def add_parsers(add: Adder) -> None:
    """Describe the commands."""
    add("console", "type at a VM's serial console; Ctrl-] leaves it")
    _login(add("ssh", "log in by ssh, or run a command: ssh NAME -- COMMAND"))
    add("ssh-config", "print a section for ~/.ssh/config")
    execute = add("exec", "run a program by the guest agent: exec NAME -- COMMAND")
    _timeout(execute, EXEC_SECONDS)
    copy = add("cp", "copy files to and from a VM: cp FILE… NAME:PATH", named=False)
    copy.add_argument("sources", metavar="FROM", nargs="+", help="FILE here, or NAME:PATH")
    copy.add_argument("target", metavar="TO", help="FILE here, or NAME:PATH")
    copy.add_argument("--agent", action="store_true", help="by the guest agent, not by ssh")
    _login(copy)
    log = add("log", "print what a VM has said on its console")
    log.add_argument("-f", "--follow", action="store_true", help="go on as it says more")
    log.add_argument("--qemu", action="store_true", help="what QEMU has said instead")
    wait = add("wait", "wait until a VM is that far")
    wait.add_argument(
        "--for",
        dest="goal",
        metavar="WHAT",
        nargs="+",
        help="ssh, agent, console TEXT or stopped (default: ssh if a port leads there, else agent)",
    )
    _timeout(wait, WAIT_SECONDS)


def run(found: argparse.Namespace) -> int:
    """Run one of them; ``found.words`` are those for the guest."""
    return _COMMANDS[found.subcommand](found)


def _login(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-l", "--login", metavar="USER", help="as that user of the guest")


def _timeout(parser: argparse.ArgumentParser, default: float) -> None:
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=parse_seconds,
        default=default,
        help=f"how long at most (default: {default:g})",
    )


def _load(name: str) -> Vm:
    from drivebay.vm.store import Vms

    return Vms().load(name)


# ---- console and log ----------------------------------------------------------------------------


def _console(found: argparse.Namespace) -> int:
    open_console(_load(found.name))
    return DONE


def open_console(vm: Vm, *, wake: bool = True) -> bool:
    """Connect the terminal with a VM's console; False when the VM has ended."""
    from drivebay.vm.console import ESCAPE_NAME, End, attach
    from drivebay.vm.waiting import running_or_refuse

    running_or_refuse(vm)
    if sys.stdin.isatty():
        print(f"[console of '{vm.name}'; {ESCAPE_NAME} leaves it]", file=sys.stderr)
    end = attach(vm.console_socket, wake=wake)
    what = "has ended" if end is End.GUEST_ENDED else "goes on"
    print(f"\n[VM '{vm.name}' {what}]", file=sys.stderr)
    return end is not End.GUEST_ENDED


def _log(found: argparse.Namespace) -> int:
    from drivebay.system.terminal import harmless
    from drivebay.vm.logs import new_bytes

    vm = _load(found.name)
    log = vm.qemu_log if found.qemu else vm.console_log
    if not log.exists() and not found.follow:
        raise NotFound(
            f"VM '{vm.name}' has said nothing yet: it was never started",
            hint=f"drivebay vm start {vm.name}",
        )
    at_terminal = sys.stdout.isatty()
    out = sys.stdout.buffer
    line = b""  # a terminal gets whole lines, in which nothing is cut in two
    for data in new_bytes(log):
        if at_terminal:
            whole, end, line = (line + data).rpartition(b"\n")
            out.write(harmless(whole + end))
        else:
            out.write(data)
        if data:
            continue
        out.flush()
        if not found.follow:
            break
        time.sleep(_FOLLOW_EVERY_S)
    out.write(harmless(line))
    out.flush()
    return DONE


# ---- ssh ----------------------------------------------------------------------------------------


def _ssh(found: argparse.Namespace) -> int:
    from drivebay.cli.vm_ssh import as_started, run_ssh
    from drivebay.vm.ssh import ssh_command

    vm = _load(found.name)
    spec = as_started(vm)
    return run_ssh(vm, spec, ssh_command(spec, vm.keys, found.words, found.login))


def _cp(found: argparse.Namespace) -> int:
    from drivebay.cli.vm_cp import copy

    return copy(found)


def _ssh_config(found: argparse.Namespace) -> int:
    from drivebay.vm.ssh import ssh_config

    vm = _load(found.name)
    print(ssh_config(vm.spec, vm.keys), end="")
    return DONE


# ---- guest agent --------------------------------------------------------------------------------


def _exec(found: argparse.Namespace) -> int:
    from drivebay.vm.agent import Agent
    from drivebay.vm.waiting import running_or_refuse

    if not found.words:
        raise UsageError("no program was named", hint="drivebay vm exec NAME -- COMMAND")
    vm = _load(found.name)
    running_or_refuse(vm)
    with Agent(vm.agent_socket) as agent:
        output = agent.run(found.words, found.timeout)
    if found.json:
        print_json(
            {
                "code": output.code,
                "out": output.out.decode(errors="replace"),
                "err": output.err.decode(errors="replace"),
                "truncated": output.truncated,
            }
        )
        return DONE
    for stream, data in ((sys.stdout, output.out), (sys.stderr, output.err)):
        stream.flush()
        stream.buffer.write(data)
        stream.flush()
    if output.truncated:
        print_warning("the guest agent cut off what was more than 16 MiB")
    return min(output.code, _LAST_CODE)


# ---- waiting ------------------------------------------------------------------------------------


def _wait(found: argparse.Namespace) -> int:
    from drivebay.vm.waiting import nearest_goal, wait_for

    vm = _load(found.name)
    goal, *more = found.goal or [nearest_goal(vm)]
    if len(more) > (1 if goal == "console" else 0):
        raise UsageError(f"too many words after --for: {' '.join(more)[:80]}")
    seconds = wait_for(vm, goal, found.timeout, more[0] if more else None)
    if found.json:
        print_json({"name": vm.name, "for": goal, "seconds": round(seconds, 3)})
    else:
        _say_ready(vm, goal, seconds)
    return DONE


def wait_until_ready(vm: Vm) -> None:
    """Wait until somebody can log in, and say so. Raises: StateError."""
    from drivebay.vm.waiting import nearest_goal, wait_for

    goal = nearest_goal(vm)
    _say_ready(vm, goal, wait_for(vm, goal, WAIT_SECONDS))


def _say_ready(vm: Vm, goal: str, seconds: float) -> None:
    said = {
        "ssh": "answers to ssh",
        "agent": "has its guest agent up",
        "console": "has said it",
        "stopped": "is off",
    }[goal]
    print(f"VM '{vm.name}' {said}, after {seconds:.1f} s")


_COMMANDS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {
    "console": _console,
    "ssh": _ssh,
    "ssh-config": _ssh_config,
    "exec": _exec,
    "cp": _cp,
    "log": _log,
    "wait": _wait,
}
