"""The target's answers become pools, disks and snapshots; SPDK's recorded ones among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drivebay.disks import inventory as module
from drivebay.disks.inventory import Inventory, check_name, read_inventory
from drivebay.errors import NotFound, UsageError

DATA = Path(__file__).parents[1] / "data" / "spdk_inventory.json"


class Recorded:
    """Answers as SPDK did when its recording had most volumes."""

    def __init__(self) -> None:
        self.answers = json.loads(DATA.read_text())

    def call(self, method: str, params: Any = None) -> Any:
        return self.answers[method]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Inventory:
    monkeypatch.setattr(module, "call", lambda client, method: client.call(method))
    return read_inventory(Recorded())  # type: ignore[arg-type]


def test_spdk_answers_are_understood(recorded: Inventory) -> None:
    (pool,) = recorded.pools
    assert (pool.name, pool.base, pool.module, pool.place) == (
        "lvs0",
        "AL",
        "aio",
        "RUN/aio_lvs.img",
    )
    assert pool.size == 254 << 20
    thin, snap = recorded.disk("lvs0/thin"), recorded.disk("snap")
    assert (thin.kind, thin.pool, thin.parent, thin.snapshot) == ("thin", "lvs0", "snap", False)
    assert snap.snapshot
    assert recorded.snapshots_of(thin) == [snap]
    assert recorded.children(snap) == [thin]
    assert recorded.disk(thin.bdev) == thin
    names = {disk.name for disk in recorded.disks}
    assert {"thick2", "thin", "byuuid", "ext", "A0", "N0p0", "M1"} <= names
    # A pool's base, what was split, and a snapshot are nothing that a machine is given.
    assert not names & {"AL", "N0", "snap", "Ra"}
    assert recorded.disk("N0p0").base == "N0"
    assert {part.name for part in recorded.parts_of(recorded.disk("N0"))} == {"N0p0", "N0p1"}
    assert recorded.pool_on(recorded.disk("AL")) == pool


def test_what_is_not_there_is_said(recorded: Inventory) -> None:
    with pytest.raises(NotFound, match="there is no disk 'nosuch'"):
        recorded.disk("nosuch")
    with pytest.raises(NotFound, match="there is no pool 'nosuch'"):
        recorded.pool("nosuch")
    with pytest.raises(NotFound, match="disk 'thin' has no snapshot 'nosuch'") as caught:
        recorded.snapshot_of(recorded.disk("thin"), "nosuch")
    assert caught.value.hint == "it has: snap"


@pytest.mark.parametrize(
    "name", ["", "a/b", "a@b", "-a", "a b", "a\n", "x" * 64, "\u00e9" * 32, "a\x1b"]
)
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="name"):
        check_name(name, "disk")


@pytest.mark.parametrize("name", ["a", "web-1.example_x", "x" * 63, "\u00e9" * 31])
def test_good_names_are_not(name: str) -> None:
    check_name(name, "disk")
