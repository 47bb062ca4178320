"""The benchmark of stacks computes what it says, and builds what it says. Nothing is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bdev_stack
import pytest
from bdev_stack import BARE, STACKS, Row
from contenders import Sample
from goals import OURS
from targets import Target


class Scribe(Target):
    """A target that only notes what it is asked to do."""

    def __init__(self, *known: str) -> None:
        super().__init__(OURS, ["x"], Path("/none/log"))
        self.known = known
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def call(self, method: str, **params: Any) -> Any:
        self.calls.append((method, params))
        answers: dict[str, Any] = {
            "rpc_get_methods": list(self.known),
            "bdev_split_create": [f"{params.get('base_bdev')}p0"],
            "bdev_lvol_get_lvstores": [{"free_clusters": 15, "cluster_size": 4 << 20}],
        }
        return answers.get(method)


def row(stack: str, *iops: float) -> Row:
    return Row(OURS, stack, "randread", [Sample(one, busy_ns=100.0) for one in iops])


def test_a_cost_compares_what_ran_in_the_same_repetition() -> None:
    bare = row(BARE, 100.0, 200.0, 50.0)
    assert bdev_stack.cost_percent(row("split", 95.0, 180.0, 49.0), bare) == pytest.approx(5.0)
    assert bdev_stack.cost_percent(bare, bare) == 0.0


def test_each_stack_has_a_goal_and_so_have_the_volumes() -> None:
    rows = [row(BARE, 100.0), row("split", 94.0), row("passthru x5", 81.0)]
    rows.append(row("malloc again", 90.0))  # has none
    volumes = {
        "first writes, drivebay": [300.0],
        "first writes, spdk": [100.0],
        "snapshot of 1024 GiB, s": [0.01, 0.06, 0.02],
        "open with 10000 volumes, s": [2.5],
    }
    found = [(goal.text, goal.met) for goal in bdev_stack.goals(rows, volumes)]
    assert found == [
        ("split, randread: percent of the bare disk's throughput lost", False),
        ("passthru x5, randread: percent of the bare disk's throughput lost", True),
        ("thin first writes against spdk", True),
        ("snapshot of 1024 GiB, s", True),
        ("open with 10000 volumes, s", False),
    ]
    assert "| split, randread | drivebay | 0.1 (0.1 to 0.1) | 6.0 | 100 |" in bdev_stack.table(rows)


def test_what_a_target_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[str] = []
    monkeypatch.setattr(bdev_stack, "fill", lambda socket: filled.append(socket.name))
    target = Scribe("bdev_passthru_create")
    assert bdev_stack.prepare(target, STACKS) == [BARE, "passthru x5", "malloc again"]
    made = [params["base_bdev_name"] for method, params in target.calls if "passthru" in method]
    assert made == ["m3", "m3-p", "m3-p-p", "m3-p-p-p", "m3-p-p-p-p"]
    assert list(target.sockets) == [BARE, "passthru x5", "malloc again"]
    assert filled == ["vhost.0", "vhost.3", "vhost.6"]


def test_the_mixed_stacks_are_made_from_below() -> None:
    target = Scribe()
    assert bdev_stack.with_a_volume(target, "m4") == "m4p0-s/thick-p-p"
    assert bdev_stack.without_a_volume(target, "m5") == "EE_m5p0-d"
    made = [method for method, _ in target.calls if method.endswith("_create")]
    assert made == [
        "bdev_split_create",
        "bdev_lvol_create",
        "bdev_passthru_create",
        "bdev_passthru_create",
        "bdev_split_create",
        "bdev_error_create",
        "bdev_delay_create",
    ]
    volume = next(params for method, params in target.calls if method == "bdev_lvol_create")
    assert volume["size_in_mib"] == 60


def test_snapshots_are_of_a_volume_that_is_larger_than_its_store() -> None:
    target = Scribe()
    assert len(bdev_stack.snapshot_seconds(target, 1024, 3)) == 3
    calls = dict(target.calls)
    assert calls["bdev_malloc_create"]["num_blocks"] * 4096 == bdev_stack.SMALL_STORE_BYTES
    assert calls["bdev_lvol_create"]["size_in_mib"] == 1 << 20
    assert calls["bdev_lvol_create"]["thin_provision"]
    names = [params["snapshot_name"] for method, params in target.calls if "snapshot" in method]
    assert names == ["snapshot0", "snapshot1", "snapshot2"]
    assert target.calls[-1] == ("bdev_malloc_delete", {"name": "small"}), "there is a next time"
    assert [method for method, _ in target.calls[-2:]] == [
        "bdev_lvol_delete_lvstore",
        "bdev_malloc_delete",
    ]
