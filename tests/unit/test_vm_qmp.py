"""vm/qmp.py against a monitor that answers well, badly, late or not at all."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.errors import DrivebayError, HostError, PeerError
from drivebay.vm.qmp import Qmp, QmpRefused

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
DONE = b'{"return": {}}ID\r\n'


class Monitor:
    """One connection's answers, given one for each line that comes; it keeps the lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: list[dict[str, object]] = []
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(1)
        self._thread: threading.Thread | None = None

    def will_say(self, greeting: bytes, *answers: bytes) -> None:
        """After the last answer it hangs up."""

        def serve() -> None:
            connection, _ = self._listening.accept()
            with connection, contextlib.suppress(ConnectionError):
                connection.sendall(greeting)
                for answer in answers:
                    line = json.loads(connection.recv(65536))  # a command comes in one piece
                    # Negotiation has no id; every command's answer repeats the command's.
                    ident = f', "id": {json.dumps(line.pop("id"))}' if "id" in line else ""
                    self.heard.append(line)
                    connection.sendall(answer.replace(b"}}ID", b"}" + ident.encode() + b"}"))
                connection.recv(65536)

        self._thread = threading.Thread(target=serve)
        self._thread.start()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.join(20)
        self._listening.close()


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Monitor]:
    monitor = Monitor(tmp_path / "m")
    yield monitor
    monitor.close()


def test_a_command_its_arguments_and_its_answer(monitor: Monitor) -> None:
    monitor.will_say(GREETING, DONE, b'{"return": {"status": "active"}}ID\n')
    with Qmp(monitor.path) as qmp:
        assert qmp.call("migrate-set-parameters", max_bandwidth=5) == {"status": "active"}
    assert monitor.heard == [
        {"execute": "qmp_capabilities", "arguments": {}},
        {"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": 5}},
    ]


def test_events_are_skipped(monitor: Monitor) -> None:
    event = b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}\r\n'
    monitor.will_say(GREETING, DONE, event + b'{"return": {"a": 7}}ID\r\n' + event)
    with Qmp(monitor.path) as qmp:
        assert qmp.call("x") == {"a": 7}


def test_a_refusal_says_why(monitor: Monitor) -> None:
    refusal = b'{"error": {"class": "GenericError", "desc": "There\'s a migration"}}ID\r\n'
    monitor.will_say(GREETING, DONE, refusal)
    with Qmp(monitor.path) as qmp, pytest.raises(QmpRefused, match=r"'migrate': There's a migra"):
        qmp.call("migrate")


@pytest.mark.parametrize(
    "said",
    [b"{}\n", b"hello\n", b"[1]\n", b"x" * (11 << 20), b""],
    ids=["no greeting", "no JSON", "no object", "endless", "silence"],
)
def test_a_monitor_that_is_none(monitor: Monitor, said: bytes) -> None:
    monitor.will_say(said)
    complaint = "did not answer" if not said else "ended or made no sense"
    with pytest.raises(DrivebayError, match=complaint):
        Qmp(monitor.path, timeout_s=0.3 if not said else 20)


def test_an_event_says_that_a_command_is_done(monitor: Monitor) -> None:
    when = b'"timestamp": {"seconds": 1, "microseconds": 1}'
    other = b'{"event": "DEVICE_DELETED", "data": {"device": "a"}, ' + when + b"}\n"
    own = other.replace(b'"a"', b'"b"')
    monitor.will_say(GREETING, DONE, other + DONE + own)
    with Qmp(monitor.path) as qmp:
        assert qmp.call_and_wait(
            "device_del", {"id": "b"}, "DEVICE_DELETED", lambda data: data["device"] == "b", 20
        )


def test_an_event_that_never_comes(monitor: Monitor) -> None:
    monitor.will_say(GREETING, DONE, DONE)
    with Qmp(monitor.path) as qmp:
        assert not qmp.call_and_wait("x", {}, "DEVICE_DELETED", lambda data: True, 0.2)


def test_a_monitor_that_goes_away(monitor: Monitor) -> None:
    monitor.will_say(GREETING, DONE)
    with Qmp(monitor.path) as qmp, pytest.raises((PeerError, HostError)):
        qmp.call("query-status")


def test_where_nobody_listens(tmp_path: Path) -> None:
    """As while QEMU starts: whoever waits for it tries again."""
    with pytest.raises(FileNotFoundError):
        Qmp(tmp_path / "none")
