"""raid1: members that fail are done without, others take their place and are rebuilt.

What the reactors meet comes here as trouble(): a leg failed a write, which then waits until
the other members' superblocks say so; or a leg could not read what another one had, and gets
it written. The last member is never done without for an error: its errors are the guest's.
Context: control.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any, cast

from drivebay.bdev.raid.array import Array
from drivebay.bdev.raid.member import NO_UUID, Slot
from drivebay.bdev.raid.rebuild import Copier, Rebuild, TargetLost
from drivebay.bdev.raid.superblock import CONFIGURED, FAILED, MISSING, Member
from drivebay.errors import DrivebayError, StateError, UsageError

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.bdev.raid.mirror import MirrorBdev, MirrorChannel

__all__ = ["MirrorArray"]

_log = logging.getLogger(__name__)


class MirrorArray(Array):
    """A RAID each of whose members has everything."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._asked = False
        self._attending: asyncio.Task[None] | None = None
        self._repairing: set[MirrorChannel] = set()

    @property
    def mirror(self) -> MirrorBdev | None:
        """The disk, while there is one."""
        return cast("MirrorBdev | None", self.disk)

    # Without a member

    async def drop(self, doomed: list[Slot], state: int) -> bool:
        """Go on without members, which the others' superblocks say first. Under ``lock``.

        Returns False when no member is left that could say it.
        """
        while True:
            if not [slot for slot in self.sources if slot not in doomed]:
                return False
            for slot in doomed:
                self.note(slot, state)
            failed = await self.save(without=doomed) if self.sb is not None else []
            if self.rebuild is not None and self.rebuild.target in failed:
                self.rebuild.stop("its superblock can't be written")
                failed.remove(self.rebuild.target)
            if not failed:
                break
            doomed = doomed + failed
        for slot in doomed:
            why = "it failed" if state == FAILED else "it is removed"
            _log.warning("RAID '%s' goes on without '%s': %s", self.name, slot.name, why)
            self.shunned.add(slot.uuid)
            await self._detach(slot)
        return True

    async def _detach(self, slot: Slot) -> None:
        if self.disk is not None:
            with contextlib.suppress(StateError):  # the disk is being removed
                await self.registry.replace_base(self.disk, slot.number, None)
        self.operational -= 1
        self.free(slot)

    # What channels tell

    def trouble(self) -> None:
        """A channel has failed legs, or something to repair."""
        self._asked = True
        if self._attending is None:
            self._attending = self.registry.spawn(self._attend())

    async def _attend(self) -> None:
        try:
            while self._asked:
                self._asked = False
                await self._judge()
        except DrivebayError:
            _log.exception("RAID '%s': what its members failed can't be judged", self.name)
        finally:
            self._attending = None

    async def _judge(self) -> None:
        if self.mirror is None:
            return
        channels = self.mirror.live_channels()
        failed: set[int] = set()
        for channel in channels:
            await channel.collect()
            failed.update(channel.failed_legs())
        if failed:
            async with self.lock:
                if self.state == "online":
                    await self._fail([self.slots[leg] for leg in sorted(failed)])
        for channel in channels:
            await channel.settle(self.state == "online" or not failed)
        for channel in channels:
            wanted = channel.wanted_repair()
            if wanted is not None and channel not in self._repairing:
                self._repairing.add(channel)
                self.registry.spawn(self._repair(channel, *wanted))
        if self.state == "offline":  # not awaited: the disk's end may wait for us to judge
            self.registry.spawn(self.end_if_offline())

    async def _fail(self, slots: Iterable[Slot]) -> None:
        """Members failed writes: do without them, all but the last. Under ``lock``."""
        if self.rebuild is not None and self.rebuild.target in slots:
            self.rebuild.stop(f"bdev '{self.rebuild.target.name}' failed a write")
        sources = self.sources
        doomed = [slot for slot in slots if slot in sources]
        if len(doomed) == len(sources):
            del doomed[:1]
        if doomed and not await self.drop(doomed, FAILED):
            _log.error("RAID '%s': no member can note that others failed", self.name)
            self.state = "offline"

    async def _repair(self, channel: MirrorChannel, leg: int, offset: int, length: int) -> None:
        """Write what a leg could not read from another one, and read it again."""
        slot, copier = self.slots[leg], Copier(self)
        bdev = slot.bdev
        try:
            async with self.window(offset, offset + length):
                if slot not in self.sources:
                    return
                await copier.copy(slot, offset, offset + length)
                await copier.read_again(slot, offset, length)
            _log.warning(
                "RAID '%s': '%s' could not read %d bytes at %d; they are written anew",
                self.name, slot.name, length, offset,
            )  # fmt: skip
        except TargetLost as error:
            _log.error("RAID '%s': '%s' stays unreadable: %s", self.name, slot.name, error)
            async with self.lock:
                if self.state == "online" and slot.bdev is bdev:
                    await self._fail([slot])
            await self.end_if_offline()
        except DrivebayError as error:
            _log.error("RAID '%s': '%s' is not repaired: %s", self.name, slot.name, error)
        finally:
            await copier.close()
            channel.end_repair()
            self._repairing.discard(channel)

    @contextlib.asynccontextmanager
    async def window(
        self, start: int, end: int, *, frontier: int | None = None
    ) -> AsyncIterator[None]:
        """Have no write to these bytes of the disk in flight, and hold new ones.

        ``frontier``: up to where the target of a rebuild is written from now on.
        Raises: StateError when there is no disk.
        """
        async with self.window_lock:
            mirror = self.mirror
            if mirror is None:
                raise StateError(f"RAID '{self.name}' has no disk any more")
            try:
                for answer in mirror.set_window(start, end, frontier):
                    await answer
                yield
            finally:
                for answer in mirror.set_window(0, 0, frontier):
                    await answer

    # A new member

    async def rejoin(self, slot: Slot, bdev: Bdev) -> None:
        """Take a bdev into an empty slot of a disk, and rebuild it. Under ``lock``.

        Raises: InUse, UsageError, HostError, StateError when another rebuild is under way.
        """
        mirror = self.mirror
        if mirror is None or self.rebuild is not None:
            raise StateError(f"RAID '{self.name}' is being rebuilt", hint="wait for its end")
        missing = sorted(mirror.io_types - bdev.io_types - {"flush"})
        if missing:
            raise UsageError(
                f"bdev '{bdev.name}' has no {', '.join(missing)}, which RAID '{self.name}' has",
                field="base_bdev",
                hint="use a bdev like the other members",
            )
        self.take(slot, bdev)
        self.operational += 1
        self.rebuild = Rebuild(self, slot, *self.around.options())
        try:
            await self._attach(mirror, slot, bdev)
        except BaseException:
            self.rebuild = None
            await self._detach(slot)
            raise
        self.rebuild.task = self.registry.spawn(self.rebuild.run())

    async def _attach(self, mirror: MirrorBdev, slot: Slot, bdev: Bdev) -> None:
        if self.sb is not None:
            if self.sb.member_at(slot.number) is None:
                self.sb.members.append(
                    Member(slot.uuid, slot.data_offset, slot.data_size, MISSING, slot.number)
                )
            self.note(slot, MISSING)  # all data are not there before the end
            if slot in await self.save():
                raise UsageError(f"no superblock can be written on bdev '{bdev.name}'")
        mirror.place_data(slot.number, slot.data_offset)
        for answer in mirror.set_target(slot.number):
            await answer
        await self.registry.replace_base(mirror, slot.number, bdev)

    async def give_up(self, uuid: str) -> bool:
        """Begin without a member that is waited for. Returns: was it this one's?

        Raises: DrivebayError when that can't be.
        """
        async with self.lock:
            for slot in self.slots:
                if self.state != "configuring" or str(slot.uuid) != uuid.lower():
                    continue
                if slot.bdev is None and self.sb is not None and self.operational > 1:
                    self.note(slot, MISSING)
                    slot.uuid = NO_UUID
                    self.operational -= 1
                    await self.complete()
                    return True
        return False

    async def rebuild_ended(self, rebuild: Rebuild, failure: str | None) -> None:
        """From the rebuild's task: its target is a member like the others, or none."""
        async with self.lock:
            slot = rebuild.target
            if self.state != "online" or self.mirror is None:
                failure = failure or "the disk is gone"
            if failure is None and self.sb is not None:
                self.note(slot, CONFIGURED)
                if slot in await self.save():
                    failure = "its superblock can't be written"
                    self.note(slot, MISSING)
                    await self.save(without=[slot])
            if failure is not None:
                _log.error("RAID '%s': no rebuild of '%s': %s", self.name, slot.name, failure)
                self.shunned.add(slot.uuid)
                await self._detach(slot)
            self.rebuild = None
            if self.mirror is not None:
                for answer in self.mirror.set_target(None):
                    await answer
        if failure is None:
            _log.info("RAID '%s': rebuild of '%s' is done", self.name, slot.name)
            self.around.completed(self)
