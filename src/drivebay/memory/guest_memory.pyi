from collections.abc import Callable, Sequence
from typing import NamedTuple

class Region(NamedTuple):
    """One region as a front end describes it (vhost-user "Memory regions description")."""

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int
    fd: int

class MemoryTable:
    """An immutable table of mapped guest memory.

    Context: control or a worker thread. Mapping and unmapping can take
    milliseconds: build and release tables in a worker thread.
    """

    regions: tuple[Region, ...]
    generation: int

    def __init__(
        self,
        regions: Sequence[Region],
        previous: MemoryTable | None = None,
        on_broken: Callable[[], None] | None = None,
    ) -> None:
        """Map the regions; those unchanged since ``previous`` keep their mapping.

        The descriptors are borrowed: the caller closes them. A region with
        descriptor -1 is one of ``previous``'s and keeps its mapping.
        Raises: PeerError for a region that overlaps, wraps, is not backed by its
        file or not by memfd, tmpfs or hugetlbfs; HostError when mmap fails.
        ``on_broken`` is called from ControlMailbox.drain() after a page fault
        beyond the end of the (truncated) file behind the table.
        """

    @property
    def broken(self) -> bool: ...
    def resolve_user(self, user_addr: int, length: int, what: str) -> int:
        """Host address of a front-end user address. Raises PeerError, naming ``what``."""

    def read(self, guest_addr: int, length: int) -> bytes:
        """A checked copy out of guest memory. Raises PeerError."""

    def write(self, guest_addr: int, data: bytes) -> None:
        """A checked copy into guest memory. Raises PeerError."""

    def release(self) -> None:
        """Unmap what no other table shares. Only when nothing is in flight."""

def install_sigbus_handler() -> None:
    """Survive front ends that truncate shared memory. Once per process, before any mapping."""

def mapped_regions() -> int:
    """Regions mapped now in the whole process (leak checks)."""
