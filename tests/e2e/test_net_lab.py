"""A lab's networks: made by `drivebay up`, joined by name, gone with `drivebay down --delete`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.net_bay import NetBay, net_bay_in

LAB = """\
[net.lan]
mode = "nat"
subnet = "192.168.100.0/24"
[net.back]
mode = "isolated"
"""


@pytest.fixture
def bay(folder: Path) -> Iterator[NetBay]:
    with net_bay_in(folder) as bay:
        yield bay
        bay.run("target", "stop", "--force")


def test_up_makes_networks_and_down_takes_them_away(bay: NetBay, folder: Path) -> None:
    file = folder / "four.toml"
    file.write_text(LAB)
    before = bay.links(bay.host)
    made = bay.ok("up", str(file))
    assert "make network 'four-lan', mode nat, for [net.lan]" in made
    assert set(bay.links(bay.host)) - set(before) == {"db-four-lan", "db-four-back"}
    assert "inet 192.168.100.1/24 " in bay.ip(bay.host, "addr show db-four-lan")
    bay.ip(bay.host, "link delete db-four-back")
    again = bay.ok("up", str(file))
    assert "start network 'four-back'" in again
    assert "four-lan" not in again, "which lacks nothing"
    bay.ok("down", str(file), "--delete", "--yes")
    assert bay.links(bay.host) == before
    assert bay.json("net", "list") == []
