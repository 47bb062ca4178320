"""`drivebay vm eject`, and a start from the CD: what a VM has for its installation alone."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Protocol

from drivebay.cli.arguments import Parser
from drivebay.cli.output import DONE, print_json

__all__ = ["add_boot_option", "add_parsers", "eject"]


class Adder(Protocol):
    """Makes the parser of one subcommand, with the VM's name as its first word."""

    def __call__(self, name: str, text: str, *, changes: bool = False) -> Parser: ...


def add_parsers(add: Adder) -> None:
    """Describe the command."""
    add("eject", "take the ISO out of a VM's CD drive, also while it runs", changes=True)


def add_boot_option(parser: argparse.ArgumentParser) -> None:
    """What is started, this time only."""
    parser.add_argument(
        "--boot",
        choices=("iso",),
        help="from its ISO this time, though there may be a system on its disk",
    )


def eject(found: argparse.Namespace) -> int:
    """Take the CD out of the running machine and out of vm.toml."""
    from drivebay.cli.steps import carry_out
    from drivebay.disks.plan import Plan
    from drivebay.errors import NotFound
    from drivebay.vm import cd, run
    from drivebay.vm.store import Vms
    from drivebay.vm.waiting import started_spec

    vms = Vms()
    with vms.locked(found.name):
        vm = vms.load(found.name)
        running = run.running(vm)
        plan = Plan()
        if running is not None and started_spec(vm, running).iso is not None:
            plan.add(f"take the CD out of the running VM '{vm.name}'", lambda: cd.eject(vm))
        if vm.spec.iso is not None:
            spec = replace(vm.spec, iso=None)
            plan.add(f"strike it from vm.toml of VM '{vm.name}'", lambda: vms.save(vm, spec))
        if not plan.texts:
            raise NotFound(f"VM '{vm.name}' has no CD", hint=f"drivebay vm info {vm.name}")
        if not carry_out(plan, found):
            return DONE
    if found.json:
        print_json({"name": vm.name, "ejected": vm.spec.iso})
    else:
        print(f"VM '{vm.name}' has no CD any more")
    return DONE
