"""`drivebay image import|create|pull|build|list|info|check|convert|resize|delete`.

Context: a short-lived process. An image is what VMs begin with; vm.images keeps them. What adds
images is in image_add, what changes them in image_change. A target is asked only who uses an
image, and none has to run.
"""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, Any

from drivebay.cli.arguments import Parser, add_json_option, add_socket_option, parse_size
from drivebay.cli.output import DONE, print_json, print_table, print_warning
from drivebay.cli.steps import add_change_options
from drivebay.disks.sizes import format_size
from drivebay.errors import DrivebayError, Unreachable
from drivebay.vm.images.building import RECIPES

if TYPE_CHECKING:
    from drivebay.disks.inventory import Inventory
    from drivebay.vm.images.store import Image

__all__ = ["build_parser", "look_at_target", "main", "show_image"]

FORMATS = ("raw", "qcow2", "vdi", "vmdk", "vhdx")

_EPILOG = """\
examples:
  drivebay image import ~/Downloads/web.qcow2 --name web
  drivebay image import https://example.org/disk.vmdk
  drivebay image pull debian-13
  drivebay image build debian
  drivebay image list
  drivebay image convert web /tmp/web.vhdx --format vhdx

An image is read-only: VMs begin with it and keep what they change for themselves.
"""

# The module and the function of a subcommand.
_RUN = {
    "import": ("image_add", "import_image"),
    "create": ("image_add", "create"),
    "pull": ("image_add", "pull"),
    "build": ("image_add", "build"),
    "check": ("image_change", "check"),
    "convert": ("image_change", "convert"),
    "resize": ("image_change", "resize"),
    "delete": ("image_change", "delete"),
}


def main(arguments: list[str]) -> int:
    """Run one of the subcommands."""
    found = build_parser().parse_args(arguments)
    if found.subcommand == "list":
        return _list(found)
    if found.subcommand == "info":
        from drivebay.vm.images.store import Images

        show_image(Images().get(found.name), found)
        return DONE
    module, function = _RUN[found.subcommand]
    return int(getattr(importlib.import_module(f"drivebay.cli.{module}"), function)(found))


def build_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser("drivebay image", description="Images that VMs begin with.", epilog=_EPILOG)
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")

    def add(name: str, text: str, *, asks: bool = False, changes: bool = True) -> Parser:
        command: Parser = commands.add_parser(name, help=text)
        if changes:
            add_change_options(command, asks=asks)
        add_socket_option(command)
        add_json_option(command)
        command.add_argument("-q", "--quiet", action="store_true", help="print names only")
        return command

    _add_import(add("import", "copy a disk image in, from a file or URL"))
    create = add("create", "make an empty image, to install something on its clones")
    create.add_argument("name", metavar="NAME", help="its name")
    create.add_argument(
        "--size", metavar="SIZE", type=parse_size, required=True, help="such as 20G"
    )
    _add_pull(add("pull", "download a well-known cloud image, and verify it"))
    build = add("build", "make an image on this machine")
    build.add_argument(
        "recipe",
        choices=RECIPES,
        help="debian: with cloud-init and guest agent; tiny: a kernel and busybox, in seconds",
    )
    build.add_argument("name", metavar="NAME", nargs="?", help="its name (default: the recipe's)")
    add("list", "show all images", changes=False)
    _name(add("info", "show one image and who uses it", changes=False))
    _name(add("check", "compare an image's content with its checksum", changes=False))
    convert = add("convert", "write an image to a file, in any format")
    _name(convert)
    convert.add_argument("file", metavar="FILE", help="the new file")
    convert.add_argument("--format", choices=FORMATS, help="its format (default: as its name ends)")
    resize = add("resize", "make an image that nobody uses larger")
    _name(resize)
    resize.add_argument("size", metavar="SIZE", type=parse_size, help="the new size, such as 20G")
    _name(add("delete", "delete an image that nobody uses", asks=True))
    return parser


def _name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the image")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FILE|URL", help="what to import; .xz is unpacked")
    parser.add_argument("--name", metavar="NAME", help="the image's name (default: the file's)")
    parser.add_argument(
        "--format", choices=FORMATS, help="its format, when its name doesn't end in it"
    )
    parser.add_argument("--sha256", metavar="SUM", help="the checksum that the file must have")


def _add_pull(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", help="such as debian-13; a name that is none shows all"
    )
    parser.add_argument("--as", dest="own", metavar="NAME", help="the image's name here")
    parser.add_argument(
        "--mirror",
        metavar="URL",
        help="what takes the place of https://HOST (default: $DRIVEBAY_IMAGE_MIRROR)",
    )


def look_at_target(found: argparse.Namespace) -> tuple[Inventory | None, list[str]]:
    """What a running target holds, and its volumes that lack what they begin with.

    None when no target runs; Raises: Unreachable when one was named that doesn't.
    """
    from drivebay.disks.connection import RpcRefused, call, connect
    from drivebay.disks.inventory import read_inventory

    try:
        with connect(found.socket) as client:
            try:
                volumes = call(client, "bdev_lvol_get_lvols")
            except RpcRefused:  # a target that may not be asked (--rpcs-allowed)
                volumes = []
            lost = [str(volume["alias"]) for volume in volumes if volume.get("is_degraded")]
            return read_inventory(client), lost
    except Unreachable:
        if found.socket is not None:
            raise
        return None, []


# ---- showing ------------------------------------------------------------------------------------


def _list(found: argparse.Namespace) -> int:
    from drivebay.vm.images.store import Images

    images = Images()
    shown = []
    for name in images.names():
        try:
            shown.append(images.get(name))
        except DrivebayError as error:
            print_warning(str(error))
    if found.quiet:
        print("".join(f"{image.name}\n" for image in shown), end="")
    elif found.json:
        print_json([as_json(image) for image in shown])
    else:
        header = ("image", "size", "used", "cloud-init", "system", "created", "from")
        rows = [
            (image.name, format_size(image.size), format_size(image.used), _spell(image),
             image.facts.os or "-", f"{image.created:%Y-%m-%d}", image.facts.origin)
            for image in shown
        ]  # fmt: skip
        print_table(header, rows)
    return DONE


def _spell(image: Image) -> str:
    return {True: "yes", False: "no", None: "unknown"}[image.facts.cloud_init]


def as_json(image: Image) -> dict[str, Any]:
    """All that is known of an image."""
    return {
        "name": image.name,
        "path": str(image.path),
        "size": image.size,
        "virtual_size": image.virtual_size,
        "used": image.used,
        "checksum": image.checksum,
        "origin": image.facts.origin,
        "os": image.facts.os,
        "user": image.facts.user,
        "cloud_init": image.facts.cloud_init,
        "created": image.created.isoformat(),
        "uuid": image.uuid,
    }


def show_image(image: Image, found: argparse.Namespace) -> None:
    """Print one image, as ``--json`` and ``-q`` want it, with its users."""
    if found.quiet:
        print(image.name)
        return
    from drivebay.vm.images.users import users_of

    users = users_of(image, look_at_target(found)[0])
    if found.json:
        print_json(as_json(image) | {"users": users})
        return
    print(f"image       {image.name}")
    print(f"from        {image.facts.origin}")
    if image.facts.os:
        print(f"system      {image.facts.os}")
    print(f"size        {format_size(image.size)}")
    print(f"used        {format_size(image.used)}")
    print(f"cloud-init  {_spell(image)}")
    if image.facts.user is not None:
        print(f"user        {image.facts.user}")
    print(f"created     {image.created:%Y-%m-%d %H:%M} UTC")
    print(f"checksum    {image.checksum}")
    print(f"file        {image.path}")
    if users:
        print(f"used by     {', '.join(users)}")
    try:
        image.check_unchanged()
    except DrivebayError as error:
        print_warning(f"{error}; {error.hint}")
