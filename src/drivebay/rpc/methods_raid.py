"""Methods about RAID bdevs: striped, concatenated, mirrored."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from drivebay.errors import DrivebayError, UsageError
from drivebay.rpc.jsonrpc import PARSE_ERROR
from drivebay.rpc.schema import (
    BDEV,
    RUNTIME,
    STARTUP,
    Array,
    Boolean,
    Choice,
    ErrorStyle,
    Integer,
    Param,
    Params,
    String,
    Uuid,
    method,
    rpc_error_of,
)

if TYPE_CHECKING:
    from drivebay.target.target import Target

# SPDK answers wrong parameters of these as if they were no JSON.
_RAID: Final = ErrorStyle(PARSE_ERROR, "spdk_json_decode_object failed", None)
_MOST_BASES: Final = 255

_LEVELS: Final = {
    "raid0": "raid0",
    "0": "raid0",
    "raid1": "raid1",
    "1": "raid1",
    "raid5f": "raid5f",
    "5f": "raid5f",
    "concat": "concat",
}


@contextmanager
def _saying(message: str) -> Iterator[None]:
    """Refusals in SPDK's words: ``message``, where {} is what the errno means."""
    try:
        yield
    except DrivebayError as error:
        refusal = rpc_error_of(_RAID, error)
        refusal.message = message.replace("{}", os.strerror(-refusal.code))
        raise refusal from error


@method(
    "bdev_raid_set_options",
    STARTUP,
    RUNTIME,
    params=(
        Param("process_window_size_kb", Integer(32), doc="what a rebuild copies at once"),
        Param("process_max_bandwidth_mb_sec", Integer(32), doc="MiB/s of a rebuild; 0: all it can"),
    ),
    style=_RAID,
    changes=True,
)
async def bdev_raid_set_options(target: Target, params: Params) -> Any:
    """Set how rebuilds that begin from now on go about it."""
    if params["process_window_size_kb"] == 0:
        raise UsageError("a rebuild can't copy 0 KiB at once", field="process_window_size_kb")
    target.settings.merge("bdev_raid_set_options", params)
    return True


@method(
    "bdev_raid_get_bdevs",
    RUNTIME,
    params=(
        Param(
            "category",
            Choice("online", "configuring", "offline", "all"),
            required=True,
            doc="which of them",
        ),
    ),
    style=_RAID,
)
async def bdev_raid_get_bdevs(target: Target, params: Params) -> Any:
    """Show RAIDs, also those that have no bdev now because members are missing."""
    return [
        {"name": array.name, **array.describe()}
        for array in target.arrays
        if params["category"] in ("all", array.state)
    ]


@method(
    "bdev_raid_create",
    RUNTIME,
    params=(
        Param("name", String(), required=True, doc="its name"),
        Param("strip_size_kb", Integer(32), default=0, doc="of raid0 and concat; a power of two"),
        Param("raid_level", Choice(*_LEVELS), required=True, doc="raid5f is refused"),
        Param(
            "base_bdevs",
            Array(String(), _MOST_BASES),
            required=True,
            doc="what it is made of; some may come later",
        ),
        Param("uuid", Uuid(), doc="made up without it"),
        Param("superblock", Boolean(), default=False, doc="write on each base what belongs to it"),
    ),
    style=_RAID,
    changes=True,
)
async def bdev_raid_create(target: Target, params: Params) -> Any:
    """Make a disk of several."""
    name = params["name"]
    with _saying(f"Failed to create RAID bdev {name}: {{}}"):
        await target.arrays.create(
            name,
            _LEVELS[params["raid_level"]],
            params["strip_size_kb"],
            params["base_bdevs"],
            params["uuid"] if params["uuid"] is None or params["uuid"].int else None,
            superblock=params["superblock"],
        )
    return True


@method(
    "bdev_raid_delete",
    RUNTIME,
    params=(
        Param("name", String(), required=True, doc="a RAID"),
        Param("clear_sb", Boolean(), default=False, doc="overwrite the superblocks of its bases"),
    ),
    style=_RAID,
    changes=True,
)
async def bdev_raid_delete(target: Target, params: Params) -> Any:
    """Remove a RAID; its bases are free again, with the data on them."""
    with _saying(f"raid bdev {params['name']} not found"):
        array = target.arrays.get(params["name"])
        await array.delete(clear=params["clear_sb"])
    return True


@method(
    "bdev_raid_add_base_bdev",
    RUNTIME,
    params=(
        Param("raid_bdev", String(), required=True, doc="a RAID with an empty slot"),
        Param("base_bdev", String(), required=True, doc="what fills it"),
    ),
    style=BDEV,
    changes=True,
)
async def bdev_raid_add_base_bdev(target: Target, params: Params) -> Any:
    """Give a RAID another base; a raid1 is rebuilt onto it, which goes on after the answer."""
    name, base = params["raid_bdev"], params["base_bdev"]
    with _saying(f"raid bdev {name} is not found in config"):
        target.arrays.get(name)
    with _saying(f"Failed to add base bdev {base} to RAID bdev {name}: {{}}"):
        await target.arrays.add_base(name, base)
    return True


@method(
    "bdev_raid_remove_base_bdev",
    RUNTIME,
    params=(Param("name", String(), required=True, doc="a base of a RAID"),),
    style=_RAID,
    changes=True,
)
async def bdev_raid_remove_base_bdev(target: Target, params: Params) -> Any:
    """Take a base from its RAID: raid1 goes on without it, the others end.

    The uuid of a base that a raid1 with superblocks waits for makes it begin without that.
    """
    with _saying("Failed to remove base bdev from raid bdev"):
        await target.arrays.remove_base(params["name"])
    return True
