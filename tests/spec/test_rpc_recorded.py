"""What SPDK's vhost answered, asked of our target: tests/data/rpc_recorded.json in its order.

One real target process gets every call; each call is a test of its own. Codes and messages
of errors must be SPDK's; ``error.data`` is ours and not compared. Where we differ on purpose
the data says how our answer is judged, and why.
"""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.process import TargetProcess
from tests.fakes.rpc_client import exchange

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "rpc_recorded.json").read_text())
CALLS: list[dict[str, Any]] = RECORDED["calls"]
MIB = 1024 * 1024

# Values that differ between any two runs.
VOLATILE = {
    "ticks",
    "tick_rate",
    "uuid",
    "aliases",
    # SPDK reads each new disk, looking for partitions and volumes.
    "bytes_read",
    "num_read_ops",
    "read_latency_ticks",
    "max_read_latency_ticks",
    "min_read_latency_ticks",
}


@pytest.fixture(scope="module")
def target() -> Iterator[TargetProcess]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        folder = Path(name)
        for file, size in (("aio0.img", 64), ("uring0.img", 64), ("aio_lvs.img", 64)):
            with (folder / file).open("wb") as image:
                image.truncate(size * MIB)
        process = TargetProcess(folder, "--wait-for-rpc")
        yield process
        assert process.stop() == 0


@pytest.fixture(scope="module")
def answers(target: TargetProcess) -> dict[int, str]:
    """Send every recorded request, in order; what came back, by number."""
    return {call["n"]: exchange(target.rpc_path, request_of(call, target.folder)) for call in CALLS}


def request_of(call: dict[str, Any], folder: Path) -> bytes:
    if call["call"] == "RAW":
        text: str = call["params"].replace("REPEAT300000", "a" * 300_000)
        # Lone bytes above 127 stand for themselves.
        return text.encode("latin-1" if max(text) < "\u0100" else "utf-8")
    params = json.loads(json.dumps(call["params"]).replace("RUN/", f"{folder}/"))
    request = {"jsonrpc": "2.0", "id": 1, "method": call["call"]}
    if params is not None:
        request["params"] = params
    return json.dumps(request).encode()


def without_data(answer: Any) -> Any:
    if isinstance(answer, list):
        return [without_data(item) for item in answer]
    if "error" in answer:
        return {**answer, "error": {k: v for k, v in answer["error"].items() if k != "data"}}
    return answer


def steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: "*" if k in VOLATILE else steady(v) for k, v in value.items()}
    return [steady(item) for item in value] if isinstance(value, list) else value


def parsed(text: str) -> list[Any]:
    return [without_data(json.loads(line)) for line in text.splitlines()]


def check_deviation(call: dict[str, Any], text: str) -> None:
    ours = call["ours"]
    lines = parsed(text)
    if ours["how"] == "raw_error":
        # A request that is too long may bring several refusals while its rest arrives.
        assert lines
        assert all(line["error"] == ours["expect"] and line["id"] is None for line in lines)
        return
    if ours["how"] == "raw_then_error":
        assert [lines[0]] == parsed(call["result"])
        assert lines[1]["error"] == ours["expect"]
        return
    (answer,) = lines
    if ours["how"] == "raw_version":
        fields = json.loads(call["result"])["result"]["fields"]
        assert answer["result"]["fields"]["major"] == fields["major"]
        assert answer["result"]["fields"]["minor"] == fields["minor"]
    elif ours["how"] == "error":
        assert answer["error"] == ours["expect"]
    elif ours["how"] == "result_has":
        assert set(ours["expect"]) <= set(answer["result"])
    elif ours["how"] == "subset":
        assert set(answer["result"]) < set(call["result"])
    else:
        assert ours["how"] == "subsystems"
        check_subsystems(answer["result"], call["result"])


def check_subsystems(found: list[dict[str, Any]], recorded: list[dict[str, Any]]) -> None:
    """Ours are some of SPDK's, in its order, each after what it needs."""
    names = [entry["subsystem"] for entry in found]
    theirs = {entry["subsystem"]: entry["depends_on"] for entry in recorded}
    assert names == [name for name in theirs if name in names]
    for position, entry in enumerate(found):
        assert set(entry["depends_on"]) <= set(theirs[entry["subsystem"]])
        assert set(entry["depends_on"]) <= set(names[:position])


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call['n']}-{call['call']}")
def test_recorded_call(call: dict[str, Any], answers: dict[int, str]) -> None:
    text = answers[call["n"]]
    if "ours" in call:
        check_deviation(call, text)
    elif call["call"] == "RAW":
        assert parsed(text) == parsed(call["result"])
    elif "error" in call:
        (answer,) = parsed(text)
        assert answer["error"] == call["error"]
    else:
        (answer,) = parsed(text)
        assert steady(answer["result"]) == steady(call["result"])


def test_answers_are_lines_of_compact_json(target: TargetProcess) -> None:
    request = b'{"jsonrpc":"2.0","id":"abc","method":"log_get_print_level"}'
    answer = exchange(target.rpc_path, request)
    assert answer == '{"jsonrpc":"2.0","id":"abc","result":"NOTICE"}\n'


@pytest.mark.parametrize(
    ("recorded", "method", "params"),
    [
        ("Malloc0", "bdev_malloc_create", {"num_blocks": 131072, "block_size": 512}),
        ("Null0", "bdev_null_create", {"num_blocks": 262144, "block_size": 512}),
        ("A0", "bdev_aio_create", {"filename": "shape.img", "block_size": 512}),
        ("U0", "bdev_uring_create", {"filename": "shape.img", "block_size": 512}),
    ],
)
def test_a_bdev_has_the_recorded_shape(
    target: TargetProcess, recorded: str, method: str, params: dict[str, Any]
) -> None:
    image = target.folder / "shape.img"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    name = f"shape-{recorded}"
    if "filename" in params:
        params = {**params, "filename": str(image)}
    assert target.rpc(method, name=name, **params) == name
    (found,) = target.rpc("bdev_get_bdevs", name=name)
    expected = RECORDED["bdevs"][recorded]
    assert list(found) == [key for key in expected if key in found]
    # A claim is shown only while there is one.
    assert set(expected) - set(found) <= {"claim_type"}
    for key in ("product_name", "block_size", "num_blocks", "zoned"):
        assert found[key] == expected[key]
    assert list(found["supported_io_types"]) == list(expected["supported_io_types"])
    assert set(expected["driver_specific"]) == set(found["driver_specific"])
    target.rpc(method.replace("_create", "_delete"), name=name)


def test_an_allow_list_hides_the_other_methods() -> None:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        process = TargetProcess(Path(name), "--rpcs-allowed", "rpc_get_methods,spdk_get_version")
        try:
            assert process.rpc("rpc_get_methods") == ["spdk_get_version", "rpc_get_methods"]
            request = b'{"jsonrpc":"2.0","id":1,"method":"bdev_get_bdevs"}'
            (answer,) = parsed(exchange(process.rpc_path, request))
            assert answer["error"] == {"code": -32601, "message": "Method not found"}
        finally:
            process.stop()


def test_the_socket_is_private(target: TargetProcess) -> None:
    assert target.rpc_path.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(target.rpc_path))
