"""QEMU's monitor: one command, one answer; and the events that a caller waits for.

Context: any thread, one at a time. `qemu.qmp` speaks the protocol, in an event loop that
runs only while a call waits.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from drivebay.errors import DrivebayError, HostError, PeerError

__all__ = ["Qmp", "QmpRefused"]

COMMAND_SECONDS: Final = 30.0

Result = TypeVar("Result")

# What it logs is in the errors that it raises; without a handler Python would print it.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class QmpRefused(DrivebayError):
    """QEMU says why it did not do what it was asked."""

    errno = errno.EINVAL


class Qmp:
    """A connection to the monitor of one QEMU, which serves one connection at a time."""

    def __init__(self, path: Path, timeout_s: float = COMMAND_SECONDS) -> None:
        """Raises: OSError while there is no such socket; HostError, PeerError."""
        self._timeout_s = timeout_s
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            connection.setblocking(False)
        except BaseException:
            connection.close()
            raise
        self._loop = asyncio.new_event_loop()
        try:
            self._client = QMPClient()
            self._run(self._client.connect(connection), "its greeting")
        except BaseException:
            connection.close()
            self._loop.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; harmless twice."""
        if self._loop.is_closed():
            return
        try:
            self._loop.run_until_complete(self._client.disconnect())
        except (QMPError, EOFError, OSError):
            pass  # the other side was quicker, or broke the protocol: it is over either way
        finally:
            self._loop.close()

    def call(self, command: str, arguments: dict[str, Any] | None = None, **more: Any) -> Any:
        """Run one command; an underscore in a keyword's name stands for a hyphen.

        Raises: QmpRefused, HostError, PeerError.
        """
        told = dict(arguments or {})
        told |= {name.replace("_", "-"): value for name, value in more.items()}
        return self._run(self._client.execute(command, told), f"'{command}'")

    def hand_over(self, descriptor: int, command: str, **more: Any) -> Any:
        """Run a command that takes an open descriptor: 'getfd', 'add-fd'. It stays open here.

        Raises: as `call`.
        """

        async def both() -> Any:
            self._client.send_fd_scm(descriptor)
            told = {name.replace("_", "-"): value for name, value in more.items()}
            return await self._client.execute(command, told)

        return self._run(both(), f"'{command}'")

    def call_and_wait(
        self,
        command: str,
        arguments: dict[str, Any],
        event: str,
        of_interest: Callable[[dict[str, Any]], bool],
        timeout_s: float,
    ) -> bool:
        """Run a command and wait for the event that says it is done; False if none comes.

        ``of_interest`` looks at the event's data. Raises: as `call`.
        """

        async def both() -> bool:
            listener = EventListener(event)
            with self._client.listen(listener):
                await self._client.execute(command, arguments)
                while True:
                    message = await listener.get()
                    data = message.get("data")
                    if isinstance(data, dict) and of_interest(data):
                        return True

        async def limited() -> bool:
            try:
                return await asyncio.wait_for(both(), timeout_s)
            except TimeoutError:
                return False

        return self._run(limited(), f"'{command}'", timeout_s + self._timeout_s)

    def _run(
        self,
        work: Coroutine[Any, Any, Result],
        what: str,
        timeout_s: float | None = None,
    ) -> Result:
        limit = self._timeout_s if timeout_s is None else timeout_s
        try:
            return self._loop.run_until_complete(asyncio.wait_for(work, limit))
        except TimeoutError as error:
            raise HostError(f"QEMU's monitor did not answer ({what})", errno.ETIMEDOUT) from error
        except ExecuteError as error:
            raise QmpRefused(f"QEMU refused {what}: {error}") from error
        except (QMPError, EOFError, OSError) as error:
            why = str(error.__cause__ or error) or type(error).__name__
            raise PeerError(f"QEMU's monitor ended or made no sense ({what}): {why}") from error
