"""split, passthru, delay, error and gpt as SPDK shows and saves them, asked of a real target.

The uuids and the objects are those of a recorded run of SPDK's vhost.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from drivebay.wire.gpt import (
    SPDK_TYPE,
    Entry,
    add_entry,
    new_table,
    pack_protective_mbr,
    table_writes,
)
from tests.fakes.process import RpcError, TargetProcess

MS_UUID = "830b066c-0f6c-40a1-9110-2e2483818fa0"
D0_UUID = "e003bab1-5bf2-52e1-9ff3-bc8d17cc13bf"
PT0_UUID = "34c44d2d-7991-5999-adae-b93a5eca7469"
LATENCIES = {
    "avg_read_latency": 1000,
    "p99_read_latency": 2000,
    "avg_write_latency": 1000,
    "p99_write_latency": 2000,
}


@pytest.fixture
def target() -> Iterator[TargetProcess]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        process = TargetProcess(Path(name))
        try:
            yield process
        finally:
            assert process.stop() == 0


def build(target: TargetProcess) -> None:
    """What the recorded run had."""
    target.rpc("bdev_malloc_create", name="MS", num_blocks=65536, block_size=512, uuid=MS_UUID)
    target.rpc("bdev_split_create", base_bdev="MS", split_count=4)
    target.rpc("bdev_passthru_create", name="PT0", base_bdev_name="MSp0")
    target.rpc("bdev_delay_create", name="D0", base_bdev_name="MSp1", **LATENCIES)
    target.rpc("bdev_error_create", base_name="MSp2")


def bdev_config(target: TargetProcess) -> list[dict[str, Any]]:
    """The saved calls of these modules."""
    calls: list[dict[str, Any]] = target.rpc("framework_get_config", name="bdev")
    parts = ("split", "passthru", "delay", "error")
    return [call for call in calls if any(f"bdev_{part}_" in call["method"] for part in parts)]


def names(target: TargetProcess) -> list[str]:
    return [bdev["name"] for bdev in target.rpc("bdev_get_bdevs")]


def test_they_look_as_spdks_do(target: TargetProcess) -> None:
    build(target)
    expected: dict[str, tuple[str, str, Any]] = {
        "MSp0": (
            "6cd39cbc-6154-5503-99e6-a06a0166ba8d",
            "Split Disk",
            {"split": {"base_bdev": "MS", "offset_blocks": 0}},
        ),
        "MSp1": (
            "d549dc80-2c02-55bd-8e03-5759ccf20d38",
            "Split Disk",
            {"split": {"base_bdev": "MS", "offset_blocks": 16384}},
        ),
        "PT0": (PT0_UUID, "passthru", {"passthru": {"name": "PT0", "base_bdev_name": "MSp0"}}),
        "D0": (
            D0_UUID,
            "delay",
            {"delay": {"name": "D0", "base_bdev_name": "MSp1", "uuid": D0_UUID, **LATENCIES}},
        ),
        "EE_MSp2": (
            "b2753226-3308-54b6-917c-f69754283ae6",
            "Error Injection Disk",
            {"error_disk": {"base_bdev": "MSp2"}},
        ),
    }
    for name, (uuid, product, specific) in expected.items():
        (found,) = target.rpc("bdev_get_bdevs", name=name)
        assert (found["uuid"], found["product_name"]) == (uuid, product)
        assert json.dumps(found["driver_specific"]) == json.dumps(specific)
        assert found["num_blocks"] == 16384
        assert found["claimed"] == (name in ("MSp0", "MSp1"))


def test_they_are_saved_as_spdk_saves_them_and_load_again(target: TargetProcess) -> None:
    build(target)
    which = {"delay_bdev_name": "D0", "latency_type": "avg_read", "latency_us": 5}
    target.rpc("bdev_delay_update_latency", **which)
    saved = bdev_config(target)
    assert json.dumps(saved) == json.dumps(
        [
            {
                "method": "bdev_split_create",
                "params": {"base_bdev": "MS", "split_count": 4, "split_size_mb": 0},
            },
            {
                "method": "bdev_passthru_create",
                "params": {"base_bdev_name": "MSp0", "name": "PT0", "uuid": PT0_UUID},
            },
            {
                "method": "bdev_delay_create",
                "params": {
                    "name": "D0",
                    "base_bdev_name": "MSp1",
                    "uuid": D0_UUID,
                    **LATENCIES,
                    "avg_read_latency": 5,
                },
            },
            {"method": "bdev_error_create", "params": {"base_name": "MSp2"}},
        ]
    )
    config = {"subsystem": "bdev", "config": target.rpc("framework_get_config", name="bdev")}
    path = target.folder / "saved.json"
    path.write_text(json.dumps({"subsystems": [config]}))
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        other = TargetProcess(Path(name), "-c", str(path))
        try:
            assert bdev_config(other) == saved
            assert names(other) == names(target)
        finally:
            other.stop()


def test_a_base_that_goes_and_comes_back(target: TargetProcess) -> None:
    """As in SPDK a split and an error bdev are forgotten, passthru and delay come again."""
    build(target)
    for kind in ("passthru", "delay"):
        more = LATENCIES if kind == "delay" else {}
        target.rpc(f"bdev_{kind}_create", name=kind, base_bdev_name=f"M_{kind}", **more)
    target.rpc("bdev_error_create", base_name="M_error")
    which = {"delay_bdev_name": "delay", "latency_type": "p99_read", "latency_us": 7777}
    with pytest.raises(RpcError, match="The requested bdev does not exist"):
        target.rpc("bdev_delay_update_latency", **which)
    for _ in range(2):
        for name in ("M_passthru", "M_delay", "M_error"):
            target.malloc(name)
        (delay,) = target.rpc("bdev_get_bdevs", name="delay")
        target.rpc("bdev_delay_update_latency", **which)
        assert "passthru" in names(target)
        for name in ("M_passthru", "M_delay", "M_error"):
            target.rpc("bdev_malloc_delete", name=name)
        assert names(target) == ["MS", "MSp0", "MSp1", "MSp2", "MSp3", "PT0", "D0", "EE_MSp2"]
    assert delay["driver_specific"]["delay"]["p99_read_latency"] == 7777
    target.rpc("bdev_malloc_delete", name="MS")
    assert names(target) == []
    assert [call["method"] for call in bdev_config(target)] == [
        "bdev_passthru_create",
        "bdev_delay_create",
    ] * 2
    build_again = {"base_bdev": "MS", "split_count": 2, "split_size_mb": 1}
    target.malloc("MS")
    assert target.rpc("bdev_split_create", **build_again) == ["MSp0", "MSp1"]


def test_deleting_gives_the_base_back(target: TargetProcess) -> None:
    build(target)
    target.rpc("bdev_passthru_delete", name="PT0")
    target.rpc("bdev_delay_delete", name="D0")
    target.rpc("bdev_error_delete", name="EE_MSp2")
    assert names(target) == ["MS", "MSp0", "MSp1", "MSp2", "MSp3"]
    assert not any(bdev["claimed"] for bdev in target.rpc("bdev_get_bdevs")[1:])
    target.rpc("bdev_split_delete", base_bdev="MS")
    assert names(target) == ["MS"]
    assert bdev_config(target) == []
    target.rpc("bdev_passthru_create", name="PT0", base_bdev_name="MS")


@pytest.mark.parametrize(
    ("method", "params", "code", "said"),
    [
        (
            "bdev_split_create",
            {"base_bdev": "MS", "split_count": 4},
            -32602,
            "Failed to create 4 split bdevs from 'MS': File exists",
        ),
        (
            "bdev_split_create",
            {"base_bdev": "MSp0", "split_count": 2},
            -32602,
            "Failed to create 2 split bdevs from 'MSp0': Operation not permitted",
        ),
        (
            "bdev_split_create",
            {"base_bdev": "MSp3", "split_count": 0},
            -32602,
            "Failed to create 0 split bdevs from 'MSp3': Invalid argument",
        ),
        ("bdev_split_create", {"base_bdev": "MSp3"}, -32602, "Invalid parameters"),
        ("bdev_delay_create", {"name": "X"}, -32603, "spdk_json_decode_object failed"),
        (
            "bdev_delay_create",
            {"name": "X", "base_bdev_name": "MSp3", **LATENCIES, "p99_read_latency": 999},
            -22,
            "Invalid argument",
        ),
        (
            "bdev_delay_create",
            {"name": "X", "base_bdev_name": "MSp3", **LATENCIES, "p99_read_latency": 1 << 63},
            -22,
            "Invalid argument",
        ),
        ("bdev_delay_delete", {"name": "PT0"}, -19, "No such device"),
        ("bdev_error_create", {"base_name": "MSp2"}, -17, "File exists"),
        ("bdev_error_create", {"base_name": "MSp0"}, -1, "Operation not permitted"),
        ("bdev_error_create", {}, -32602, "spdk_json_decode_object failed"),
        ("bdev_error_delete", {"name": "MSp2"}, -19, "No such device"),
        ("bdev_error_resume_pending", {"name": "MSp2"}, -19, "No such device"),
        (
            "bdev_error_inject_error",
            {"name": "EE_MSp2", "io_type": "read", "error_type": "nvme_failure"},
            -22,
            "nvme_sct or nvme_sc should be specified for NVMe error injection",
        ),
        (
            "bdev_error_inject_error",
            {"name": "EE_MSp2", "io_type": "read", "error_type": "failure", "nvme_sc": 1},
            -22,
            "nvme_sct or nvme_sc should be specified for NVMe error injection",
        ),
        (
            "bdev_error_inject_error",
            {"name": "EE_MSp2", "io_type": "all", "error_type": "corrupt_data"},
            -22,
            "Invalid argument",
        ),
    ],
)
def test_refusals(shared: TargetProcess, method: str, params: Any, code: int, said: str) -> None:
    with pytest.raises(RpcError) as caught:
        shared.rpc(method, **params)
    assert str(caught.value) == f"{code}: {said}"
    assert len(bdev_config(shared)) == 4


@pytest.fixture(scope="module")
def shared() -> Iterator[TargetProcess]:
    """One target for calls that change nothing."""
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        process = TargetProcess(Path(name))
        build(process)
        yield process
        assert process.stop() == 0


def test_injection_is_accepted_in_all_kinds(shared: TargetProcess) -> None:
    for kind, more in (
        ("failure", {}),
        ("pending", {"num": 5, "queue_depth": 3}),
        ("nomem", {}),
        ("corrupt_data", {"corrupt_offset": 7, "corrupt_value": 255}),
        ("nvme_failure", {"nvme_sct": 2, "nvme_sc": 0x81}),
    ):
        given: dict[str, Any] = {"name": "EE_MSp2", "error_type": kind, **more}
        assert shared.rpc("bdev_error_inject_error", io_type="all", **given) is True
    assert shared.rpc("bdev_error_resume_pending", name="EE_MSp2") is True
    cleared = {"name": "EE_MSp2", "io_type": "clear", "error_type": "failure"}
    assert shared.rpc("bdev_error_inject_error", **cleared) is True


def image_with_a_partition(target: TargetProcess) -> Path:
    blocks = 8 * 2048
    table = new_table(blocks, 512, UUID(int=1))
    table = add_entry(table, Entry(2, SPDK_TYPE, UUID(MS_UUID), 2048, 4095, 0, "pool"))
    image = target.folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(blocks * 512)
        file.write(pack_protective_mbr(blocks, 512))
        for group in table_writes(table, 512):
            for offset, data in group:
                file.seek(offset)
                file.write(data)
    return image


def test_without_auto_examine_only_what_is_named_is_looked_into() -> None:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        target = TargetProcess(Path(name), "--wait-for-rpc")
        try:
            target.rpc("bdev_set_options", bdev_auto_examine=False)
            target.rpc("framework_start_init")
            path = str(image_with_a_partition(target))
            target.rpc("bdev_aio_create", name="A0", filename=path, block_size=512)
            target.rpc("bdev_wait_for_examine")
            assert names(target) == ["A0"]
            target.rpc("bdev_examine", name="A0")
            with pytest.raises(RpcError, match="File exists"):
                target.rpc("bdev_examine", name="A0")
            target.rpc("bdev_wait_for_examine")
            assert names(target) == ["A0", "A0p2"]
            target.rpc("bdev_aio_delete", name="A0")
            target.rpc("bdev_aio_create", name="A0", filename=path, block_size=512)
            target.rpc("bdev_wait_for_examine")
            assert names(target) == ["A0", "A0p2"]
            saved = target.rpc("framework_get_config", name="bdev")
            assert saved[0]["params"]["bdev_auto_examine"] is False
            assert saved[1] == {"method": "bdev_examine", "params": {"name": "A0"}}
        finally:
            assert target.stop() == 0


def test_partitions_of_a_file_are_found_and_not_saved(target: TargetProcess) -> None:
    image = image_with_a_partition(target)
    target.rpc("bdev_aio_create", name="A0", filename=str(image), block_size=512)
    target.rpc("bdev_wait_for_examine")
    assert names(target) == ["A0", "A0p2"]
    (found,) = target.rpc("bdev_get_bdevs", name=MS_UUID)
    assert (found["name"], found["product_name"]) == ("A0p2", "GPT Disk")
    assert found["num_blocks"] == 2048
    saved = target.rpc("framework_get_config", name="bdev")
    assert [call["method"] for call in saved if "A0" in json.dumps(call)] == ["bdev_aio_create"]
    target.rpc("bdev_passthru_create", name="P", base_bdev_name="A0p2")
    target.rpc("bdev_aio_delete", name="A0")
    assert names(target) == []
