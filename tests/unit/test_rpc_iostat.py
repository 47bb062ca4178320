"""Counters: how several channels add up, what a reset forgets, and in which words they are told."""

from __future__ import annotations

from typing import Any

import pytest

from drivebay.bdev.base import OpStats
from drivebay.rpc.methods_bdev import counts

FIRST: Any = OpStats(2, 1024, 1, 30, 20, 10)
NOTHING: Any = OpStats(0, 0, 0, 0, 0, 0)


def test_channels_add_up() -> None:
    assert FIRST.plus(OpStats(1, 512, 0, 5, 5, 5)) == OpStats(3, 1536, 1, 35, 20, 5)
    assert FIRST.plus(NOTHING) == NOTHING.plus(FIRST) == FIRST


@pytest.mark.parametrize(
    ("mode", "left"),
    [
        ("all", NOTHING),
        ("error", OpStats(2, 1024, 0, 30, 20, 10)),
        ("maxmin", OpStats(2, 1024, 1, 30, 0, 0)),
    ],
)
def test_a_reset_forgets_what_its_mode_says(mode: str, left: OpStats) -> None:
    assert FIRST.cleared(mode) == left


def test_counters_have_spdks_names() -> None:
    told = counts({"read": FIRST, "write": NOTHING, "unmap": FIRST, "flush": FIRST})
    assert (told["num_read_ops"], told["bytes_read"], told["num_unmap_ops"]) == (2, 1024, 2)
    assert (told["num_write_ops"], told["bytes_written"]) == (0, 0)
    assert told["read_latency_ticks"] == 30
    assert (told["max_read_latency_ticks"], told["min_read_latency_ticks"]) == (20, 10)
    assert told["num_copy_ops"] == told["bytes_copied"] == 0
    assert told["io_error"] == {"failed": 3}
    assert counts({"read": NOTHING})["io_error"] == {}
