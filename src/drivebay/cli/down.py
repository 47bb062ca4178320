"""`drivebay down [FILE]`: a lab's VMs switched off; or all that the lab has made deleted.

Context: a short-lived process.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from drivebay.cli.arguments import Parser, add_json_option, add_socket_option, parse_seconds
from drivebay.cli.output import DONE, print_json
from drivebay.cli.steps import add_change_options, carry_out
from drivebay.cli.up import LAB_FILE, record_for
from drivebay.errors import NotFound, StateError

if TYPE_CHECKING:
    from drivebay.vm.lab.record import Labs, Record

__all__ = ["build_parser", "main"]

_EPILOG = """\
examples:
  drivebay down                         stop the lab of lab.toml in this folder
  drivebay down --force                 do not wait for its guests
  drivebay down --delete                delete its VMs, disks and pools; it asks
  drivebay down four --delete           by its name, when the file is gone

Other labs, other VMs and images are not touched.
"""


def build_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser(
        "drivebay down",
        description="Switch a lab's VMs off; their disks keep every byte.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        default=LAB_FILE,
        help="the lab's, or the lab's name when that is gone (default: lab.toml)",
    )
    parser.add_argument(
        "--delete", action="store_true", help="delete all that 'up' has made for this lab"
    )
    parser.add_argument("--force", action="store_true", help="as if the plug were pulled")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=parse_seconds,
        default=90.0,
        help="how long the guests have to switch themselves off (default: %(default)g)",
    )
    add_change_options(parser, asks=True)
    add_socket_option(parser)
    add_json_option(parser)
    return parser


def main(arguments: list[str]) -> int:
    """Take a lab down."""
    found = build_parser().parse_args(arguments)
    from drivebay.vm.lab.record import Labs

    labs = Labs()
    name, record = _meant(labs, found.file)
    with labs.locked(name):
        return _delete(labs, name, record, found) if found.delete else _stop(name, record, found)


def _meant(labs: Labs, word: str) -> tuple[str, Record]:
    """The lab of a file, whatever is in it by now, or of that name. Raises: NotFound."""
    from drivebay.vm.lab.reading import lab_name_of

    path = Path(word).resolve()
    name = labs.of_file(path)
    if name is None and not path.exists() and word in labs.names():
        name = word
    if name is None:
        name = lab_name_of(path)
        record_for(labs, name, path)  # refuses the lab of another file
    record = labs.load(name)
    if record is None:
        names = ", ".join(labs.names())
        raise NotFound(
            f"the lab '{name}' has made nothing: there is nothing to take down",
            hint=f"there are {names}" if names else "drivebay up makes a lab",
        )
    return name, record


def _stop(name: str, record: Record, found: argparse.Namespace) -> int:
    from drivebay.vm import run
    from drivebay.vm.lab.planning import lab_vms
    from drivebay.vm.several import stop_several
    from drivebay.vm.store import Vms

    vms = Vms()
    names = lab_vms(name, record, vms)
    running = [each for each in names if run.running(vms.load(each)) is not None]
    if found.dry_run:
        if found.json:
            print_json({"facts": [], "would": [f"stop VM '{each}'" for each in running]})
        else:
            print("".join(f"would stop VM '{each}'\n" for each in running), end="")
        return DONE
    ended: dict[str, str | None] = {}
    failed = []
    for outcome in stop_several(vms, running, force=found.force, timeout_s=found.timeout):
        if outcome.error is not None:
            failed.append((outcome.name, outcome.error))
            continue
        ended[outcome.name] = outcome.result
        if not found.json:
            by_force = " (ended by force: for its guest that was a power cut)"
            print(f"VM '{outcome.name}' is off{by_force * (outcome.result == 'by force')}",
                  flush=True)  # fmt: skip
    if found.json:
        print_json({"lab": name, "ended": ended})
    elif not running:
        print(f"lab '{name}' is down already")
    if failed:
        raise StateError(
            "; ".join(f"VM '{each}': {error}" for each, error in failed), hint=failed[0][1].hint
        ) from failed[0][1]
    return DONE


def _delete(labs: Labs, name: str, record: Record, found: argparse.Namespace) -> int:
    from drivebay.disks.connection import find_socket
    from drivebay.disks.starting import connect_or_start
    from drivebay.vm.lab.planning import plan_delete
    from drivebay.vm.lab.site import Site

    with connect_or_start(found.socket) as client:
        site = Site(name, record, client, find_socket(found.socket))
        plan = plan_delete(site)
        if not carry_out(plan, found, f"Delete lab '{name}' with all that is on its disks?"):
            return DONE
    labs.delete(record)
    if found.json:
        print_json({"deleted": name, "did": plan.texts})
    else:
        print(f"lab '{name}' is deleted")
    return DONE
