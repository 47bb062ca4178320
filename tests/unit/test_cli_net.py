"""`drivebay net`: what is refused before anything is done, and what a plain user sees."""

from __future__ import annotations

import json
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from drivebay.cli.main import main
from drivebay.net import members, reconcile, store
from drivebay.net.model import Network
from drivebay.net.store import Networks

MAC = "52:54:00:00:00:01"


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Networks:
    """Root's networks, of which none is up, and we are a plain user."""
    found = Networks(tmp_path / "networks")
    with found.all_locked():
        subnet = IPv4Network("192.168.100.0/24")
        found.create(Network("dbt-lan", "nat", "db-dbt-lan", subnet, made=True))
    members.keep(found, "dbt-lan", "web", 0, MAC)
    lease = f"99999999999 {MAC} 192.168.100.2 web *\n99999999999 {MAC[:-1]}9 192.168.100.140 * *\n"
    (found.of("dbt-lan") / "leases").write_text(lease)
    monkeypatch.setattr(store, "ROOTS", found.folder)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(reconcile, "differences", lambda *_: pytest.fail("only root sees them"))
    return found


def said(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    assert main(["net", *words]) == code
    return capsys.readouterr().err


@pytest.mark.parametrize("words", [("create", "x"), ("delete", "dbt-lan"), ("start", "dbt-lan")])
def test_only_root_changes_networks(
    networks: Networks, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert f"hint: sudo drivebay net {' '.join(words)}" in said(capsys, 1, *words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--subnet", "192.168.1.5/24"), "is 192.168.1.0/24 meant?"),
        (("--subnet", "x"), "'x' is no IPv4 subnet"),
        (("--mode", "switch"), "invalid choice: 'switch'"),
        (("--mtu", "big"), "invalid int value"),
    ],
)
def test_a_wrong_word_is_named(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: str
) -> None:
    assert expected in said(capsys, 2, "create", "lan", *words)


def test_a_plain_user_sees_networks(networks: Networks, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["net", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "name": "dbt-lan",
            "mode": "nat",
            "subnet": "192.168.100.0/24",
            "bridge": "db-dbt-lan",
            "uplink": None,
            "vms": ["web"],
            "state": "down",
        }
    ]
    assert main(["net", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "dbt-lan", "nat", "192.168.100.0/24", "db-dbt-lan", "web", "down"
    ]  # fmt: skip
    assert main(["net", "list", "-q"]) == 0
    assert capsys.readouterr().out == "dbt-lan\n"


def test_who_is_in_a_network_is_shown(
    networks: Networks, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["net", "info", "dbt-lan", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(e["vm"], e["address"], e["name"]) for e in shown["members"]] == [
        ("web", "192.168.100.2", "web"),
        (None, "192.168.100.140", None),
    ]
    assert main(["net", "info", "dbt-lan"]) == 0
    text = capsys.readouterr().out
    assert "gateway   192.168.100.1, the host; DHCP and DNS, too" in text
    assert f"web  0          {MAC}  192.168.100.2" in text


def test_a_network_that_is_broken_is_listed_with_its_reason(
    networks: Networks, capsys: pytest.CaptureFixture[str]
) -> None:
    (networks.of("dbt-lan") / "network.toml").write_text("mode = 3")
    assert main(["net", "list"]) == 0
    assert "'mode' is 3, and should be a text" in capsys.readouterr().out
    assert "mend it:" in said(capsys, 2, "info", "dbt-lan")


def test_a_network_that_is_not_there_is_named(
    networks: Networks, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no network 'wan'" in said(capsys, 1, "info", "wan")
