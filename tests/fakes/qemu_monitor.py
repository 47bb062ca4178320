"""QEMU's monitor for those who speak to a running VM: it obeys, refuses, tells of events, or not.

Context: tests. Serves any number of connections, one after the other. Never imports drivebay.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["FakeMonitor", "Refuses"]

GREETING: dict[str, Any] = {"QMP": {"version": {}, "capabilities": []}}
STAMP = {"timestamp": {"seconds": 1, "microseconds": 2}}


class Refuses(str):
    """An answer that is a refusal, in these words."""


class FakeMonitor:
    """``answers`` has what is returned for a command ({} for all others); a callable is called."""

    def __init__(self, path: Path) -> None:
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {"query-status": {"status": "running"}}
        self.events: dict[str, list[dict[str, Any]]] = {}  # told after the answer to a command
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(4)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def commands(self) -> list[str]:
        return [command for command, _ in self.heard if command != "qmp_capabilities"]

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join(20)
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as lines:
                try:
                    self._talk(connection, lines.readline)
                except ConnectionError:
                    continue

    def _talk(self, connection: socket.socket, next_line: Callable[[], bytes]) -> None:
        connection.sendall(json.dumps(GREETING).encode() + b"\r\n")
        while line := next_line():
            told = json.loads(line)
            command, arguments = told["execute"], told.get("arguments", {})
            self.heard.append((command, arguments))
            answer = self.answers.get(command, {})
            if callable(answer):
                answer = answer(arguments)
            if isinstance(answer, Refuses):
                said: dict[str, Any] = {"error": {"class": "GenericError", "desc": str(answer)}}
            else:
                said = {"return": answer}
            if "id" in told:
                said["id"] = told["id"]
            events = [{**event, **STAMP} for event in self.events.get(command, [])]
            for each in (said, *events):
                connection.sendall(json.dumps(each).encode() + b"\r\n")
