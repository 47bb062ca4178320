"""A web server that answers as good and bad servers do: ranges, lies, early ends.

Context: tests. It serves byte strings by path from a thread; ``asked`` is what it was asked.
What it does wrong is a function for one request: it gets the handler and answers itself.
Never imports drivebay.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

Fault = Callable[["Handler"], None]


class Asked(NamedTuple):
    path: str
    headers: Message


class WebServer:
    """Serves until `close`; as a context manager, too."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etag: str | None = '"v1"'
        self.modified: str | None = None
        self.asked: list[Asked] = []
        self.faults: list[Fault] = []  # of the next requests, in order
        outer = self

        class Bound(Handler):
            server_of_test = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def ranges(self) -> list[str | None]:
        return [asked.headers["Range"] for asked in self.asked]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    """One connection, one request (HTTP/1.1 so that chunks are allowed)."""

    protocol_version = "HTTP/1.1"
    server_of_test: WebServer

    def do_GET(self) -> None:
        served = self.server_of_test
        self.close_connection = True
        served.asked.append(Asked(self.path, self.headers))
        if served.faults:
            served.faults.pop(0)(self)
        else:
            self.send_file()

    def do_HEAD(self) -> None:
        self.do_GET()

    @property
    def content(self) -> bytes | None:
        return self.server_of_test.files.get(self.path)

    def send_file(self, most: int | None = None) -> None:
        """As it should be, but no more than ``most`` bytes of it."""
        content = self.content
        if content is None:
            self.answer(404, b"")
            return
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        served = self.server_of_test
        if wanted and self.headers["If-Range"] in (served.etag, served.modified):
            start = int(wanted[1])
            if start >= len(content):
                self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206, content[start:], {"Content-Range": span}, most)
        else:
            self.answer(200, content, most=most)

    def answer(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str | None] | None = None,
        most: int | None = None,
    ) -> None:
        """Send an answer; a header None is left out."""
        served = self.server_of_test
        usual: dict[str, str | None] = {
            "Content-Length": str(len(content)),
            "ETag": served.etag,
            "Last-Modified": served.modified,
            "Connection": "close",
        }
        self.send_response(status)
        for name, value in (usual | (headers or {})).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:most])

    def log_request(self, code: object = None, size: object = None) -> None:
        """Say nothing."""


# ---- faults -------------------------------------------------------------------------------------


def ends_after(length: int) -> Fault:
    """The connection ends early."""
    return lambda handler: handler.send_file(length)


def status(code: int, **headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.answer(code, b"sorry", {**named})


def without_length(handler: Handler) -> None:
    """The end of the connection is the end of the file, as far as anybody can tell."""
    handler.answer(200, handler.content or b"", {"Content-Length": None})


def in_chunks(handler: Handler, most: int | None = None) -> None:
    content = handler.content or b""
    chunks = b"".join(
        b"%x\r\n%b\r\n" % (len(piece), piece)
        for piece in (content[at : at + 1000] for at in range(0, len(content), 1000))
    )
    headers = {"Content-Length": None, "Transfer-Encoding": "chunked"}
    handler.answer(200, chunks + b"0\r\n\r\n", {**headers}, most)


def reset(handler: Handler) -> None:
    """No answer at all."""
    handler.connection.shutdown(socket.SHUT_RDWR)
