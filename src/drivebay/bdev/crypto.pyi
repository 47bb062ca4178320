from uuid import UUID

from drivebay.bdev.base import Bdev
from drivebay.bdev.filter import FilterBdev

class CryptoKey:
    """A key for AES-XTS, in memory that is wiped at its end. It shows nothing of itself."""

    name: str
    cipher: str  # AES_XTS
    bits: int  # of each half: 128 or 256

    def __init__(self, name: str, key: str, key2: str) -> None:
        """``key`` and ``key2`` are hexadecimal. Raises: UsageError."""

    def digits(self) -> tuple[str, str]:
        """Return both halves in hexadecimal, for a configuration that keeps them in the clear."""

class CryptoBdev(FilterBdev):
    """Another disk, encrypted with a key."""

    key: CryptoKey

    def __init__(self, name: str, uuid: UUID | None, base: Bdev, key: CryptoKey) -> None:
        """Raises: UsageError when it would stand on too many others."""
