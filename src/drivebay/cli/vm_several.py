"""`drivebay vm autostart`, `vm start --autostart`, `vm stop --all`: what a host does by itself.

Context: a short-lived process; the last two are what the systemd unit runs, whose status then
says in a sentence how it went.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from typing import Final, Protocol

from drivebay.cli.arguments import Parser
from drivebay.cli.output import DONE, REFUSED, print_error, print_json, print_warning
from drivebay.errors import DrivebayError, StateError, UsageError

__all__ = ["ENDED", "RUN", "add_names", "add_parsers", "autostart", "switch"]

# The module and the function of a subcommand.
RUN: Final = {"autostart": ("vm_several", "autostart")}
# How a VM ended, as lifecycle.stop tells it.
ENDED: Final = {
    "off": "is off",
    "by force": "was ended by force: for its guest that was a power cut",
    None: "was not running",
}


class Adder(Protocol):
    """Makes the parser of one subcommand."""

    def __call__(
        self, name: str, text: str, *, changes: bool = False, named: bool = True
    ) -> Parser: ...


def add_parsers(add: Adder) -> None:
    """Describe the command."""
    command = add("autostart", "have a VM start with the host", changes=True, named=False)
    command.add_argument("name", metavar="NAME", nargs="?", help="the VM")
    command.add_argument("--off", action="store_true", help="no longer")
    command.add_argument(
        "--install",
        action="store_true",
        help="give this host's systemd the unit that starts the target and these VMs",
    )
    command.add_argument("--unit", action="store_true", help="print that unit")


def add_names(parser: argparse.ArgumentParser, option: str, text: str) -> None:
    """One VM, or those that ``option`` means."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="the VM")
    parser.add_argument(option, dest="several", action="store_true", help=text)


# ---- several ------------------------------------------------------------------------------------


def switch(found: argparse.Namespace) -> int:
    """Start those that are marked, or stop all that run."""
    if found.name is not None:
        raise UsageError(f"either '{found.name[:80]}' or those that the option means")
    return _start(found) if found.subcommand == "start" else _stop(found)


def _start(found: argparse.Namespace) -> int:
    from drivebay.vm.autostart import marked
    from drivebay.vm.several import start_several
    from drivebay.vm.store import Vms

    if found.wait or found.boot or found.text:
        raise UsageError("--wait, --boot and --text are for one VM")
    vms = Vms()
    names, broken = marked(vms)
    failed = [str(error) for error in broken]
    shown = []
    for error in broken:
        print_error(error)
    for outcome in start_several(vms, names, found.socket):
        shown.append({"name": outcome.name, "error": _text(outcome.error)})
        if outcome.error is not None:
            failed.append(f"VM '{outcome.name}': {outcome.error}")
            print_error(_of(outcome.name, outcome.error))
        elif not found.json:
            print(f"VM '{outcome.name}' runs", flush=True)
    if found.json:
        print_json(shown)
    elif not names:
        print("no VM that is to start with the host is off")
    _tell_systemd(len(names), failed)
    return REFUSED if failed else DONE


def _stop(found: argparse.Namespace) -> int:
    from drivebay.vm.autostart import running_names
    from drivebay.vm.several import stop_several
    from drivebay.vm.store import Vms

    vms = Vms()
    names = running_names(vms)
    shown, code = [], DONE
    for outcome in stop_several(vms, names, force=found.force, timeout_s=found.timeout):
        shown.append({"name": outcome.name, "ended": outcome.result, "error": _text(outcome.error)})
        if outcome.error is not None:
            code = print_error(_of(outcome.name, outcome.error))
        elif not found.json:
            print(f"VM '{outcome.name}' {ENDED[outcome.result]}", flush=True)
    if found.json:
        print_json(shown)
    elif not names:
        print("no VM runs")
    return code


def _text(error: DrivebayError | None) -> str | None:
    return None if error is None else str(error)


def _of(name: str, error: DrivebayError) -> DrivebayError:
    """The error of one VM among others."""
    return StateError(f"VM '{name}': {error}", hint=error.hint)


def _tell_systemd(wanted: int, failed: Sequence[str]) -> None:
    """sd_notify(3): what 'systemctl status' shows. Elsewhere nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    status = "; ".join(failed) if failed else f"{wanted} VMs were started with the host"
    if failed:
        status = f"DEGRADED: {len(failed)} of the VMs that start with the host do not run: {status}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.sendto(
                f"STATUS={' '.join(status.split())}".encode(),
                f"\0{address[1:]}" if address.startswith("@") else address,
            )
        except OSError as error:
            print_warning(f"systemd's socket '{address}' takes no status: {error.strerror}")


# ---- which ones ---------------------------------------------------------------------------------


def autostart(found: argparse.Namespace) -> int:
    """Mark a VM, install the unit, or print it."""
    from drivebay.vm.unit import unit_text

    if found.unit:
        print(unit_text(), end="")
        return DONE
    if found.install:
        if found.name is not None or found.off:
            raise UsageError("--install is for the host, and --off for one VM")
        return _install(found)
    if found.name is None:
        raise UsageError("name a VM", hint="drivebay vm autostart NAME")
    return _mark(found)


def _mark(found: argparse.Namespace) -> int:
    from drivebay.cli.steps import carry_out
    from drivebay.disks.plan import Plan
    from drivebay.vm.autostart import plan_mark
    from drivebay.vm.store import Vms
    from drivebay.vm.unit import is_installed

    vms = Vms()
    with vms.locked(found.name):
        plan = Plan()
        plan_mark(plan, vms, vms.load(found.name), not found.off)
        if not carry_out(plan, found):
            return DONE
    if found.json:
        print_json({"name": found.name, "autostart": not found.off, "unit": is_installed()})
        return DONE
    print(f"VM '{found.name}' {'does not start' if found.off else 'starts'} with the host")
    if not found.off and not is_installed():
        print("  once this host has the unit for it: drivebay vm autostart --install")
    return DONE


def _install(found: argparse.Namespace) -> int:
    from drivebay.cli.steps import carry_out
    from drivebay.disks.connection import answers, find_socket
    from drivebay.disks.plan import Plan
    from drivebay.vm.unit import NAME, plan_installation, systemctl, unit_path

    plan = Plan()
    plan_installation(plan)
    if not carry_out(plan, found):
        return DONE
    if found.json:
        print_json({"unit": str(unit_path())})
        return DONE
    words = " ".join(systemctl())
    print(f"'{unit_path()}' starts the target, and the VMs that are marked, with the host")
    if answers(find_socket(None)):
        print("  a target runs already; end it first: drivebay target stop")
    print(f"  now, too     {words} start {NAME}")
    print(f"  how it goes  {words} status {NAME}")
    if os.geteuid() != 0:
        print("  before anybody logs in, and after: loginctl enable-linger")
    return DONE
