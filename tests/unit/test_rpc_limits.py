"""Limits and statistics over RPC, with SPDK's recorded answers, on one target process."""

from __future__ import annotations

import base64
import json
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.driver import Session
from tests.fakes.process import TargetProcess, wait_until
from tests.fakes.rpc_client import exchange

MIB = 1 << 20
ZERO = dict.fromkeys(
    ("rw_ios_per_sec", "rw_mbytes_per_sec", "r_mbytes_per_sec", "w_mbytes_per_sec"), 0
)


@pytest.fixture(scope="module")
def process() -> Iterator[TargetProcess]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        target = TargetProcess(Path(name))
        yield target
        assert target.stop() == 0


@pytest.fixture
def target(process: TargetProcess) -> Iterator[TargetProcess]:
    """With a disk M0 and a controller of it."""
    process.malloc("M0")
    process.rpc("bdev_wait_for_examine")  # its reads count too
    process.controller("vhost.0", "M0")
    yield process
    process.rpc("vhost_delete_controller", ctrlr="vhost.0", force=True)
    process.rpc("bdev_malloc_delete", name="M0")


def error_of(target: TargetProcess, method: str, **params: object) -> tuple[int, str]:
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    error = json.loads(exchange(target.rpc_path, json.dumps(request).encode()))["error"]
    return error["code"], error["message"]


def limits(target: TargetProcess, name: str = "M0") -> dict[str, int]:
    found: dict[str, int] = target.rpc("bdev_get_bdevs", name=name)[0]["assigned_rate_limits"]
    return found


def test_limits_are_set_one_by_one_rounded_and_shown(target: TargetProcess) -> None:
    for given, shown in (
        ({"rw_ios_per_sec": 20000}, {"rw_ios_per_sec": 20000}),
        ({"rw_ios_per_sec": 20001}, {"rw_ios_per_sec": 21000}),
        ({"r_mbytes_per_sec": 7}, {"rw_ios_per_sec": 21000, "r_mbytes_per_sec": 7}),
        ({"rw_ios_per_sec": 0, "w_mbytes_per_sec": (1 << 64) - 1}, {"r_mbytes_per_sec": 7}),
        ({"r_mbytes_per_sec": 1 << 63}, {"r_mbytes_per_sec": 17592186044415}),
        (dict(ZERO), {}),
    ):  # fmt: skip
        assert target.rpc("bdev_set_qos_limit", name="M0", **given) is True
        assert limits(target) == ZERO | shown


def test_refusals_are_spdks(target: TargetProcess) -> None:
    ask = "bdev_set_qos_limit"
    assert error_of(target, ask, name="M0") == (-22, "No rate limits specified")
    assert error_of(target, ask, name="nosuch", rw_ios_per_sec=1) == (-19, "No such device")
    refused = (-32603, "spdk_json_decode_object failed")
    assert error_of(target, ask, name="M0", rw_ios_per_sec=-5) == refused
    assert error_of(target, "bdev_get_histogram", name="nosuch") == (-19, "No such device")
    assert error_of(target, "bdev_get_histogram", name="M0") == (-32603, "Bad address")
    enable = "bdev_enable_histogram"
    assert error_of(target, enable, name="M0", enable=True, opc="x") == (-32603, "Invalid Io type")
    assert error_of(target, enable, name="M0", enable=True, granularity=11) == (
        -22, "Invalid argument")  # fmt: skip
    assert error_of(target, enable, name="M0", enable=True, min_nsec=9, max_nsec=9)[0] == -22
    assert error_of(target, "bdev_get_iostat", per_channel=True) == (-22, "Invalid argument")
    assert error_of(target, "bdev_get_histogram_borders", name="M0") == refused


def test_a_limit_holds_for_a_session_that_is_there(target: TargetProcess) -> None:
    with Session(target.folder / "vhost.0") as guest:
        guest.disk.read(0, 512)
        target.rpc("bdev_set_qos_limit", name="M0", rw_mbytes_per_sec=8)
        for _ in range(5):
            guest.disk.read(0, MIB)
        (found,) = target.rpc("bdev_get_iostat", names=["M0"])["bdevs"]
        rate = target.rpc("bdev_get_iostat", names=[])["tick_rate"]
        # Four waited for what the one before cost, an eighth of a second.
        assert found["read_latency_ticks"] / rate > 0.25
        assert found["max_read_latency_ticks"] / rate > 0.1
        target.rpc("bdev_set_qos_limit", name="M0", rw_mbytes_per_sec=0)


def counts(answer: dict[str, Any]) -> list[int]:
    data = base64.b64decode(answer["histogram"])
    return list(struct.unpack(f"<{len(data) // 8}Q", data))


def test_a_histogram_has_spdks_layout_and_survives_its_session(target: TargetProcess) -> None:
    enable, get, borders = (
        "bdev_enable_histogram", "bdev_get_histogram", "bdev_get_histogram_borders",
    )  # fmt: skip
    assert target.rpc(enable, name="M0", enable=True) is True
    empty = target.rpc(get, name="M0")
    assert list(empty) == ["histogram", "granularity", "min_range", "max_range", "tsc_rate"]
    ranges = empty["max_range"] - empty["min_range"] + 1
    assert empty["granularity"] == 7
    assert counts(empty) == [0] * (128 * ranges)
    # 1 us and 120 s in ticks.
    assert empty["min_range"] == max(0, (empty["tsc_rate"] // 10**6).bit_length() - 7)
    assert empty["max_range"] == (120 * empty["tsc_rate"] - 1).bit_length() - 7
    with Session(target.folder / "vhost.0") as guest:
        for _ in range(3):
            guest.disk.read(0, 512)
        guest.disk.write(0, bytes(512))
        assert sum(counts(target.rpc(get, name="M0"))) == 4
        target.rpc(enable, name="M0", enable=True)
        assert sum(counts(target.rpc(get, name="M0"))) == 4, "the same again begins anew"
    wait_until(lambda: not sessions(target), "the session's end")
    assert sum(counts(target.rpc(get, name="M0"))) == 4
    assert target.rpc(borders, name="M0", borders=[10**6, 10**9]) == {"borders_count": [4, 4, 4]}
    target.rpc(enable, name="M0", enable=True, opc="write")
    with Session(target.folder / "vhost.0") as guest:
        guest.disk.read(0, 512)
        guest.disk.write(0, bytes(512))
        assert sum(counts(target.rpc(get, name="M0"))) == 1
        target.rpc(enable, name="M0", enable=False)
        guest.disk.read(0, 512)
    assert error_of(target, get, name="M0") == (-32603, "Bad address")


def sessions(target: TargetProcess) -> list[Any]:
    found: list[Any] = target.rpc("vhost_get_controllers")[0]["sessions"]
    return found


def test_queue_depth_is_sampled_while_somebody_asks(target: TargetProcess) -> None:
    def stats() -> dict[str, int]:
        found: dict[str, int] = target.rpc("bdev_get_iostat", names=["M0"])["bdevs"][0]
        return found

    period = "bdev_set_qd_sampling_period"
    assert "queue_depth" not in stats()
    assert target.rpc(period, name="M0", period=1000) is True
    before = stats()
    assert [before[name] for name in list(before)[-4:]] == [1000, 0, 0, 0]
    assert list(before)[-4:] == [
        "queue_depth_polling_period", "queue_depth", "io_time", "weighted_io_time",
    ]  # fmt: skip
    target.rpc("bdev_set_qos_limit", name="M0", rw_mbytes_per_sec=1)
    with Session(target.folder / "vhost.0") as guest:
        guest.disk.read(0, MIB)
        pending = [guest.disk.queue(0, 0, room=512) for _ in range(4)]
        guest.disk.publish()
        wait_until(lambda: stats()["queue_depth"] == 4, "four requests that wait")
        wait_until(lambda: stats()["io_time"] > 20_000, "some time with requests")
        found = stats()
        assert found["weighted_io_time"] >= 3.5 * found["io_time"]
        target.rpc("bdev_set_qos_limit", name="M0", rw_mbytes_per_sec=0)
        for read in pending:
            guest.disk.wait(read)
    wait_until(lambda: stats()["queue_depth"] == 0, "none that waits")
    assert target.rpc(period, name="M0", period=0) is True
    assert "queue_depth" not in stats()
    assert error_of(target, period, name="nosuch", period=1) == (-19, "No such device")


def test_limits_and_histograms_are_saved_behind_their_bdev(target: TargetProcess) -> None:
    target.rpc("bdev_passthru_create", name="P0", base_bdev_name="M0x")
    target.malloc("M0x")
    target.rpc("bdev_set_qos_limit", name="M0", rw_ios_per_sec=50000, r_mbytes_per_sec=100)
    target.rpc("bdev_set_qos_limit", name="P0", w_mbytes_per_sec=3)
    target.rpc("bdev_enable_histogram", name="M0", enable=True, opc="read", granularity=5)
    calls = target.rpc("framework_get_config", name="bdev")
    names = [call["method"] for call in calls]
    at = names.index("bdev_malloc_create")
    assert calls[at + 1] == {
        "method": "bdev_set_qos_limit",
        "params": {"name": "M0", "rw_ios_per_sec": 50000, "r_mbytes_per_sec": 100},
    }
    assert calls[at + 2] == {
        "method": "bdev_enable_histogram",
        "params": {"name": "M0", "enable": True, "opc": "read", "granularity": 5},
    }
    assert names[-2:] == ["bdev_wait_for_examine", "bdev_set_qos_limit"]
    assert calls[-1]["params"] == {"name": "P0", "w_mbytes_per_sec": 3}
    file = target.folder / "saved.json"
    file.write_text(json.dumps({"subsystems": [{"subsystem": "bdev", "config": calls}]}))
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        second = TargetProcess(Path(name), "-c", str(file))
        try:
            assert limits(second) == ZERO | {"rw_ios_per_sec": 50000, "r_mbytes_per_sec": 100}
            assert limits(second, "P0") == ZERO | {"w_mbytes_per_sec": 3}
            assert second.rpc("framework_get_config", name="bdev") == calls
        finally:
            second.stop()
    target.rpc("bdev_passthru_delete", name="P0")
    target.rpc("bdev_malloc_delete", name="M0x")
