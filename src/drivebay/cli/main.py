"""`drivebay`: finds the command, runs it, and turns its errors into exit codes.

Context: a short-lived process, except for `vhost` and `target run`, which become
the target. Nothing is imported before the command is known: `drivebay --help`
has 0.2 s, and the target's first answer 0.4 s.

A command is a module with ``main(arguments: list[str]) -> int`` and a
``build_parser() -> Parser`` from which shell completion reads its options.
It raises DrivebayError; it never prints an error or exits by itself.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import NamedTuple

from drivebay.cli.output import DONE, REFUSED, print_error
from drivebay.errors import DrivebayError, UsageError

__all__ = ["COMMANDS", "Command", "main"]


class Command(NamedTuple):
    """One word after `drivebay`: the module that serves it and its line in the help."""

    module: str
    summary: str


COMMANDS = {
    "vhost": Command("drivebay.cli.vhost", "run the target, with the options of SPDK's vhost"),
    "target": Command("drivebay.cli.target", "run, start, stop the target, or show its state"),
    "pool": Command("drivebay.cli.pool", "where disks live: in files and on partitions"),
    "disk": Command("drivebay.cli.disk", "make, show and change disks"),
    "image": Command("drivebay.cli.image", "import, download, build and show disk images"),
    "vm": Command("drivebay.cli.vm", "make, start and change virtual machines"),
    "net": Command("drivebay.cli.net", "networks of VMs: NAT, isolated, routed, the host's LAN"),
    "up": Command("drivebay.cli.up", "make and start a lab: pools, disks and VMs from one file"),
    "down": Command("drivebay.cli.down", "stop a lab, which keeps every byte; or delete it"),
    "rpc": Command("drivebay.cli.rpc", "call any method of a running target"),
    "bench": Command("drivebay.cli.bench", "put load on any vhost-user-blk socket, and verify"),
    "demo": Command("drivebay.cli.demo", "boot a virtual machine on a disk of ours"),
    "doctor": Command("drivebay.cli.doctor", "what this host or a VM lacks, and the mend"),
    "completion": Command("drivebay.cli.completion", "print a completion script for your shell"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns: its exit code (see cli.output)."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except DrivebayError as error:
        return print_error(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone; what is left in the buffer must not
        # raise again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return REFUSED


def _dispatch(words: list[str]) -> int:
    first = words[0] if words else "--help"
    if first in ("-h", "--help", "help"):
        print(_help_text())
        return DONE
    if first in ("-v", "--version"):
        from drivebay.cli.version import version_line

        print(version_line())
        return DONE
    command = COMMANDS.get(first)
    if command is None:
        raise UsageError(f"no command '{first}'", hint="'drivebay --help' lists the commands")
    module = importlib.import_module(command.module)
    try:
        return int(module.main(words[1:]))
    except SystemExit as end:  # argparse's way out of --help and --version
        return end.code if isinstance(end.code, int) else DONE


def _help_text() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: drivebay COMMAND …",
            "",
            "Fast disks for virtual machines: a vhost-user storage target.",
            "",
            *lines,
            "",
            "'drivebay COMMAND --help' shows its options; 'drivebay --version' the version.",
            "Exit codes: 0 done, 1 refused, 2 usage, 3 target unreachable.",
        ]
    )
