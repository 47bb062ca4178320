"""Each declared method: what it takes, what it refuses, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drivebay.errors import HostError, NotFound, UsageError
from drivebay.rpc.jsonrpc import RpcError, decode
from drivebay.rpc.methods import all_methods
from drivebay.rpc.reference import reference
from drivebay.rpc.schema import (
    BDEV,
    RUNTIME,
    STARTUP,
    VHOST,
    Array,
    Boolean,
    Choice,
    Integer,
    Kind,
    Method,
    Param,
    String,
    Structure,
    Uuid,
    rpc_error_of,
)

METHODS = all_methods()

RIGHT: list[tuple[type[Kind], Any]] = [
    (String, "text"),
    (Boolean, True),
    (Integer, 1),
    (Uuid, "0a0a0a0a-0000-4000-8000-000000000001"),
    (Array, []),
    (Structure, {}),
]
WRONG: dict[type[Kind], list[Any]] = {
    String: [1, None, True, [], {}, "a\0b", 1.5],
    Boolean: [0, 1, "true", None, [], {}],
    Integer: ["1", -(1 << 70), 1 << 70, 1.5, True, None, [], {}, float("inf")],
    Uuid: ["zzz", 1, None, "0a0a0a0a00004000800000000000000", "g" * 36, "{" + "0" * 34 + "}"],
    Choice: ["no such word", 1, None, [], True],
    Array: ["x", {}, None, 1, [[]], [{}], [None]],
    Structure: [[], "x", 1, None],
}
PARAMETERS = [(method, param) for method in METHODS.values() for param in method.params]


def right_value(kind: Kind) -> Any:
    if isinstance(kind, Choice):
        return kind.words[0]
    return next(value for known, value in RIGHT if isinstance(kind, known))


def complete(method: Method) -> dict[str, Any]:
    return {param.name: right_value(param.kind) for param in method.params if param.required}


@pytest.mark.parametrize(
    ("method", "param"), PARAMETERS, ids=[f"{m.name}-{p.name}" for m, p in PARAMETERS]
)
def test_each_parameter_refuses_each_wrong_type(method: Method, param: Param) -> None:
    for value in WRONG[type(param.kind)]:
        with pytest.raises(RpcError) as caught:
            method.read_params({**complete(method), param.name: value})
        assert caught.value.code == method.style.params_code
        assert caught.value.message == method.style.params_message
        assert caught.value.data is not None
        assert caught.value.data["field"] == param.name
        assert caught.value.data["hint"]
    given = {**complete(method), param.name: right_value(param.kind)}
    assert param.name in method.read_params(given)


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_each_method_names_what_is_missing_or_unknown(method: Method) -> None:
    if not method.params:
        with pytest.raises(RpcError, match="requires no parameters") as caught:
            method.read_params({})
        assert caught.value.code == -32602
        assert method.read_params(None) == {}
        return
    for missing in complete(method):
        given = {name: value for name, value in complete(method).items() if name != missing}
        with pytest.raises(RpcError) as caught:
            method.read_params(given)
        assert caught.value.data is not None
        assert caught.value.data["field"] == missing
    unknown = {**complete(method), "bogus": 1}
    if method.relaxed:
        assert "bogus" not in method.read_params(unknown)
    else:
        with pytest.raises(RpcError) as caught:
            method.read_params(unknown)
        assert caught.value.data is not None
        assert caught.value.data["field"] == "bogus"


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_each_method_refuses_positions_and_double_members(method: Method) -> None:
    for given in ([], ["x"], decode(b'{"name":"a","name":"b"}')):
        with pytest.raises(RpcError) as caught:
            method.read_params(given)
        assert caught.value.code in (-32602, method.style.params_code)


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_each_method_is_documented(method: Method) -> None:
    assert method.doc
    assert method.states <= {STARTUP, RUNTIME}
    assert method.states
    assert f"### {method.name}\n" in reference()
    for param in method.params:
        assert param.doc


def test_the_page_is_what_the_declarations_say() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rpc.md").read_text()
    assert page == reference(), "write it anew: python -m drivebay.rpc.reference > docs/rpc.md"


def test_a_number_may_be_written_in_any_way_but_as_a_string() -> None:
    u32 = Integer(32)
    assert u32.read(1e3) == 1000
    assert u32.read(0xFFFFFFFF) == 0xFFFFFFFF
    assert Integer(32, signed=True).read(-1) == -1
    for value in ("1000", True, 1 << 32, -1):
        with pytest.raises(ValueError, match="expected"):
            u32.read(value)


def test_what_is_shown_of_a_value_is_short() -> None:
    method = METHODS["bdev_malloc_create"]
    for value in ("x" * 100_000, 1 << 4000, {"a": "b" * 1000}):
        with pytest.raises(RpcError) as caught:
            method.read_params({"block_size": value, "num_blocks": 1})
        assert len(str(caught.value.data)) < 400


def test_failures_have_spdks_code_and_text_and_our_sentence() -> None:
    error = rpc_error_of(BDEV, NotFound("no bdev is called 'x'", hint="list them"))
    assert (error.code, error.message) == (-19, "No such device")
    assert error.data == {"reason": "no bdev is called 'x'", "hint": "list them"}
    error = rpc_error_of(VHOST, UsageError("bad", field="cpumask"))
    assert (error.code, error.message) == (-32602, "Invalid argument")
    assert error.data == {"reason": "bad", "field": "cpumask"}
    error = rpc_error_of(BDEV, HostError("can't open 'f'", 2, path="f"))
    assert (error.code, error.message) == (-2, "No such file or directory")
