"""Which requests are looked at at all, and the headers of every answer.

Context: ASGI, around an application. A server on a loopback address is reached by every page that
the user's browser shows:

- a page of another name whose address was changed to 127.0.0.1 (DNS rebinding) says that name in
  `Host`;
- a page of another origin says it in `Origin`, which browsers send with each POST and WebSocket;
- a page that frames or embeds ours is kept away by the headers.

The port in `Host` may be another than ours, since ssh may forward another one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard", "is_ours"]

_HOST: Final = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.ASCII)
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self' ws://{host}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_READING: Final = frozenset({"GET", "HEAD"})


class Guard:
    """Refuses with 403 what does not come from a page of ours."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        hosts, origins = _values(scope, b"host"), _values(scope, b"origin")
        changes = scope["type"] == "websocket" or scope["method"] not in _READING
        ours = is_ours(hosts, origins, origin_needed=changes)
        host = hosts[0] if ours else "127.0.0.1"

        async def send_guarded(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                policy = _POLICY.format(host=host).encode("latin-1")
                added = [*_HEADERS, (b"content-security-policy", policy)]
                names = {name for name, _ in added}
                kept = [pair for pair in message.get("headers", ()) if pair[0] not in names]
                message = {**message, "headers": [*kept, *added]}
            await send(message)

        if ours:
            await self._app(scope, receive, send_guarded)
        else:
            await _refuse(scope, receive, send_guarded)


def is_ours(hosts: Sequence[str], origins: Sequence[str], *, origin_needed: bool) -> bool:
    """Whether a request with these headers was meant for us, and sent by a page of ours."""
    if len(hosts) != 1 or len(origins) > 1:
        return False
    host = hosts[0]
    if not _HOST.fullmatch(host):
        return False
    return origins[0] == f"http://{host}" if origins else not origin_needed


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    from starlette.responses import PlainTextResponse
    from starlette.websockets import WebSocket

    answer = PlainTextResponse("This request does not come from a page of this server.\n", 403)
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(answer)
    else:
        await answer(scope, receive, send)
