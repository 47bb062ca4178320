"""The state table: what is in it, what a failed lookup says, and that nothing else decides."""

from __future__ import annotations

import pytest

from drivebay.errors import InternalError, PeerError
from drivebay.vhost.handlers import HANDLERS
from drivebay.vhost.state import (
    OFFERED_PROTOCOL_FEATURES,
    TABLE,
    Fds,
    State,
    check_fds,
    has_own_reply,
    lookup,
    settle,
)
from drivebay.wire.vhost_user import Header, ProtocolFeature, Request

ALL = OFFERED_PROTOCOL_FEATURES


def header(request: int, size: int | None = None) -> Header:
    if size is None:
        size = TABLE[Request(request)].payload_min
    return Header(request, False, size)


def test_every_row_has_a_handler_and_every_handler_a_row() -> None:
    assert set(TABLE) == set(HANDLERS)


def test_no_row_needs_a_feature_that_is_not_offered() -> None:
    for request, row in TABLE.items():
        assert not row.needs & ~ALL, request


@pytest.mark.parametrize("request_", list(TABLE))
@pytest.mark.parametrize("state", list(State))
def test_a_message_is_allowed_exactly_where_its_row_says(request_: Request, state: State) -> None:
    row = TABLE[request_]
    if state in row.moves:
        assert lookup(state, header(request_), ALL) is row
    else:
        with pytest.raises(PeerError, match=f"{request_.name}.*'{state.value}'.*allowed when"):
            lookup(state, header(request_), ALL)


@pytest.mark.parametrize("request_", [r for r, row in TABLE.items() if row.needs])
def test_a_message_of_a_feature_that_was_not_negotiated_is_refused(request_: Request) -> None:
    needs = TABLE[request_].needs
    with pytest.raises(PeerError, match=f"needs protocol feature {needs.name}, not negotiated"):
        lookup(State.READY, header(request_), ALL & ~needs)


@pytest.mark.parametrize("request_", list(TABLE))
def test_payloads_outside_their_limits_are_refused_before_they_are_read(
    request_: Request,
) -> None:
    row = TABLE[request_]
    state = next(iter(row.moves))
    for size in {row.payload_min - 1, row.payload_max + 1, 0xFFFFFFFF} - {-1}:
        with pytest.raises(PeerError, match=f"payload of {size} bytes"):
            lookup(state, header(request_, size), ALL)


@pytest.mark.parametrize("number", [0, 45, 99, 0xFFFFFFFF])
def test_an_unknown_number_is_named_by_itself(number: int) -> None:
    with pytest.raises(PeerError, match=f"message {number} is not served here"):
        lookup(State.READY, Header(number, False, 0), ALL)


@pytest.mark.parametrize("request_", [r for r in Request if r not in TABLE])
def test_what_is_not_served_is_refused_by_name(request_: Request) -> None:
    with pytest.raises(PeerError, match=rf"{request_.name} \({request_}\) is not served here"):
        lookup(State.READY, Header(request_, False, 8), ALL)


def test_post_copy_and_stopping_without_drain_are_neither_offered_nor_served() -> None:
    assert not ALL & (ProtocolFeature.PAGEFAULT | ProtocolFeature.GET_VRING_BASE_INFLIGHT)
    for request in (Request.POSTCOPY_ADVISE, Request.POSTCOPY_LISTEN):
        assert request not in TABLE


def test_own_replies() -> None:
    assert has_own_reply(Request.GET_VRING_BASE)
    assert has_own_reply(Request.GET_INFLIGHT_FD)
    assert not has_own_reply(Request.SET_VRING_KICK)
    assert not has_own_reply(99)


@pytest.mark.parametrize("request_", list(TABLE))
def test_settling_allows_the_moves_of_the_row_and_no_other(request_: Request) -> None:
    facts = {
        State.NEGOTIATING: (False, 0),
        State.READY: (True, 0),
        State.RUNNING: (True, 1),
    }
    for before, allowed in TABLE[request_].moves.items():
        for after, (features_set, started) in facts.items():
            if after in allowed:
                assert settle(request_, before, features_set, started) is after
            else:
                with pytest.raises(InternalError, match=request_.name):
                    settle(request_, before, features_set, started)


@pytest.mark.parametrize(
    ("request_", "payload", "wanted"),
    [
        (Request.SET_OWNER, b"", 0),
        (Request.REM_MEM_REG, bytes(40), 0),
        (Request.ADD_MEM_REG, bytes(40), 1),
        (Request.SET_VRING_KICK, bytes(8), 1),
        (Request.SET_VRING_KICK, (1 << 8).to_bytes(8, "little"), 0),
        (Request.SET_MEM_TABLE, (3).to_bytes(8, "little"), 3),
        (Request.SET_MEM_TABLE, (0xFFFFFFFF).to_bytes(8, "little"), 8),
    ],
)
def test_descriptors_a_message_may_use(request_: Request, payload: bytes, wanted: int) -> None:
    row = TABLE[request_]
    assert check_fds(request_, row, payload, 8) == wanted
    assert check_fds(request_, row, payload, wanted) == wanted
    if wanted:
        with pytest.raises(PeerError, match=f"{request_.name}.*with {wanted - 1} file desc"):
            check_fds(request_, row, payload, wanted - 1)


def test_only_messages_that_take_descriptors_say_so() -> None:
    taking = {request for request, row in TABLE.items() if row.fds is not Fds.NONE}
    assert taking == {
        Request.SET_MEM_TABLE,
        Request.ADD_MEM_REG,
        Request.SET_VRING_KICK,
        Request.SET_VRING_CALL,
        Request.SET_VRING_ERR,
        Request.SET_LOG_BASE,
        Request.SET_LOG_FD,
        Request.SET_BACKEND_REQ_FD,
        Request.SET_INFLIGHT_FD,
    }
