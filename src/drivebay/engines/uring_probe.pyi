from pathlib import Path

def device_has_poll_queues(fd: int, devices: Path = ...) -> bool:
    """Of the device that a file lies on, or of a block device itself."""

def can_be_polled(fd: int, length: int) -> bool:
    """Whether reads of this O_DIRECT descriptor complete when the device is polled.

    Reads the first ``length`` bytes, which must suit O_DIRECT. Blocking. False when in doubt.
    """
