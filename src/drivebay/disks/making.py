"""Disks that lie in no pool: on a file or a device, or as the parts of another disk.

Context: a short-lived process. Planning only looks; a disk that cannot be made leaves no file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from drivebay.disks.connection import call, target_owner
from drivebay.disks.inventory import Disk
from drivebay.disks.places import (
    check_visible,
    contents_of,
    make_sparse_file,
    place_size,
    remove_file,
)
from drivebay.disks.plan import Plan
from drivebay.disks.sizes import format_size
from drivebay.errors import InUse, UsageError

if TYPE_CHECKING:
    from drivebay.rpc.client import Client

__all__ = ["PARTS_MOST", "check_base", "mebibytes", "plan_file_disk", "plan_parts"]

PARTS_MOST: Final = 1024
_MIB: Final = 1 << 20


def mebibytes(size: int) -> int:
    """SPDK counts volumes in MiB. Raises: UsageError for what is no whole number of them."""
    if size <= 0 or size % _MIB:
        raise UsageError(f"a disk in a pool has a whole number of MiB, and {size} bytes is none")
    return size // _MIB


def plan_file_disk(
    plan: Plan,
    client: Client,
    name: str,
    place: Path,
    size: int | None,
    socket: str,
    *,
    use_existing: bool = False,
) -> None:
    """A file that is made, or a file or device that is there and holds nothing known.

    ``use_existing`` takes also one that holds something. Raises: InUse, StateError, UsageError.
    """
    if not place.exists():
        if size is None:
            raise UsageError(f"there is no file '{place}' yet", hint="add --size, such as 10G")
        plan.add(
            f"make the file '{place}' of {format_size(size)}, which takes up what is used of it",
            lambda: make_sparse_file(place, size, socket),
            lambda: remove_file(place),
        )
    else:
        _check_present(place, size, socket, use_existing=use_existing)
    plan.add(
        f"open '{place}' as the disk '{name}'",
        lambda: call(client, "bdev_aio_create", {"name": name, "filename": str(place)}),
        lambda: call(client, "bdev_aio_delete", {"name": name}),
    )


def _check_present(place: Path, wanted: int | None, socket: str, *, use_existing: bool) -> None:
    size = place_size(place)
    if wanted is not None and wanted != size:
        raise UsageError(
            f"'{place}' is there already, with {format_size(size)}",
            hint="leave --size out, or resize the disk afterwards",
        )
    holds = contents_of(place)
    if holds and not use_existing:
        what = ", ".join(map(str, holds))
        raise InUse(
            f"'{place}' is not empty: it holds {what}",
            hint="a machine could overwrite that; if it may: --yes-use-existing",
        )
    check_visible(place, target_owner(socket)[0])


def check_base(disk: Disk) -> None:
    """Refuse to split what somebody uses. Raises: InUse."""
    if disk.uses:
        names = ", ".join(use.controller for use in disk.uses)
        raise InUse(f"disk '{disk.name}' can't be split while controllers show it: {names}")
    if disk.snapshot or disk.claimed:
        raise InUse(
            f"disk '{disk.name}' can't be split: something stands on it already",
            hint=f"drivebay disk info {disk.name}",
        )


def plan_parts(
    plan: Plan, client: Client, base: str, base_size: int, parts: int, size: int | None
) -> None:
    """Split the bdev ``base`` into parts BASEp0 and so on; ``size`` is that of each.

    Raises: UsageError when they are more than it has.
    """
    params: dict[str, object] = {"base_bdev": base, "split_count": parts}
    if size is not None:
        if size % _MIB or size * parts > base_size:
            raise UsageError(
                f"{parts} parts of {format_size(size)} are more than '{base}' has "
                f"({format_size(base_size)}), or no whole number of MiB"
            )
        params["split_size_mb"] = size // _MIB
    each = format_size(size if size is not None else base_size // parts)
    plan.add(
        f"split '{base}' into {parts} disks of {each}: {base}p0 to {base}p{parts - 1}",
        lambda: call(client, "bdev_split_create", params),
        lambda: call(client, "bdev_split_delete", {"base_bdev": base}),
    )
