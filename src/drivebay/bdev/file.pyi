from uuid import UUID

from drivebay.bdev.base import Bdev

class FileBdev(Bdev):
    """A disk in a file or on a block device. Blocking to make: a worker thread."""

    path: str
    direct: bool  # O_DIRECT; False: through the page cache
    polled: bool  # its device has poll queues, which are used
    module: str  # type: ignore[misc]  # one class, two names: "aio" and "uring"
    product_name: str  # type: ignore[misc]

    def __init__(
        self,
        name: str,
        uuid: UUID | None,
        path: str,
        block_size: int = 0,
        readonly: bool = False,
        module: str = "aio",
        fallocate: bool | None = None,
    ) -> None:
        """Open, lock and measure the file; block_size 0 takes what the file suggests.

        ``fallocate`` False: neither unmap nor write zeroes, even where they work.
        Raises: UsageError for sizes, InUse naming who holds it, HostError (errno, path).
        """

    def rescan(self) -> int:
        """Blocks that the file has now. Blocking."""
