"""One front end's connection: its messages, one after another, until it hangs up.

Context: control, one task per session. The rhythm of each message is fixed:
look it up in the state table, read its payload, count its descriptors, handle
it, settle the state, answer. A handler may wait (for a reactor, for mmap); that
holds up this session and nobody else, and a hang-up is noticed meanwhile.

Whatever a front end gets wrong raises PeerError: the session ends with one
logged sentence. After the end its queues drain in the background, however long
the disk takes, and only then is the guest's memory unmapped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from drivebay.errors import DrivebayError, PeerError
from drivebay.reactor.mailbox import Answer
from drivebay.vhost.connection import Connection, HungUp
from drivebay.vhost.descriptors import Received, close_all
from drivebay.vhost.handlers import HANDLERS, Device, Handlers, Refused
from drivebay.vhost.migration import Migration
from drivebay.vhost.recovery import Recovery
from drivebay.vhost.ring import Coalescing, Ring
from drivebay.vhost.rings import Rings
from drivebay.vhost.state import State, check_fds, has_own_reply, lookup, settle
from drivebay.wire.vhost_user import Header, ProtocolFeature, Request, VringState, pack_u64

__all__ = ["Session"]

_log = logging.getLogger(__name__)

SLOW_S: Final = 5.0
HANGUP_LOOK_S: Final = 0.1

_OK: Final = pack_u64(0)
_FAILED: Final = pack_u64(1)


class Session:
    """One connection of a front end to a device."""

    def __init__(self, connection: Connection, device: Device, vid: int, session_id: int) -> None:
        self.vid = vid
        self.id = session_id
        self.name = f"{device.name}s{vid}"
        self.state = State.NEGOTIATING
        self.surplus_fds = 0
        self.ended = asyncio.Event()  # the socket is closed; it may drain for long yet
        self._connection = connection
        self._device = device
        self._config_change_owed = False
        self._end_reason: str | None = None
        self._changing = asyncio.Lock()
        self._handlers = Handlers(device, self.name)
        self.rings = Rings(
            session_id,
            device,
            self._handlers.terms,
            self._wait,
            self._ring_broken,
            self._memory_broken,
            self._ring_suspended,
        )
        self._handlers.rings = self.rings
        self._migration = self._handlers.migration = Migration(self.rings, self._log_broken)
        self._handlers.recovery = Recovery(device, self._inflight_broken)
        self.rings.recovery = self._handlers.recovery

    # Life -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the connection until it ends, then drain and give everything back."""
        self._device.note(f"session '{self.name}' begins")
        try:
            while True:
                await self._one_message()
        except HungUp as hang_up:
            if self._end_reason is not None:
                self._device.complain(f"session '{self.name}' ends: {self._end_reason}")
            else:
                self._device.note(f"session '{self.name}' ends: {hang_up}")
        except DrivebayError as error:
            hint = f" ({error.hint})" if error.hint else ""
            self._device.complain(f"session '{self.name}' ends: {self._end_reason or error}{hint}")
        finally:
            self._connection.close()
            self._handlers.close()
            self.ended.set()
            async with self._changing:
                await self.rings.drain(self._wait_to_the_end)
                await self._migration.close()
                await self._handlers.recovery.drop()

    def end(self, reason: str) -> None:
        """Make run() come to its end soon."""
        self._end_reason = self._end_reason or reason
        self._connection.shut_down()

    async def _one_message(self) -> None:
        received = Received()
        try:
            header = await self._connection.receive_header(received)
            try:
                await self._take(header, received)
            except Refused as refusal:
                self._device.complain(f"session '{self.name}' was refused: {refusal}")
                await self._acknowledge(header, _FAILED)
            except HungUp:
                raise
            except DrivebayError:
                if self._must_acknowledge(header):
                    self._connection.try_reply(header.request, _FAILED)
                raise
        finally:
            received.close()

    async def _take(self, header: Header, received: Received) -> None:
        """From the header on. Raises: PeerError, HostError, HungUp, Refused."""
        row = lookup(self.state, header, self._handlers.protocol)
        payload = await self._connection.receive_payload(header.size, received)
        wanted = check_fds(header.request, row, payload, len(received))
        self.surplus_fds += received.close_surplus(wanted)
        request = Request(header.request)
        async with self._changing:
            if row.stopped_ring:
                self._require_stopped(request, payload)
            answer = await HANDLERS[request](self._handlers, payload, received)
            features_set = self._handlers.features is not None
            self.state = settle(request, self.state, features_set, self.rings.started)
        self._send_owed_config_change()
        if row.replies:
            try:
                await self._connection.reply(request, answer or b"", self._handlers.fd_to_send)
            finally:
                close_all([self._handlers.fd_to_send])
                self._handlers.fd_to_send = -1
        else:
            await self._acknowledge(header, _OK)

    async def _acknowledge(self, header: Header, code: bytes) -> None:
        if self._must_acknowledge(header):
            await self._connection.reply(header.request, code)

    def _must_acknowledge(self, header: Header) -> bool:
        asked = header.need_reply and ProtocolFeature.REPLY_ACK in self._handlers.protocol
        return asked and not has_own_reply(header.request)

    def _require_stopped(self, request: Request, payload: bytes) -> None:
        index = VringState.parse(payload).index
        if self.rings[index].started:
            raise PeerError(
                f"{request.name} for queue {index}, which is started "
                "(GET_VRING_BASE must stop it first)"
            )

    # Waiting ----------------------------------------------------------------------------

    async def _wait(self, answers: Sequence[Answer], why: str) -> None:
        """Wait for the data plane. Raises: HungUp when the front end goes away meanwhile."""
        await self._wait_looking(answers, why, self._raise_if_hung_up)

    async def _wait_to_the_end(self, answers: Sequence[Answer], why: str) -> None:
        """Wait for the data plane when nobody is there any more who could hang up."""
        await self._wait_looking(answers, why, lambda: None)

    async def _wait_looking(
        self, answers: Sequence[Answer], why: str, look: Callable[[], None]
    ) -> None:
        pending = {asyncio.ensure_future(_until_done(a)) for a in answers if not a.done}
        waited_s = 0.0
        warned = False
        while pending:
            _done, pending = await asyncio.wait(pending, timeout=HANGUP_LOOK_S)
            waited_s += HANGUP_LOOK_S
            if pending and waited_s >= SLOW_S and not warned:
                warned = True
                _log.warning(
                    "session '%s' has waited %d s %s: bdev '%s' is slow",
                    *(self.name, SLOW_S, why, self._device.disk_name),
                )
            look()

    def _raise_if_hung_up(self) -> None:
        if self._connection.hung_up():
            raise HungUp("the front end hung up while it was waited for")

    # What the data plane reports --------------------------------------------------------

    def _ring_broken(self, ring: Ring, cause: str) -> None:
        self._device.complain(
            f"controller '{self._device.name}', session '{self.name}': queue {ring.index} is "
            f"given up: {cause}"
        )

    def _memory_broken(self) -> None:
        self.end("its guest memory was truncated while it was in use")

    def _log_broken(self) -> None:
        self.end("its dirty log was truncated while it was in use")

    def _inflight_broken(self) -> None:
        self.end("its inflight region was truncated while it was in use")

    def _ring_suspended(self, ring: Ring) -> None:
        self._device.note(
            f"session '{self.name}': queue {ring.index} is suspended until its memory is back"
        )

    # What the controller asks -----------------------------------------------------------

    @property
    def connected(self) -> bool:
        """False as soon as the front end is gone, even if nothing of that was read yet."""
        return not self.ended.is_set() and not self._connection.hung_up()

    @property
    def migrating(self) -> bool:
        """Whether what is written into the guest's memory is marked in a dirty log."""
        return self._migration.active

    def config_changed(self) -> None:
        """Tell the front end, if it opened a channel for that."""
        self._config_change_owed = True
        self._send_owed_config_change()

    def _send_owed_config_change(self) -> None:
        # "Suspended device state": while all rings are stopped no message may be sent.
        backend = self._handlers.backend
        if self._config_change_owed and backend is not None and self.state is State.RUNNING:
            self._config_change_owed = False
            backend.config_changed()

    async def set_coalescing(self, coalescing: Coalescing) -> None:
        """Applied to queues that run, at once; those that start later ask for it."""
        async with self._changing:
            if not self.ended.is_set():
                await self.rings.set_coalescing(coalescing)

    async def rebalance(self) -> None:
        """The disk's reactors have changed: move the queues."""
        async with self._changing:
            if not self.ended.is_set():
                await self.rings.rebalance(self._wait_to_the_end)

    async def leave_disk(self) -> None:
        """Hot remove: let go of the bdev; open_channel gives a removed one from now on."""
        async with self._changing:
            if not self.ended.is_set():
                await self.rings.leave_disk(self._wait_to_the_end)


async def _until_done(answer: Answer) -> None:
    await answer
