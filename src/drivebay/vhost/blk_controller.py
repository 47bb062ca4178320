"""A vhost-user-blk controller: one bdev, one socket, and everybody who is connected to it.

Context: control. Several sessions may use one controller at the same time, as
several virtual machines may open one disk. When the bdev goes away the
controller and its sessions stay: the disk has no capacity then, and I/O fails.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from drivebay.bdev.base import Bdev, Channel
from drivebay.errors import DrivebayError, InUse, StateError
from drivebay.reactor.reactor import Reactor
from drivebay.vhost.connection import Connection
from drivebay.vhost.handlers import SERIAL_BYTES
from drivebay.vhost.limited_log import LimitedLog
from drivebay.vhost.listening_socket import ListeningSocket
from drivebay.vhost.removed_disk import RemovedDisk
from drivebay.vhost.ring import Coalescing
from drivebay.vhost.session import Session
from drivebay.wire.vhost_user import MAX_QUEUES
from drivebay.wire.virtio_blk import SECTOR_BYTES, BlkConfig, BlkFeature, feature_mask

if TYPE_CHECKING:
    from drivebay.bdev.base import Listener

__all__ = ["TRANSPORT", "BdevSource", "BlkController", "SessionNumbers"]

_log = logging.getLogger(__name__)

TRANSPORT: Final = "vhost_user_blk"
SEG_MAX: Final = 126  # with header and status a request fills a ring of 128
MAX_RANGE_SECTORS: Final = 32768  # of one discard or write-zeroes segment: 16 MiB
ACCEPT_PAUSE_S: Final = 0.5


class BdevSource(Protocol):
    """What of the bdev registry a controller uses."""

    async def open_channel(self, bdev: Bdev, reactor: Reactor) -> Channel: ...
    async def close_channel(self, channel: Channel) -> None: ...
    def subscribe(self, bdev: Bdev, listener: Listener) -> None: ...
    def unsubscribe(self, bdev: Bdev, listener: Listener) -> None: ...


class SessionNumbers:
    """The lowest free number for each session of the process; used again after its end."""

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def take(self) -> int:
        number = next(n for n in range(len(self._taken) + 1) if n not in self._taken)
        self._taken.add(number)
        return number

    def give_back(self, number: int) -> None:
        self._taken.discard(number)


def offered_features(bdev: Bdev, readonly: bool, packed_ring: bool) -> int:
    """The virtio features for a bdev. SIZE_MAX is not among them: segments have no limit.

    virtio 1.3 §5.2.5.2: a device that offers CONFIG_WCE must offer FLUSH.
    """
    features = feature_mask(
        BlkFeature.SEG_MAX,
        BlkFeature.BLK_SIZE,
        BlkFeature.TOPOLOGY,
        BlkFeature.MQ,
        BlkFeature.RING_INDIRECT_DESC,
        BlkFeature.RING_EVENT_IDX,
        BlkFeature.VERSION_1,
    )
    if packed_ring:
        features |= feature_mask(BlkFeature.RING_PACKED)
    if "flush" in bdev.io_types:
        features |= feature_mask(BlkFeature.FLUSH, BlkFeature.CONFIG_WCE)
    if readonly:
        return features | feature_mask(BlkFeature.RO)
    if "unmap" in bdev.io_types:
        features |= feature_mask(BlkFeature.DISCARD)
    if "write_zeroes" in bdev.io_types:
        features |= feature_mask(BlkFeature.WRITE_ZEROES)
    return features


class BlkController:
    """One controller; Controllers makes and keeps them."""

    def __init__(
        self,
        name: str,
        bdev: Bdev,
        *,
        readonly: bool,
        packed_ring: bool,
        socket_uid: int | None,
        serial: str | None,
        cpumask: int,
        thread_id: int,
        reactors: Sequence[Reactor],
        listening: ListeningSocket,
        source: BdevSource,
        removed: RemovedDisk,
        numbers: SessionNumbers,
    ) -> None:
        """``reactors`` are those of the cpumask, the one for the first queue in front.

        ``thread_id`` is its number among the threads that management shows: in SPDK's
        words a controller is one.
        """
        self.name = name
        self.bdev: Bdev | None = bdev
        self.readonly = readonly or bdev.readonly
        self.cpumask = cpumask
        self.coalescing = Coalescing()
        self.thread_id = thread_id
        self.made_at = time.monotonic()
        self.disk_name = bdev.name
        self.serial = (bdev.name if serial is None else serial).encode()[:SERIAL_BYTES]
        self.sessions: dict[Session, asyncio.Task[None]] = {}
        self._asked_readonly = readonly
        self._packed_ring = packed_ring
        self._socket_uid = socket_uid
        self._asked_serial = serial
        self._features = offered_features(bdev, self.readonly, packed_ring)
        self._block_size = bdev.block_size
        self._unmaps = "unmap" in bdev.io_types
        self._reactors = tuple(reactors)
        self._listening = listening
        self._source = source
        self._removed = removed
        self._numbers = numbers
        self._complaints = LimitedLog(_log, logging.WARNING)
        self._notes = LimitedLog(_log, logging.INFO)
        self._next_session_id = 0
        self._busy_ticks = 0  # of sessions that are over
        self._pause: asyncio.TimerHandle | None = None
        source.subscribe(bdev, self._on_bdev_event)
        self._listen()

    @property
    def socket_path(self) -> str:
        return str(self._listening.path)

    # What a session asks (handlers.Device) ----------------------------------------------

    def features(self) -> int:
        return self._features

    def config_space(self, writeback: bool) -> bytes:
        """``struct virtio_blk_config``; the capacity is 0 once the bdev is gone."""
        bdev = self.bdev
        discards = self._features >> BlkFeature.DISCARD & 1
        zeroes = self._features >> BlkFeature.WRITE_ZEROES & 1
        return BlkConfig(
            capacity_sectors=bdev.num_blocks * bdev.block_size // SECTOR_BYTES if bdev else 0,
            seg_max=SEG_MAX,
            blk_size=self._block_size,
            num_queues=MAX_QUEUES,
            writeback=writeback,
            min_io_size_blocks=1,
            max_discard_sectors=MAX_RANGE_SECTORS * discards,
            max_discard_seg=discards,
            discard_sector_alignment=self._block_size // SECTOR_BYTES * discards,
            max_write_zeroes_sectors=MAX_RANGE_SECTORS * zeroes,
            max_write_zeroes_seg=zeroes,
            write_zeroes_may_unmap=bool(zeroes) and self._unmaps,
        ).pack()

    def complain(self, sentence: str) -> None:
        self._complaints.add(sentence)

    def note(self, sentence: str) -> None:
        self._notes.add(sentence)

    def reactor_for(self, session_id: int, index: int) -> Reactor:
        """Queues go round the reactors; each session begins at the next one."""
        return self._reactors[(session_id + index) % len(self._reactors)]

    async def open_channel(self, reactor: Reactor) -> Channel:
        if self.bdev is not None:
            try:
                return await self._source.open_channel(self.bdev, reactor)
            except StateError as being_removed:
                _log.info("controller '%s': %s", self.name, being_removed)
        return await self._removed.channel(reactor)

    async def close_channel(self, channel: Channel) -> None:
        if not self._removed.owns(channel):
            await self._source.close_channel(channel)

    # Sessions ---------------------------------------------------------------------------

    def _listen(self) -> None:
        self._pause = None
        asyncio.get_running_loop().add_reader(self._listening.socket, self._accept)

    def _stop_listening(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        asyncio.get_running_loop().remove_reader(self._listening.socket)
        self._listening.close()

    def _accept(self) -> None:
        """Take one waiting connection; the loop calls again while there are more."""
        try:
            sock, _address = self._listening.socket.accept()
        except BlockingIOError:
            return  # it gave up waiting
        except OSError as error:
            # Most likely there are no descriptors left: it waits in the backlog meanwhile.
            self.complain(f"controller '{self.name}' cannot accept a connection: {error}")
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listening.socket)
            self._pause = loop.call_later(ACCEPT_PAUSE_S, self._listen)
            return
        self.begin_session(sock)

    def begin_session(self, sock: socket.socket) -> Session:
        """Serve one connected socket, which is the session's from now on."""
        session = Session(Connection(sock), self, self._numbers.take(), self._next_session_id)
        self._next_session_id += 1
        task = asyncio.create_task(session.run())
        self.sessions[session] = task
        task.add_done_callback(lambda done: self._session_done(session, done))
        return session

    def _session_done(self, session: Session, task: asyncio.Task[None]) -> None:
        del self.sessions[session]
        self._numbers.give_back(session.vid)
        self._busy_ticks += session.rings.busy_ticks
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("session '%s' ended by a fault of ours", session.name, exc_info=error)

    def connected(self) -> list[Session]:
        return [session for session in self.sessions if session.connected]

    # The bdev's events ------------------------------------------------------------------

    async def _on_bdev_event(self, _bdev: Bdev, event: str) -> None:
        if event == "remove":
            self.bdev = None
            _log.warning(
                "controller '%s' has lost bdev '%s': its disk has no capacity now",
                *(self.name, self.disk_name),
            )
        for session in self.connected():
            session.config_changed()
        if event == "remove":
            await asyncio.gather(*(_or_end(s, s.leave_disk()) for s in self.connected()))

    # Where and how it is served ------------------------------------------------------------

    @property
    def reactors(self) -> tuple[Reactor, ...]:
        """Those that may serve it, the first queue's in front."""
        return self._reactors

    @property
    def busy_ticks(self) -> int:
        """For how long reactors worked for it."""
        return self._busy_ticks + sum(session.rings.busy_ticks for session in self.sessions)

    async def move(self, cpumask: int, reactors: Sequence[Reactor]) -> None:
        """Serve it on other reactors from now on; returns when all queues have moved."""
        self.cpumask = cpumask
        self._reactors = tuple(reactors)
        await asyncio.gather(*(_or_end(s, s.rebalance()) for s in self.connected()))

    async def set_coalescing(self, coalescing: Coalescing) -> None:
        self.coalescing = coalescing
        changes = (_or_end(s, s.set_coalescing(coalescing)) for s in self.connected())
        await asyncio.gather(*changes)

    # Management -------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What vhost_get_controllers shows; ``lingering`` only while there is any.

        A lingering session has ended, but its last requests are still with the bdev.
        """
        shown = {
            "ctrlr": self.name,
            "cpumask": f"{self.cpumask:#x}",
            **self.coalescing._asdict(),
            "socket": self.socket_path,
            "sessions": [_describe_session(session) for session in self.connected()],
            "backend_specific": {
                "block": {
                    "readonly": self.readonly,
                    "bdev": self.bdev.name if self.bdev is not None else None,
                    "transport": TRANSPORT,
                }
            },
        }
        lingering = sum(session.ended.is_set() for session in self.sessions)
        return {**shown, "lingering": lingering} if lingering else shown

    def save(self) -> list[tuple[str, dict[str, Any]]]:
        """The RPC calls that make it again; none when its bdev is gone."""
        if self.bdev is None:
            return []
        made = {
            "ctrlr": self.name,
            "dev_name": self.bdev.name,
            "cpumask": f"{self.cpumask:x}",
            "readonly": self._asked_readonly,
            "transport": TRANSPORT,
        }
        # SPDK does not save it, and its guests come back without; here it survives a restart.
        if self._packed_ring:
            made["packed_ring"] = True
        if self._socket_uid is not None:
            made["socket_uid"] = self._socket_uid
        if self._asked_serial is not None:
            made["serial"] = self._asked_serial
        calls: list[tuple[str, dict[str, Any]]] = [("vhost_create_blk_controller", made)]
        if self.coalescing.delay_base_us:
            told = {"ctrlr": self.name, **self.coalescing._asdict()}
            calls.append(("vhost_controller_set_coalescing", told))
        return calls

    def refuse_if_connected(self) -> None:
        """Raises: InUse."""
        count = len(self.connected())
        if count:
            raise InUse(
                f"controller '{self.name}' has {count} connected session{'s' * (count > 1)}",
                hint='disconnect, or call vhost_delete_controller with "force": true',
            )

    async def close(self, on_draining: Callable[[asyncio.Task[None]], None]) -> None:
        """Stop listening and end all sessions; returns when their sockets are closed.

        What still drains then is handed to ``on_draining``.
        """
        self._stop_listening()
        if self.bdev is not None:
            self._source.unsubscribe(self.bdev, self._on_bdev_event)
        for session, task in list(self.sessions.items()):
            on_draining(task)
            session.end("the controller is deleted")
        await asyncio.gather(*(session.ended.wait() for session in list(self.sessions)))


async def _or_end(session: Session, change: Awaitable[None]) -> None:
    """Make a change to one session of several; it ends if that fails."""
    try:
        await change
    except DrivebayError as error:
        session.end(str(error))


def _describe_session(session: Session) -> dict[str, Any]:
    """``migrating`` is there only while the guest's memory is copied elsewhere."""
    started = session.rings.started
    shown = {
        "vid": session.vid,
        "id": session.id,
        "name": session.name,
        "started": started > 0,
        "max_queues": started,
        "inflight_task_cnt": session.rings.inflight,
    }
    return {**shown, "migrating": True} if started and session.migrating else shown
