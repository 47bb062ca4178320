"""vm/agent.py against an agent that obeys, refuses, lies, says too much, or says nothing."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.errors import DrivebayError, HostError, PeerError
from drivebay.vm import agent as agent_module
from drivebay.vm.agent import Agent, AgentRefused, AgentSilent, Interface
from tests.fakes.qemu_agent import FakeAgent, done, raw, refuses, says, silent

SHORT = 0.05


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeAgent]:
    fake = FakeAgent(tmp_path / "a")
    yield fake
    fake.close()


# ---- the port -----------------------------------------------------------------------------------


def test_what_was_in_the_port_before_counts_for_nothing(guest: FakeAgent) -> None:
    guest.first_words = b'{"return": 1}\n{"half\nno json\n[]\n\x00\xfe{"return": {}}\n{"unfinis'
    guest.will("guest-ping", says({}))
    with Agent(guest.path) as agent:
        agent.ping()
    assert guest.commands() == ["guest-ping"]


def test_a_wrong_number_is_no_answer(guest: FakeAgent) -> None:
    guest.will("guest-sync-delimited", says(7))
    with pytest.raises(AgentSilent, match="no guest agent answers"):
        Agent(guest.path, SHORT)


def test_a_guest_without_an_agent_is_told_what_to_install(guest: FakeAgent) -> None:
    guest.will("guest-sync-delimited", silent)
    with pytest.raises(AgentSilent) as caught:
        Agent(guest.path, SHORT)
    assert "apt install qemu-guest-agent" in str(caught.value.hint)


def test_a_guest_that_never_stops_talking_is_silent_too(
    guest: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.will("guest-sync-delimited", raw(b'{"return": 0}\n' * 100_000))
    clock = iter(range(1_000_000))
    monkeypatch.setattr("drivebay.vm.agent.time.monotonic", lambda: float(next(clock)))
    with pytest.raises(AgentSilent):
        Agent(guest.path, 3.0)


def test_no_port_at_all(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="can't reach the guest agent's port: No such file"):
        Agent(tmp_path / "absent")


def test_a_line_without_end_is_refused(guest: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "LINE_MOST", 1000)
    guest.will("guest-info", raw(b'"' + b"x" * 2000))
    with Agent(guest.path) as agent, pytest.raises(PeerError, match="more than 1000 bytes"):
        agent.info()


def test_the_end_of_qemu_is_noticed(guest: FakeAgent) -> None:
    guest.will("guest-ping", raw(b""))
    with Agent(guest.path) as agent, pytest.raises(PeerError, match="QEMU ended before"):
        agent.ping()


def test_a_late_answer_is_not_taken_for_the_next_one(guest: FakeAgent) -> None:
    guest.will("guest-ping", silent)
    guest.will("guest-fsfreeze-thaw", says(3))
    with Agent(guest.path) as agent:
        with pytest.raises(AgentSilent):
            agent.call("guest-ping", SHORT)
        guest.late = b'{"return": 99}\n'
        assert agent.thaw() == 3


def test_a_short_answer_behind_a_long_one_is_found(guest: FakeAgent) -> None:
    """They come together, so that what was searched for the end of one is no matter any more."""
    guest.late = b"x" * 1_000_000 + b"\n"
    Agent(guest.path).close()


@pytest.mark.parametrize(
    "line", [b"no json\n", b"[1]\n", b"{}\n", b'{"x": 1}\n', b"[" * 9999 + b"\n"]
)
def test_an_answer_that_is_none_is_refused(guest: FakeAgent, line: bytes) -> None:
    guest.will("guest-ping", raw(line))
    with Agent(guest.path) as agent, pytest.raises(PeerError, match="answered 'guest-ping'"):
        agent.ping()


def test_a_refusal_has_the_agents_words(guest: FakeAgent) -> None:
    guest.will("guest-ping", refuses("out of order"))
    guest.will("guest-info", raw(b'{"error": 5}\n'))
    with Agent(guest.path) as agent:
        with pytest.raises(AgentRefused, match="refused 'guest-ping': out of order") as caught:
            agent.ping()
        assert caught.value.hint is None
        with pytest.raises(AgentRefused, match="without a reason"):
            agent.info()


def test_a_blocked_command_has_its_mend(guest: FakeAgent) -> None:
    guest.will("guest-exec", refuses("Command guest-exec has been disabled"))
    with Agent(guest.path) as agent, pytest.raises(AgentRefused) as caught:
        agent.run(["true"], 10.0)
    assert "/etc/sysconfig/qemu-ga" in str(caught.value.hint)


# ---- what it can and where it is ----------------------------------------------------------------


def test_info_names_the_commands_that_are_allowed(guest: FakeAgent) -> None:
    commands = [{"name": "a", "enabled": True}, {"name": "b", "enabled": False}, {"name": "c"}]
    guest.will("guest-info", says({"version": "7.2.0", "supported_commands": commands}))
    with Agent(guest.path) as agent:
        info = agent.info()
    assert info.version == "7.2.0"
    assert info.commands == {"a"}


@pytest.mark.parametrize(
    "value",
    [None, [], {"version": 7, "supported_commands": []}, {"version": "7"},
     {"version": "7", "supported_commands": ["a"]},
     {"version": "7", "supported_commands": [{"enabled": True}]}],
)  # fmt: skip
def test_info_of_another_shape_is_refused(guest: FakeAgent, value: object) -> None:
    guest.will("guest-info", says(value))
    with Agent(guest.path) as agent, pytest.raises(PeerError):
        agent.info()


def test_addresses_without_the_loopback(guest: FakeAgent) -> None:
    def address(text: str) -> dict[str, object]:
        return {"ip-address": text, "ip-address-type": "ipv4", "prefix": 24}

    interfaces = [
        {"name": "lo", "ip-addresses": [address("127.0.0.1"), address("::1")]},
        {"name": "eth0", "hardware-address": "52:54:00:12:34:56",
         "ip-addresses": [address("10.0.2.15"), address("fe80::1")]},
        {"name": "eth1"},
    ]  # fmt: skip
    guest.will("guest-network-get-interfaces", says(interfaces))
    with Agent(guest.path) as agent:
        assert agent.network_addresses() == [
            Interface("eth0", "52:54:00:12:34:56", ("10.0.2.15", "fe80::1")),
            Interface("eth1", "", ()),
        ]


@pytest.mark.parametrize(
    "value",
    [
        {},
        [1],
        [{"ip-addresses": []}],
        [{"name": "e", "ip-addresses": {}}],
        [{"name": "e", "ip-addresses": [{"ip-address": "10.0.2.15\x1b[2J"}]}],
        [{"name": "e", "ip-addresses": [{"ip-address": 7}]}],
    ],
)
def test_addresses_that_are_none_are_refused(guest: FakeAgent, value: object) -> None:
    guest.will("guest-network-get-interfaces", says(value))
    with Agent(guest.path) as agent, pytest.raises(PeerError):
        agent.network_addresses()


# ---- programs -----------------------------------------------------------------------------------


def test_a_program_runs_to_its_end(guest: FakeAgent) -> None:
    guest.will("guest-exec", says({"pid": 42}))
    guest.will(
        "guest-exec-status",
        says({"exited": False}),
        done(exitcode=3, **{"out-data": base64.b64encode(b"a\0b").decode(), "err-data": "ISE="}),
    )
    with Agent(guest.path) as agent:
        found = agent.run(["cp", "-a", "x"], 20.0, b"in")
    assert (found.code, found.out, found.err, found.truncated) == (3, b"a\0b", b"!!", False)
    started, *asked = [heard for heard in guest.heard if heard["execute"].startswith("guest-exec")]
    assert started["arguments"] == {
        "path": "cp", "arg": ["-a", "x"], "input-data": "aW4=", "capture-output": True
    }  # fmt: skip
    assert [heard["arguments"] for heard in asked] == [{"pid": 42}] * 2


def test_a_script_is_a_shells_input(guest: FakeAgent) -> None:
    guest.will("guest-exec", says({"pid": 1}))
    guest.will("guest-exec-status", done(exitcode=0))
    with Agent(guest.path) as agent:
        assert agent.run_script("echo hi\n", 20.0).out == b""
    arguments = next(
        heard["arguments"] for heard in guest.heard if heard["execute"] == "guest-exec"
    )
    assert (arguments["path"], arguments["arg"]) == ("/bin/sh", ["-s"])
    assert base64.b64decode(arguments["input-data"]) == b"echo hi\n"


@pytest.mark.parametrize("which", ["out-truncated", "err-truncated"])
def test_a_signal_and_output_that_was_cut_off_are_told(guest: FakeAgent, which: str) -> None:
    guest.will("guest-exec", says({"pid": 1}))
    guest.will("guest-exec-status", done(signal=9, **{which: True}))
    with Agent(guest.path) as agent:
        found = agent.run(["x"], 20.0)
    assert found.code == 137
    assert found.truncated


def test_a_program_without_end_is_left_behind(guest: FakeAgent) -> None:
    guest.will("guest-exec", says({"pid": 7}))
    guest.will("guest-exec-status", says({"exited": False}))
    with Agent(guest.path) as agent, pytest.raises(AgentSilent, match="goes on as process 7"):
        agent.run(["sleep", "99"], 0.0)


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"exitcode": "0"},
        {"exitcode": True},
        {"exitcode": -1},
        {"signal": None},
        {"exitcode": 0, "out-data": "!"},
        {"exitcode": 0, "out-data": "é"},
        {"exitcode": 0, "err-data": 5},
    ],
)
def test_an_end_of_another_shape_is_refused(guest: FakeAgent, status: dict[str, object]) -> None:
    guest.will("guest-exec", says({"pid": 1}))
    guest.will("guest-exec-status", done(**status))
    with Agent(guest.path) as agent, pytest.raises(PeerError, match="'guest-exec-status'"):
        agent.run(["x"], 20.0)


# ---- freezing -----------------------------------------------------------------------------------


def test_file_systems_are_frozen_for_the_block_alone(guest: FakeAgent) -> None:
    guest.will("guest-fsfreeze-freeze", says(2))
    guest.will("guest-fsfreeze-thaw", says(2))
    with Agent(guest.path) as agent, agent.frozen() as count:
        assert count == 2
        assert guest.commands() == ["guest-fsfreeze-freeze"]
    assert guest.commands() == ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]


def test_file_systems_are_thawed_when_the_block_fails(guest: FakeAgent) -> None:
    guest.will("guest-fsfreeze-freeze", says(2))
    guest.will("guest-fsfreeze-thaw", says(2))
    with (
        Agent(guest.path) as agent,
        pytest.raises(ZeroDivisionError),
        agent.frozen(),
    ):
        raise ZeroDivisionError
    assert guest.commands()[-1] == "guest-fsfreeze-thaw"


def test_a_freeze_without_answer_is_thawed(
    guest: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "FREEZE_SECONDS", SHORT)
    guest.will("guest-fsfreeze-freeze", silent)
    guest.will("guest-fsfreeze-thaw", says(1))
    with (
        Agent(guest.path) as agent,
        pytest.raises(AgentSilent, match="guest-fsfreeze-freeze"),
        agent.frozen(),
    ):
        raise AssertionError("the block has begun")
    assert guest.commands() == ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]


def test_a_thaw_is_tried_again(guest: FakeAgent) -> None:
    guest.will("guest-fsfreeze-freeze", says(1))
    guest.will("guest-fsfreeze-thaw", raw(b"garbage\n"), says(1))
    with Agent(guest.path) as agent, agent.frozen():
        pass
    assert guest.commands().count("guest-fsfreeze-thaw") == 2


def test_a_guest_that_may_have_stayed_frozen_is_told(guest: FakeAgent) -> None:
    guest.will("guest-fsfreeze-freeze", says(1))
    guest.will("guest-fsfreeze-thaw", raw(b"garbage\n"))
    with (
        Agent(guest.path) as agent,
        pytest.raises(DrivebayError, match="may have stayed frozen") as caught,
        agent.frozen(),
    ):
        pass
    assert "fsfreeze --unfreeze" in str(caught.value.hint)


def test_a_guest_that_can_not_freeze_says_so(guest: FakeAgent) -> None:
    guest.will("guest-fsfreeze-freeze", refuses("unsupported"))
    guest.will("guest-fsfreeze-thaw", refuses("unsupported"))
    with (
        Agent(guest.path) as agent,
        pytest.raises(AgentRefused, match="freeze': unsupported"),
        agent.frozen(),
    ):
        raise AssertionError("the block has begun")


@pytest.mark.parametrize("value", ["2", -1, 1.0, True, None])
def test_a_count_that_is_none_is_refused(guest: FakeAgent, value: object) -> None:
    guest.will("guest-fsfreeze-freeze", says(value))
    with Agent(guest.path) as agent, pytest.raises(PeerError):
        agent.freeze()


def test_a_shutdown_waits_for_no_answer(guest: FakeAgent) -> None:
    guest.will("guest-shutdown", silent)
    with Agent(guest.path) as agent:
        agent.shutdown()
    guest.join()
    assert guest.heard[-1] == {"execute": "guest-shutdown", "arguments": {"mode": "powerdown"}}
