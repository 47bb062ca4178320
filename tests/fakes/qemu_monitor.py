"""QEMU's monitor for those who speak to a running VM: it obeys, refuses, tells of events, or not.

Context: tests. Serves any number of connections, one after the other. Never imports drivebay.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
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
        self.descriptors: list[int] = []  # that were handed over; closed at the end
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
        for descriptor in self.descriptors:
            os.close(descriptor)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection, contextlib.suppress(ConnectionError):
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        connection.sendall(json.dumps(GREETING).encode() + b"\r\n")
        while True:  # a command comes in one piece and without a newline, a descriptor with a blank
            command, descriptors, _, _ = socket.recv_fds(connection, 65536, 4)
            self.descriptors += descriptors
            if not command:
                return
            if command.isspace():
                continue
            told = json.loads(command)
            name, arguments = told["execute"], told.get("arguments", {})
            self.heard.append((name, arguments))
            answer = self.answers.get(name, {})
            if callable(answer):
                answer = answer(arguments)
            if isinstance(answer, Refuses):
                said: dict[str, Any] = {"error": {"class": "GenericError", "desc": str(answer)}}
            else:
                said = {"return": answer}
            if "id" in told:
                said["id"] = told["id"]
            events = [{**event, **STAMP} for event in self.events.get(name, [])]
            for each in (said, *events):
                connection.sendall(json.dumps(each).encode() + b"\r\n")
