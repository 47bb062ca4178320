"""Bdevs that stand on others: made on their bases, gone with them, resized with them.

Context: control (the asyncio thread).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final
from uuid import UUID

from drivebay.bdev.claims import EXCLUSIVE
from drivebay.errors import DrivebayError, NotFound

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.bdev.registry import BdevRegistry

__all__ = ["PartPlan", "derived_uuid", "part_uuid", "stack", "stack_parts"]

_log = logging.getLogger(__name__)

_PART_NAMESPACE: Final = UUID("976b899e-3e1e-4d71-ab69-c2b08e9df8b8")

# What one of several bdevs on the same base is made with.
PartPlan = tuple[str, UUID, Callable[[], "Bdev"]]


def derived_uuid(namespace: UUID, base: UUID, where: bytes = b"") -> UUID:
    """The uuid that SPDK gives to a bdev on ``base``: the same after each start.

    >>> derived_uuid(UUID(int=1), UUID(int=2))
    UUID('cfc0356d-8612-54eb-a4d2-4ba6b70a12f0')
    """
    name = namespace.bytes + base.bytes + where
    return UUID(bytes=hashlib.sha1(name, usedforsecurity=False).digest()[:16], version=5)


def part_uuid(base: Bdev, offset_blocks: int, num_blocks: int) -> UUID:
    """The uuid that SPDK derives for a part of a bdev, from where it lies."""
    where = struct.pack("<QQ", offset_blocks, num_blocks)
    return derived_uuid(_PART_NAMESPACE, base.uuid, where)


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
            registry.release(base, by)

    try:
        for base in bases:
            registry.claim(base, by, kind)
            claimed.append(base)
    except DrivebayError:
        let_go()
        raise
    return await _stand(registry, bases, (name, uuid, build), let_go)


async def stack_parts(
    registry: BdevRegistry, base: Bdev, plans: Sequence[PartPlan], *, by: str
) -> list[Bdev]:
    """As stack(), for several bdevs on one base that share one exclusive claim of it.

    The claim ends with the last of them. Raises: as stack(); none of them is there then.
    """
    held = len(plans)

    def let_go() -> None:
        nonlocal held
        held -= 1
        if held == 0:
            registry.release(base, by)

    if plans:
        registry.claim(base, by)
    made: list[Bdev] = []
    try:
        for plan in plans:
            bdev = await _stand(registry, [base], plan, let_go)
            made.append(bdev)
    except BaseException:
        for _ in plans[len(made) + 1 :]:  # the one that failed has let go already
            let_go()
        for bdev in reversed(made):
            with contextlib.suppress(NotFound):
                await registry.remove(bdev.name)
        raise
    return made


async def _stand(
    registry: BdevRegistry,
    bases: Sequence[Bdev],
    plan: tuple[str, UUID | None, Callable[[], Bdev]],
    on_closed: Callable[[], None],
) -> Bdev:
    """Make one bdev that follows its bases; ``on_closed`` is also called when it fails."""
    name, uuid, build = plan

    def end() -> None:
        for base in bases:
            registry.unsubscribe(base, follow)
        on_closed()

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

    bdev = await registry.create(name, uuid, build, end)
    try:
        for base in bases:
            registry.subscribe(base, follow)
    except DrivebayError:  # a base went while the bdev was being made
        with contextlib.suppress(NotFound):
            await registry.remove(name)
        raise
    return bdev
