"""Firewalls of others that keep guests' packets back: found in the rules that the host has.

Context: any; reads what `nft -j list ruleset` and `iptables-legacy -S` have said, and changes no
rule: the mend is a command for the person whose firewall it is.

What one table lets through another may still drop, so our own rules can't help a guest here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

__all__ = ["Blocker", "blockers"]

Json = dict[str, Any]
_OURS: Final = "drivebay_"
_DHCP_AND_DNS: Final = "53,67"


@dataclass(frozen=True)
class Blocker:
    """A chain that lets through only what it knows. ``hook``: forward, or input (to the host)."""

    owner: str  # docker, ufw, firewalld, iptables, iptables-legacy, nftables
    hook: str
    family: str
    table: str
    chain: str

    def __str__(self) -> str:
        if self.owner in ("docker", "ufw", "firewalld"):
            return f"{self.owner}'s firewall ({self.family} {self.table}, chain {self.chain})"
        return f"chain {self.chain} of {self.owner} ({self.family} {self.table})"

    def mend(self, bridge: str) -> str:
        """The commands by which a person lets a bridge's packets through."""
        forwarded = self.hook == "forward"
        match self.owner:
            case "firewalld":
                return (
                    f"sudo firewall-cmd --permanent --zone=trusted --add-interface={bridge} && "
                    "sudo firewall-cmd --reload"
                )
            case "ufw" if forwarded:
                return (
                    f"sudo ufw route allow in on {bridge} && sudo ufw route allow out on {bridge}"
                )
            case "ufw":
                return f"sudo ufw allow in on {bridge}"
            case "nftables":
                rule = f"sudo nft insert rule {self.family} {self.table} {self.chain}"
                if forwarded:
                    return f"{rule} iifname {bridge} accept && {rule} oifname {bridge} accept"
                return f"{rule} iifname {bridge} udp dport '{{ {_DHCP_AND_DNS} }}' accept"
        program = "iptables-legacy" if self.owner == "iptables-legacy" else "iptables"
        chain = "DOCKER-USER" if self.owner == "docker" and forwarded else self.chain
        insert = f"sudo {program} -I {chain}"
        if forwarded:
            return f"{insert} -i {bridge} -j ACCEPT && {insert} -o {bridge} -j ACCEPT"
        ports = f"-p udp -m multiport --dports {_DHCP_AND_DNS}"
        return f"{insert} -i {bridge} {ports} -j ACCEPT"


def blockers(ruleset: Json, legacy: str, hook: str, bridge: str) -> Iterator[Blocker]:
    """Each firewall that drops at ``hook`` what it does not know, and has no rule for a bridge."""
    entries = ruleset.get("nftables", [])
    chains: list[Json] = [entry["chain"] for entry in entries if "chain" in entry]
    rules: list[Json] = [entry["rule"] for entry in entries if "rule" in entry]
    for chain in chains:
        place = (chain["family"], chain["table"])
        if chain.get("hook") != hook or chain["family"] not in ("ip", "inet"):
            continue
        if str(chain["table"]).startswith(_OURS):
            continue
        its_rules = [rule for rule in rules if (rule["family"], rule["table"]) == place]
        if _closed(chain, its_rules) and not any(_names(rule, bridge) for rule in its_rules):
            names = {str(c["name"]) for c in chains if (c["family"], c["table"]) == place}
            yield Blocker(_owner(chain, names), hook, *place, str(chain["name"]))
    yield from _legacy_blocker(legacy, hook, bridge)


def _closed(chain: Json, rules: list[Json]) -> bool:
    """Whether what no rule knows is dropped: by the policy, or by an unconditional last rule."""
    if chain.get("policy") == "drop":
        return True
    own = [rule for rule in rules if rule["chain"] == chain["name"]]
    if not own:
        return False
    last = [part for part in own[-1]["expr"] if "counter" not in part and "log" not in part]
    return len(last) == 1 and (
        "drop" in last[0]
        or "reject" in last[0]
        or last[0].get("xt") == {"type": "target", "name": "REJECT"}
    )


def _names(rule: Json, bridge: str) -> bool:
    """Whether a rule is for what comes from a bridge, and does not end there."""
    if any("drop" in part or "reject" in part for part in rule["expr"]):
        return False
    for part in rule["expr"]:
        match = part.get("match")
        if not isinstance(match, dict) or match.get("op") != "==":
            continue
        if match["left"] not in ({"meta": {"key": "iifname"}}, {"meta": {"key": "iif"}}):
            continue
        right = match["right"]
        wanted = right.get("set", []) if isinstance(right, dict) else [right]
        if any(fnmatchcase(bridge, str(pattern)) for pattern in wanted):
            return True
    return False


def _owner(chain: Json, names: set[str]) -> str:
    if chain["table"] == "firewalld":
        return "firewalld"
    if any(name.startswith("ufw-") for name in names):
        return "ufw"
    if "DOCKER-USER" in names and chain["hook"] == "forward":
        return "docker"
    return "iptables" if chain["name"] in ("FORWARD", "INPUT") else "nftables"


def _legacy_blocker(listed: str, hook: str, bridge: str) -> Iterator[Blocker]:
    """The same in the kernel's older tables, as `iptables-legacy -S` lists them."""
    chain = hook.upper()
    lines = listed.splitlines()
    own = [line for line in lines if line.startswith(f"-A {chain} ")]
    rejects = bool(own) and own[-1].startswith((f"-A {chain} -j REJECT", f"-A {chain} -j DROP"))
    if f"-P {chain} DROP" not in lines and not rejects:
        return
    for line in lines:
        words = line.split()
        if "-i" in words and words[-2:] == ["-j", "ACCEPT"]:
            pattern = words[words.index("-i") + 1].replace("+", "*")
            if fnmatchcase(bridge, pattern) and "!" not in words:
                return
    owner = "docker" if hook == "forward" and "-N DOCKER-USER" in lines else "iptables-legacy"
    yield Blocker(owner, hook, "ip", "filter", chain)
