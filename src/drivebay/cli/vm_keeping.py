"""The words of `drivebay vm snapshot|snapshots|revert`: what keeps a VM as it is now.

Context: a short-lived process; imported by each command of `drivebay vm`, so it imports little.
"""

from __future__ import annotations

from typing import Final, Protocol

from drivebay.cli.arguments import Parser

__all__ = ["RUN", "add_parsers"]

# The module and the function of a subcommand.
RUN: Final = {
    "snapshot": ("vm_snapshot", "snapshot"),
    "snapshots": ("vm_snapshot", "list_snapshots"),
    "revert": ("vm_snapshot", "revert"),
}


class Adder(Protocol):
    """Makes the parser of one subcommand, with the VM's name as its first word."""

    def __call__(
        self, name: str, text: str, *, asks: bool = False, changes: bool = False
    ) -> Parser: ...


def add_parsers(add: Adder) -> None:
    """Describe the commands."""
    take = add("snapshot", "keep a VM's disks as they are now, also while it runs", asks=True,
               changes=True)  # fmt: skip
    take.add_argument("tag", metavar="TAG", help="the snapshot's name")
    take.add_argument("--delete", action="store_true", help="delete that snapshot instead")
    listing = add("snapshots", "list a VM's snapshots")
    listing.add_argument("-q", "--quiet", action="store_true", help="print names only")
    back = add("revert", "go back to a snapshot: what was written since is lost", asks=True,
               changes=True)  # fmt: skip
    back.add_argument("tag", metavar="TAG", help="the snapshot to go back to")
