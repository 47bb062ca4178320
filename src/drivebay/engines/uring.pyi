from drivebay.reactor.mailbox import Answer
from drivebay.reactor.reactor import Reactor

SETUP_FLAGS: tuple[int, ...]  # of io_uring_setup(2), best first

class UringEngine:
    """A reactor's io_uring. Made by the first file channel on it."""

    def __init__(self, plain: UringEngine | None = None) -> None:
        """With ``plain`` a polled ring, which gives to that one what the device refuses.

        Raises: HostError when the kernel forbids or lacks io_uring.
        """

    def enable(self, reactor: Reactor) -> Answer: ...
    def close(self) -> None: ...
