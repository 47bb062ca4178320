"""`drivebay image import|create`: images from files, and empty ones."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Final

from drivebay.cli.image import show_image
from drivebay.cli.output import DONE
from drivebay.cli.progress import Phases
from drivebay.cli.steps import carry_out
from drivebay.disks.plan import Plan
from drivebay.disks.sizes import format_size
from drivebay.errors import NotFound, UsageError
from drivebay.vm.images.formats import shown
from drivebay.vm.images.importing import check_file, create_empty, import_file, name_from
from drivebay.vm.images.store import ImageFacts, Images

__all__ = ["create", "import_image"]

_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


def import_image(found: argparse.Namespace) -> int:
    """Copy a file in as an image."""
    if found.sha256 is not None and not _SHA256.fullmatch(found.sha256):
        raise UsageError(
            f"'{found.sha256[:80]}' is no SHA-256: that has 64 digits, 0 to 9 and a to f",
            hint=f"sha256sum {found.source}",
        )
    path = Path(found.source).absolute()
    called = shown(str(path))
    if not path.exists():
        raise NotFound(f"there is no file '{called}'")
    name = found.name or name_from(path.name)
    images = Images()
    images.check_free(name)
    plan = Plan()
    with Phases() as phases:
        if found.sha256 is not None:
            plan.add(
                f"compare '{called}' with the checksum",
                lambda: check_file(path, called, found.sha256, phases),
            )
        plan.add(
            f"copy '{called}' in as image '{name}'",
            lambda: import_file(
                images, name, path, ImageFacts(shown(str(path))), kind=found.format, report=phases
            ),
        )
        done = carry_out(plan, found)
    if done:
        show_image(images.get(name), found)
    return DONE


def create(found: argparse.Namespace) -> int:
    """Make an empty image."""
    images = Images()
    images.check_free(found.name)
    plan = Plan()
    plan.add(
        f"make the empty image '{found.name}' of {format_size(found.size)}",
        lambda: create_empty(images, found.name, found.size),
    )
    if carry_out(plan, found):
        show_image(images.get(found.name), found)
    return DONE
