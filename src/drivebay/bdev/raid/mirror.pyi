from collections.abc import Sequence
from uuid import UUID

from drivebay.bdev.base import Bdev, Channel
from drivebay.bdev.raid.member import Raid
from drivebay.reactor.mailbox import Answer

class MirrorChannel(Channel):
    """A way into all bases of a mirror. The doors of a RAID's own control."""

    def collect(self) -> Answer:
        """Have failed_legs() say what failed until now; those writes wait for settle()."""

    def failed_legs(self) -> list[int]:
        """Which legs failed writes before the last collect()."""

    def settle(self, kept: bool) -> Answer:
        """Let the writes end that collect() knew of; not ``kept``: with an error."""

    def wanted_repair(self) -> tuple[int, int, int] | None:
        """(leg, offset, length) in bytes that it could not read and another one could."""

    def end_repair(self) -> None:
        """That one is done, or given up; the next may be noted."""

class MirrorBdev(Bdev):
    """A disk that every one of its bases has. Context: control."""

    def __init__(
        self,
        name: str,
        uuid: UUID | None,
        block_size: int,
        num_blocks: int,
        bases: Sequence[Bdev | None],
        data_offsets: Sequence[int],
        raid: Raid,
    ) -> None:
        """Offsets in blocks. Raises: UsageError."""

    def live_channels(self) -> list[MirrorChannel]:
        """Those that may have I/O."""

    def place_data(self, index: int, data_offset: int) -> None:
        """Where the data begin on the next base of a leg, in blocks."""

    def set_target(self, index: int | None, frontier: int = 0) -> list[Answer]:
        """Which leg is written, below byte ``frontier``, but not read; None: there is none."""

    def set_window(self, start: int, end: int, frontier: int | None = None) -> list[Answer]:
        """Hold new writes to these bytes; to none when ``end`` is 0. ``frontier`` of the target.

        All answered: the writes that began before are over.
        """
