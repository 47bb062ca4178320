"""The firewall of a network: one nftables table of our own, put there and taken away as a whole.

Context: a short-lived process of root. The ruleset is made as nft's JSON (libnftables-json(5)) and
given to `nft -j`, which alone knows the priorities of chains. Each change is one transaction, so
there is no moment without rules. Tables of others are neither read nor changed: a packet has to
please all of them, so what another table drops stays dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from typing import Any, Final

from drivebay.errors import StateError
from drivebay.net.model import Network
from drivebay.net.programs import find_program

__all__ = ["fingerprint", "present", "put", "refused_packets", "remove", "ruleset"]

Json = dict[str, Any]
_FAMILY: Final = "inet"
_SECONDS: Final = 30.0
_REFUSED: Final = "refused"
# Never translated: a packet to many may be for the host's other side as well as for guests.
_TO_MANY: Final = ({"prefix": {"addr": "224.0.0.0", "len": 4}}, "255.255.255.255")
_ACCEPT: Final[Json] = {"accept": None}
# Refused, not dropped: who tries learns it at once.
_REFUSE: Final[tuple[Json, ...]] = (
    {"counter": None},
    {"reject": {"type": "icmpx", "expr": "admin-prohibited"}},
)


# ---- what should be -----------------------------------------------------------------------------


def ruleset(network: Network) -> Json:
    """The table of a network, as one transaction that replaces an earlier one.

    | from the bridge                       | to the bridge                      |
    |---------------------------------------|------------------------------------|
    | nat, routed: IPv4 with its own source | nat: answers; routed: IPv4 to it   |
    | isolated: nothing                     | isolated: nothing                  |

    Inside the bridge all may talk to each other (frames come here where br_netfilter is on).
    """
    table = {"family": _FAMILY, "name": network.table}
    chains = [_chain(network, "forward", "filter", 0)]
    rules = [_rule(network, "forward", _from(network), _to(network), _ACCEPT)]
    if network.forwards:
        subnet = _subnet(network)
        back: list[Json] = [_answers()] if network.mode == "nat" else [_is(_ip("daddr"), subnet)]
        rules += [
            _rule(network, "forward", _from(network), _is(_ip("saddr"), subnet), _ACCEPT),
            _rule(network, "forward", _to(network), *back, _ACCEPT),
        ]
    rules += [
        _rule(network, "forward", _from(network), *_REFUSE, comment=_REFUSED),
        _rule(network, "forward", _to(network), *_REFUSE, comment=_REFUSED),
    ]
    if network.mode == "nat":
        chains.append(_chain(network, "postrouting", "nat", 100))  # srcnat
        rules.append(_masquerade(network))
    commands: list[Json] = [{"add": {"table": table}}, {"delete": {"table": table}}]
    return {"nftables": [*commands, {"add": {"table": table}}, *chains, *rules]}


def _masquerade(network: Network) -> Json:
    elsewhere = {"set": [_subnet(network), *_TO_MANY]}
    return _rule(
        network,
        "postrouting",
        _is(_ip("saddr"), _subnet(network)),
        _is(_ip("daddr"), elsewhere, "!="),
        _is(_meta("oifname"), network.bridge, "!="),
        {"masquerade": None},
    )


def _chain(network: Network, hook: str, kind: str, priority: int) -> Json:
    chain = {"family": _FAMILY, "table": network.table, "name": hook, "type": kind}
    return {"add": {"chain": {**chain, "hook": hook, "prio": priority, "policy": "accept"}}}


def _rule(network: Network, chain: str, *statements: Json, comment: str | None = None) -> Json:
    rule: Json = {"family": _FAMILY, "table": network.table, "chain": chain}
    rule["expr"] = list(statements)
    if comment is not None:
        rule["comment"] = comment
    return {"add": {"rule": rule}}


def _is(left: Json, right: object, op: str = "==") -> Json:
    return {"match": {"op": op, "left": left, "right": right}}


def _meta(key: str) -> Json:
    return {"meta": {"key": key}}


def _ip(field: str) -> Json:
    return {"payload": {"protocol": "ip", "field": field}}


def _from(network: Network) -> Json:
    return _is(_meta("iifname"), network.bridge)


def _to(network: Network) -> Json:
    return _is(_meta("oifname"), network.bridge)


def _answers() -> Json:
    return _is({"ct": {"key": "state"}}, ["established", "related"], "in")


def _subnet(network: Network) -> Json:
    assert network.subnet is not None
    return {
        "prefix": {"addr": str(network.subnet.network_address), "len": network.subnet.prefixlen}
    }


# ---- what is ------------------------------------------------------------------------------------


def put(network: Network) -> None:
    """Put the table there, in place of an earlier one. Raises: NotFound, StateError."""
    done = _nft("-j", "-f", "-", text=json.dumps(ruleset(network)))
    if done.returncode != 0:
        raise _refusal(f"make the firewall table of network '{network.name}'", done)


def present(network: Network) -> str | None:
    """The fingerprint of the table that is there; None without one. Raises: NotFound."""
    found = _listed(network)
    return None if found is None else fingerprint(found)


def remove(network: Network) -> None:
    """Take the table away, if it is there. Raises: NotFound, StateError."""
    if _listed(network) is None:
        return
    done = _nft("delete", "table", _FAMILY, network.table)
    if done.returncode != 0:
        raise _refusal(f"remove the firewall table of network '{network.name}'", done)


def refused_packets(network: Network) -> int | None:
    """How many packets the table has refused since it was put there."""
    found = _listed(network)
    if found is None:
        return None
    rules = [entry["rule"] for entry in found["nftables"] if "rule" in entry]
    return sum(
        int(statement["counter"]["packets"])
        for rule in rules
        if rule.get("comment") == _REFUSED
        for statement in rule["expr"]
        if "counter" in statement
    )


def fingerprint(value: Json) -> str:
    """What a ruleset says, without what differs from one listing to the next."""
    text = json.dumps(_lasting(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: None if key == "counter" else _lasting(part)
            for key, part in value.items()
            if key not in ("handle", "metainfo")
        }
    if isinstance(value, list):
        return [_lasting(part) for part in value]
    return value


def _listed(network: Network) -> Json | None:
    """`nft list table`, which fails for one that is not there."""
    done = _nft("-j", "list", "table", _FAMILY, network.table)
    if done.returncode != 0:
        if "No such file" in done.stderr:
            return None
        raise _refusal(f"look at the firewall table of network '{network.name}'", done)
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def _nft(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [find_program("nft"), *words]
    try:
        return subprocess.run(
            command,
            input=text or "",
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise StateError(
            f"nft has not answered for {_SECONDS:.0f} seconds", hint="drivebay doctor net"
        ) from error


def _refusal(what: str, done: subprocess.CompletedProcess[str]) -> StateError:
    said = next((line.strip() for line in done.stderr.splitlines() if line.strip()), "nothing")
    return StateError(f"can't {what}: nft says: {said:.200}", hint="drivebay doctor net")
