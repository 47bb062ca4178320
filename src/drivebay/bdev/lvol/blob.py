"""One blob: what its chain of metadata pages says, and the pages that say it.

No I/O. A blob has flags, xattrs and clusters. Where its clusters lie is written either as run
lengths in the chain itself (EXTENT_RLE), or as a table of extent pages (EXTENT_TABLE) that hold
512 entries each; a blob keeps the form that it was found in.
"""

from __future__ import annotations

import contextlib
import errno
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol
from uuid import UUID

from drivebay.bdev.lvol import layout
from drivebay.bdev.lvol.layout import DESCRIPTOR, StoreError, damaged, divide_up

# Our own limit: a table of 512 MiB. With clusters of 1 MiB such a volume has 128 TiB.
MAX_CLUSTERS: Final = 1 << 27

_FLAGS: Final = struct.Struct("<QQQ")
_XATTR: Final = struct.Struct("<HH")
_RUN: Final = struct.Struct("<II")
_COUNT: Final = struct.Struct("<Q")
_START: Final = struct.Struct("<I")


class Table(Protocol):
    """Where a blob's clusters lie; at run time a ClusterTable."""

    @property
    def num_clusters(self) -> int: ...
    @property
    def allocated(self) -> int: ...
    @property
    def clusters(self) -> memoryview[int]: ...
    @property
    def extent_pages(self) -> memoryview[int] | None: ...
    def resize(self, num_clusters: int) -> None: ...
    def recount(self) -> None: ...


@dataclass(eq=False, slots=True)
class Blob:
    """A blob in memory; ``pages`` is its chain, the first one is where its id says."""

    id: int
    table: Table
    invalid_flags: int = 0
    data_ro_flags: int = 0
    md_ro_flags: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    internal: dict[bytes, bytes] = field(default_factory=dict)
    pages: list[int] = field(default_factory=list)
    foreign: bool = False  # has descriptors of a newer version, which we could not write back
    _uuid: UUID | None = None

    @property
    def root(self) -> int:
        """The page where its chain begins."""
        return self.id & 0xFFFFFFFF

    @property
    def thin(self) -> bool:
        """Whether clusters may be missing."""
        return bool(self.invalid_flags & layout.THIN)

    @property
    def has_extent_table(self) -> bool:
        """Whether its clusters stand in extent pages; in run lengths otherwise."""
        return self.table.extent_pages is not None

    @property
    def data_read_only(self) -> bool:
        """Whether its content may not change: it says so, or in words that we do not know."""
        return bool(self.data_ro_flags)

    @property
    def metadata_read_only(self) -> bool:
        """Whether nothing of it may change."""
        return bool(self.data_ro_flags or self.md_ro_flags & ~layout.KNOWN_MD_RO or self.foreign)

    @property
    def untouchable(self) -> bool:
        """Whether a newer version says so; the read-only flag alone stops no rename by us."""
        unknown = self.data_ro_flags & ~layout.KNOWN_DATA_RO
        return bool(unknown or self.md_ro_flags & ~layout.KNOWN_MD_RO or self.foreign)

    @property
    def clear_method(self) -> int:
        """0 default, 1 none, 2 unmap, 3 write zeroes, as SPDK numbers them."""
        return self.md_ro_flags & layout.KNOWN_MD_RO

    @property
    def parent_id(self) -> int | None:
        """The id of the snapshot that it is a clone of."""
        if self.external_id is not None or not self.thin:
            return None
        value = self.internal.get(layout.SNAPSHOT_OF)
        return int.from_bytes(value, "little") if value is not None else None

    @property
    def external_id(self) -> bytes | None:
        """What names the bdev that it is a clone of."""
        if not self.invalid_flags & layout.EXTERNAL_SNAPSHOT:
            return None
        return self.internal.get(layout.EXTERNAL_ID, b"")

    @property
    def name(self) -> str:
        """The name of the volume or store. Raises: StoreError when there is none."""
        value = self.xattrs.get(b"name", b"").split(b"\0")[0]
        if not 0 < len(value) < layout.NAME_MAX:
            raise damaged(f"blob {self.root} has no name of 1 to {layout.NAME_MAX - 1} characters")
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise damaged(f"the name of blob {self.root} is not UTF-8: {value!r}") from None

    @property
    def uuid(self) -> UUID | None:
        """Its uuid, None if it has none that can be read. It never changes."""
        if self._uuid is None:
            value = self.xattrs.get(b"uuid", b"")
            if len(value) == layout.UUID_LENGTH and value[-1] == 0:
                with contextlib.suppress(ValueError):
                    self._uuid = UUID(value[:-1].decode())
        return self._uuid

    def set_reference(self, key: bytes, blob_id: int) -> None:
        """Note another blob in an internal xattr."""
        self.internal[key] = blob_id.to_bytes(8, "little")
        self.invalid_flags |= layout.HAS_INTERNAL_XATTRS


# Reading


@dataclass(slots=True)
class Draft:
    """What a chain says, before the clusters are looked up."""

    invalid_flags: int = 0
    data_ro_flags: int = 0
    md_ro_flags: int = 0
    foreign: bool = False
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    internal: dict[bytes, bytes] = field(default_factory=dict)
    runs: list[tuple[int, int]] | None = None  # (cluster, count), EXTENT_RLE
    num_clusters: int | None = None  # EXTENT_TABLE
    extents: list[tuple[int, int]] = field(default_factory=list)  # (page, count)


def descriptors(data: bytes) -> Iterator[tuple[int, memoryview]]:
    """Each descriptor of a page: its type and body. Raises: StoreError when one has no end."""
    view = memoryview(data.ljust(layout.DESCRIPTORS_LENGTH, b"\0"))
    offset = 0
    while offset + DESCRIPTOR.size <= len(view):
        kind, length = DESCRIPTOR.unpack_from(view, offset)
        if kind == layout.PADDING and length == 0:
            return
        offset += DESCRIPTOR.size
        if length > len(view) - offset:
            raise damaged(f"a descriptor of type {kind} has {length} bytes, more than its page")
        yield kind, view[offset : offset + length]
        offset += length


def read_chain(root: int, pages: Iterable[layout.Page]) -> Draft:
    """What the pages of a blob say. Raises: StoreError."""
    draft = Draft()
    for page in pages:
        for kind, body in descriptors(page.descriptors):
            try:
                _READERS.get(kind, _read_foreign)(draft, body)
            except (struct.error, ValueError) as error:
                raise damaged(f"blob {root}: descriptor of type {kind}: {error}") from None
    unknown = draft.invalid_flags & ~layout.KNOWN_INVALID
    if unknown:
        raise StoreError(
            errno.EINVAL,
            f"blob {root} has features that this program does not know (flags {unknown:#x})",
            hint="open the store with the program that wrote it",
        )
    for key in (layout.SNAPSHOT_OF, layout.SNAPSHOT_BEGUN, layout.REMOVAL_BEGUN):
        if len(draft.internal.get(key, bytes(8))) != 8:
            raise damaged(f"blob {root}: the reference {key.decode()} has not 8 bytes")
    return draft


def _read_flags(draft: Draft, body: memoryview) -> None:
    if len(body) != _FLAGS.size:
        raise ValueError(f"it has {len(body)} bytes instead of {_FLAGS.size}")
    draft.invalid_flags, draft.data_ro_flags, draft.md_ro_flags = _FLAGS.unpack(body)


def _read_xattr_into(xattrs: dict[bytes, bytes], body: memoryview) -> None:
    name_length, value_length = _XATTR.unpack_from(body)
    if _XATTR.size + name_length + value_length != len(body):
        raise ValueError("its lengths do not add up")
    name = bytes(body[_XATTR.size : _XATTR.size + name_length])
    if name in xattrs:
        raise ValueError(f"{name!r} is there twice")
    xattrs[name] = bytes(body[_XATTR.size + name_length :])


def _read_runs(draft: Draft, body: memoryview) -> None:
    if draft.num_clusters is not None:
        raise ValueError("run lengths and an extent table in one blob")
    if not len(body) or len(body) % _RUN.size:
        raise ValueError(f"it has {len(body)} bytes, no multiple of {_RUN.size}")
    draft.runs = (draft.runs or []) + list(_RUN.iter_unpack(body))


def _read_table(draft: Draft, body: memoryview) -> None:
    if draft.runs is not None:
        raise ValueError("run lengths and an extent table in one blob")
    (num_clusters,) = _COUNT.unpack_from(body)
    if draft.num_clusters not in (None, num_clusters):
        raise ValueError(f"{num_clusters} clusters here and {draft.num_clusters} there")
    draft.num_clusters = num_clusters
    draft.extents += _RUN.iter_unpack(body[_COUNT.size :])


def _read_foreign(draft: Draft, body: memoryview) -> None:
    draft.foreign = True


def _read_misplaced(draft: Draft, body: memoryview) -> None:
    raise ValueError("extents where none may be")


_READERS: Final = {
    layout.PADDING: lambda draft, body: None,
    layout.FLAGS: _read_flags,
    layout.XATTR: lambda draft, body: _read_xattr_into(draft.xattrs, body),
    layout.XATTR_INTERNAL: lambda draft, body: _read_xattr_into(draft.internal, body),
    layout.EXTENT_RLE: _read_runs,
    layout.EXTENT_TABLE: _read_table,
    layout.EXTENT_PAGE: _read_misplaced,
}


def read_extent_page(page: layout.Page, number: int) -> tuple[int, memoryview[int]]:
    """The first cluster and the entries of an extent page. Raises: StoreError."""
    found = list(descriptors(page.descriptors))
    if page.sequence or page.next != layout.NO_PAGE or len(found) != 1:
        raise damaged(f"metadata page {number} is no extent page")
    kind, body = found[0]
    short = len(body) <= _START.size or len(body) % 4
    if kind != layout.EXTENT_PAGE or short or len(body) > 4 * (layout.ENTRIES_A_PAGE + 1):
        raise damaged(f"metadata page {number} is no extent page")
    return _START.unpack_from(body)[0], body[_START.size :].cast("I")


# Writing


class _Writer:
    def __init__(self, blob_id: int) -> None:
        self.blob_id = blob_id
        self.bodies = [bytearray()]

    @property
    def room(self) -> int:
        return layout.DESCRIPTORS_LENGTH - len(self.bodies[-1])

    def add(self, kind: int, body: bytes) -> None:
        if DESCRIPTOR.size + len(body) > self.room:
            self.bodies.append(bytearray())
        if DESCRIPTOR.size + len(body) > self.room:
            raise StoreError(errno.ENOMEM, f"an xattr of {len(body)} bytes fits into no page")
        self.bodies[-1] += DESCRIPTOR.pack(kind, len(body)) + body

    def add_list(self, kind: int, head: bytes, entries: Sequence[tuple[int, int]]) -> None:
        """As many descriptors as it takes, each with the head."""
        done = 0
        while True:
            fit = (self.room - DESCRIPTOR.size - len(head)) // _RUN.size
            if fit >= min(1, len(entries)):
                part = entries[done : done + fit]
                self.add(kind, head + b"".join(_RUN.pack(*entry) for entry in part))
                done += len(part)
            if done == len(entries) and fit >= 0:
                return
            self.bodies.append(bytearray())


def write_chain(
    blob: Blob, num_clusters: int, clusters: Sequence[int] | None = None
) -> list[bytes]:
    """The descriptors of each page of the blob's chain, as if it had that many clusters.

    ``clusters``: others than its table has now, for one without extent pages. Raises:
    StoreError (ENOMEM) when an xattr is too long.
    """
    writer = _Writer(blob.id)
    writer.add(layout.FLAGS, _FLAGS.pack(blob.invalid_flags, blob.data_ro_flags, blob.md_ro_flags))
    kinds = ((layout.XATTR, blob.xattrs), (layout.XATTR_INTERNAL, blob.internal))
    for kind, xattrs in kinds:
        for name, value in xattrs.items():
            writer.add(kind, _XATTR.pack(len(name), len(value)) + name + value)
    pages = blob.table.extent_pages
    if pages is not None:
        entries = extent_entries(pages[: extent_page_count(num_clusters)])
        writer.add_list(layout.EXTENT_TABLE, _COUNT.pack(num_clusters), entries)
    elif num_clusters:
        entries_now = blob.table.clusters[:num_clusters] if clusters is None else clusters
        writer.add_list(layout.EXTENT_RLE, b"", runs(entries_now))
    return [bytes(body).ljust(layout.DESCRIPTORS_LENGTH, b"\0") for body in writer.bodies]


def extent_entries(pages: Iterable[int]) -> list[tuple[int, int]]:
    """(page, 1) for each extent page, (0, count) for several in a row that are missing."""
    entries: list[tuple[int, int]] = []
    for page in pages:
        if page or not entries or entries[-1][0]:
            entries.append((page, 1))
        else:
            entries[-1] = (0, entries[-1][1] + 1)
    return entries


def runs(clusters: Iterable[int]) -> list[tuple[int, int]]:
    """(first cluster, count) for clusters in a row, (0, count) for missing ones."""
    found: list[tuple[int, int]] = []
    for cluster in clusters:
        if found:
            first, count = found[-1]
            if cluster == (first + count if first else 0):
                found[-1] = (first, count + 1)
                continue
        found.append((cluster, 1))
    return found


def extent_page_count(num_clusters: int) -> int:
    """How many extent pages that many clusters take."""
    return divide_up(num_clusters, layout.ENTRIES_A_PAGE)


def consecutive(first: int, count: int) -> memoryview[int]:
    """The numbers first, first + 1 …, to be copied into a table."""
    return memoryview(array("I", range(first, first + count)))
