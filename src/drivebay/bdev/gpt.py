"""Partitions of SPDK's own type become bdevs when their disk is examined.

Only those: what a guest has on its disk is the guest's. What is read is not trusted (see
wire/gpt), and a table that is wrong ends in one log line. Context: control; the path is
bdev/part.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from drivebay.bdev.part import PartBdev
from drivebay.bdev.stack import PartPlan, part_uuid, stack_parts
from drivebay.errors import DrivebayError
from drivebay.wire.gpt import (
    SPDK_TYPE,
    SPDK_TYPE_OLD,
    Entry,
    GptError,
    Table,
    is_protective_mbr,
    parse_header,
    parse_table,
)

if TYPE_CHECKING:
    from uuid import UUID

    from drivebay.bdev.access import Access
    from drivebay.bdev.base import Bdev
    from drivebay.bdev.registry import BdevRegistry
    from drivebay.reactor.reactor import Reactor

__all__ = ["GptBdev", "examine_gpt"]

_log = logging.getLogger(__name__)


class GptBdev(PartBdev):
    """One partition."""

    product_name = "GPT Disk"
    module = "gpt"

    def __init__(
        self, name: str, uuid: UUID, base: Bdev, blocks: int, disk_uuid: UUID, found: Entry
    ) -> None:
        super().__init__(name, uuid, base, found.first_lba, blocks)
        self._disk_uuid = disk_uuid
        self._found = found

    def driver_specific(self) -> dict[str, Any]:
        base = self.bases[0]
        assert base is not None
        return {
            "gpt": {
                "base_bdev": base.name,
                "offset_blocks": self.offset_blocks,
                "partition_table_guid": str(self._disk_uuid),
                "partition_type_guid": str(self._found.type_guid),
                "unique_partition_guid": str(self._found.unique_guid),
                "partition_name": self._found.name,
            }
        }


async def examine_gpt(registry: BdevRegistry, reactor: Reactor, bdev: Bdev) -> None:
    """Make bdevs of the disk's partitions; raises nothing that its content brings about."""
    if bdev.num_blocks < 3:  # MBR, header, and entries
        return
    try:
        async with registry.access(bdev, reactor) as access:
            table = await _read_table(bdev, access)
    except DrivebayError as error:
        if bdev in registry:
            _log.warning("bdev '%s' can't be searched for partitions: %s", bdev.name, error)
        return
    plans = [] if table is None else _plans(bdev, table)
    if not plans:
        return
    try:
        await stack_parts(registry, bdev, plans, by=f"the partition table of '{bdev.name}'")
    except DrivebayError as error:
        _log.error("the partitions of bdev '%s' can't be had: %s", bdev.name, error)


async def _read_table(bdev: Bdev, access: Access) -> Table | None:
    first = await access.read(0, bdev.block_size)
    if not is_protective_mbr(first):
        return None
    try:
        return await _read_copy(bdev, access, 1)
    except GptError as error:
        _log.warning("bdev '%s': %s; trying its second copy", bdev.name, error)
    try:
        return await _read_copy(bdev, access, bdev.num_blocks - 1)
    except GptError as error:
        _log.warning("bdev '%s' has no partition table that can be used: %s", bdev.name, error)
    return None


async def _read_copy(bdev: Bdev, access: Access, lba: int) -> Table:
    size = bdev.block_size
    header = parse_header(await access.read(lba * size, size), lba, size, bdev.num_blocks)
    blocks = -(-header.entries_bytes // size)
    return parse_table(header, await access.read(header.entries_lba * size, blocks * size))


def _plans(bdev: Bdev, table: Table) -> list[PartPlan]:
    plans: list[PartPlan] = []
    for found in table.entries:
        if found.type_guid not in (SPDK_TYPE, SPDK_TYPE_OLD):
            continue
        # SPDK gave the older type one block less, and disks were laid out with that.
        blocks = found.last_lba + 1 - found.first_lba - (found.type_guid == SPDK_TYPE_OLD)
        if blocks:
            plans.append(_plan(bdev, table.header.disk_guid, found, blocks))
    return plans


def _plan(bdev: Bdev, disk_uuid: UUID, found: Entry, blocks: int) -> PartPlan:
    name = f"{bdev.name}p{found.number}"
    uuid = found.unique_guid
    if not uuid.int:
        uuid = part_uuid(bdev, found.first_lba, blocks)
    return name, uuid, lambda: GptBdev(name, uuid, bdev, blocks, disk_uuid, found)
