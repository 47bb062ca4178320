"""Who may look: tokens that open a door once, and the secrets that they are exchanged for.

Context: any; one thread. Only their hashes are kept, and all are compared, each in constant time,
so that the time of a refusal says nothing. Nothing here is written anywhere: both end with the
process.

    issue ──► token, in the URL's fragment ── redeem, once, within 5 minutes ──► secret ── knows
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Final

__all__ = ["TOKEN_SECONDS", "Sessions", "Tokens"]

TOKEN_SECONDS: Final = 300.0
_BYTES: Final = 32
_TOKENS_MOST: Final = 16  # that nobody has used yet; the oldest makes room
_SESSIONS_MOST: Final = 64
_LENGTH_MOST: Final = 256  # of what is compared


class Tokens:
    """Words that work once, each for one thing: ``scope`` is whatever the caller means by it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._unused: dict[bytes, tuple[str, float]] = {}

    def issue(self, scope: str) -> str:
        """Make one."""
        if len(self._unused) >= _TOKENS_MOST:
            del self._unused[next(iter(self._unused))]
        token = secrets.token_urlsafe(_BYTES)
        self._unused[_hash(token)] = (scope, self._clock() + TOKEN_SECONDS)
        return token

    def redeem(self, token: str) -> str | None:
        """Use it up. Returns: its scope; None when it is unknown, used or too old."""
        now = self._clock()
        self._unused = {kept: (scope, end) for kept, (scope, end) in self._unused.items()
                        if now < end}  # fmt: skip
        found = _find(self._unused, token)
        return None if found is None else self._unused.pop(found)[0]


class Sessions:
    """Secrets of browsers that were let in, until the process ends."""

    def __init__(self) -> None:
        self._open: dict[bytes, str] = {}

    def open(self, scope: str) -> str:
        """Let one in; the oldest of too many has to come in anew."""
        if len(self._open) >= _SESSIONS_MOST:
            del self._open[next(iter(self._open))]
        secret = secrets.token_urlsafe(_BYTES)
        self._open[_hash(secret)] = scope
        return secret

    def knows(self, secret: str, scope: str) -> bool:
        """Whether that secret was given out for that scope."""
        found = _find(self._open, secret)
        return found is not None and self._open[found] == scope


def _find(kept: Mapping[bytes, object], word: str) -> bytes | None:
    if len(word) > _LENGTH_MOST:
        return None
    wanted, found = _hash(word), None
    for each in kept:
        if hmac.compare_digest(each, wanted):
            found = each
    return found


def _hash(word: str) -> bytes:
    return hashlib.sha256(word.encode(errors="surrogatepass")).digest()
