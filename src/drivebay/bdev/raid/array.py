"""One RAID: its members, whether it is a disk now, and what becomes of it as they come and go.

States, in SPDK's words: *configuring* (members are missing, there is no disk), *online*,
*offline* (too many members are lost, the disk is gone). ``lock`` is held while any of that
changes; it is let go before the disk is removed, since its I/O may wait for `_attend`.
Context: control.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from errno import EIO
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from drivebay.bdev.raid.geometry import data_sizes, num_blocks, strip_in_blocks
from drivebay.bdev.raid.member import NO_UUID, Slot, check_member
from drivebay.bdev.raid.metadata import clear_superblock, write_superblock
from drivebay.bdev.raid.superblock import CONFIGURED, MISSING, Member, Superblock
from drivebay.errors import DrivebayError, HostError, NotFound, UsageError

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.bdev.raid.rebuild import Rebuild
    from drivebay.bdev.registry import BdevRegistry
    from drivebay.reactor.reactor import Reactor

__all__ = ["Array", "Surroundings"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """What a RAID needs of the target that it is in."""

    registry: BdevRegistry
    reactor: Callable[[], Reactor]  # for control's own I/O
    options: Callable[[], tuple[int, int]]  # window in KiB, MiB/s or 0, of a rebuild
    forget: Callable[[Array], None]
    completed: Callable[[Array], None]  # members that it did without may be taken now


class Array:
    """A RAID of any level, with or without a disk."""

    def __init__(
        self,
        around: Surroundings,
        name: str,
        level: str,
        strip_size_kb: int,
        slots: list[Slot],
        *,
        uuid: UUID | None,
        superblock: bool,
        sb: Superblock | None = None,
    ) -> None:
        self.around = around
        self.registry = around.registry
        self.name = name
        self.level = level
        self.strip_size_kb = strip_size_kb
        self.slots = slots
        self.uuid = uuid or (uuid4() if superblock else None)
        self.superblock = superblock
        self.sb = sb
        self.operational = len(slots)
        if sb is not None:
            self.operational = sum(member.state == CONFIGURED for member in sb.members)
        self.state = "configuring"
        self.disk: Bdev | None = None
        self.rebuild: Rebuild | None = None
        self.lock = asyncio.Lock()
        self.window_lock = asyncio.Lock()  # one range at a time is held
        self.shunned: set[UUID] = set()  # members that were sent away in this process
        self._named = [slot.name for slot in slots]
        self._deleted = False

    # What it is

    @property
    def holder(self) -> str:
        """In whose name it claims bases."""
        return f"raid bdev '{self.name}'"

    @property
    def members(self) -> list[Slot]:
        """The slots that have a bdev."""
        return [slot for slot in self.slots if slot.bdev is not None]

    @property
    def sources(self) -> list[Slot]:
        """The members that have all the data."""
        target = self.rebuild.target if self.rebuild is not None else None
        return [slot for slot in self.members if slot is not target]

    @property
    def block_size(self) -> int | None:
        """That of its members; None while it has none."""
        if self.sb is not None:
            return self.sb.block_size
        return next((slot.bdev.block_size for slot in self.slots if slot.bdev is not None), None)

    def slot_of(self, bdev: Bdev) -> Slot | None:
        """Where a bdev is a member."""
        return next((slot for slot in self.slots if slot.bdev is bdev), None)

    def describe(self) -> dict[str, Any]:
        """As bdev_get_bdevs shows it, in SPDK's order."""
        shown: dict[str, Any] = {
            "uuid": str(self.uuid or NO_UUID),
            "strip_size_kb": self.strip_size_kb,
            "state": self.state,
            "raid_level": self.level,
            "superblock": self.superblock,
            "num_base_bdevs": len(self.slots),
            "num_base_bdevs_discovered": len(self.members),
            "num_base_bdevs_operational": self.operational,
        }
        if self.rebuild is not None:
            shown["process"] = self.rebuild.describe()
        shown["base_bdevs_list"] = [slot.describe() for slot in self.slots]
        return shown

    def call(self) -> tuple[str, dict[str, Any]] | None:
        """The RPC call that makes it again; None when its superblocks do."""
        if self.superblock:
            return None
        params: dict[str, Any] = {"name": self.name}
        if self.uuid is not None:
            params["uuid"] = str(self.uuid)
        if self.strip_size_kb:
            params["strip_size_kb"] = self.strip_size_kb
        params["raid_level"] = self.level
        # A mirror whose base was lost must not take it back: it lacks what was written since.
        names = [slot.name for slot in self.slots] if self.level == "raid1" else self._named
        params["base_bdevs"] = [
            name or f"removed_base_bdev_{number}" for number, name in enumerate(names)
        ]
        return "bdev_raid_create", params

    def size_on_bases(self) -> int:
        """Blocks it has now that a base has another size."""
        strip = strip_in_blocks(self.level, self.strip_size_kb, self.block_size or 1)
        room = [s.bdev.num_blocks - s.data_offset for s in self.slots if s.bdev is not None]
        return num_blocks(self.level, data_sizes(self.level, strip, room))

    # Members

    def take(self, slot: Slot, bdev: Bdev) -> None:
        """Make a bdev the member of a slot. Raises: InUse, UsageError, StateError."""
        self.registry.claim(bdev, self.holder)
        try:
            slot.data_offset, slot.data_size = check_member(
                slot, bdev, self.name, self.block_size, self.superblock
            )
            self.registry.subscribe(bdev, self._follow)
        except DrivebayError:
            self.registry.release(bdev, self.holder)
            raise
        slot.bdev = bdev
        slot.uuid = bdev.uuid
        slot.name = slot.name or bdev.name

    def free(self, slot: Slot, *, keep_name: bool = False) -> None:
        """Give the slot's bdev back, and make room for another; harmless without one."""
        if slot.bdev is not None:
            self.registry.unsubscribe(slot.bdev, self._follow)
            self.registry.release(slot.bdev, self.holder)
        slot.bdev = None
        if not keep_name:
            slot.name = None
        if self.state == "configuring" and self.sb is not None:
            return  # the superblock says what belongs here, and where
        slot.uuid = NO_UUID
        slot.data_offset = 0
        if self.state == "configuring":
            slot.data_size = 0

    def free_all(self) -> None:
        """Let go of every member."""
        for slot in self.slots:
            self.free(slot, keep_name=True)

    async def complete(self) -> None:
        """Become a disk if nothing is missing any more. Under ``lock``. Raises: DrivebayError."""
        if self.state != "configuring" or len(self.members) != self.operational:
            return
        block_size = self.block_size or 0
        strip = strip_in_blocks(self.level, self.strip_size_kb, block_size)
        sized = [slot for slot in self.slots if slot.data_size]
        used = data_sizes(self.level, strip, [slot.data_size for slot in sized])
        size = num_blocks(self.level, used)
        if size == 0:
            raise UsageError(f"the base bdevs of RAID '{self.name}' are smaller than a strip")
        if self.superblock:
            await self._write_first(size, strip, used)
        for slot, data_size in zip(sized, used, strict=True):
            slot.data_size = data_size
        self.state = "online"
        try:
            await self.registry.create(
                self.name, self.uuid, lambda: self._build(size, used), self._closed
            )
        except BaseException:
            self.state, self.disk = "configuring", None
            raise
        self.around.completed(self)

    def _build(self, size: int, used: list[int]) -> Bdev:
        """In a worker thread. Raises: UsageError."""
        bases = [slot.bdev for slot in self.slots]
        offsets = [slot.data_offset for slot in self.slots]
        if self.level == "raid1":
            from drivebay.bdev.raid.mirror import MirrorBdev  # compiled; loaded when needed

            block_size = self.block_size or 0
            self.disk = MirrorBdev(self.name, self.uuid, block_size, size, bases, offsets, self)
        else:
            from drivebay.bdev.raid.striped import StripedBdev

            there = [base for base in bases if base is not None]
            strip_bytes = self.strip_size_kb * 1024
            self.disk = StripedBdev(
                self.name, self.uuid, there, offsets, used, strip_bytes, self.level, self
            )
        self.uuid = self.disk.uuid
        return self.disk

    def trouble(self) -> None:
        """Only mirrors have any that they can do something about."""

    def _closed(self) -> None:
        """The disk is gone, and nobody holds it any more; or it could not be made."""
        if self.disk is None:
            return
        self.disk = None
        if self.rebuild is not None:
            self.rebuild.stop("its disk is gone")
        if self.state == "online" or self._deleted:
            self.state = "offline"
            self.free_all()
            self.around.forget(self)

    # Superblocks

    async def _write_first(self, size: int, strip: int, used: list[int]) -> None:
        """The superblocks of a RAID that becomes a disk. Raises: DrivebayError."""
        assert self.uuid is not None
        if self.sb is None:
            block_size = self.block_size or 0
            self.sb = Superblock(
                self.uuid, self.name, size, block_size, self.level, strip, 0, len(self.slots)
            )
            for slot, data_size in zip(self.slots, used, strict=True):
                self.sb.members.append(
                    Member(slot.uuid, slot.data_offset, data_size, CONFIGURED, slot.number)
                )
        elif self.sb.raid_size != size:
            raise UsageError(
                f"RAID '{self.name}' has {self.sb.raid_size} blocks by its superblock, "
                f"but {size} on its members"
            )
        failed = await self.save()
        if failed:
            names = ", ".join(f"'{slot.name}'" for slot in failed)
            raise HostError(f"RAID '{self.name}' can't write its superblock on {names}", EIO)

    async def save(self, without: Iterable[Slot] = ()) -> list[Slot]:
        """Write a newer superblock on all members but some. Returns: those that failed it."""
        assert self.sb is not None
        self.sb.seq += 1
        failed = []
        for slot in self.members:
            if slot in without or slot.bdev is None:
                continue
            try:
                await write_superblock(self.registry, slot.bdev, self.around.reactor(), self.sb)
            except DrivebayError as error:
                _log.error("RAID '%s': no superblock on '%s': %s", self.name, slot.name, error)
                failed.append(slot)
        return failed

    def note(self, slot: Slot, state: int) -> None:
        """What the next superblock says of a slot."""
        entry = self.sb.member_at(slot.number) if self.sb is not None else None
        if entry is not None:
            entry.state = state
            if slot.bdev is not None:
                entry.uuid = slot.uuid
                entry.data_offset = slot.data_offset

    # Members that leave

    async def _follow(self, bdev: Bdev, event: str) -> None:
        if event == "remove":
            with contextlib.suppress(NotFound):
                await self.remove_member(bdev, keep_name=True)
        elif event == "resize":
            await self._resized(bdev)

    async def remove_member(self, bdev: Bdev, *, keep_name: bool = False) -> None:
        """Do without a base; without the disk when that is one too many.

        Raises: NotFound when it is not, or no longer, a member.
        """
        rebuild, slot = self.rebuild, self.slot_of(bdev)
        if rebuild is not None and (slot is rebuild.target or self.sources == [slot]):
            await rebuild.cancel(f"bdev '{bdev.name}' is removed")
            if slot is rebuild.target:
                return
        async with self.lock:
            slot = self.slot_of(bdev)
            if slot is None:
                raise NotFound(f"bdev '{bdev.name}' is no member of RAID '{self.name}'")
            if self.state != "online":
                self.free(slot, keep_name=keep_name and self.sb is None)
            elif not await self.drop([slot], MISSING):
                self.state = "offline"
                self.operational -= 1
                self.free(slot)
        await self.end_if_offline()

    async def drop(self, doomed: list[Slot], state: int) -> bool:
        """Go on without members. Under ``lock``. Returns: can it? A striped RAID can't."""
        return False

    async def end_if_offline(self) -> None:
        """Remove the disk of a RAID that is offline, and forget one that has no member."""
        if self.state != "offline":
            return
        if self.rebuild is not None:
            await self.rebuild.cancel("its disk is gone")
        if any(bdev is self.disk for bdev in self.registry):
            if not self._deleted:
                _log.error("RAID '%s' is offline: too few of its members are left", self.name)
            with contextlib.suppress(NotFound):
                await self.registry.remove(self.name, "raid")
        if not self.members:
            self.around.forget(self)

    async def delete(self, *, clear: bool) -> None:
        """End it for good. Raises: NotFound when somebody is doing so."""
        if self._deleted:
            raise NotFound(f"raid bdev '{self.name}' is being deleted")
        self._deleted = True
        if self.rebuild is not None:
            await self.rebuild.cancel("the RAID is deleted")
        async with self.lock:
            if clear and self.sb is not None:
                for slot in self.members:
                    assert slot.bdev is not None
                    try:
                        await clear_superblock(self.registry, slot.bdev, self.around.reactor())
                    except DrivebayError as error:
                        _log.error("RAID '%s': its superblock stays: %s", self.name, error)
            self.state = "offline"
            if self.disk is None:
                self.free_all()
        await self.end_if_offline()
        self.around.forget(self)

    async def _resized(self, bdev: Bdev) -> None:
        async with self.lock:
            if self.state != "online" or self.level == "concat" or self.disk is None:
                return
            size = self.size_on_bases()
            if size == self.disk.num_blocks:
                return
            try:
                await self.registry.resize(self.disk, size)
            except DrivebayError as error:
                _log.error("%s; its base '%s' has another size now", error, bdev.name)
                return
            each = size if self.level == "raid1" else size // len(self.slots)
            for slot in self.slots:
                slot.data_size = each
            if self.sb is not None:
                self.sb.raid_size = size
                for member in self.sb.members:
                    member.data_size = each
                await self.save()
