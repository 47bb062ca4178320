from collections.abc import Sequence
from uuid import UUID

from drivebay.bdev.base import Bdev
from drivebay.bdev.raid.member import Raid

class StripedBdev(Bdev):
    """A disk of several, in strips (raid0) or one after the other (concat)."""

    def __init__(
        self,
        name: str,
        uuid: UUID | None,
        bases: Sequence[Bdev],
        data_offsets: Sequence[int],
        data_sizes: Sequence[int],
        strip_bytes: int,
        level: str,
        raid: Raid,
    ) -> None:
        """Offsets and sizes are in blocks, of each base. Raises: UsageError."""

def content_id_of(bdev: Bdev) -> str:
    """Of a disk on bases: memory is another one in each process, a uuid stays."""
