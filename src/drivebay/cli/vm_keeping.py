"""The words of `drivebay vm snapshot|snapshots|revert|export|import`: a VM kept as it is now.

Context: a short-lived process; imported by each command of `drivebay vm`, so it imports little.
"""

from __future__ import annotations

from typing import Final, Protocol

from drivebay.cli.arguments import Parser

__all__ = ["RUN", "add_import", "add_parsers"]

FORMATS: Final = ("qcow2", "raw", "vmdk", "vdi", "vhdx")

# The module and the function of a subcommand.
RUN: Final = {
    "snapshot": ("vm_snapshot", "snapshot"),
    "snapshots": ("vm_snapshot", "list_snapshots"),
    "revert": ("vm_snapshot", "revert"),
    "export": ("vm_export", "export_vm"),
    "import": ("vm_import", "import_vm"),
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
    export = add("export", "write a disk of a VM to a file, also while it runs", changes=True)
    export.add_argument("file", metavar="FILE", help="NAME.qcow2, .raw, .vmdk, .vdi or .vhdx")
    export.add_argument("--disk", metavar="DISK", help="that disk (default: the first)")


def add_import(parser: Parser) -> None:
    """Describe what `import` takes beside the words of `create`."""
    parser.add_argument("file", metavar="FILE", help="a disk image: qcow2, raw, vmdk, vdi, vhdx")
    parser.add_argument("name", metavar="NAME", help="the new VM's name, and the image's")
    parser.add_argument("--format", choices=FORMATS, help="if its name does not say it")
