"""Split: one bdev cut into parts of equal size. Context: control; the path is bdev/part."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from drivebay.bdev.part import PartBdev
from drivebay.bdev.stack import PartPlan, part_uuid, stack_parts
from drivebay.errors import UsageError

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.bdev.registry import BdevRegistry

__all__ = ["SplitBdev", "split"]

_log = logging.getLogger(__name__)

_MIB: Final = 1 << 20
_MOST_PARTS: Final = 16384


class SplitBdev(PartBdev):
    """One of the parts."""

    product_name = "Split Disk"
    module = "split"

    def driver_specific(self) -> dict[str, Any]:
        base = self.bases[0]
        assert base is not None
        return {"split": {"base_bdev": base.name, "offset_blocks": self.offset_blocks}}


async def split(
    registry: BdevRegistry, base: Bdev, prefix: str, count: int, size_mb: int
) -> list[Bdev]:
    """Make parts ``<prefix>p0``, ``p1`` … of ``size_mb`` MiB each, or of all that there is for 0.

    As many as fit, ``count`` at most. Raises: as stack_parts(), and UsageError.
    """
    blocks = _blocks_of_a_part(base, count, size_mb)
    fitting = base.num_blocks // blocks
    if count > fitting:
        _log.warning(
            "bdev '%s' of %d blocks has room for %d parts of %d blocks, not for %d",
            base.name,
            base.num_blocks,
            fitting,
            blocks,
            count,
        )
    plans = [_plan(base, f"{prefix}p{i}", i * blocks, blocks) for i in range(min(count, fitting))]
    return await stack_parts(registry, base, plans, by=f"the split of '{prefix}'")


def _blocks_of_a_part(base: Bdev, count: int, size_mb: int) -> int:
    if not 1 <= count <= _MOST_PARTS:
        raise UsageError(f"{count} parts: give 1 to {_MOST_PARTS}", field="split_count")
    if size_mb:
        if size_mb * _MIB >= 1 << 63:
            raise UsageError(f"{size_mb} MiB is no size of a disk", field="split_size_mb")
        return size_mb * _MIB // base.block_size
    if count > base.num_blocks:
        raise UsageError(
            f"bdev '{base.name}' has {base.num_blocks} blocks and can't become {count} parts",
            field="split_count",
        )
    return base.num_blocks // count


def _plan(base: Bdev, name: str, offset: int, blocks: int) -> PartPlan:
    uuid = part_uuid(base, offset, blocks)
    return name, uuid, lambda: SplitBdev(name, uuid, base, offset, blocks)
