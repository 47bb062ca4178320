"""The screens of VMs as a web application: a page, and a WebSocket that carries RFB.

Context: an event loop. Who has redeemed a token for a VM may look at that VM, in as many tabs as
they like; nobody else gets more than files that everybody may have.

    GET  /screen/NAME           the page, the same for each name
    POST /screen/NAME/session   {"token": …} ──► {"secret": …};  {"secret": …} ──► {} or 403
    WS   /screen/NAME/socket    subprotocols 'binary' and 'drivebay.SECRET'
    GET  /static/…, /novnc/…    the page's files
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute

from drivebay.errors import DrivebayError, UsageError
from drivebay.vm.spec import check_vm_name
from drivebay.web.files import KINDS, our_files, script_files
from drivebay.web.guard import Guard
from drivebay.web.novnc import BELOW
from drivebay.web.relay import hang_up, relay
from drivebay.web.tokens import Sessions, Tokens

if TYPE_CHECKING:
    from starlette.websockets import WebSocket
    from uvicorn import Server

__all__ = ["Door", "address_of", "application", "make_server"]

TABS_MOST: Final = 16
CONNECTIONS_MOST: Final = 128
BODY_BYTES_MOST: Final = 1024
FRAME_BYTES_MOST: Final = 1 << 20  # a browser's; the largest is a text that is pasted
HEADER_BYTES_MOST: Final = 16384
CLOSING_SECONDS: Final = 1
NOT_SHOWN: Final = 4001  # the reason follows
_REASON_BYTES_MOST: Final = 120  # RFC 6455, 5.5: 125 with the code
_SUBPROTOCOL: Final = "binary"
_SECRET: Final = "drivebay."

Connect = Callable[[str], socket.socket]


@dataclass
class Door:
    """Who may come in."""

    tokens: Tokens = field(default_factory=Tokens)
    sessions: Sessions = field(default_factory=Sessions)

    def exchange(self, name: str, token: str) -> str | None:
        """A secret for a token of that VM; the token is used up in any case."""
        scope = self.tokens.redeem(token)
        return self.sessions.open(scope) if scope is not None and scope == name else None


def address_of(name: str, port: int, token: str) -> str:
    """The page's address. The token is behind the '#', which no browser sends."""
    return f"http://127.0.0.1:{port}/screen/{name}#token={token}"


def application(door: Door, connect: Connect, novnc: Path) -> Starlette:
    """Make it; ``connect`` opens a VM's screen, and may take a while.

    It raises a DrivebayError, whose sentence the page shows.
    """
    ours, scripts = our_files(), script_files(novnc, BELOW)
    screens = _Screens(door, connect)

    async def page(request: Request) -> Response:
        if not _is_name(request.path_params["name"]):
            return _nothing()
        return Response(ours["screen.html"], media_type=KINDS[".html"])

    async def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in ours:
            return _nothing()
        return Response(ours[name], media_type=KINDS[Path(name).suffix])

    async def script(request: Request) -> Response:
        path = scripts.get(request.path_params["path"])
        return _nothing() if path is None else FileResponse(path, media_type=KINDS[".js"])

    return Starlette(
        routes=[
            Route("/screen/{name}", page),
            Route("/screen/{name}/session", screens.session, methods=["POST"]),
            WebSocketRoute("/screen/{name}/socket", screens.socket),
            Route("/static/{name}", static),
            Route("/novnc/{path:path}", script),
        ],
        middleware=[Middleware(Guard)],
    )


def make_server(app: Starlette) -> Server:
    """A server for it, with bounds; it is run by ``await server.serve(sockets=[…])``."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="websockets-sansio",
            ws_max_size=FRAME_BYTES_MOST,
            ws_per_message_deflate=False,  # a screen is compressed already
            h11_max_incomplete_event_size=HEADER_BYTES_MOST,
            limit_concurrency=CONNECTIONS_MOST,
            timeout_graceful_shutdown=CLOSING_SECONDS,
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_config=None,
            log_level="error",
        )
    )


class _Screens:
    """The two requests for which one has to be let in."""

    def __init__(self, door: Door, connect: Connect) -> None:
        self._door, self._connect = door, connect
        self._tabs = 0

    async def session(self, request: Request) -> Response:
        """Exchange a token for a secret, or look whether a secret is still good."""
        name = request.path_params["name"]
        try:
            said = await _small_json(request)
        except ValueError:
            return PlainTextResponse("This is no JSON object of the kind expected.\n", 400)
        if "token" in said:
            secret = self._door.exchange(name, said["token"])
            return _closed() if secret is None else JSONResponse({"secret": secret})
        known = self._door.sessions.knows(said.get("secret", ""), name)
        return JSONResponse({}) if known else _closed()

    async def socket(self, websocket: WebSocket) -> None:
        """Show the screen, as long as VM and browser are there."""
        name = websocket.path_params["name"]
        offered = websocket.scope["subprotocols"]
        secret = next((word.removeprefix(_SECRET) for word in offered
                       if word.startswith(_SECRET)), "")  # fmt: skip
        if not self._door.sessions.knows(secret, name) or _SUBPROTOCOL not in offered:
            await websocket.send_denial_response(_closed())
            return
        if self._tabs >= TABS_MOST:
            busy = PlainTextResponse(f"{TABS_MOST} tabs show a screen already.\n", 503)
            await websocket.send_denial_response(busy)
            return
        self._tabs += 1
        try:
            await websocket.accept(_SUBPROTOCOL)
            await self._show(websocket, name)
        finally:
            self._tabs -= 1

    async def _show(self, websocket: WebSocket, name: str) -> None:
        try:
            connection = await asyncio.to_thread(self._connect, name)
        except DrivebayError as error:
            await hang_up(websocket, NOT_SHOWN, _cut(str(error)))
            return
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        await relay(websocket, reader, writer)


async def _small_json(request: Request) -> dict[str, str]:
    """The body, an object of texts. Raises: ValueError."""
    body = b""
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > BODY_BYTES_MOST:
                raise ValueError("too long")
    except ClientDisconnect as error:
        raise ValueError("the browser left") from error
    try:
        said: Any = json.loads(body)
    except RecursionError as error:
        raise ValueError("too deep") from error
    if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
        raise ValueError("no object of texts")
    return said


def _is_name(name: str) -> bool:
    try:
        check_vm_name(name)
    except UsageError:
        return False
    return True


def _cut(text: str) -> str:
    return text.encode()[:_REASON_BYTES_MOST].decode(errors="ignore")


def _nothing() -> Response:
    return PlainTextResponse("There is nothing here.\n", 404)


def _closed() -> Response:
    return PlainTextResponse("This link does not open the screen.\n", 403)
