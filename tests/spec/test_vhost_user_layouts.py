"""vhost-user's payloads and virtio-blk's configuration space, byte by byte.

The layouts are written here once more, from the documents, so that a wrong
field in wire/ cannot pass by agreeing with itself.
"""

from __future__ import annotations

import struct

import pytest

from drivebay.errors import PeerError
from drivebay.wire import vhost_user as vu
from drivebay.wire.virtio_blk import CONFIG_BYTES, WRITEBACK_OFFSET, BlkConfig, BlkFeature


def test_header() -> None:
    """ "u32 request, u32 flags, u32 size"; flags: 2 bits version, bit 2 reply, bit 3 need_reply."""
    assert vu.Header.parse(struct.pack("=III", 12, 1 | 8, 8)) == vu.Header(12, True, 8)
    assert vu.pack_message(24, b"ab", vu.HeaderFlag.REPLY) == struct.pack("=III", 24, 5, 2) + b"ab"


@pytest.mark.parametrize("flags", [0, 2, 3, 0xFFFFFFFE])
def test_header_of_another_version(flags: int) -> None:
    with pytest.raises(PeerError, match="version"):
        vu.Header.parse(struct.pack("=III", 1, flags, 0))


def test_header_that_claims_to_be_a_reply() -> None:
    with pytest.raises(PeerError, match="marked as a reply"):
        vu.Header.parse(struct.pack("=III", 1, 1 | 4, 0))


def test_vring_state() -> None:
    """ "u32 index, u32 num"."""
    assert vu.VringState.parse(struct.pack("=II", 255, 7)) == vu.VringState(255, 7)
    assert vu.VringState(3, 9).pack() == struct.pack("=II", 3, 9)


@pytest.mark.parametrize("index", [256, 0xFFFFFFFF])
def test_an_index_behind_the_last_queue(index: int) -> None:
    with pytest.raises(PeerError, match=f"queue {index} does not exist"):
        vu.VringState.parse(struct.pack("=II", index, 0))
    with pytest.raises(PeerError, match=f"queue {index} does not exist"):
        vu.VringAddr.parse(struct.pack("=IIQQQQ", index, 0, 0, 0, 0, 0))


def test_vring_addr() -> None:
    """ "index, flags, descriptor, used, available, log": used stands before available."""
    payload = struct.pack("=IIQQQQ", 2, 1, 0xD, 0x5ED, 0xA, 0x109)
    addr = vu.VringAddr.parse(payload)
    assert (addr.index, addr.desc, addr.used, addr.avail) == (2, 0xD, 0x5ED, 0xA)
    assert addr.pack() == payload


def test_log() -> None:
    """ "log size, log offset"."""
    payload = struct.pack("=QQ", 0x512E, 0x0FF)
    assert vu.LogArea.parse(payload) == vu.LogArea(size=0x512E, mmap_offset=0x0FF)
    assert vu.LogArea(0x512E, 0x0FF).pack() == payload


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_the_log_flag_of_a_vring_is_bit_0(flags: int) -> None:
    addr = vu.VringAddr.parse(struct.pack("=IIQQQQ", 0, flags, 0, 0, 0, 0))
    assert addr.is_logged == bool(flags & 1)


def test_vring_file() -> None:
    """ "Bits (0-7) of the payload contain the vring index. Bit 8 is the invalid FD flag." """
    assert vu.VringFile.parse(struct.pack("=Q", 255)) == vu.VringFile(255, True)
    assert vu.VringFile.parse(struct.pack("=Q", 255 | 256)) == vu.VringFile(255, False)
    with pytest.raises(PeerError, match="must be 0"):
        vu.VringFile.parse(struct.pack("=Q", 1 << 9))


def test_memory_table() -> None:
    """ "u32 regions, u32 padding, region ..."; a region is guest, size, user, mmap offset."""
    payload = struct.pack("=II4Q4Q", 2, 0, 1, 2, 3, 4, 5, 6, 7, 8)
    regions = vu.parse_mem_table(payload)
    assert regions == (vu.MemoryRegion(1, 2, 3, 4), vu.MemoryRegion(5, 6, 7, 8))
    assert vu.pack_mem_table(regions) == payload
    assert vu.parse_mem_table(bytes(8)) == ()


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (bytes(7), "no room for its count"),
        (struct.pack("=II", 9, 0) + bytes(9 * 32), "9 regions in one memory table"),
        (struct.pack("=II", 0xFFFFFFFF, 0), "4294967295 regions"),
        (struct.pack("=II", 2, 0) + bytes(32), "2 regions is 40 bytes long"),
        (struct.pack("=II", 1, 0) + bytes(33), "1 regions is 41 bytes long"),
    ],
)
def test_memory_tables_that_lie(payload: bytes, text: str) -> None:
    with pytest.raises(PeerError, match=text):
        vu.parse_mem_table(payload)


def test_single_region() -> None:
    """ "u64 padding, a region"."""
    region = vu.MemoryRegion(1, 2, 3, 4)
    assert vu.parse_single_region(struct.pack("=5Q", 0, 1, 2, 3, 4)) == region
    assert vu.pack_single_region(region) == struct.pack("=5Q", 0, 1, 2, 3, 4)
    assert region.same_place(vu.MemoryRegion(1, 2, 3, 99))
    assert not region.same_place(vu.MemoryRegion(1, 2, 4, 4))


def test_config_access() -> None:
    """ "u32 offset, u32 size, u32 flags, payload"."""
    access = vu.ConfigAccess.parse(struct.pack("=III", 32, 1, 1) + b"\1")
    assert (access.offset, access.size, access.flags, access.data) == (32, 1, 1, b"\1")


@pytest.mark.parametrize(
    ("parse", "size"),
    [
        (vu.Header.parse, 12),
        (vu.parse_u64, 8),
        (vu.VringState.parse, 8),
        (vu.VringAddr.parse, 40),
        (vu.VringFile.parse, 8),
        (vu.parse_single_region, 40),
    ],
)
def test_other_lengths_are_refused(parse, size: int) -> None:  # type: ignore[no-untyped-def]
    for wrong in (0, size - 1, size + 1):
        with pytest.raises(PeerError, match=f"{wrong} bytes long"):
            parse(bytes(wrong))


def test_virtio13_5_2_4_configuration_layout() -> None:
    """Each field at its own offset; geometry, secure erase and zones are zero."""
    space = BlkConfig(
        capacity_sectors=0x1122334455667788,
        seg_max=126,
        blk_size=4096,
        num_queues=256,
        writeback=True,
        min_io_size_blocks=1,
        max_discard_sectors=11,
        max_discard_seg=12,
        discard_sector_alignment=13,
        max_write_zeroes_sectors=14,
        max_write_zeroes_seg=15,
        write_zeroes_may_unmap=True,
    ).pack()
    assert len(space) == CONFIG_BYTES == 96
    expected = {
        (0, "<Q"): 0x1122334455667788,
        (8, "<I"): 0,
        (12, "<I"): 126,
        (16, "<I"): 0,
        (20, "<I"): 4096,
        (24, "<B"): 0,
        (25, "<B"): 0,
        (26, "<H"): 1,
        (28, "<I"): 0,
        (WRITEBACK_OFFSET, "<B"): 1,
        (33, "<B"): 0,
        (34, "<H"): 256,
        (36, "<I"): 11,
        (40, "<I"): 12,
        (44, "<I"): 13,
        (48, "<I"): 14,
        (52, "<I"): 15,
        (56, "<B"): 1,
    }
    for (offset, kind), value in expected.items():
        assert struct.unpack_from(kind, space, offset) == (value,), offset
    assert space[57:] == bytes(96 - 57)


def test_virtio13_5_2_3_feature_bits() -> None:
    assert {bit.name: bit.value for bit in BlkFeature} == {
        "SIZE_MAX": 1,
        "SEG_MAX": 2,
        "GEOMETRY": 4,
        "RO": 5,
        "BLK_SIZE": 6,
        "FLUSH": 9,
        "TOPOLOGY": 10,
        "CONFIG_WCE": 11,
        "MQ": 12,
        "DISCARD": 13,
        "WRITE_ZEROES": 14,
        "LIFETIME": 15,
        "SECURE_ERASE": 16,
        "ZONED": 17,
        "RING_INDIRECT_DESC": 28,
        "RING_EVENT_IDX": 29,
        "VERSION_1": 32,
        "ACCESS_PLATFORM": 33,
        "RING_PACKED": 34,
    }
