"""`drivebay doctor [net | vm NAME]`: what this host, its networks or a VM lack, and what mends it.

Context: a short-lived process; changes nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from drivebay.cli.arguments import Parser, add_json_option, add_socket_option
from drivebay.cli.output import DONE, REFUSED, print_json, table_lines
from drivebay.errors import DrivebayError, UsageError

if TYPE_CHECKING:
    from drivebay.host.finding import Finding

__all__ = ["build_parser", "main"]

_EPILOG = """\
A note is something that is not there and may not be wanted; a warning will hurt some day;
with a problem VMs do not start, or have no network, and the exit code is 1.
"""


def main(arguments: list[str]) -> int:
    """Check, and print what was found."""
    found = build_parser().parse_args(arguments)
    findings = list(_check(found))
    if found.json:
        print_json([asdict(finding) for finding in findings])
    elif found.quiet:
        print("".join(f"{finding.mend}\n" for finding in findings if finding.mend), end="")
    else:
        _show(findings)
    return REFUSED if any(finding.level == "problem" for finding in findings) else DONE


def build_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser("drivebay doctor", description="What is missing here?", epilog=_EPILOG)
    add_socket_option(parser)
    add_json_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print the mends only")
    parser.add_argument(
        "subject",
        nargs="*",
        metavar="net | vm NAME",
        help="check networks, or this VM (default: the host)",
    )
    return parser


def _check(found: argparse.Namespace) -> Iterable[Finding]:
    match found.subject:
        case []:
            return _check_host(found.socket)
        case ["net"]:
            return _check_network()
        case ["vm", name]:
            return _check_vm(name, found.socket)
    raise UsageError(
        f"'{' '.join(found.subject)}' can't be checked",
        hint="drivebay doctor, or: doctor net, doctor vm NAME",
    )


def _check_host(socket: str | None) -> Iterable[Finding]:
    from drivebay.host.emulator import check_emulator
    from drivebay.host.finding import failed
    from drivebay.host.folders import check_folders
    from drivebay.host.resources import check_memory
    from drivebay.host.storage import check_storage
    from drivebay.host.tools import check_tools
    from drivebay.vm.store import Vms

    yield from check_emulator()
    yield from check_tools()
    yield from check_folders()
    vms = Vms()
    readable = []
    try:
        names = vms.names()
    except DrivebayError as error:
        yield failed("VMs", error)
        names = []
    for name in names:
        try:
            readable.append(vms.load(name))
        except DrivebayError as error:
            yield failed("VMs", error, "warning")
    yield from check_memory(readable)
    yield from check_storage(socket)


def _check_vm(name: str, socket: str | None) -> Iterable[Finding]:
    from drivebay.host.machine import check_machine
    from drivebay.vm.store import Vms

    return check_machine(Vms(), name, socket)


def _check_network() -> Iterable[Finding]:
    from drivebay.host.network import check_network

    return check_network()


def _show(findings: list[Finding]) -> None:
    rows = [(finding.level, finding.subject, finding.what) for finding in findings]
    header, *lines = table_lines(("level", "about", "what"), rows)
    print(header)
    for finding, line in zip(findings, lines, strict=True):
        print(line)
        if finding.mend:
            print(f"         mend: {finding.mend}")
