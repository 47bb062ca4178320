"""RAIDs over RPC where the recorded calls do not go: refusals, late bases, RAIDs on RAIDs.

Codes and texts of refusals are those of SPDK's source.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.process import RpcError, TargetProcess
from tests.fakes.rpc_client import exchange

NOT_REMOVED = "Failed to remove base bdev from raid bdev"


@pytest.fixture(scope="module")
def target() -> Iterator[TargetProcess]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        process = TargetProcess(Path(name))
        process.rpc("bdev_malloc_create", name="M1", num_blocks=16384, block_size=4096)
        for base in ("Ra", "Rb", "Rc", "Rd", "Re", "Rf", "Rg"):
            process.malloc(base)
        for raid, level, strip, bases, superblock in (
            ("RAID0", "raid0", 64, ["Ra", "Rb"], False),
            ("RAID1", "raid1", 0, ["Rc", "Rd"], True),
            ("CONC", "concat", 64, ["Re", "Rf"], False),
        ):
            process.rpc(
                "bdev_raid_create",
                name=raid,
                raid_level=level,
                strip_size_kb=strip,
                base_bdevs=bases,
                superblock=superblock,
            )
        yield process
        assert process.stop() == 0


def ask(target: TargetProcess, method: str, params: Any) -> dict[str, Any]:
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    answer: dict[str, Any] = json.loads(exchange(target.rpc_path, json.dumps(request).encode()))
    return answer


def shown(target: TargetProcess, name: str) -> dict[str, Any]:
    raids = target.rpc("bdev_raid_get_bdevs", category="all")
    (found,) = [raid for raid in raids if raid["name"] == name]
    assert isinstance(found, dict)
    return found


def test_a_window_of_nothing_is_refused(target: TargetProcess) -> None:
    answer = ask(target, "bdev_raid_set_options", {"process_window_size_kb": 0})
    assert (answer["error"]["code"], answer["error"]["message"]) == (-22, "Invalid argument")


def test_the_saved_configuration_has_raids_without_superblocks(
    target: TargetProcess,
) -> None:
    target.rpc("bdev_raid_set_options", process_window_size_kb=512)
    saved = target.rpc("framework_get_config", name="bdev")
    (options,) = [call for call in saved if call["method"] == "bdev_raid_set_options"]
    assert options["params"] == {"process_window_size_kb": 512, "process_max_bandwidth_mb_sec": 0}
    raids = [call["params"] for call in saved if call["method"] == "bdev_raid_create"]
    assert [raid.pop("uuid") for raid in raids] == [
        shown(target, name)["uuid"] for name in ("RAID0", "CONC")
    ]
    assert raids == [
        {"name": "RAID0", "strip_size_kb": 64, "raid_level": "raid0", "base_bdevs": ["Ra", "Rb"]},
        {"name": "CONC", "strip_size_kb": 64, "raid_level": "concat", "base_bdevs": ["Re", "Rf"]},
    ]


@pytest.mark.parametrize(
    ("method", "params", "code", "message"),
    [
        ("bdev_raid_delete", {"name": "no"}, -19, "raid bdev no not found"),
        (
            "bdev_raid_add_base_bdev",
            {"raid_bdev": "no", "base_bdev": "M1"},
            -19,
            "raid bdev no is not found in config",
        ),
        (
            "bdev_raid_add_base_bdev",
            {"raid_bdev": "RAID1", "base_bdev": "M1"},
            -22,
            "Failed to add base bdev M1 to RAID bdev RAID1: Invalid argument",
        ),
        (
            "bdev_raid_add_base_bdev",
            {"raid_bdev": "RAID1"},
            -32603,
            "spdk_json_decode_object failed",
        ),
        ("bdev_raid_remove_base_bdev", {"name": "no"}, -19, NOT_REMOVED),
        ("bdev_raid_remove_base_bdev", {"name": "M1"}, -19, NOT_REMOVED),
        (
            "bdev_raid_create",
            {"name": "RW", "raid_level": "raid1", "base_bdevs": ["Rg", "M1"]},
            -22,
            "Failed to create RAID bdev RW: Invalid argument",
        ),
        (
            "bdev_raid_create",
            {"name": "RW", "raid_level": "raid1", "base_bdevs": ["Rg", "Rg"]},
            -1,
            "Failed to create RAID bdev RW: Operation not permitted",
        ),
        (
            "bdev_raid_create",
            {"name": "RW", "raid_level": "raid1", "base_bdevs": ["Rg", "RW"]},
            -22,
            "Failed to create RAID bdev RW: Invalid argument",
        ),
        (
            "bdev_raid_create",
            {"name": "RW", "raid_level": "raid0", "strip_size_kb": 3, "base_bdevs": ["Rg"]},
            -22,
            "Failed to create RAID bdev RW: Invalid argument",
        ),
        (
            "bdev_raid_create",
            {"name": "R" * 64, "raid_level": "raid0", "strip_size_kb": 4, "base_bdevs": ["Rg"]},
            -22,
            f"Failed to create RAID bdev {'R' * 64}: Invalid argument",
        ),
    ],
)  # fmt: skip
def test_refusals_have_spdks_code_and_our_hint(
    target: TargetProcess,
    method: str,
    params: dict[str, Any],
    code: int,
    message: str,
) -> None:
    error = ask(target, method, params)["error"]
    assert (error["code"], error["message"]) == (code, message)
    assert error["data"]


def test_bases_that_come_later_complete_a_raid_and_take_it_along(target: TargetProcess) -> None:
    target.rpc(
        "bdev_raid_create", name="late", raid_level="0", strip_size_kb=4, base_bdevs=["L0", "L1"]
    )
    assert shown(target, "late")["state"] == "configuring"
    target.malloc("L1")
    assert shown(target, "late")["num_base_bdevs_discovered"] == 1
    target.malloc("L0")
    assert shown(target, "late")["state"] == "online"
    (disk,) = target.rpc("bdev_get_bdevs", name="late")
    assert disk["num_blocks"] == 32768
    target.rpc("bdev_wait_for_examine")
    target.rpc("bdev_malloc_delete", name="L0")
    late = shown(target, "late")
    assert (late["state"], late["num_base_bdevs_operational"]) == ("offline", 1)
    assert [base["name"] for base in late["base_bdevs_list"]] == [None, "L1"]
    with pytest.raises(RpcError, match="-19"):
        target.rpc("bdev_get_bdevs", name="late")
    target.rpc("bdev_raid_delete", name="late")
    (base,) = target.rpc("bdev_get_bdevs", name="L1")
    assert not base["claimed"]


def test_raids_stand_on_raids(target: TargetProcess) -> None:
    for name in ("T0", "T1", "T2", "T3"):
        target.malloc(name)
    target.rpc(
        "bdev_raid_create", name="ten", raid_level="raid0", strip_size_kb=4, base_bdevs=["m0", "m1"]
    )
    for name, bases in (("m0", ["T0", "T1"]), ("m1", ["T2", "T3"])):
        target.rpc("bdev_raid_create", name=name, raid_level="raid1", base_bdevs=bases)
    assert shown(target, "ten")["state"] == "online"
    target.rpc("bdev_raid_remove_base_bdev", name="T3")
    assert shown(target, "ten")["state"] == "online"
    for name in ("ten", "m0", "m1"):
        target.rpc("bdev_raid_delete", name=name)
