"""The server of screens in a thread; behind each screen a test has QEMU's end of the stream."""

from __future__ import annotations

import asyncio
import http.client
import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from drivebay.errors import StateError
from drivebay.web.screen import Door, application, make_server

__all__ = ["Answer", "Serving", "serving"]

VM = "web"


class Answer:
    """What a server said."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    def json(self) -> Any:
        return json.loads(self.body)


class Serving:
    """It shows one VM, which is on unless a test says otherwise."""

    def __init__(self, novnc: Path) -> None:
        self.door = Door()
        self.qemus: queue.Queue[socket.socket] = queue.Queue()
        self.on = True
        self._listening = socket.socket()
        self._listening.bind(("127.0.0.1", 0))
        self._listening.listen()
        self.port: int = self._listening.getsockname()[1]
        self.server = make_server(application(self.door, self._connect, novnc))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        while not self.server.started:
            time.sleep(0.001)

    def _run(self) -> None:
        asyncio.run(self.server.serve(sockets=[self._listening]))

    def _connect(self, name: str) -> socket.socket:
        if not self.on:
            raise StateError(f"VM '{name}' is not running" + "ü" * 200)
        ours, theirs = socket.socketpair()
        self.qemus.put(theirs)
        return ours

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        """``headers``: an underscore is a hyphen; Host and Origin are ours unless given."""
        told = {"Host": self.host, "Origin": f"http://{self.host}"}
        told |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.putrequest(method, path, skip_host=True)
            for name, value in told.items():
                if value:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def session(self, name: str = VM, **said: object) -> Answer:
        return self.ask("POST", f"/screen/{name}/session", json.dumps(said).encode())

    def secret(self) -> str:
        """As a browser that has followed a link."""
        answer = self.session(token=self.door.tokens.issue(VM))
        assert answer.status == 200
        return str(answer.json()["secret"])

    def look(self, secret: str, name: str = VM, **changed: Any) -> ClientConnection:
        """A tab's WebSocket."""
        told: dict[str, Any] = {
            "origin": f"http://{self.host}",
            "subprotocols": ["binary", f"drivebay.{secret}"],
            "compression": None,
            "open_timeout": 20,
            **changed,
        }
        made: ClientConnection = connect(f"ws://{self.host}/screen/{name}/socket", **told)
        return made

    def qemu(self) -> socket.socket:
        """The other end of the tab that was opened last."""
        found = self.qemus.get(timeout=20)
        found.settimeout(20)
        return found

    def close(self) -> None:
        self.server.should_exit = True
        self._thread.join()
        while not self.qemus.empty():
            self.qemus.get().close()


@contextmanager
def serving(folder: Path) -> Iterator[Serving]:
    """Serve until the block ends; noVNC is a file or two in ``folder``."""
    for name in ("core/rfb.js", "core/util/int.js", "vendor/pako.js", "app/ui.js", "core/x.txt"):
        path = folder / "novnc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"// {name}\n")
    (folder / "secret.js").write_text("secret")
    served = Serving(folder / "novnc")
    try:
        yield served
    finally:
        served.close()
