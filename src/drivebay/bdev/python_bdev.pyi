from uuid import UUID

from drivebay.bdev.base import Bdev
from drivebay.bdev.python_disk import PythonDisk

class PythonBdev(Bdev):
    """Serves what a PythonDisk reads and writes; the disk's methods run in threads of its own."""

    disk: PythonDisk

    def __init__(self, name: str, uuid: UUID | None, disk: PythonDisk) -> None:
        """Raises: UsageError for sizes, for too many threads and for a disk that can't read."""

    def start(self) -> None:
        """Start the threads; opening a channel does it."""

    def run(self) -> None:
        """What each of the threads does."""
