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
from drivebay.vm.qmp import LINE_LIMIT, Qmp, QmpRefused

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
DONE = b'{"return": {}}\r\n'


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
            with (
                connection,
                connection.makefile("rb") as lines,
                contextlib.suppress(ConnectionError),
            ):
                connection.sendall(greeting)
                for answer in answers:
                    self.heard.append(json.loads(lines.readline()))
                    connection.sendall(answer)
                lines.readline()

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
    monitor.will_say(GREETING, DONE, b'{"return": {"status": "active"}}\n')
    with Qmp(monitor.path) as qmp:
        assert qmp.call("migrate-set-parameters", max_bandwidth=5) == {"status": "active"}
    assert monitor.heard == [
        {"execute": "qmp_capabilities", "arguments": {}},
        {"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": 5}},
    ]


def test_events_are_skipped(monitor: Monitor) -> None:
    event = b'{"event": "STOP", "timestamp": {}}\r\n'
    monitor.will_say(GREETING, event + DONE, event + b'{"return": 7}\r\n' + event)
    with Qmp(monitor.path) as qmp:
        assert qmp.call("x") == 7


def test_a_refusal_says_why(monitor: Monitor) -> None:
    refusal = b'{"error": {"class": "GenericError", "desc": "There\'s a migration"}}\r\n'
    monitor.will_say(GREETING, DONE, refusal)
    with Qmp(monitor.path) as qmp, pytest.raises(QmpRefused, match=r"'migrate': There's a migra"):
        qmp.call("migrate")


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (b"{}\n", "began with '{}', not a greeting"),
        (b"hello\n", "no JSON"),
        (b"[1]\n", "no object"),
        (b"x" * (LINE_LIMIT + 70000), "a line of more than"),
        (b"", "did not answer"),
    ],
    ids=["no greeting", "no JSON", "no object", "endless", "silence"],
)
def test_a_monitor_that_is_none(monitor: Monitor, said: bytes, complaint: str) -> None:
    monitor.will_say(said)
    with pytest.raises(DrivebayError, match=complaint):
        Qmp(monitor.path, timeout_s=0.3 if not said else 20)


def test_a_monitor_that_goes_away(monitor: Monitor) -> None:
    monitor.will_say(GREETING, DONE)
    with Qmp(monitor.path) as qmp, pytest.raises((PeerError, HostError)):
        qmp.call("query-status")


def test_where_nobody_listens(tmp_path: Path) -> None:
    """As while QEMU starts: whoever waits for it tries again."""
    with pytest.raises(FileNotFoundError):
        Qmp(tmp_path / "none")
