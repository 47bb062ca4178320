"""The channel back to the front end: "read the configuration again", and nothing else.

Context: control. It never waits: the front end may not read, and may wait for
us at the same time. A message that finds no room is kept, one for however many
changes there were, and tried again for a while.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Final

from drivebay.wire.vhost_user import BackendRequest, pack_message

__all__ = ["BackendChannel"]

_log = logging.getLogger(__name__)

RETRY_S: Final = 1.0
TRIES: Final = 60

_CONFIG_CHANGE: Final = pack_message(BackendRequest.CONFIG_CHANGE_MSG, b"")


class BackendChannel:
    """What SET_BACKEND_REQ_FD brought; owns the socket."""

    def __init__(self, sock: socket.socket, session_name: str) -> None:
        self._sock: socket.socket | None = sock
        self._name = session_name
        self._unsent = b""
        self._again = False  # another change came after the message that is unsent
        self._tries = 0
        self._retry: asyncio.TimerHandle | None = None

    def config_changed(self) -> None:
        """Send CONFIG_CHANGE_MSG, now or as soon as there is room."""
        if self._sock is None:
            return
        if self._unsent:
            self._again = len(self._unsent) < len(_CONFIG_CHANGE)
            return
        self._unsent = _CONFIG_CHANGE
        self._tries = 0
        self._send()

    def _send(self) -> None:
        self._retry = None
        if self._sock is None:
            return
        try:
            sent = self._sock.send(self._unsent, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            _log.warning("%s closed its channel for config changes: %s", self._name, error)
            self.close()
            return
        self._unsent = self._unsent[sent:]
        if not self._unsent and self._again:
            self._again = False
            self._unsent = _CONFIG_CHANGE
        if self._unsent:
            self._wait_for_room()

    def _wait_for_room(self) -> None:
        if self._tries == 0:
            _log.warning("%s does not read its channel for config changes", self._name)
        self._tries += 1
        if self._tries > TRIES:
            _log.warning("%s was not told of a config change: its channel stayed full", self._name)
            self.close()
            return
        self._retry = asyncio.get_running_loop().call_later(RETRY_S, self._send)

    def close(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._sock is not None:
            self._sock.close()
            self._sock = None
