"""`drivebay image import|create|pull|build`: images from files and the web, or made here."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from drivebay.cli.image import show_image
from drivebay.cli.output import DONE
from drivebay.cli.progress import Phases, print_line
from drivebay.cli.steps import carry_out
from drivebay.disks.plan import Plan
from drivebay.disks.sizes import format_size
from drivebay.errors import NotFound, UsageError
from drivebay.vm.images.building import build_image
from drivebay.vm.images.formats import shown
from drivebay.vm.images.importing import check_file, create_empty, import_file, name_from
from drivebay.vm.images.store import ImageFacts, Images, Report

__all__ = ["build", "create", "import_image", "pull"]

_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


def import_image(found: argparse.Namespace) -> int:
    """Copy a file in as an image."""
    from drivebay.vm.images.download import is_url

    if found.sha256 is not None and not _SHA256.fullmatch(found.sha256):
        raise UsageError(
            f"'{shown(found.sha256)}' is no SHA-256: that has 64 digits, 0 to 9 and a to f"
        )
    if urlsplit(found.source).scheme == "file":
        return _import_file(found, Path(unquote(urlsplit(found.source).path)))
    if is_url(found.source):
        return _import_url(found)
    return _import_file(found, Path(found.source))


def _import_file(found: argparse.Namespace, path: Path) -> int:
    path = path.absolute()
    called = shown(str(path))
    if not path.exists():
        raise NotFound(f"there is no file '{called}'")
    name = found.name or name_from(path.name)
    images = Images()

    def work(report: Report) -> None:
        if found.sha256 is not None:
            check_file(path, called, found.sha256, report)
        import_file(images, name, path, ImageFacts(called), kind=found.format, report=report)

    return _add(found, images, name, f"copy '{called}' in as image '{name}'", work)


def _import_url(found: argparse.Namespace) -> int:
    from drivebay.vm.images.download import check_url, clean_url, file_name

    check_url(found.source)
    url = clean_url(found.source)
    file = shown(file_name(found.source))
    name = found.name or name_from(file)
    images = Images()

    def work(report: Report) -> None:
        _download(images, name, found.source, file, ImageFacts(url), found.format, found.sha256,
                  report)  # fmt: skip

    return _add(found, images, name, f"fetch '{url}' and import it as image '{name}'", work)


def _download(
    images: Images,
    name: str,
    url: str,
    file: str,
    facts: ImageFacts,
    kind: str | None,
    checksum: str | None,
    report: Report,
) -> None:
    from drivebay.vm.images.download import downloaded

    with downloaded(url, checksum, report) as path:
        import_file(images, name, path, facts, called=file, kind=kind, report=report)


def pull(found: argparse.Namespace) -> int:
    """Download one of the catalogue, and verify it."""
    from drivebay.vm.images.catalogue import MIRROR_SETTING, cloud_image, find_checksum
    from drivebay.vm.images.download import clean_url, fetch_text, file_name

    wanted = cloud_image(found.name)
    name = found.own or wanted.name
    url, checksums = wanted.at(found.mirror or os.environ.get(MIRROR_SETTING))
    facts = ImageFacts(clean_url(url), wanted.os, wanted.user, wanted.cloud_init)
    images = Images()

    def work(report: Report) -> None:
        checksum = find_checksum(fetch_text(checksums), file_name(url), wanted.kind)
        _download(images, name, url, file_name(url), facts, wanted.format, checksum, report)

    return _add(found, images, name, f"fetch '{facts.origin}' as image '{name}'", work)


def create(found: argparse.Namespace) -> int:
    """Make an empty image."""
    images = Images()
    text = f"make the empty image '{found.name}' of {format_size(found.size)}"
    return _add(
        found, images, found.name, text, lambda report: create_empty(images, found.name, found.size)
    )


def build(found: argparse.Namespace) -> int:
    """Make an image by one of the recipes in vm.images."""
    name = found.name or found.recipe
    images = Images()
    text = f"build the image '{name}' ({found.recipe})"
    return _add(
        found,
        images,
        name,
        text,
        lambda report: build_image(images, found.recipe, name, print_line, report),
    )


def _add(
    found: argparse.Namespace,
    images: Images,
    name: str,
    text: str,
    work: Callable[[Report], object],
) -> int:
    """Carry out a plan of one step, which makes an image, and show that."""
    images.check_free(name)
    plan = Plan()
    with Phases() as phases:
        plan.add(text, lambda: work(phases))
        done = carry_out(plan, found)
    if done:
        show_image(images.get(name), found)
    return DONE
