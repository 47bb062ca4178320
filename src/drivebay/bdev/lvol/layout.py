"""SPDK's blobstore as it lies on disk: the super block, metadata pages, descriptors, masks.

Numbers and packing only, no I/O. All values are little-endian. A *page* here is the 4,096 bytes
that mean something; on disk a metadata page may be larger, and the rest of it is nothing.
Whatever comes from a disk is checked here or in blob.py and load.py before it is used.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from drivebay.errors import DrivebayError
from drivebay.memory.crc32c import crc32c

PAGE: Final = 4096
SIGNATURE: Final = b"SPDKBLOB"
VERSION: Final = 3
STORE_TYPE: Final = b"LVOLSTORE".ljust(16, b"\0")
NO_PAGE: Final = 0xFFFFFFFF  # ends a chain
NO_BLOB: Final = 0xFFFFFFFFFFFFFFFF
ID_BIT: Final = 1 << 32  # set in every blob's id; the rest is the number of its first page
ENTRIES_A_PAGE: Final = 512  # clusters in one extent page
MASK_HEADER: Final = struct.Struct("<BI")
MASK_PAGES, MASK_CLUSTERS, MASK_BLOBS = range(3)

# Descriptors
PADDING, EXTENT_RLE, XATTR, FLAGS, XATTR_INTERNAL, EXTENT_TABLE, EXTENT_PAGE = range(7)
DESCRIPTOR: Final = struct.Struct("<BI")
DESCRIPTORS_OFFSET: Final = 16
DESCRIPTORS_LENGTH: Final = 4072

# invalid_flags: who does not know a bit may not open the blob at all.
THIN: Final = 1
HAS_INTERNAL_XATTRS: Final = 2
HAS_EXTENT_TABLE: Final = 4
EXTERNAL_SNAPSHOT: Final = 8
KNOWN_INVALID: Final = THIN | HAS_INTERNAL_XATTRS | HAS_EXTENT_TABLE | EXTERNAL_SNAPSHOT
# data_ro_flags: who does not know a bit may only read; md_ro_flags: may not change the metadata.
READ_ONLY: Final = 1
KNOWN_DATA_RO: Final = READ_ONLY
KNOWN_MD_RO: Final = 3  # the clear method

# Internal xattrs
SNAPSHOT_OF: Final = b"SNAP"  # the parent's id
SNAPSHOT_BEGUN: Final = b"SNAPTMP"  # the id of the blob that a snapshot is being made of
REMOVAL_BEGUN: Final = b"SNAPRM"  # the id of the clone that takes over a snapshot's clusters
EXTERNAL_ID: Final = b"EXTSNAP"

NAME_MAX: Final = 64  # with its closing zero
UUID_LENGTH: Final = 37  # the same

_SUPER: Final = struct.Struct("<8sIIIQ7I16sIIQII")
_BLOCK: Final = 512  # the smallest that a disk writes as a whole
# In the super block's last block: its fields once more, which are in the first one.
_ECHO: Final = struct.Struct(f"<8s{_SUPER.size}s")
_ECHO_SIGNATURE: Final = b"DBAYECHO"
_PAGE: Final = struct.Struct("<QII4072sI")
_CRC: Final = struct.Struct("<I")


class StoreError(DrivebayError):
    """An lvol store refuses; ``code`` is what SPDK answers."""

    def __init__(self, code: int, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.errno = code


def damaged(what: str) -> StoreError:
    """The error for metadata that breaks the format's rules."""
    return StoreError(errno.EILSEQ, f"the lvol store's metadata is damaged: {what}")


def divide_up(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


def page_crc(page: bytes | bytearray | memoryview) -> int:
    """The CRC that a page or super block must carry in its last four bytes."""
    return crc32c(memoryview(page)[: PAGE - 4])


def is_sound(page: bytes | memoryview) -> bool:
    """Whether its CRC is right."""
    return page_crc(page) == int.from_bytes(page[PAGE - 4 : PAGE], "little")


def mask_pages(bits: int, page_bytes: int) -> int:
    """How many pages a mask of that many bits takes."""
    return divide_up(MASK_HEADER.size + divide_up(bits, 8), page_bytes)


@dataclass(frozen=True)
class Super:
    """The super block: spdk_bs_super_block. Places and lengths are in metadata pages."""

    version: int
    length: int
    clean: int
    super_blob: int
    cluster_bytes: int
    page_mask_start: int
    page_mask_len: int
    cluster_mask_start: int
    cluster_mask_len: int
    md_start: int
    md_len: int
    store_type: bytes
    blob_mask_start: int
    blob_mask_len: int
    size: int
    io_unit: int
    page_bytes: int
    rest: bytes = bytes(PAGE - 4 - _SUPER.size)

    @property
    def total_clusters(self) -> int:
        """Clusters on the base, those of the metadata included."""
        return self.size // self.cluster_bytes

    @property
    def metadata_clusters(self) -> int:
        """How many of the first ones hold the metadata."""
        return divide_up(self.md_start + self.md_len, self.cluster_bytes // self.page_bytes)

    @property
    def cluster_mask_room(self) -> int:
        """How many pages the mask of clusters may grow to."""
        end = self.blob_mask_start if self.blob_mask_len else self.md_start
        return end - self.cluster_mask_start

    @property
    def max_growable(self) -> int:
        """The size in bytes that SPDK says the store can grow to."""
        pages = mask_pages(self.md_len, self.page_bytes)
        return (pages * self.page_bytes - MASK_HEADER.size) * 8 * self.cluster_bytes

    def page_offset(self, page: int) -> int:
        """Where on the base a page of the metadata region lies."""
        return (self.md_start + page) * self.page_bytes

    def pack(self) -> bytes:
        """The 4,096 bytes on disk.

        The fields that change are in its first 512 bytes, the checksum is in the last ones; a
        power cut may leave one block new and the other old. The echo is what the checksum is for.
        """
        fields = [value for name, value in vars(self).items() if name != "rest"]
        head = _SUPER.pack(SIGNATURE, *fields)
        echo = _ECHO.pack(_ECHO_SIGNATURE, head).ljust(_BLOCK - _CRC.size, b"\0")
        body = head + self.rest[: len(self.rest) - len(echo)] + echo
        return body + _CRC.pack(crc32c(body))


def is_super_block(data: bytes) -> bool:
    """Whether a disk that begins so may hold a blobstore at all."""
    return data[:8] == SIGNATURE


def unpack_super(data: bytes, device_bytes: int, block_bytes: int) -> Super:
    """Read and check a super block. Raises: StoreError; ENXIO when it is no lvol store."""
    if len(data) != PAGE or not is_super_block(data):
        raise StoreError(errno.EILSEQ, "there is no blobstore here: its signature is missing")
    torn = not is_sound(data)
    if torn:
        data = _untorn(data)
    sb = Super(*(*_SUPER.unpack_from(data)[1:], data[_SUPER.size : PAGE - 4]))
    if torn:
        sb = replace(sb, clean=0)
    if not 1 <= sb.version <= VERSION:
        raise StoreError(
            errno.EILSEQ,
            f"the blobstore has version {sb.version}; this program knows 1 to {VERSION}",
        )
    if sb.store_type != STORE_TYPE:
        raise StoreError(errno.ENXIO, "this blobstore holds something else than logical volumes")
    sb = replace(
        sb,
        size=sb.size or device_bytes,
        io_unit=sb.io_unit or PAGE,
        page_bytes=sb.page_bytes or PAGE,
    )
    _check_sizes(sb, device_bytes, block_bytes)
    _check_places(sb)
    return sb


def _untorn(data: bytes) -> bytes:
    """The super block that a power cut tore while it was written; before that, or after.

    Raises: StoreError when that does not explain it.
    """
    signature, head = _ECHO.unpack_from(data, PAGE - _BLOCK)
    candidates: list[bytes] = []
    if signature == _ECHO_SIGNATURE:
        candidates.append(head + data[len(head) :])
    clean = int.from_bytes(data[16:20], "little")  # all that changed if the last block is SPDK's
    candidates.append(data[:16] + (1 - clean & 1).to_bytes(4, "little") + data[20:])
    for candidate in candidates:
        if is_super_block(candidate) and is_sound(candidate):
            return candidate
    raise damaged("the super block's checksum is wrong")


def _check_sizes(sb: Super, device_bytes: int, block_bytes: int) -> None:
    if sb.length != PAGE:
        raise damaged(f"the super block says that it has {sb.length} bytes instead of {PAGE}")
    if sb.size > device_bytes:
        raise StoreError(
            errno.EILSEQ,
            f"the lvol store has {sb.size} bytes, its base only {device_bytes}",
            hint="a base that shrank can't be used until it has its size again",
        )
    power_of_two = sb.page_bytes & (sb.page_bytes - 1) == 0
    if not PAGE <= sb.page_bytes <= 1 << 20 or not power_of_two:
        raise damaged(f"its metadata pages have {sb.page_bytes} bytes")
    if sb.page_bytes % block_bytes or sb.io_unit % block_bytes or sb.io_unit > 1 << 20:
        raise StoreError(
            errno.EINVAL,
            f"the lvol store was made for blocks of {sb.io_unit} bytes; "
            f"its base has blocks of {block_bytes}",
        )
    if sb.cluster_bytes < sb.page_bytes or sb.cluster_bytes % PAGE:
        raise damaged(f"its clusters have {sb.cluster_bytes} bytes")
    if sb.cluster_bytes % sb.io_unit:
        raise damaged(f"clusters of {sb.cluster_bytes} bytes in blocks of {sb.io_unit}")


def _check_places(sb: Super) -> None:
    pages = mask_pages(sb.md_len, sb.page_bytes)
    parts = [
        ("the mask of pages", sb.page_mask_start, sb.page_mask_len, pages),
        (
            "the mask of clusters",
            sb.cluster_mask_start,
            sb.cluster_mask_len,
            mask_pages(sb.total_clusters, sb.page_bytes),
        ),
    ]
    if sb.blob_mask_len:  # older versions have none
        parts.append(("the mask of blobs", sb.blob_mask_start, sb.blob_mask_len, pages))
    parts.append(("the metadata", sb.md_start, sb.md_len, 1))
    end = 1
    for name, start, length, needed in parts:
        if length < needed:
            raise damaged(f"{name} has {length} pages instead of {needed} at least")
        if start < end:
            raise damaged(f"{name} begins at page {start}, where something else lies")
        end = start + length
    if sb.metadata_clusters > sb.total_clusters:
        raise damaged(f"its metadata takes {end} pages, more than the store has")


class Page(NamedTuple):
    """A metadata page: spdk_blob_md_page."""

    blob_id: int
    sequence: int
    descriptors: bytes  # zeroes at their end may be missing: most of a page is that
    next: int = NO_PAGE
    reserved: int = 0

    def pack(self) -> bytes:
        """The 4,096 bytes on disk."""
        body = _PAGE.pack(self.blob_id, self.sequence, self.reserved, self.descriptors, self.next)
        return body + _CRC.pack(crc32c(body))


def unpack_page(data: bytes | memoryview) -> Page | None:
    """Read a page; None when its CRC is wrong."""
    if not is_sound(data):
        return None
    blob_id, sequence, reserved, descriptors, following = _PAGE.unpack_from(data)
    return Page(blob_id, sequence, _without_zeroes(descriptors), following, reserved)


def _without_zeroes(descriptors: bytes) -> bytes:
    """Without most of those at the end: rstrip() would take ten times as long to find all."""
    for length, rest in _ZEROES_AFTER.items():
        if descriptors.endswith(rest):
            return descriptors[:length]
    return descriptors


_ZEROES_AFTER: Final = {length: bytes(DESCRIPTORS_LENGTH - length) for length in (256, 1024)}


# A copy of a page that is about to be overwritten in place, for the case that a power cut tears
# that write. It lies in a free page; ``reserved`` is the page that it is for plus one,
# ``sequence`` counts the copies, and the CRC is inverted, so that nobody takes it for a page.


def pack_copy(image: bytes, target: int, count: int) -> bytes:
    """The copy of ``image`` (4,096 bytes), which belongs to page ``target``."""
    body = image[:8] + struct.pack("<II", count & 0xFFFFFFFF, target + 1) + image[16 : PAGE - 4]
    return body + _CRC.pack(crc32c(body) ^ 0xFFFFFFFF)


def unpack_copy(data: bytes | memoryview) -> tuple[int, int, bytes] | None:
    """The count, the target and the image of a copy; None when it is none."""
    stored = int.from_bytes(data[PAGE - 4 : PAGE], "little")
    count, target = struct.unpack_from("<II", data, 8)
    if page_crc(data) ^ 0xFFFFFFFF != stored or not target:
        return None
    body = bytes(data[:8]) + bytes(8) + bytes(data[16 : PAGE - 4])
    crc = crc32c(body) if any(body) else 0  # a page that is taken off the disk has only zeroes
    return count, target - 1, body + _CRC.pack(crc)


def pack_mask(kind: int, bits: int, used: bytes | memoryview, pages: int, page_bytes: int) -> bytes:
    """A mask on disk: kind, number of bits, the bits."""
    return (MASK_HEADER.pack(kind, bits) + bytes(used)).ljust(pages * page_bytes, b"\0")


def unpack_mask(kind: int, bits: int, data: bytes, *, at_least: bool = False) -> bytes:
    """The bits of a mask. Raises: StoreError when it is another kind or size."""
    found_kind, found_bits = MASK_HEADER.unpack_from(data)
    short = found_bits < bits or MASK_HEADER.size + divide_up(found_bits, 8) > len(data)
    if found_kind != kind or short or (found_bits != bits and not at_least):
        raise damaged(
            f"a used mask of kind {kind} for {bits} entries was expected; "
            f"it is of kind {found_kind} for {found_bits}"
        )
    return data[MASK_HEADER.size : MASK_HEADER.size + divide_up(bits, 8)]


def bits_from_flags(flags: bytes | bytearray) -> bytes:
    """One bit for each byte that is 0 or 1, the lowest first."""
    digits = bytes(flags).translate(b"01" + bytes(254))[::-1]
    return int(digits or b"0", 2).to_bytes(divide_up(len(flags), 8), "little")


def flags_from_bits(bits: bytes, count: int) -> bytearray:
    """The reverse: a byte of 0 or 1 for each of the first ``count`` bits."""
    digits = format(int.from_bytes(bits, "little"), f"0{count}b")[::-1] if count else ""
    return bytearray(digits[:count].encode().translate(_DIGITS))


_DIGITS: Final = bytes(48) + b"\0\1" + bytes(206)
