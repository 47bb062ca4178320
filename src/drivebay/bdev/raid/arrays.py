"""All RAIDs of a target: made by request, or found by the superblocks of their members.

A bdev that arrives is taken by the RAID that waits for its name, or for its uuid and carries
the superblock that says so. The newest superblock counts; a member with an older one is never
read from, it is rebuilt. Context: control.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from uuid import UUID

from drivebay.bdev.raid.array import Array, Surroundings
from drivebay.bdev.raid.geometry import check_shape
from drivebay.bdev.raid.member import NO_UUID, Slot
from drivebay.bdev.raid.metadata import read_superblock
from drivebay.bdev.raid.mirror_array import MirrorArray
from drivebay.bdev.raid.superblock import CONFIGURED, SIGNATURE, Member, Superblock
from drivebay.errors import AlreadyExists, DrivebayError, InUse, NotFound, StateError, UsageError

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.bdev.registry import BdevRegistry
    from drivebay.reactor.reactor import Reactor

__all__ = ["Arrays"]

_log = logging.getLogger(__name__)

_NAME_BYTES = 63  # that a superblock has room for


class Arrays:
    """The RAIDs of one target, in the order in which they were made or found."""

    def __init__(
        self,
        registry: BdevRegistry,
        reactor: Callable[[], Reactor],
        options: Callable[[], tuple[int, int]],
    ) -> None:
        self._registry = registry
        self._around = Surroundings(registry, reactor, options, self._forget, self._look_again)
        self._arrays: list[Array] = []
        registry.examining.on_arrival(self._arrived, self._awaited)
        registry.examining.on_examine(self.examine, lambda head: head.startswith(SIGNATURE))

    def __iter__(self) -> Iterator[Array]:
        return iter(list(self._arrays))

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        """The RPC calls that make those again that no superblock does."""
        return [call for array in self._arrays if (call := array.call()) is not None]

    def get(self, name: str) -> Array:
        """Raises: NotFound."""
        for array in self._arrays:
            if array.name == name:
                return array
        raise NotFound(f"no RAID is called '{name[:80]}'", hint="see bdev_raid_get_bdevs")

    def _forget(self, array: Array) -> None:
        if array in self._arrays:
            self._arrays.remove(array)

    # By request

    async def create(
        self,
        name: str,
        level: str,
        strip_size_kb: int,
        base_names: list[str],
        uuid: UUID | None,
        *,
        superblock: bool,
    ) -> Array:
        """Make a RAID of the bases that are here; it waits for the others.

        Raises: DrivebayError; nothing is claimed then.
        """
        if not name or len(name.encode(errors="replace")) > _NAME_BYTES or not name.isprintable():
            raise UsageError(
                f"the name of a RAID must have 1 to {_NAME_BYTES} bytes, all printable",
                field="name",
            )
        if any(array.name == name for array in self._arrays) or not self._registry.is_free(name):
            raise AlreadyExists(f"a bdev or RAID called '{name[:80]}' exists already")
        check_shape(level, strip_size_kb, len(base_names))
        self._check_names(name, base_names)
        slots = [Slot(number, base) for number, base in enumerate(base_names)]
        array = self._add(name, level, strip_size_kb, slots, uuid, superblock)
        try:
            async with array.lock:
                for slot in slots:
                    bdev = self._find(slot.name or "")
                    if bdev is not None:
                        await self._refuse_foreign(array, bdev)
                        array.take(slot, bdev)
                await array.complete()
        except BaseException:
            self._forget(array)
            array.free_all()
            raise
        return array

    def _add(
        self,
        name: str,
        level: str,
        strip_size_kb: int,
        slots: list[Slot],
        uuid: UUID | None,
        superblock: bool,
        sb: Superblock | None = None,
    ) -> Array:
        kind = MirrorArray if level == "raid1" else Array
        array = kind(
            self._around, name, level, strip_size_kb, slots, uuid=uuid, superblock=superblock, sb=sb
        )
        self._arrays.append(array)
        return array

    def _check_names(self, name: str, base_names: list[str]) -> None:
        if name in base_names:
            raise UsageError(
                f"RAID '{name}' can't be one of its own bases",
                field="base_bdevs",
                hint="name the bdevs that it is made of",
            )
        seen: set[object] = set()
        for base in base_names:
            if not base:
                raise UsageError("a base bdev needs a name", field="base_bdevs")
            found: object = self._find(base) or base
            if found in seen:
                refusal = InUse(f"bdev '{base[:80]}' is named twice")
                refusal.errno = 1  # EPERM: SPDK finds it claimed, by this very RAID
                refusal.hint = "name each base once"
                raise refusal
            seen.add(found)

    def _find(self, name: str) -> Bdev | None:
        try:
            return self._registry.get(name)
        except NotFound:
            return None

    async def _superblock_of(self, bdev: Bdev) -> Superblock | None:
        """Raises: HostError, StateError. One that can't be believed counts as none."""
        try:
            return await read_superblock(self._registry, bdev, self._around.reactor())
        except UsageError as error:
            _log.warning("%s", error)
            return None

    async def _refuse_foreign(self, array: Array, bdev: Bdev) -> None:
        self._registry.require_unclaimed(bdev)
        sb = await self._superblock_of(bdev)
        if sb is not None:
            raise _foreign(bdev, sb)

    async def add_base(self, name: str, base_name: str) -> None:
        """Give a RAID another base; a mirror that is a disk is rebuilt onto it.

        Raises: DrivebayError.
        """
        array = self.get(name)
        async with array.lock:
            if array.rebuild is not None:
                raise StateError(f"RAID '{name}' is being rebuilt", hint="wait for its end")
            bdev = self._find(base_name)
            slot = self._slot_for(array, bdev)
            if slot is None:
                raise UsageError(
                    f"RAID '{name}' has no empty slot for another base",
                    field="base_bdev",
                    hint="remove one first: bdev_raid_remove_base_bdev",
                )
            if bdev is None:
                if array.state == "configuring":
                    slot.name = base_name
                raise NotFound(f"no bdev is called '{base_name[:80]}'", hint="see bdev_get_bdevs")
            if _stands_on(bdev, array.disk):
                raise UsageError(
                    f"bdev '{base_name}' stands on RAID '{name}' itself", field="base_bdev"
                )
            self._registry.require_unclaimed(bdev)
            sb = await self._superblock_of(bdev)
            if sb is not None:
                slot = self._slot_by(array, bdev, sb)
            await self._join(array, slot, bdev)

    def _slot_for(self, array: Array, bdev: Bdev | None) -> Slot | None:
        """Where SPDK would put a base that is asked for."""
        empty = [slot for slot in array.slots if slot.name is None and slot.bdev is None]
        if array.state == "configuring" and bdev is not None:
            for slot in empty:
                if slot.uuid == bdev.uuid:
                    return slot
        return next((slot for slot in empty if slot.uuid == NO_UUID), None)

    def _slot_by(self, array: Array, bdev: Bdev, sb: Superblock) -> Slot:
        """Where a bdev belongs that was a member before. Raises: AlreadyExists, UsageError."""
        if array.sb is None or sb.uuid != array.sb.uuid:
            raise _foreign(bdev, sb)
        entry = array.sb.member_of(bdev.uuid)
        slot = array.slots[entry.slot] if entry is not None else None
        if slot is None or slot.bdev is not None:
            raise UsageError(
                f"the superblock of RAID '{array.name}' has no place for bdev '{bdev.name}'",
                hint="overwrite the first MiB of the bdev to use it as a new one",
            )
        return slot

    async def _join(self, array: Array, slot: Slot, bdev: Bdev) -> None:
        """Under the array's lock. Raises: DrivebayError."""
        if array.state == "online" and isinstance(array, MirrorArray):
            await array.rejoin(slot, bdev)
        elif array.state == "configuring":
            array.take(slot, bdev)
            await array.complete()
        else:
            raise StateError(f"RAID '{array.name}' is {array.state} and takes no base")

    async def remove_base(self, name: str) -> None:
        """Take a base from its RAID. Raises: NotFound.

        Named by the uuid that its RAID still waits for, a mirror is begun without it.
        """
        bdev = self._find(name)
        for array in self:
            slot = array.slot_of(bdev) if bdev is not None else None
            if bdev is not None and slot is not None:
                await array.remove_member(bdev)
                return
            if bdev is None and isinstance(array, MirrorArray) and await array.give_up(name):
                return
        raise NotFound(f"bdev '{name[:80]}' is no member of a RAID", hint="see bdev_raid_get_bdevs")

    # Bdevs that arrive

    def _awaits(self, array: Array, bdev: Bdev) -> bool:
        if array.state != "configuring" or array.sb is not None:
            return False
        return any(slot.awaits(bdev) for slot in array.slots)

    def _awaited(self, bdev: Bdev) -> bool:
        return any(self._awaits(array, bdev) for array in self._arrays)

    async def _arrived(self, bdev: Bdev) -> None:
        for array in self:
            if not self._awaits(array, bdev):
                continue
            async with array.lock:
                slot = next((slot for slot in array.slots if slot.awaits(bdev)), None)
                if slot is None or array not in self._arrays:
                    continue
                try:
                    await self._refuse_foreign(array, bdev)
                    array.take(slot, bdev)
                    await array.complete()
                except DrivebayError as error:
                    _log.error("RAID '%s' can't use bdev '%s': %s", array.name, bdev.name, error)
            return

    async def examine(self, bdev: Bdev) -> None:
        """Take a bdev whose superblock says that it is a member."""
        try:
            sb = await read_superblock(self._registry, bdev, self._around.reactor())
            if sb is not None:
                await self._place(bdev, sb)
        except DrivebayError as error:
            _log.error("bdev '%s' becomes no member of a RAID: %s", bdev.name, error)

    async def _place(self, bdev: Bdev, sb: Superblock) -> None:
        """Raises: DrivebayError when it can't be the member that it says it is."""
        if sb.block_size != bdev.block_size:
            raise UsageError(f"its superblock is of blocks of {sb.block_size} bytes")
        array = self._by_uuid(sb.uuid)
        fresh = array is None
        if array is None:
            array = self._assemble(sb)
        async with array.lock:
            if array not in self._arrays:
                raise StateError(f"RAID '{array.name}' is being deleted")
            if array.sb is None:
                raise AlreadyExists(f"RAID '{array.name}' without superblocks has its uuid")
            if sb.seq > array.sb.seq:
                if array.state != "configuring":
                    raise InUse(f"RAID '{array.name}' is in use with older data")
                array.free_all()
                self._forget(array)
            else:
                await self._join_by(array, bdev, sb)
        if array not in self._arrays:
            await self._place(bdev, sb)
        elif fresh:
            self._look_again(array)

    def _by_uuid(self, uuid: UUID) -> Array | None:
        return next((array for array in self._arrays if array.uuid == uuid), None)

    def _assemble(self, sb: Superblock) -> Array:
        """A RAID as its superblock says, without members yet. Raises: DrivebayError."""
        strip_size_kb = sb.strip_size * sb.block_size // 1024
        check_shape(sb.level, strip_size_kb, sb.num_base_bdevs)
        if any(array.name == sb.name for array in self._arrays):
            raise AlreadyExists(f"another RAID is called '{sb.name}'")
        slots = [Slot(number) for number in range(sb.num_base_bdevs)]
        for member in sb.members:
            slot = slots[member.slot]
            slot.data_offset, slot.data_size = member.data_offset, member.data_size
            if member.state == CONFIGURED:
                slot.uuid = member.uuid
        return self._add(sb.name, sb.level, strip_size_kb, slots, sb.uuid, True, sb)

    async def _join_by(self, array: Array, bdev: Bdev, sb: Superblock) -> None:
        """Take a bdev with an equal or older superblock. Under ``lock``. Raises: DrivebayError."""
        assert array.sb is not None
        entry = array.sb.member_of(bdev.uuid)
        if entry is None:
            raise UsageError(f"RAID '{array.name}' does not list its uuid")
        slot = array.slots[entry.slot]
        if slot.bdev is bdev:
            return
        if slot.bdev is not None:
            raise AlreadyExists(f"its place in RAID '{array.name}' is taken")
        if array.state == "configuring" and entry.state != CONFIGURED:
            _log.info("bdev '%s' waits for RAID '%s' to be there", bdev.name, array.name)
            return
        if entry.state != CONFIGURED:
            _refuse_rival(array.sb, sb, entry)
            if array.rebuild is not None:
                _log.info("bdev '%s' waits for a rebuild of RAID '%s'", bdev.name, array.name)
                return
            slot.data_offset = entry.data_offset
        await self._join(array, slot, bdev)

    def _look_again(self, array: Array | None) -> None:
        """Bdevs that came before they could be used may be now."""
        if array is None or array.sb is None:
            return
        for member in array.sb.members:
            if array.slots[member.slot].bdev is None and member.uuid not in array.shunned:
                bdev = self._find(str(member.uuid))
                if bdev is None or self._registry.claims(bdev).kind is not None:
                    continue
                if self._registry.examining.may_examine(bdev):
                    self._registry.spawn(self.examine(bdev))


def _foreign(bdev: Bdev, sb: Superblock) -> AlreadyExists:
    return AlreadyExists(
        f"bdev '{bdev.name}' has the superblock of RAID '{sb.name}' ({sb.uuid})",
        hint="delete that RAID with clear_sb, or overwrite the first MiB of the bdev",
    )


def _refuse_rival(ours: Superblock, theirs: Superblock, entry: Member) -> None:
    """Raises: UsageError when a member went on alone while ours did: both have other data."""
    mine = theirs.member_at(entry.slot)
    if mine is None or mine.state != CONFIGURED:
        return
    for member in ours.members:
        other = theirs.member_at(member.slot)
        if member.state == CONFIGURED and other is not None and other.state != CONFIGURED:
            raise UsageError(
                f"RAID '{ours.name}' was used without it, and it without the others",
                hint="keep one half: overwrite the first MiB of the other and add it anew",
            )


def _stands_on(bdev: Bdev, below: Bdev | None) -> bool:
    """Whether ``bdev`` is ``below``, or has it somewhere beneath it."""
    if below is None:
        return False
    return bdev is below or any(base is not None and _stands_on(base, below) for base in bdev.bases)
