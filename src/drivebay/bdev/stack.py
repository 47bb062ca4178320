"""Bdevs that stand on others: made on their bases, gone with them, resized with them.

Context: control (the asyncio thread).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from drivebay.bdev.claims import EXCLUSIVE
from drivebay.errors import DrivebayError, NotFound

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.bdev.registry import BdevRegistry

__all__ = ["derived_uuid", "stack"]

_log = logging.getLogger(__name__)


def derived_uuid(namespace: UUID, base: UUID) -> UUID:
    """The uuid that SPDK gives to a bdev on ``base``: the same after each start.

    >>> derived_uuid(UUID(int=1), UUID(int=2))
    UUID('cfc0356d-8612-54eb-a4d2-4ba6b70a12f0')
    """
    digest = hashlib.sha1(namespace.bytes + base.bytes, usedforsecurity=False).digest()
    return UUID(bytes=digest[:16], version=5)


async def stack(
    registry: BdevRegistry,
    bases: Sequence[Bdev],
    name: str,
    uuid: UUID | None,
    build: Callable[[], Bdev],
    *,
    by: str,
    kind: str = EXCLUSIVE,
) -> Bdev:
    """Claim the bases for ``by``, make a bdev on them, and have it follow them.

    It is removed when a base is, and has size_on_bases() blocks after a base's resize. The
    claims end when its last user has let go. Raises: InUse, UsageError, AlreadyExists, and
    whatever ``build`` raises; nothing is claimed then.
    """
    claimed: list[Bdev] = []

    def let_go() -> None:
        for base in claimed:
            registry.unsubscribe(base, follow)
            registry.release(base, by)

    async def follow(base: Bdev, event: str) -> None:
        if event == "remove":
            with contextlib.suppress(NotFound):
                if registry.get(name) is bdev:
                    await registry.remove(name)
        elif event == "resize":
            try:
                await registry.resize(bdev, bdev.size_on_bases())
            except DrivebayError as error:
                _log.error("%s; its base '%s' has another size now", error, base.name)

    try:
        for base in bases:
            registry.claim(base, by, kind)
            claimed.append(base)
    except DrivebayError:
        let_go()
        raise
    bdev = await registry.create(name, uuid, build, let_go)
    for base in bases:
        registry.subscribe(base, follow)
    return bdev
