"""Whatever bytes and values arrive: the parser ends, and a method refuses or takes them whole."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from drivebay.rpc.jsonrpc import (
    MAX_REQUEST_BYTES,
    ParseFault,
    RpcError,
    StreamParser,
    decode,
    encode_error,
    parse_request,
)
from drivebay.rpc.methods import all_methods

METHODS = all_methods()

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.uuids().map(str),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)
# Pieces of requests, so that chance finds the way into the parser.
_PIECES = rb"""{ } [ ] " , : \ 1 - null {"id":1} "method" "jsonrpc":"2.0" \u00e9 \ud800 1e999"""
pieces = st.sampled_from([*_PIECES.split(), b" ", b"\n", b"\x00", b"\xff"])


@given(st.lists(pieces | st.binary(max_size=8), max_size=60), st.integers(1, 40))
def test_any_bytes_are_values_or_faults(stream: list[bytes], size: int) -> None:
    data = b"".join(stream)
    parser = StreamParser()
    for start in range(0, len(data), size):
        parser.feed(data[start : start + size])
        for _ in range(len(data) + 2):  # each turn takes at least one byte, or is the last
            try:
                value = parser.next_value()
            except ParseFault:
                continue
            if value is None:
                break
            with contextlib.suppress(ParseFault):
                check_envelope(decode(value))
        else:
            raise AssertionError("the parser does not come to an end")
        assert len(parser._buffer) <= MAX_REQUEST_BYTES


def outcome(check: Callable[[], Any]) -> Any:
    """What a check returns, or the refusal that it raises."""
    try:
        return check()
    except RpcError as refusal:
        return refusal


def check_envelope(value: Any) -> None:
    found = outcome(lambda: parse_request(value))
    if isinstance(found, RpcError):
        assert found.code == -32600
    else:
        assert isinstance(found.method, str)


@given(st.sampled_from(sorted(METHODS)), st.data())
def test_any_parameters_are_checked_or_refused(name: str, data: st.DataObject) -> None:
    method = METHODS[name]
    names = st.sampled_from([param.name for param in method.params] or ["x"]) | st.text(max_size=9)
    given_params = data.draw(st.none() | st.lists(anything) | st.dictionaries(names, anything))
    checked = outcome(lambda: method.read_params(given_params))
    if isinstance(checked, RpcError):
        assert checked.code in (-32602, method.style.params_code)
        json.loads(encode_error(1, checked))  # whatever was given can be shown
        return
    assert set(checked) == {param.name for param in method.params}
    for param in method.params:
        if given_params is not None and param.name in given_params:
            assert param.kind.read(given_params[param.name]) == checked[param.name]  # type: ignore[call-overload]
        else:
            assert not param.required
            assert checked[param.name] == param.default
