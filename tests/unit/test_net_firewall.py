"""The ruleset of a network: what nft is told, and what counts as the same."""

from __future__ import annotations

from ipaddress import IPv4Network
from typing import Any

import pytest

from drivebay.errors import NotFound
from drivebay.net import programs
from drivebay.net.firewall import fingerprint, ruleset
from drivebay.net.model import Network


def network(mode: str) -> Network:
    return Network("my-lan", mode, "db-my-lan", IPv4Network("192.168.100.0/24"))


def words(statement: dict[str, Any]) -> str:
    """A statement of a rule, as a person would write it."""
    if "match" not in statement:
        return next(iter(statement))
    match = statement["match"]
    left = match["left"]
    name = left["meta"]["key"] if "meta" in left else next(iter(left.values()))
    name = name if isinstance(name, str) else name.get("field") or name["key"]
    right = match["right"]
    if isinstance(right, dict) and "prefix" in right:
        right = f"{right['prefix']['addr']}/{right['prefix']['len']}"
    return f"{name} {match['op']} {right if isinstance(right, str) else '…'}"


def rules(mode: str, chain: str) -> list[str]:
    found = [
        c["add"]["rule"] for c in ruleset(network(mode))["nftables"] if "rule" in c.get("add", {})
    ]
    assert {rule["table"] for rule in found} == {"drivebay_my_lan"}
    return [", ".join(map(words, rule["expr"])) for rule in found if rule["chain"] == chain]


INSIDE = "iifname == db-my-lan, oifname == db-my-lan, accept"
OUT = "iifname == db-my-lan, saddr == 192.168.100.0/24, accept"
REFUSED = [
    "iifname == db-my-lan, counter, reject",
    "oifname == db-my-lan, counter, reject",
]


def test_nat_lets_out_what_has_its_source_and_back_what_answers() -> None:
    back = "oifname == db-my-lan, state in …, accept"
    assert rules("nat", "forward") == [INSIDE, OUT, back, *REFUSED]
    assert rules("nat", "postrouting") == [
        "saddr == 192.168.100.0/24, daddr != …, oifname != db-my-lan, masquerade"
    ]


def test_routed_lets_in_what_is_for_it_and_translates_nothing() -> None:
    back = "oifname == db-my-lan, daddr == 192.168.100.0/24, accept"
    assert rules("routed", "forward") == [INSIDE, OUT, back, *REFUSED]
    assert rules("routed", "postrouting") == []


def test_isolated_lets_nothing_pass() -> None:
    assert rules("isolated", "forward") == [INSIDE, *REFUSED]
    assert rules("isolated", "postrouting") == []


def test_the_table_is_replaced_in_one_transaction() -> None:
    commands = ruleset(network("nat"))["nftables"]
    table = {"family": "inet", "name": "drivebay_my_lan"}
    assert commands[:3] == [
        {"add": {"table": table}},  # else there might be none to delete
        {"delete": {"table": table}},
        {"add": {"table": table}},
    ]


def test_handles_and_counts_make_no_difference_and_rules_do() -> None:
    def listed(handle: int, packets: int, port: int) -> dict[str, Any]:
        count = {"counter": {"packets": packets, "bytes": packets * 60}}
        match = {"match": {"op": "==", "left": {"meta": {"key": "x"}}, "right": port}}
        rule = {"rule": {"handle": handle, "expr": [match, count]}}
        return {"nftables": [{"metainfo": {"version": str(handle)}}, rule]}

    assert fingerprint(listed(1, 0, 25)) == fingerprint(listed(9, 77, 25))
    assert fingerprint(listed(1, 0, 25)) != fingerprint(listed(1, 0, 26))


def test_a_program_that_is_missing_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(programs, "_ADMINS", "/nowhere")
    with pytest.raises(NotFound, match="'nft' is not installed") as caught:
        programs.find_program("nft")
    assert caught.value.hint == "sudo apt-get install nftables"
