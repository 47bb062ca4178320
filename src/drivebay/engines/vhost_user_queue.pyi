from mmap import mmap

from drivebay.engines.vhost_user_memory import QueueLayout

class DriverQueue:
    """One virtqueue from the driver's side. Context: one thread at a time."""

    def __init__(
        self,
        memory: mmap,
        layout: QueueLayout,
        guest_base: int,
        event_idx: bool,
        kick_fd: int,
        call_fd: int,
    ) -> None:
        """Lay the queue out in fresh memory; the descriptors are borrowed."""

    @property
    def slots(self) -> int: ...
    @property
    def kicks(self) -> int: ...
    def silence(self) -> None:
        """Tell the device that nobody waits for its calls (we poll)."""

    def arm(self) -> bool:
        """Ask for a call at the next completion; True if one is there already."""

    def put(self, slot: int, kind: int, sector: int, length: int) -> None:
        """Make a request ready in a free slot. Raises UsageError, StateError."""

    def publish(self) -> None:
        """Show it to the device, and kick if that asks to be kicked."""

    def take(self) -> tuple[int, int, int] | None:
        """Slot, status byte and used length of one completion. Raises PeerError."""

    def data(self, slot: int) -> memoryview:
        """The slot's data area, in guest memory."""
