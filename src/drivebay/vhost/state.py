"""The vhost-user state machine of one session, as a table. No I/O, no clock, no objects.

Everything that decides whether a message may come now stands here: in which
state, after which protocol features, with how many descriptors, how long its
payload is, and which states it can lead to. A lookup that fails is the error
text. What a message *does* is session.py's business.

The states follow from two facts about a session:

    NEGOTIATING   SET_FEATURES has not come yet, or a reset undid it
    READY         the features are set, no ring is started
    RUNNING       the features are set, at least one ring is started

A ring has two switches of its own (ring.py): *started*, from SET_VRING_KICK to
GET_VRING_BASE, and *enabled*. It is served while both are on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final

from drivebay.errors import InternalError, PeerError
from drivebay.wire.vhost_user import (
    INFLIGHT_BYTES,
    MAX_CONFIG_BYTES,
    MAX_FDS,
    MAX_TABLE_REGIONS,
    MEM_REGION_BYTES,
    MEM_TABLE_HEADER_BYTES,
    Header,
    ProtocolFeature,
    Request,
)

__all__ = [
    "OFFERED_PROTOCOL_FEATURES",
    "TABLE",
    "Fds",
    "Row",
    "State",
    "check_fds",
    "has_own_reply",
    "lookup",
    "name_of",
    "settle",
]

OFFERED_PROTOCOL_FEATURES: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
NO_FEATURE: Final = ProtocolFeature(0)
# BACKEND_SEND_FD is not among them: no message of our own carries a descriptor. PAGEFAULT
# neither: a reactor that waits for a page of a post-copy migration would hold up everybody.


class State(Enum):
    NEGOTIATING = "negotiating"
    READY = "ready"
    RUNNING = "running"


class Fds(Enum):
    """How many descriptors a message brings; more are closed, fewer are an error."""

    NONE = "none"
    ONE = "one"
    PER_REGION = "one for each region"
    BY_FLAG = "one, unless bit 8 of the payload is set"


Moves = Mapping[State, frozenset[State]]

_STAYS: Final[Moves] = MappingProxyType({state: frozenset({state}) for state in State})
_RESETS: Final[Moves] = MappingProxyType({state: frozenset({State.NEGOTIATING}) for state in State})
_NOT_RUNNING: Final[Moves] = MappingProxyType(
    {state: frozenset({state}) for state in (State.NEGOTIATING, State.READY)}
)
_SETS_FEATURES: Final[Moves] = MappingProxyType(
    {
        State.NEGOTIATING: frozenset({State.READY}),
        State.READY: frozenset({State.READY}),
        State.RUNNING: frozenset({State.RUNNING}),
    }
)
# A kick before the addresses starts nothing yet: the ring starts when they come.
_MAY_START: Final[Moves] = MappingProxyType(
    {
        State.READY: frozenset({State.READY, State.RUNNING}),
        State.RUNNING: frozenset({State.RUNNING}),
    }
)
_BRINGS_ADDRESSES: Final[Moves] = MappingProxyType(
    {State.NEGOTIATING: frozenset({State.NEGOTIATING}), **_MAY_START}
)
_MAY_STOP: Final[Moves] = MappingProxyType(
    {
        State.NEGOTIATING: frozenset({State.NEGOTIATING}),
        State.READY: frozenset({State.READY}),
        State.RUNNING: frozenset({State.RUNNING, State.READY}),
    }
)


@dataclass(frozen=True, slots=True)
class Row:
    """One message: where it is allowed, what it needs, where it leads."""

    moves: Moves
    payload_min: int = 0
    payload_max: int = 0
    fds: Fds = Fds.NONE
    needs: ProtocolFeature = NO_FEATURE
    replies: bool = False  # answered always, with a payload of its own
    stopped_ring: bool = False  # only for a ring that is not started


def _row(
    moves: Moves,
    size: int | tuple[int, int] = 0,
    *,
    fds: Fds = Fds.NONE,
    needs: ProtocolFeature = NO_FEATURE,
    replies: bool = False,
    stopped_ring: bool = False,
) -> Row:
    low, high = size if isinstance(size, tuple) else (size, size)
    return Row(moves, low, high, fds, needs, replies, stopped_ring)


_U64: Final = 8
_VRING_STATE: Final = 8
_VRING_ADDR: Final = 40
_SINGLE_REGION: Final = 8 + MEM_REGION_BYTES
_MEM_TABLE: Final = (
    MEM_TABLE_HEADER_BYTES,
    MEM_TABLE_HEADER_BYTES + MAX_TABLE_REGIONS * MEM_REGION_BYTES,
)
_CONFIG: Final = (12, 12 + MAX_CONFIG_BYTES)
_LOG: Final = 16
_P = ProtocolFeature
_R = Request

TABLE: Final[Mapping[Request, Row]] = MappingProxyType(
    {
        # What each side can do
        _R.GET_FEATURES: _row(_STAYS, replies=True),
        _R.SET_FEATURES: _row(_SETS_FEATURES, _U64),
        _R.GET_PROTOCOL_FEATURES: _row(_STAYS, replies=True),
        _R.SET_PROTOCOL_FEATURES: _row(_NOT_RUNNING, _U64),
        _R.GET_QUEUE_NUM: _row(_STAYS, needs=_P.MQ, replies=True),
        # Ownership and reset
        _R.SET_OWNER: _row(_STAYS),
        _R.RESET_OWNER: _row(_STAYS),
        _R.RESET_DEVICE: _row(_RESETS, needs=_P.RESET_DEVICE),
        _R.SET_STATUS: _row(_MAY_STOP, _U64, needs=_P.STATUS),
        _R.GET_STATUS: _row(_STAYS, needs=_P.STATUS, replies=True),
        # Memory
        _R.SET_MEM_TABLE: _row(_STAYS, _MEM_TABLE, fds=Fds.PER_REGION),
        _R.GET_MAX_MEM_SLOTS: _row(_STAYS, needs=_P.CONFIGURE_MEM_SLOTS, replies=True),
        _R.ADD_MEM_REG: _row(_STAYS, _SINGLE_REGION, fds=Fds.ONE, needs=_P.CONFIGURE_MEM_SLOTS),
        # Older front ends send the region's descriptor once more; it is closed unused.
        _R.REM_MEM_REG: _row(_STAYS, _SINGLE_REGION, needs=_P.CONFIGURE_MEM_SLOTS),
        # Migration
        _R.SET_LOG_BASE: _row(_STAYS, _LOG, fds=Fds.ONE, needs=_P.LOG_SHMFD, replies=True),
        _R.SET_LOG_FD: _row(_STAYS, fds=Fds.ONE),
        # Rings
        _R.SET_VRING_NUM: _row(_STAYS, _VRING_STATE, stopped_ring=True),
        _R.SET_VRING_ADDR: _row(_BRINGS_ADDRESSES, _VRING_ADDR),
        _R.SET_VRING_BASE: _row(_STAYS, _VRING_STATE, stopped_ring=True),
        _R.SET_VRING_KICK: _row(_MAY_START, _U64, fds=Fds.BY_FLAG),
        _R.SET_VRING_CALL: _row(_STAYS, _U64, fds=Fds.BY_FLAG),
        _R.SET_VRING_ERR: _row(_STAYS, _U64, fds=Fds.BY_FLAG),
        # Deviation: also without VHOST_USER_F_PROTOCOL_FEATURES, because front ends exist that
        # negotiate it, leave it out of SET_FEATURES and enable their rings all the same.
        _R.SET_VRING_ENABLE: _row(_STAYS, _VRING_STATE),
        _R.GET_VRING_BASE: _row(_MAY_STOP, _VRING_STATE, replies=True),
        # Requests in flight. A region is not changed under a ring that keeps its own in one.
        _R.GET_INFLIGHT_FD: _row(_STAYS, INFLIGHT_BYTES, needs=_P.INFLIGHT_SHMFD, replies=True),
        _R.SET_INFLIGHT_FD: _row(
            _NOT_RUNNING, INFLIGHT_BYTES, fds=Fds.ONE, needs=_P.INFLIGHT_SHMFD
        ),
        # The device's configuration space
        _R.GET_CONFIG: _row(_STAYS, _CONFIG, needs=_P.CONFIG, replies=True),
        _R.SET_CONFIG: _row(_STAYS, _CONFIG, needs=_P.CONFIG),
        _R.SET_BACKEND_REQ_FD: _row(_STAYS, fds=Fds.ONE, needs=_P.BACKEND_REQ),
    }
)


# Messages that are not served, but would be answered with a payload of their own.
_UNSERVED_WITH_REPLY: Final = frozenset(
    {
        _R.CREATE_CRYPTO_SESSION,
        _R.POSTCOPY_ADVISE,
        _R.GET_SHARED_OBJECT,
        _R.SET_DEVICE_STATE_FD,
        _R.CHECK_DEVICE_STATE,
        _R.GET_SHMEM_CONFIG,
    }
)


def has_own_reply(request: int) -> bool:
    """Whether need_reply means nothing here: the message has an answer anyhow."""
    row = _row_of(request)
    return row.replies if row is not None else request in _UNSERVED_WITH_REPLY


def _row_of(request: int) -> Row | None:
    try:
        return TABLE.get(Request(request))
    except ValueError:
        return None


def name_of(request: int) -> str:
    """A message as the error texts call it: its name and number, or the number alone."""
    try:
        return f"{Request(request).name} ({request})"
    except ValueError:
        return f"message {request}"


def lookup(state: State, header: Header, negotiated: ProtocolFeature) -> Row:
    """The row for a message that has just begun; nothing of its payload was read yet.

    Raises: PeerError, whose text says what was wrong about it.
    """
    name = name_of(header.request)
    row = _row_of(header.request)
    if row is None:
        raise PeerError(f"{name} is not served here")
    if row.needs & ~negotiated:
        raise PeerError(f"{name} needs protocol feature {row.needs.name}, not negotiated")
    if state not in row.moves:
        allowed = " or ".join(sorted(allowed.value for allowed in row.moves))
        raise PeerError(f"{name} came in state '{state.value}' (allowed when {allowed})")
    if not row.payload_min <= header.size <= row.payload_max:
        limit = str(row.payload_min)
        if row.payload_max != row.payload_min:
            limit = f"{row.payload_min} to {row.payload_max}"
        raise PeerError(f"{name} has a payload of {header.size} bytes (must be {limit})")
    return row


def check_fds(request: int, row: Row, payload: bytes, count: int) -> int:
    """How many of the ``count`` descriptors the message may use; the rest are surplus.

    Raises: PeerError when there are fewer than it needs.
    """
    match row.fds:
        case Fds.NONE:
            wanted = 0
        case Fds.ONE:
            wanted = 1
        case Fds.PER_REGION:
            wanted = min(int.from_bytes(payload[:4], "little"), MAX_FDS)
        case Fds.BY_FLAG:
            wanted = 0 if payload[1] & 1 else 1
    if count < wanted:
        raise PeerError(
            f"{name_of(request)} came with {count} file descriptors (must be {row.fds.value})"
        )
    return wanted


def settle(request: Request, before: State, features_set: bool, rings_started: int) -> State:
    """The state after a message was handled, which must be one that the table foresees."""
    if not features_set:
        after = State.NEGOTIATING
    else:
        after = State.RUNNING if rings_started else State.READY
    if after not in TABLE[request].moves[before]:
        raise InternalError(
            f"{request.name} led from '{before.value}' to '{after.value}', which no row foresees"
        )
    return after
