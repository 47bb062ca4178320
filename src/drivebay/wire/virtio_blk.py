"""The block device's configuration space and feature bits, for the set-up plane.

Vocabulary only; the path's own page is virtio_blk.pxd. Source: virtio 1.3
§5.2.3 (feature bits), §5.2.4 (configuration layout) and §6 (reserved bits).
Everything is little-endian, and a sector has 512 bytes whatever the block size.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

__all__ = [
    "CONFIG_BYTES",
    "SECTOR_BYTES",
    "WRITEBACK_OFFSET",
    "BlkConfig",
    "BlkFeature",
    "feature_mask",
]

SECTOR_BYTES: Final = 512
CONFIG_BYTES: Final = 96  # up to and with the zoned characteristics; 60 without what we never offer
WRITEBACK_OFFSET: Final = 32

# §5.2.4: capacity size_max seg_max geometry(3) blk_size topology(4) writeback unused0 num_queues
# discard(3) write_zeroes(2) may_unmap unused1[3]: 60 bytes; secure erase and zones stay zero.
_CONFIG: Final = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
assert _CONFIG.size == 60


class BlkFeature(IntEnum):
    """Feature bits by number: the block device's own, the ring's and the transport's."""

    SIZE_MAX = 1
    SEG_MAX = 2
    GEOMETRY = 4
    RO = 5
    BLK_SIZE = 6
    FLUSH = 9
    TOPOLOGY = 10
    CONFIG_WCE = 11
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14
    LIFETIME = 15
    SECURE_ERASE = 16
    ZONED = 17
    RING_INDIRECT_DESC = 28
    RING_EVENT_IDX = 29
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34


def feature_mask(*bits: int) -> int:
    """The feature word with these bits set.

    >>> hex(feature_mask(BlkFeature.RO, BlkFeature.VERSION_1))
    '0x100000020'
    """
    mask = 0
    for bit in bits:
        mask |= 1 << bit
    return mask


@dataclass(frozen=True, slots=True)
class BlkConfig:
    """``struct virtio_blk_config``; what is not a field here reads as zero."""

    capacity_sectors: int
    seg_max: int
    blk_size: int
    num_queues: int
    writeback: bool
    min_io_size_blocks: int = 0
    max_discard_sectors: int = 0
    max_discard_seg: int = 0
    discard_sector_alignment: int = 0
    max_write_zeroes_sectors: int = 0
    max_write_zeroes_seg: int = 0
    write_zeroes_may_unmap: bool = False

    def pack(self) -> bytes:
        """The whole space, CONFIG_BYTES long."""
        packed = _CONFIG.pack(
            self.capacity_sectors,
            0,  # size_max: a segment may have any length
            self.seg_max,
            *(0, 0, 0),  # geometry
            self.blk_size,
            *(0, 0, self.min_io_size_blocks, 0),  # topology: blocks are physical, none misaligned
            self.writeback,
            0,
            self.num_queues,
            self.max_discard_sectors,
            self.max_discard_seg,
            self.discard_sector_alignment,
            self.max_write_zeroes_sectors,
            self.max_write_zeroes_seg,
            self.write_zeroes_may_unmap,
        )
        return packed.ljust(CONFIG_BYTES, b"\0")
