from collections.abc import Callable, Sequence

from drivebay.memory.guest_memory import MemoryTable

class DirtyLog:
    """The log of a migration (vhost-user "Migration"), mapped.

    Context: control or a worker thread, for mapping can take milliseconds. Queues
    borrow it: keep it until BlkQueue.set_log() or stop() was answered.
    """

    def __init__(
        self,
        fd: int,
        mmap_offset: int,
        size: int,
        on_broken: Callable[[], None] | None = None,
    ) -> None:
        """Map ``size`` bytes of a descriptor, which is borrowed: the caller closes it.

        Raises: PeerError for a log that is empty, misaligned, wraps, ends behind its file,
        or is not memory; HostError when mmap fails.
        ``on_broken`` is called from ControlMailbox.drain() after its file was truncated.
        """

    @property
    def covers(self) -> int:
        """The first guest address that it has no bit for."""

    def mark(self, guest_addr: int, length: int) -> None:
        """As the data plane marks ``length`` bytes that it wrote. Without the GIL."""

    def mark_buffers(
        self, table: MemoryTable, buffers: Sequence[tuple[int, int]], length: int
    ) -> None:
        """As the data plane marks the first ``length`` bytes of a request's buffers.

        ``buffers`` are (guest address, length), each within one region. Raises: PeerError.
        """

    def release(self) -> None:
        """Unmap it. Only when no queue uses it any more."""
