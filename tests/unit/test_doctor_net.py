"""`drivebay doctor net`: what is found in facts about hosts on which a network does not work."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Network
from typing import Any

import pytest

from drivebay.cli.main import main
from drivebay.host import network
from drivebay.host.finding import Finding
from drivebay.host.firewalls import blockers
from drivebay.host.network import findings
from drivebay.host.network_facts import Facts, Listener, Standing, parse_listeners
from drivebay.net.model import Network

LAN = Network("lan", "nat", "db-lan", IPv4Network("192.168.9.0/24"), made=True)
OFFICE = Network("office", "bridge", "br0", uplink="eno1", made=True)
LAB = Network("lab", "isolated", "db-lab", IPv4Network("192.168.10.0/24"), made=True)
UP = Standing("lan", LAN, "up", 4711)
GOOD = Facts(
    root=True,
    networks=(UP,),
    forwarding=True,
    uplinks=("eno1",),
    rules={"nftables": []},
    can_bridge=True,
    can_translate=True,
    ping_groups=(0, 2147483647),
    groups=(1000,),
)
Json = dict[str, Any]


def bad(facts: Facts) -> list[Finding]:
    return [finding for finding in findings(facts) if finding.level != "ok"]


def only(facts: Facts) -> Finding:
    (found,) = bad(facts)
    return found


def standing(net: Network, state: str = "up") -> Standing:
    return Standing(net.name, net, state, 4711 if state == "up" else None)


def chain(name: str, hook: str | None = None, policy: str = "drop", **place: str) -> Json:
    base = {"family": "ip", "table": "filter", **place, "name": name}
    return {"chain": base if hook is None else {**base, "hook": hook, "policy": policy}}


def rule(chain: str, *parts: Json, **place: str) -> Json:
    return {"rule": {"family": "ip", "table": "filter", **place, "chain": chain,
                     "expr": list(parts)}}  # fmt: skip


def from_(bridge: object, key: str = "iifname", op: str = "==") -> Json:
    return {"match": {"op": op, "left": {"meta": {"key": key}}, "right": bridge}}


ACCEPT: Json = {"accept": None}
COUNTER: Json = {"counter": {"packets": 1, "bytes": 2}}
DOCKER = [
    chain("FORWARD", "forward"),
    chain("DOCKER-USER"),
    rule("FORWARD", COUNTER, {"jump": {"target": "DOCKER-USER"}}),
    rule("FORWARD", from_("docker0"), ACCEPT),
]


def with_rules(*entries: Json, **changed: Any) -> Facts:
    return replace(GOOD, rules={"nftables": list(entries)}, **changed)


def test_a_good_host_has_nothing_to_mend() -> None:
    assert bad(GOOD) == []
    assert [finding.what for finding in findings(GOOD)][-1] == "network 'lan', mode nat"


# ---- firewalls ----------------------------------------------------------------------------------


def test_dockers_forward_policy_is_named_and_only_the_person_mends_it() -> None:
    found = only(with_rules(*DOCKER))
    assert (found.level, found.subject) == ("problem", "firewall")
    assert found.what == (
        "docker's firewall (ip filter, chain FORWARD) lets through only what it knows, and has no "
        "rule for 'db-lan': guests of network 'lan' reach nothing outside"
    )
    assert found.mend == (
        "sudo iptables -I DOCKER-USER -i db-lan -j ACCEPT && "
        "sudo iptables -I DOCKER-USER -o db-lan -j ACCEPT"
    )


@pytest.mark.parametrize("right", ["db-lan", "db-*", {"set": ["virbr0", "db-lan"]}])
def test_a_rule_for_the_bridge_is_enough(right: object) -> None:
    assert bad(with_rules(*DOCKER, rule("DOCKER-USER", from_(right), COUNTER, ACCEPT))) == []


@pytest.mark.parametrize(
    "parts",
    [
        (from_("db-lan"), {"drop": None}),
        (from_("db-lan", op="!="), ACCEPT),
        (from_("db-lan", "oifname"), ACCEPT),
        (from_("db-other"), ACCEPT),
    ],
)
def test_a_rule_that_lets_nothing_in_from_it_is_none(parts: tuple[Json, ...]) -> None:
    assert only(with_rules(*DOCKER, rule("DOCKER-USER", *parts))).subject == "firewall"


def test_rules_of_another_table_do_not_help() -> None:
    elsewhere = rule("forward", from_("db-lan"), ACCEPT, table="mine", family="inet")
    assert only(with_rules(*DOCKER, elsewhere)).subject == "firewall"


@pytest.mark.parametrize(
    ("entries", "owner", "mend"),
    [
        ([chain("FORWARD", "forward")], "chain FORWARD of iptables (ip filter)",
         "sudo iptables -I FORWARD -i db-lan -j ACCEPT"),
        ([chain("FORWARD", "forward"), chain("ufw-user-forward")], "ufw's firewall",
         "sudo ufw route allow in on db-lan && sudo ufw route allow out on db-lan"),
        ([chain("filter_FORWARD", "forward", "accept", family="inet", table="firewalld"),
          rule("filter_FORWARD", {"reject": {}}, family="inet", table="firewalld")],
         "firewalld's firewall", "sudo firewall-cmd --permanent --zone=trusted"),
        ([chain("fw", "forward", family="inet", table="own")], "chain fw of nftables (inet own)",
         "sudo nft insert rule inet own fw iifname db-lan accept && "),
        ([chain("FORWARD", "forward", "accept"),
          rule("FORWARD", COUNTER, {"xt": {"type": "target", "name": "REJECT"}})],
         "chain FORWARD of iptables", "sudo iptables -I FORWARD"),
    ],
)  # fmt: skip
def test_each_firewall_has_its_own_mend(entries: list[Json], owner: str, mend: str) -> None:
    found = only(with_rules(*entries))
    assert found.what.startswith(owner)
    assert mend in (found.mend or "")


@pytest.mark.parametrize(
    "entries",
    [
        [chain("FORWARD", "forward", "accept"), rule("FORWARD", from_("eth7"), {"drop": None})],
        [chain("forward", "forward", family="inet", table="drivebay_other")],
        [chain("forward", "forward", family="bridge", table="filter")],
        [chain("OUTPUT", "output")],
        [chain("FORWARD", "forward", "accept"), rule("FORWARD", COUNTER, {"return": None})],
    ],
)
def test_a_firewall_that_lets_the_unknown_through_is_none(entries: list[Json]) -> None:
    assert bad(with_rules(*entries)) == []


def test_a_closed_host_gives_no_addresses() -> None:
    found = only(with_rules(chain("INPUT", "input")))
    assert "get no address and no name by DHCP and DNS" in found.what
    assert found.mend == (
        "sudo iptables -I INPUT -i db-lan -p udp -m multiport --dports 53,67 -j ACCEPT"
    )
    assert bad(with_rules(chain("INPUT", "input"), networks=(standing(OFFICE),))) == []


def test_where_bridged_frames_are_filtered_bridges_of_all_kinds_suffer() -> None:
    nets = (standing(OFFICE), standing(LAB))
    facts = with_rules(*DOCKER, networks=nets, foreign_bridges=("br0", "virbr0"))
    assert bad(facts) == [], "inside a bridge nothing is filtered"
    found = bad(replace(facts, bridged_filtered=True))
    assert [(finding.mend or "").split()[5] for finding in found] == ["br0", "db-lab", "virbr0"]
    assert all("bridge-nf-call-iptables is 1" in finding.what for finding in found)
    assert "not each other" in only(with_rules(*DOCKER, bridged_filtered=True)).what


LEGACY = "-P INPUT ACCEPT\n-P FORWARD DROP\n-P OUTPUT ACCEPT\n"


@pytest.mark.parametrize(
    ("listed", "mend"),
    [
        (LEGACY, "sudo iptables-legacy -I FORWARD -i db-lan"),
        (LEGACY + "-N DOCKER-USER\n", "sudo iptables -I DOCKER-USER -i db-lan"),
        ("-P FORWARD ACCEPT\n-A FORWARD -j REJECT --reject-with icmp-host-prohibited\n",
         "sudo iptables-legacy -I FORWARD"),
        (LEGACY + "-A FORWARD -i db-+ -j ACCEPT\n", None),
        (LEGACY + "-A FORWARD ! -i db-lan -j ACCEPT\n", "iptables-legacy"),
        ("-P FORWARD ACCEPT\n", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_older_tables_are_looked_at_too(listed: str, mend: str | None) -> None:
    found = [blocker.mend("db-lan") for blocker in blockers({}, listed, "forward", "db-lan")]
    assert len(found) == (0 if mend is None else 1)
    assert all(mend in text for text in found if mend)


# ---- kernel, programs, networks -----------------------------------------------------------------


def test_what_the_kernel_lacks_hurts_who_has_a_network() -> None:
    without = replace(GOOD, can_tap=False, can_bridge=False, can_translate=False, can_vhost=False)
    found = bad(without)
    assert [(finding.level, (finding.mend or "").split("modprobe ")[1]) for finding in found] == [
        ("problem", "tun"),
        ("problem", "bridge"),
        ("problem", "-a nf_tables nft_chain_nat nft_masq"),
        ("note", "vhost_net"),
    ]
    assert {finding.level for finding in bad(replace(without, networks=()))} == {"note"}


def test_programs_that_are_missing() -> None:
    without = replace(GOOD, lacking={"dnsmasq": "sudo apt-get install dnsmasq-base"})
    assert only(without).level == "problem"
    assert only(replace(without, networks=(standing(OFFICE),))).level == "note"


@pytest.mark.parametrize("state", ["down", "half made: has to make bridge 'db-lan'"])
def test_a_network_that_is_not_up_is_started(state: str) -> None:
    found = only(replace(GOOD, networks=(standing(LAN, state),)))
    assert found.what == f"network 'lan' is {state}"
    assert found.mend == "sudo drivebay net start lan"


def test_a_network_whose_file_is_broken() -> None:
    found = only(replace(GOOD, networks=(Standing("lan", None, "network.toml is not TOML"),)))
    assert found.what == "network.toml is not TOML"


def test_forwarding_matters_to_networks_that_lead_out() -> None:
    off = replace(GOOD, forwarding=False)
    assert "passes no packets on" in only(off).what
    assert bad(replace(off, networks=(standing(LAB), standing(OFFICE)))) == []
    assert bad(replace(off, forwarding=None)) == []


def test_a_strict_filter_matters_with_several_uplinks() -> None:
    strict = replace(GOOD, strict=("eno1",))
    assert bad(strict) == []
    several = replace(strict, uplinks=("eno1", "wlan0"))
    assert only(several).mend == "sudo sysctl net.ipv4.conf.all.rp_filter=2"
    assert bad(replace(several, strict=())) == []
    assert bad(replace(several, networks=(standing(LAB),))) == []


def test_a_change_of_the_uplink_that_waits() -> None:
    assert "is taken back in 42 seconds" in only(replace(GOOD, waiting=42.4)).what


def test_a_plain_user_is_told_what_only_root_sees() -> None:
    ours = Listener("udp", "192.168.9.1", 53)  # whose process is not told
    plain = replace(GOOD, root=False, rules=None, networks=(Standing("lan", LAN, "up"),))
    assert only(replace(plain, listeners=(ours,))).mend == "sudo drivebay doctor net"


def test_ping_in_user_mode_needs_the_hosts_leave() -> None:
    assert only(replace(GOOD, ping_groups=(1, 0))).level == "note"
    assert bad(replace(GOOD, ping_groups=(1000, 1000))) == []
    assert only(replace(GOOD, ping_groups=(0, 999))).subject == "ping"


# ---- who listens --------------------------------------------------------------------------------

SS = """\
udp UNCONN 0 0 0.0.0.0%virbr0:67 0.0.0.0:* users:(("dnsmasq",pid=11,fd=3))
udp UNCONN 0      0      0.0.0.0%db-lan:67 0.0.0.0:* users:(("dnsmasq",pid=4711,fd=4))
udp UNCONN 0 0 0.0.0.0:67 0.0.0.0:* users:(("dhcpd",pid=12,fd=7))
tcp LISTEN 0 32 [::1]:53 [::]:* users:(("un(b)ound",pid=13,fd=5))
tcp LISTEN 0 32 *:53 *:*
nonsense
"""


def test_what_ss_says_is_read() -> None:
    assert list(parse_listeners(SS)) == [
        Listener("udp", "0.0.0.0", 67, "virbr0", "dnsmasq", 11),
        Listener("udp", "0.0.0.0", 67, "db-lan", "dnsmasq", 4711),
        Listener("udp", "0.0.0.0", 67, None, "dhcpd", 12),
        Listener("tcp", "[::1]", 53, None, "un(b)ound", 13),
        Listener("tcp", "*", 53),
    ]


def listening(*listeners: Listener, state: str = "up") -> Facts:
    return replace(GOOD, networks=(standing(LAN, state),), listeners=listeners)


def test_another_dhcp_server_may_answer_our_guests() -> None:
    everywhere = only(listening(Listener("udp", "0.0.0.0", 67, None, "dhcpd", 12)))
    assert everywhere.level == "warning"
    assert "dhcpd (process 12) listens for DHCP on all interfaces" in everywhere.what
    here = only(listening(Listener("udp", "0.0.0.0", 67, "db-lan", "dnsmasq", 12)))
    assert here.level == "problem"
    assert "except-interface=db-lan" in (here.mend or "")


def test_our_own_and_those_of_other_bridges_are_none() -> None:
    ours = Listener("udp", "0.0.0.0", 67, "db-lan", "dnsmasq", 4711)
    libvirts = Listener("udp", "0.0.0.0", 67, "virbr0", "dnsmasq", 11)
    assert bad(listening(ours, libvirts, Listener("tcp", "127.0.0.1", 53))) == []


def test_a_name_server_everywhere_keeps_ours_from_its_port() -> None:
    theirs = Listener("udp", "[::]", 53, None, "named", 12)
    assert bad(listening(theirs)) == [], "ours has its port already"
    down, dns = bad(listening(theirs, state="down"))
    assert (down.subject, dns.subject) == ("networks", "DNS")
    assert "named (process 12) listens on port 53/udp on all interfaces" in dns.what


# ---- the command --------------------------------------------------------------------------------


def test_the_command_says_what_facts_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(network, "read_facts", lambda *_: with_rules(*DOCKER))
    monkeypatch.setattr(network, "_foreign_bridges", lambda: iter(()))
    assert main(["doctor", "net", "-q"]) == 1
    assert "sudo iptables -I DOCKER-USER -i db-lan -j ACCEPT" in capsys.readouterr().out
    monkeypatch.setattr(network, "read_facts", lambda *_: GOOD)
    assert main(["doctor", "net"]) == 0
    assert main(["doctor", "nets"]) == 2
    assert "hint: drivebay doctor, or: doctor net, doctor vm NAME" in capsys.readouterr().err
