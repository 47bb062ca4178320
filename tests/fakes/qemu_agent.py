"""A QEMU guest agent at the guest's end of its port: it obeys, refuses, lies or says nothing."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["FakeAgent", "done", "obeys_sync", "raw", "refuses", "says", "silent"]

Heard = dict[str, Any]
Answer = Callable[[Heard], "bytes | None"]  # None: it says nothing


def says(value: object) -> Answer:
    line = json.dumps({"return": value}).encode() + b"\n"
    return lambda heard: line


def refuses(why: str) -> Answer:
    line = json.dumps({"error": {"class": "GenericError", "desc": why}}).encode() + b"\n"
    return lambda heard: line


def raw(line: bytes) -> Answer:
    return lambda heard: line


def silent(heard: Heard) -> None:
    return None


def done(**values: object) -> Answer:
    """The end of a program."""
    return says({"exited": True, **values})


def obeys_sync(heard: Heard) -> bytes:
    number = heard["arguments"]["id"]
    return b"\xff" + json.dumps({"return": number}).encode() + b"\n"


class FakeAgent:
    """The guest's side of the port: for each command the answers in order, the last for ever."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: list[Heard] = []
        self.answers: dict[str, list[Answer]] = {"guest-sync-delimited": [obeys_sync]}
        self.first_words = b""  # in the port from before
        self.late = b""  # said before the next answer, whatever is asked
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(1)
        self._listening.settimeout(20)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def will(self, command: str, *answers: Answer) -> None:
        self.answers[command] = list(answers)

    def commands(self) -> list[str]:
        return [
            heard["execute"] for heard in self.heard if heard["execute"] != "guest-sync-delimited"
        ]

    def _serve(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:
            return
        with connection, connection.makefile("rb") as lines:
            try:
                connection.sendall(self.first_words)
                for line in lines:
                    heard = json.loads(line.lstrip(b"\xff"))
                    if heard["execute"] == "guest-sync-delimited":
                        assert line.startswith(b"\xff")
                    self.heard.append(heard)
                    answers = self.answers[heard["execute"]]
                    answer = (answers.pop(0) if len(answers) > 1 else answers[0])(heard)
                    if answer == b"":
                        return
                    if answer is not None:
                        connection.sendall(self.late + answer)
                        self.late = b""
            except ConnectionError:
                return

    def join(self) -> None:
        """Wait until it has heard all that the connection carried."""
        self._thread.join(20)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self.join()
        self._listening.close()
