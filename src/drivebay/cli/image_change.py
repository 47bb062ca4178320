"""`drivebay image check|convert|resize|delete`: what is done with an image that is there."""

from __future__ import annotations

import argparse
from pathlib import Path

from drivebay.cli.image import look_at_target, show_image
from drivebay.cli.output import DONE, print_json
from drivebay.cli.progress import Phases
from drivebay.cli.steps import carry_out
from drivebay.disks.connection import call, connect
from drivebay.disks.plan import Plan
from drivebay.disks.sizes import format_size
from drivebay.errors import UsageError
from drivebay.vm.images.formats import FORMATS, format_of_name
from drivebay.vm.images.importing import export
from drivebay.vm.images.store import Image, Images
from drivebay.vm.images.users import bdev_of, refuse_used

__all__ = ["check", "convert", "delete", "resize"]


def check(found: argparse.Namespace) -> int:
    """Compare the content with the checksum; exit code 1 when it differs."""
    images = Images()
    image = images.get(found.name)
    with Phases() as phases:
        images.verify(image, phases)
    if found.json:
        print_json({"name": image.name, "checksum": image.checksum, "unchanged": True})
    else:
        print(image.name if found.quiet else f"image '{image.name}' is as it was added")
    return DONE


def convert(found: argparse.Namespace) -> int:
    """Write an image to a file of another format."""
    image = Images().get(found.name)
    target = Path(found.file).absolute()
    kind = found.format or format_of_name(target.name)
    if kind is None:
        raise UsageError(
            f"'{target.name}' doesn't say which format it should have",
            hint=f"add --format, one of {', '.join(FORMATS)}",
        )
    plan = Plan()
    with Phases() as phases:
        plan.add(
            f"write image '{image.name}' to '{target}' as {kind}",
            lambda: export(image, target, kind, phases),
        )
        done = carry_out(plan, found)
    if done and found.json:
        print_json({"name": image.name, "file": str(target), "format": kind})
    elif done:
        print(target if found.quiet else f"image '{image.name}' is in '{target}' ({kind})")
    return DONE


def resize(found: argparse.Namespace) -> int:
    """Make an image larger that nobody uses."""
    images = Images()
    image = images.get(found.name)
    _release(image, found, "resized", act=False)
    plan = Plan()
    with Phases() as phases:

        def grow() -> None:
            with images.locked():
                _release(image, found, "resized")
                images.grow(image, found.size, phases)

        plan.add(f"make image '{image.name}' {format_size(found.size)} large", grow)
        done = carry_out(plan, found)
    if done:
        show_image(images.get(image.name), found)
    return DONE


def delete(found: argparse.Namespace) -> int:
    """Delete an image that nobody uses, and its bdev in a running target."""
    images = Images()
    image = images.get(found.name)
    _release(image, found, "deleted", act=False)
    plan = Plan()
    plan.add(
        f"delete image '{image.name}' with its folder '{image.path.parent}'",
        lambda: images.delete(image.name, lambda: _release(image, found, "deleted")),
    )
    if carry_out(plan, found, f"Delete image '{image.name}'?"):
        if found.json:
            print_json({"deleted": image.name})
        else:
            print(image.name if found.quiet else f"image '{image.name}' deleted")
    return DONE


def _release(image: Image, found: argparse.Namespace, what: str, *, act: bool = True) -> None:
    """Have the target let go of an image that nobody uses; without ``act`` only look.

    The next VM that begins with the image opens it again. Raises: InUse.
    """
    inventory, incomplete = look_at_target(found)
    refuse_used(image, inventory, incomplete, what)
    bdev = None if inventory is None else bdev_of(image, inventory)
    if act and bdev is not None:
        with connect(found.socket) as client:
            call(client, f"bdev_{bdev.module}_delete", {"name": bdev.bdev})
