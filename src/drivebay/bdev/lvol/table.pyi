from drivebay.bdev.base import Channel

class ClusterTable:
    """Where a volume's clusters lie. Context: control.

    Between freeze and thaw of the space, and with the volumes quiesced that read it, except
    that entries may become other than 0 at any time.
    """

    parent: ClusterTable | None
    external: bool  # what is not here lies on another bdev
    external_channel: Channel | None

    def __init__(self, num_clusters: int, blob_id: int, *, extent_table: bool = True) -> None:
        """Nothing allocated. Without ``extent_table`` control itself saves each allocation."""

    @property
    def num_clusters(self) -> int: ...
    @property
    def allocated(self) -> int:
        """How many clusters it has of its own."""

    @property
    def blob_id(self) -> int: ...
    @property
    def clusters(self) -> memoryview[int]:
        """All entries, writable ("I"); take it anew after resize(), recount() after writing."""

    @property
    def extent_pages(self) -> memoryview[int] | None:
        """The metadata page of each 512 entries, 0 for none; None without an extent table."""

    def get(self, index: int) -> int:
        """The cluster's number on the base, 0 if it is not allocated. Raises: IndexError."""

    def set(self, index: int, cluster: int) -> None:
        """Raises: IndexError."""

    def recount(self) -> None:
        """Count the allocated ones after writes to ``clusters``."""

    def resize(self, num_clusters: int) -> None:
        """New entries are not allocated; those cut off must have been released before."""

    def swap(self, other: ClusterTable) -> None:
        """Exchange clusters and extent pages, however many; blob_id and parents stay.

        Raises: UsageError when one has an extent table and the other has not.
        """

    def set_parent(self, parent: ClusterTable | None) -> None:
        """What is not allocated here is read there; None: it reads as zeroes."""

    def set_external(self, channel: Channel | None, *, present: bool = True) -> None:
        """What is not allocated here is read from another bdev.

        ``channel`` is of that bdev, on the owner's reactor and kept open; None while it is
        missing. ``present`` False: there is no such bdev any more.
        """
