"""Images that are made on this machine, by one of the recipes beside this module.

Context: a short-lived process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from drivebay.vm.images.store import BuiltImage, Images, Report

__all__ = ["RECIPES", "build_image"]

RECIPES: Final = ("debian", "tiny")


def build_image(
    images: Images, recipe: str, name: str, say: Callable[[str], None], report: Report
) -> None:
    """Build an image, and say how far it is. Raises: what the recipe raises."""
    module = importlib.import_module(f"drivebay.vm.images.{recipe}")
    make: Callable[[Path, Callable[[str], None]], BuiltImage] = getattr(module, f"build_{recipe}")
    with images.workspace() as folder:
        built = make(folder, say)
        images.add(name, built.raw, built.facts, report)
