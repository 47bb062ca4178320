"""What each vhost-user message does: one handler per row of the state table.

Context: control, under the session's lock. By the time a handler runs, the state
table has allowed the message, its payload has a possible length, and it has at
least the descriptors it needs. A handler checks the values, changes the session,
and returns the payload of the answer if the message has one of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from drivebay.errors import DrivebayError, PeerError
from drivebay.memory.guest_memory import Region
from drivebay.vhost.backend_channel import BackendChannel
from drivebay.vhost.descriptors import Received, check_eventfd, take_stream_socket
from drivebay.vhost.migration import Migration
from drivebay.vhost.recovery import Content, Recovery
from drivebay.vhost.ring import Coalescing, DeviceTerms, Ring
from drivebay.vhost.rings import Disk, Rings
from drivebay.vhost.state import OFFERED_PROTOCOL_FEATURES
from drivebay.wire.vhost_user import (
    MAX_CONFIG_BYTES,
    MAX_QUEUES,
    MIGRATION_CONFIG,
    VHOST_F_LOG_ALL,
    VHOST_USER_F_PROTOCOL_FEATURES,
    ConfigAccess,
    Inflight,
    LogArea,
    MemoryRegion,
    ProtocolFeature,
    Request,
    VringAddr,
    VringFile,
    VringState,
    feature_names,
    pack_u64,
    parse_mem_table,
    parse_single_region,
    parse_u64,
)
from drivebay.wire.virtio_blk import WRITEBACK_OFFSET, BlkFeature

__all__ = ["HANDLERS", "MAX_MEM_SLOTS", "SERIAL_BYTES", "Device", "Handlers", "Refused"]

MAX_MEM_SLOTS: Final = 32
STATUS_NEEDS_RESET: Final = 0x40  # virtio 1.3 §2.1
# What a session offers besides the device's own features.
SESSION_FEATURES: Final = 1 << VHOST_F_LOG_ALL | 1 << VHOST_USER_F_PROTOCOL_FEATURES
SERIAL_BYTES: Final = 20


class Refused(DrivebayError):
    """Not granted, but nothing is broken either: answered non-zero, and the session goes on."""


class Device(Disk, Protocol):
    """What a session serves; the controller is one."""

    @property
    def name(self) -> str: ...
    @property
    def bdev(self) -> Content | None:
        """None after it was removed."""

    @property
    def readonly(self) -> bool: ...
    @property
    def disk_name(self) -> str:
        """The bdev's name, for logs."""

    @property
    def serial(self) -> bytes:
        """The serial number that guests see, at most SERIAL_BYTES."""

    @property
    def coalescing(self) -> Coalescing: ...
    def features(self) -> int:
        """The virtio features to offer."""

    def config_space(self, writeback: bool) -> bytes:
        """The configuration space, with this session's own cache mode."""

    def complain(self, sentence: str) -> None:
        """Log what a front end did wrong, at a limited rate."""

    def note(self, sentence: str) -> None:
        """Log what a front end did, at a limited rate."""


class Handlers:
    """What was negotiated with one front end, and the messages that change it."""

    def __init__(self, device: Device, session_name: str) -> None:
        self.features: int | None = None
        self.protocol = ProtocolFeature(0)
        self.backend: BackendChannel | None = None
        self.rings: Rings  # set by the session, which these three report to
        self.migration: Migration
        self.recovery: Recovery
        self.fd_to_send = -1  # goes with the answer to the message that is handled, and is closed
        self._device = device
        self._name = session_name
        self._status = 0
        self._writeback = True

    def terms(self) -> DeviceTerms:
        """What a queue that starts now must know."""
        return DeviceTerms(
            features=self.features or 0,
            readonly=self._device.readonly,
            write_through=not self.writes_back(),
            serial=self._device.serial,
            coalescing=self._device.coalescing,
        )

    def close(self) -> None:
        if self.backend is not None:
            self.backend.close()

    # Negotiation ------------------------------------------------------------------------

    async def _get_features(self, _payload: bytes, _fds: Received) -> bytes:
        return pack_u64(self._device.features() | SESSION_FEATURES)

    async def _set_features(self, payload: bytes, _fds: Received) -> None:
        features = parse_u64(payload)
        never_offered = features & ~(self._device.features() | SESSION_FEATURES)
        if never_offered:
            raise PeerError(
                f"SET_FEATURES with {feature_names(never_offered)}, which were not offered"
            )
        changed = (features ^ (self.features or 0)) & ~(1 << VHOST_F_LOG_ALL)
        if self.rings.started and changed:
            raise PeerError(
                f"SET_FEATURES changes {feature_names(changed)} while rings are started"
            )
        running = self.rings.started > 0
        self.features = features
        await self.migration.set_logging(bool(features >> VHOST_F_LOG_ALL & 1))
        # A migration switches logging by this message, which must not enable a ring again.
        if running:
            return
        if not features >> VHOST_USER_F_PROTOCOL_FEATURES & 1:
            await self.rings.enable_all()

    async def _get_protocol_features(self, _payload: bytes, _fds: Received) -> bytes:
        return pack_u64(OFFERED_PROTOCOL_FEATURES)

    async def _set_protocol_features(self, payload: bytes, _fds: Received) -> None:
        features = parse_u64(payload)
        never_offered = features & ~OFFERED_PROTOCOL_FEATURES
        if never_offered:
            raise PeerError(
                f"SET_PROTOCOL_FEATURES with {feature_names(never_offered)}, which were not offered"
            )
        self.protocol = ProtocolFeature(features)

    async def _get_queue_num(self, _payload: bytes, _fds: Received) -> bytes:
        return pack_u64(MAX_QUEUES)

    async def _ignore(self, _payload: bytes, _fds: Received) -> None:
        """SET_OWNER needs nothing of us; RESET_OWNER is to be ignored."""

    async def _reset_device(self, _payload: bytes, _fds: Received) -> None:
        # The cache mode stays: virtio 1.3 §5.2.5 leaves it open, and the front end, which
        # answers the guest from a copy of its own, does not set it again after a reset.
        await self.rings.reset()
        await self.recovery.drop()  # a new one comes with the next start
        await self.migration.set_logging(False)
        self.features = None
        self._status = 0

    async def _set_status(self, payload: bytes, _fds: Received) -> None:
        status = parse_u64(payload)
        if status > 0xFF:
            raise PeerError(f"SET_STATUS with {status:#x} (a device status has 8 bits)")
        if status == 0:
            # Front ends send this before GET_VRING_BASE, also when a guest is only paused:
            # the rings stop, and nothing about them is forgotten.
            await self.rings.stop_all("for a reset (SET_STATUS)")
        self._status = status

    async def _get_status(self, _payload: bytes, _fds: Received) -> bytes:
        return pack_u64(self._status | (STATUS_NEEDS_RESET if self.rings.broken else 0))

    # Memory -----------------------------------------------------------------------------

    async def _set_mem_table(self, payload: bytes, fds: Received) -> None:
        told = parse_mem_table(payload)
        regions = [_mapped(region, fd) for region, fd in zip(told, fds.borrow(), strict=True)]
        await self._switch_memory(regions, "to change its memory (SET_MEM_TABLE)")

    async def _get_max_mem_slots(self, _payload: bytes, _fds: Received) -> bytes:
        return pack_u64(MAX_MEM_SLOTS)

    async def _add_mem_reg(self, payload: bytes, fds: Received) -> None:
        regions = self.rings.regions
        if len(regions) >= MAX_MEM_SLOTS:
            raise PeerError(f"ADD_MEM_REG, but all {MAX_MEM_SLOTS} memory slots are taken")
        (fd,) = fds.borrow()
        added = _mapped(parse_single_region(payload), fd)
        await self._switch_memory([*regions, added], "to add memory (ADD_MEM_REG)")

    async def _rem_mem_reg(self, payload: bytes, _fds: Received) -> None:
        gone = parse_single_region(payload)
        regions = self.rings.regions
        left = [region for region in regions if not gone.same_place(MemoryRegion(*region[:4]))]
        if len(left) == len(regions):
            raise PeerError(
                f"REM_MEM_REG of {gone.size} bytes at guest address {gone.guest_addr:#x}: "
                "there is no such region"
            )
        await self._switch_memory(left, "to remove memory (REM_MEM_REG)")

    async def _switch_memory(self, regions: Sequence[Region], why: str) -> None:
        if self.rings.started:
            self.migration.require_room_for(regions)
        await self.rings.switch_memory(regions, why)

    # Migration --------------------------------------------------------------------------

    async def _set_log_base(self, payload: bytes, fds: Received) -> bytes:
        """The document gives the answer no content; others send this much."""
        (fd,) = fds.borrow()
        await self.migration.take_log(LogArea.parse(payload), fd)
        return pack_u64(0)

    async def _set_log_fd(self, _payload: bytes, fds: Received) -> None:
        """An eventfd that we *may* ring when the log changes: a wake-up for each mark is none
        that a front end wants, so it is closed again."""
        check_eventfd(fds.borrow()[0], "the log descriptor")

    # Rings ------------------------------------------------------------------------------

    async def _set_vring_num(self, payload: bytes, _fds: Received) -> None:
        state = VringState.parse(payload)
        ring = self.rings[state.index]
        ring.set_size(state.num)
        await self._start_if_complete(ring)

    async def _set_vring_addr(self, payload: bytes, _fds: Received) -> None:
        addr = VringAddr.parse(payload)
        ring = self.rings[addr.index]
        ring.set_addr(addr)
        await self.rings.logging_changed([ring])
        await self._start_if_complete(ring)

    async def _set_vring_base(self, payload: bytes, _fds: Received) -> None:
        state = VringState.parse(payload)
        self.rings[state.index].set_base(state.num, self.terms())

    async def _get_vring_base(self, payload: bytes, _fds: Received) -> bytes:
        index = VringState.parse(payload).index
        ring = self.rings[index]
        await self.rings.stop([ring], "to stop a queue (GET_VRING_BASE)")
        ring.drop_kick()
        return VringState(index, ring.base_for(self.terms())).pack()

    async def _set_vring_kick(self, payload: bytes, fds: Received) -> None:
        ring = await self._replace_fd("kick", payload, fds)
        ring.kicked = True
        await self._start_if_complete(ring)

    async def _set_vring_call(self, payload: bytes, fds: Received) -> None:
        await self._replace_fd("call", payload, fds)

    async def _set_vring_err(self, payload: bytes, fds: Received) -> None:
        await self._replace_fd("err", payload, fds)

    async def _replace_fd(self, role: str, payload: bytes, fds: Received) -> Ring:
        file = VringFile.parse(payload)
        if file.has_fd:
            check_eventfd(fds.borrow()[0], f"the {role} descriptor of queue {file.index}")
        ring = self.rings[file.index]
        ring.replace_fd(role, fds.take())
        await self.rings.notifiers_changed(ring)
        return ring

    async def _start_if_complete(self, ring: Ring) -> None:
        if not ring.started or ring.queue is not None:
            return
        if not (self.features or 0) >> BlkFeature.VERSION_1 & 1:
            raise PeerError(
                f"queue {ring.index} starts without VIRTIO_F_VERSION_1: the guest's driver or "
                "firmware uses the legacy interface, which is not served",
                hint="give the device disable-legacy=on",
            )
        await self.rings.start(ring)

    async def _set_vring_enable(self, payload: bytes, _fds: Received) -> None:
        state = VringState.parse(payload)
        if state.num > 1:
            raise PeerError(f"SET_VRING_ENABLE with {state.num} (must be 0 or 1)")
        await self.rings.set_enabled(self.rings[state.index], bool(state.num))

    # Requests in flight -----------------------------------------------------------------

    async def _get_inflight_fd(self, payload: bytes, _fds: Received) -> bytes:
        """The front end keeps the region, and sends it back before rings start."""
        region, self.fd_to_send = self.recovery.offer(
            Inflight.parse(payload), packed=self._packed(), writeback=self._writeback
        )
        return region.pack(len(payload))

    async def _set_inflight_fd(self, payload: bytes, fds: Received) -> None:
        (fd,) = fds.borrow()
        self._writeback = await self.recovery.take(
            Inflight.parse(payload), fd, packed=self._packed(), writeback=self._writeback
        )

    def _packed(self) -> bool:
        return bool((self.features or 0) >> BlkFeature.RING_PACKED & 1)

    # Configuration space ----------------------------------------------------------------

    def writes_back(self) -> bool:
        """The cache mode. Before negotiation it is what a driver that can flush would get.

        virtio 1.3 §5.2.5.2: "If VIRTIO_BLK_F_CONFIG_WCE is negotiated but
        VIRTIO_BLK_F_FLUSH is not, the device MUST initialize writeback to 0."
        """
        features = self._device.features() if self.features is None else self.features
        return self._writeback and bool(features >> BlkFeature.FLUSH & 1)

    async def _get_config(self, payload: bytes, _fds: Received) -> bytes:
        """An empty answer says that it failed."""
        access = ConfigAccess.parse(payload)
        if access.size == 0 or access.offset + access.size > MAX_CONFIG_BYTES:
            self._device.complain(
                f"session '{self._name}' asked for {access.size} bytes of configuration at "
                f"{access.offset} (must be 1 to {MAX_CONFIG_BYTES}, and end there)"
            )
            return b""
        space = self._device.config_space(self.writes_back()).ljust(MAX_CONFIG_BYTES, b"\0")
        data = space[access.offset : access.offset + access.size]
        return ConfigAccess(access.offset, access.size, access.flags, data).pack()

    async def _set_config(self, payload: bytes, _fds: Received) -> None:
        """Only ``writeback`` can be written; a migration writes everything, and the rest is ours.

        Raises: Refused.
        """
        access = ConfigAccess.parse(payload)
        if len(access.data) != access.size:
            raise PeerError(f"SET_CONFIG of {access.size} bytes came with {len(access.data)}")
        whole = access.flags & MIGRATION_CONFIG
        if not whole and (access.offset, access.size) != (WRITEBACK_OFFSET, 1):
            raise Refused(
                f"SET_CONFIG of {access.size} bytes at {access.offset}: only writeback, at "
                f"{WRITEBACK_OFFSET}, can be written"
            )
        if not (self.features or 0) >> BlkFeature.CONFIG_WCE & 1:
            raise Refused("SET_CONFIG without VIRTIO_BLK_F_CONFIG_WCE")
        place = WRITEBACK_OFFSET - access.offset
        if not 0 <= place < access.size:
            return
        if access.data[place] > 1:
            raise Refused(f"SET_CONFIG of writeback to {access.data[place]} (must be 0 or 1)")
        self._writeback = access.data[place] == 1
        self.recovery.store_writeback(self._writeback)
        await self.rings.set_write_through(not self.writes_back())

    async def _set_backend_req_fd(self, _payload: bytes, fds: Received) -> None:
        sock = take_stream_socket(fds, "the back-end channel")
        if self.backend is not None:
            self.backend.close()
        self.backend = BackendChannel(sock, f"session '{self._name}'")


def _mapped(region: MemoryRegion, fd: int) -> Region:
    return Region(region.guest_addr, region.size, region.user_addr, region.mmap_offset, fd)


Handler = Callable[[Handlers, bytes, Received], Awaitable[bytes | None]]

HANDLERS: Final[dict[Request, Handler]] = {
    Request.GET_FEATURES: Handlers._get_features,
    Request.SET_FEATURES: Handlers._set_features,
    Request.GET_PROTOCOL_FEATURES: Handlers._get_protocol_features,
    Request.SET_PROTOCOL_FEATURES: Handlers._set_protocol_features,
    Request.GET_QUEUE_NUM: Handlers._get_queue_num,
    Request.SET_OWNER: Handlers._ignore,
    Request.RESET_OWNER: Handlers._ignore,
    Request.RESET_DEVICE: Handlers._reset_device,
    Request.SET_STATUS: Handlers._set_status,
    Request.GET_STATUS: Handlers._get_status,
    Request.SET_MEM_TABLE: Handlers._set_mem_table,
    Request.GET_MAX_MEM_SLOTS: Handlers._get_max_mem_slots,
    Request.ADD_MEM_REG: Handlers._add_mem_reg,
    Request.REM_MEM_REG: Handlers._rem_mem_reg,
    Request.SET_LOG_BASE: Handlers._set_log_base,
    Request.SET_LOG_FD: Handlers._set_log_fd,
    Request.SET_VRING_NUM: Handlers._set_vring_num,
    Request.SET_VRING_ADDR: Handlers._set_vring_addr,
    Request.SET_VRING_BASE: Handlers._set_vring_base,
    Request.GET_VRING_BASE: Handlers._get_vring_base,
    Request.SET_VRING_KICK: Handlers._set_vring_kick,
    Request.SET_VRING_CALL: Handlers._set_vring_call,
    Request.SET_VRING_ERR: Handlers._set_vring_err,
    Request.SET_VRING_ENABLE: Handlers._set_vring_enable,
    Request.GET_INFLIGHT_FD: Handlers._get_inflight_fd,
    Request.SET_INFLIGHT_FD: Handlers._set_inflight_fd,
    Request.GET_CONFIG: Handlers._get_config,
    Request.SET_CONFIG: Handlers._set_config,
    Request.SET_BACKEND_REQ_FD: Handlers._set_backend_req_fd,
}
