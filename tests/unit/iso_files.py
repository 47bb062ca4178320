"""Small ISOs for tests, with names of each kind."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from pathlib import Path

import pycdlib

__all__ = ["write_iso"]


def write_iso(
    path: Path, files: Mapping[str, bytes], *, label: str = "TEST", names: str = "rock-ridge"
) -> Path:
    """Write an ISO with ``files`` by their places on it, such as '/casper/vmlinuz'.

    ``names`` are 'rock-ridge', 'joliet' (the plain ones beside it tell nothing) or 'plain'.
    """
    iso = pycdlib.PyCdlib()
    iso.new(
        interchange_level=3,
        vol_ident=label,
        rock_ridge="1.09" if names == "rock-ridge" else None,
        joliet=3 if names == "joliet" else None,
    )
    numbers = itertools.count()
    plain = {"": ""}  # of folders, by their real names

    def add(place: str, content: bytes | None) -> None:
        above, _, own = place.rpartition("/")
        if above not in plain:
            add(above, None)
        told = own.upper() if names == "plain" else f"N{next(numbers)}"
        rr_name = own if names == "rock-ridge" else None
        joliet = place if names == "joliet" else None
        if content is None:
            plain[place] = f"{plain[above]}/{told.replace('.', '_')}"
            iso.add_directory(plain[place], rr_name=rr_name, joliet_path=joliet)
            return
        where = f"{plain[above]}/{told}{'' if '.' in told else '.'};1"
        iso.add_fp(io.BytesIO(content), len(content), where, rr_name=rr_name, joliet_path=joliet)

    for place, content in files.items():
        add(place, content)
    iso.write(str(path))
    iso.close()
    return path
