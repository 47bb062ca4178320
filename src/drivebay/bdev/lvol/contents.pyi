from drivebay.bdev.base import Channel

class Contents:
    """A store's copiers; their buffers cost address space only, until used."""

    def __init__(self, base: Channel, cluster_bytes: int) -> None: ...
