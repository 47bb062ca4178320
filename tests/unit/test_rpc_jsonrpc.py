"""The stream of JSON values, the envelope of a request, and the answers."""

from __future__ import annotations

import doctest
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivebay.rpc import jsonrpc
from drivebay.rpc.jsonrpc import (
    MAX_DEPTH,
    MAX_REQUEST_BYTES,
    MAX_VALUES,
    DuplicateKeys,
    InvalidParamsShape,
    ParseFault,
    RpcError,
    StreamParser,
    decode,
    encode_error,
    encode_result,
    parse_request,
)


def values(*chunks: bytes) -> list[bytes | str]:
    """What a parser makes of chunks: values, and the texts of faults."""
    parser = StreamParser()
    found: list[bytes | str] = []
    for chunk in chunks:
        parser.feed(chunk)
        while True:
            try:
                value = parser.next_value()
            except ParseFault as fault:
                found.append(str(fault))
                continue
            if value is None:
                break
            found.append(value)
    return found


def test_examples_in_the_documentation() -> None:
    assert doctest.testmod(jsonrpc).failed == 0


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b'{"a":1}{"b":2}', [b'{"a":1}', b'{"b":2}']),
        (b' \n\t{"a":1}\r\n [2] ', [b'{"a":1}', b"[2]"]),
        (b'{"a":"}{[\\"]"}', [b'{"a":"}{[\\"]"}']),
        (b'{"a":"\\\\"}{}', [b'{"a":"\\\\"}', b"{}"]),
        (b'5 "x" null', [b"5", b'"x"', b"null"]),
        (b"", []),
        (b'{"a":', []),
        ('{"a":"\u00e9\u20ac\U0001f600"}'.encode(), ['{"a":"\u00e9\u20ac\U0001f600"}'.encode()]),
    ],
)
def test_values_are_cut_out_of_the_stream(stream: bytes, expected: list[bytes]) -> None:
    assert values(stream) == expected
    whole_values = values(*(bytes([byte]) for byte in stream))
    if not stream.startswith(b"5"):  # a bare number has no end of its own
        assert [value for value in whole_values if value not in (b"null",)] == [
            value for value in expected if value not in (b"null",)
        ]


@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(st.text(max_size=8), inner, max_size=4)
            ),
            max_leaves=12,
        ).filter(lambda value: isinstance(value, dict | list)),
        max_size=4,
    ),
    st.data(),
)
def test_any_values_however_they_are_cut(documents: list[Any], data: st.DataObject) -> None:
    stream = b" ".join(
        json.dumps(document, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "replace")
        for document in documents
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    chunks = [
        stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)
    ]
    assert values(*chunks) == values(stream)
    assert len(values(stream)) == len(documents)


@pytest.mark.parametrize(
    "rubbish",
    [b"hello\n", b"\xff\xfe{}", b"/* c */ {}", b"}", b"[}", b'{"a\n":1}', b"tru", b'"a" "b\x00"'],
)
def test_rubbish_is_refused_and_the_next_request_is_read(rubbish: bytes) -> None:
    found = values(rubbish, b'{"next":1}')
    assert any(isinstance(value, str) for value in found)
    assert found[-1] == b'{"next":1}'


def test_a_request_that_is_too_long_is_refused_once_and_passed_over() -> None:
    long = b'{"a":"' + b"x" * (MAX_REQUEST_BYTES + 50_000) + b'"}'
    chunks = [long[start : start + 4096] for start in range(0, len(long), 4096)]
    assert values(*chunks, b'{"next":1}') == [
        f"a request is longer than {MAX_REQUEST_BYTES} bytes",
        b'{"next":1}',
    ]


def test_a_request_of_the_greatest_length_passes() -> None:
    request = b'{"a":"' + b"x" * (MAX_REQUEST_BYTES - 8) + b'"}'
    assert len(request) == MAX_REQUEST_BYTES
    chunks = [request[start : start + 4096] for start in range(0, len(request), 4096)]
    assert values(*chunks) == [request]


def test_memory_stays_bounded_while_an_endless_request_arrives() -> None:
    parser = StreamParser()
    parser.feed(b'["')
    faults = 0
    for _ in range(1000):
        parser.feed(b"x" * 4096)
        try:
            assert parser.next_value() is None
        except ParseFault:
            faults += 1
        assert len(parser._buffer) <= MAX_REQUEST_BYTES + 4096
    assert faults == 1


def test_nesting_has_a_limit() -> None:
    deepest = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert values(deepest) == [deepest]
    found = values(b"[" * 100_000, b'{"next":1}')
    assert f"JSON is nested deeper than {MAX_DEPTH} levels" in found
    assert found[-1] == b'{"next":1}'


def test_the_number_of_values_has_a_limit() -> None:
    few = b"[" + b",".join([b"1"] * (MAX_VALUES - 2)) + b"]"
    assert values(few) == [few]
    many = b"[" + b",".join([b"1"] * (MAX_VALUES + 2)) + b"]"
    assert values(many, b'{"next":1}') == [
        f"a request holds more than {MAX_VALUES} values",
        b'{"next":1}',
    ]


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1,}',
        b"{'a':1}",
        b"{bad json}",
        b"[NaN]",
        b"[Infinity]",
        b'["\xff"]',
        b'["\\ud800"]',
        b'["\\udc00\\ud800"]',
        b'["\\x"]',
        b"[01]",
        b"[" + b"1" * 5000 + b"]",
    ],
)
def test_what_is_not_json_is_refused(text: bytes) -> None:
    with pytest.raises(ParseFault):
        decode(text)


def test_surrogate_pairs_are_characters() -> None:
    assert decode(b'"\\ud83d\\ude00"') == "\U0001f600"


def test_a_member_that_comes_twice_is_marked() -> None:
    assert isinstance(decode(b'{"a":1,"a":2}'), DuplicateKeys)
    assert not isinstance(decode(b'{"a":1,"b":2}'), DuplicateKeys)


@pytest.mark.parametrize("request_id", ["abc", "", 0, -7, 1.5, 12345678901234567890123, "i" * 200])
def test_an_id_comes_back_as_it_was(request_id: str | float) -> None:
    request = parse_request({"id": request_id, "method": "m"})
    assert json.loads(encode_result(request.id, None))["id"] == request_id


@pytest.mark.parametrize("request_id", [True, {}, [], float("inf"), "i" * 2000])
def test_what_is_no_id_is_refused(request_id: object) -> None:
    with pytest.raises(RpcError) as caught:
        parse_request({"id": request_id, "method": "m"})
    assert caught.value.code == -32600


@pytest.mark.parametrize("params", ["x", 5, True])
def test_params_of_another_shape_are_refused_with_the_id(params: object) -> None:
    with pytest.raises(InvalidParamsShape) as caught:
        parse_request({"id": 3, "method": "m", "params": params})
    assert caught.value.request_id == 3


def test_an_error_carries_its_data_only_when_there_is_some() -> None:
    with_data = json.loads(encode_error(1, RpcError(-22, "Invalid argument", {"hint": "h"})))
    assert with_data["error"] == {"code": -22, "message": "Invalid argument", "data": {"hint": "h"}}
    assert "data" not in json.loads(encode_error(1, RpcError(-22, "x")))["error"]
