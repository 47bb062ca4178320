"""The folders of networks and their journals: at once or not at all, one change at a time."""

from __future__ import annotations

import threading
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from drivebay.errors import AlreadyExists, InUse, NotFound, StateError, UsageError
from drivebay.net import store
from drivebay.net.journal import Journal, Made
from drivebay.net.model import Network
from drivebay.net.store import Networks, require_root

LAN = Network("lan", "nat", "db-lan", IPv4Network("192.168.100.0/24"))


@pytest.fixture
def networks(tmp_path: Path) -> Networks:
    found = Networks(tmp_path / "networks")
    with found.all_locked():
        found.create(LAN)
    return found


def test_a_network_is_found_again(networks: Networks) -> None:
    assert networks.names() == ["lan"]
    assert networks.load("lan") == LAN
    assert networks.others("lan") == []
    assert networks.others("x") == [LAN]
    assert networks.mark_made(LAN).made
    assert networks.load("lan").made


def test_everybody_may_look(networks: Networks) -> None:
    folder = networks.of("lan")
    assert folder.stat().st_mode & 0o777 == 0o755
    assert (folder / "network.toml").stat().st_mode & 0o777 == 0o644


def test_a_name_that_is_taken_is_refused(networks: Networks) -> None:
    with pytest.raises(AlreadyExists, match="network 'lan' already"):
        networks.create(LAN)
    assert [path.name for path in networks.folder.iterdir() if path.is_dir()] == ["lan"]


def test_what_killed_commands_left_goes_with_the_next_creation(networks: Networks) -> None:
    for name in (".new-abc", ".gone-lan-7"):
        (networks.folder / name).mkdir()
        (networks.folder / name / "network.toml").write_text("half")
    assert networks.names() == ["lan"]
    networks.create(Network("x", "nat", "db-x", IPv4Network("10.0.0.0/24")))
    assert [path.name for path in sorted(networks.folder.glob("*/"))] == ["lan", "x"]


def test_a_network_that_is_gone_is_named(networks: Networks) -> None:
    networks.delete("lan")
    assert networks.names() == []
    with pytest.raises(NotFound, match="no network 'lan'"):
        networks.load("lan")
    with pytest.raises(NotFound), networks.locked("lan"):
        pass


def test_a_broken_file_is_named_and_hides_no_other_network(networks: Networks) -> None:
    path = networks.of("lan") / "network.toml"
    path.write_text("mode = 3")
    with pytest.raises(UsageError) as caught:
        networks.load("lan")
    assert caught.value.hint == f"mend it: {path}"
    assert networks.others("x") == []


def test_a_second_change_waits_for_the_first(networks: Networks) -> None:
    inside, done = threading.Event(), []

    def change() -> None:
        inside.wait(10)
        with networks.locked("lan"):
            done.append("second")

    thread = threading.Thread(target=change)
    thread.start()
    with networks.locked("lan"):
        inside.set()
        thread.join(0.2)
        done.append("first")
    thread.join(10)
    assert done == ["first", "second"]


def test_a_change_that_takes_too_long_is_said(
    networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.0)
    with (
        networks.locked("lan"),
        pytest.raises(InUse, match="has been changing network 'lan'"),
        networks.locked("lan"),
    ):
        pass


def test_one_who_waited_for_its_end_finds_no_network(networks: Networks) -> None:
    found: list[str] = []

    def change() -> None:
        try:
            with networks.locked("lan"):
                found.append("a network that is gone")
        except NotFound as error:
            found.append(str(error))

    with networks.locked("lan"):
        thread = threading.Thread(target=change)
        thread.start()
        thread.join(0.2)
        networks.delete("lan")
    thread.join(10)
    assert found == ["there is no network 'lan'"]


def test_a_plain_user_is_told_who_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(StateError) as caught:
        require_root("net create lan")
    assert caught.value.hint == "sudo drivebay net create lan"
    assert Networks().folder == Path("/var/lib/drivebay/networks")


# ---- the journal --------------------------------------------------------------------------------


def test_the_journal_keeps_the_order_and_one_thing_of_a_kind(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.entries() == []
    journal.note("bridge", "db-lan")
    journal.note("dnsmasq", "dnsmasq", pid=7)
    journal.note("table", "drivebay_lan")
    journal.note("dnsmasq", "dnsmasq", pid=8)
    assert [entry.kind for entry in journal.entries()] == ["bridge", "dnsmasq", "table"]
    assert journal.find("dnsmasq") == Made("dnsmasq", "dnsmasq", {"pid": 8})
    journal.strike("bridge")
    journal.strike("bridge")
    assert journal.find("bridge") is None
    assert (tmp_path / "made.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "text", ["{", "[1]", '[{"kind": "bridge"}]', '[{"kind": "rocket", "name": "", "facts": {}}]']
)
def test_a_journal_that_is_broken_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "made.json").write_text(text)
    with pytest.raises(UsageError, match="is not what Drivebay wrote") as caught:
        Journal(tmp_path).entries()
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(f"rm {tmp_path}/made.json")
