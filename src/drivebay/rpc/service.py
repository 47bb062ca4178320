"""One target with its RPC socket and its configuration file, from start to stop.

Context: control. Start: take the socket's path, read the file, bring the target up, replay
the startup part, go to runtime, replay the rest, answer clients. With ``wait_for_rpc``
clients are answered before, and framework_start_init lets it go on.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from drivebay.errors import HostError
from drivebay.rpc.config import Entry, Replay, read_config, saved_config, write_config
from drivebay.rpc.dispatch import Dispatcher
from drivebay.rpc.schema import RUNTIME, STARTUP
from drivebay.rpc.server import RpcServer
from drivebay.target.options import Options
from drivebay.target.target import Target

__all__ = ["Service"]

_log = logging.getLogger(__name__)


class Service:
    """What a target process runs; ``start``, then ``serve`` until it is cancelled, ``stop``."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.target = Target(options)
        self.server: RpcServer | None = None
        if options.rpc_socket is not None:
            self.server = RpcServer(self.target, options.rpc_socket, options.rpcs_allowed)
            self.dispatcher = self.server.dispatcher
        else:
            self.dispatcher = Dispatcher(self.target)
        self._replay: Replay | None = None
        self._saving = asyncio.Lock()
        self._changes = 0  # made
        self._saved = 0  # of those, in the file

    async def start(self) -> None:
        """Come up as far as the options say. Raises: DrivebayError; stop() then."""
        if self.server is not None:
            self.server.claim()
        await self.target.start()
        entries = await asyncio.to_thread(self._read_entries)
        # The file was written with every method at hand: the allow-list is for clients.
        replayer = Dispatcher(self.target)
        self.target.rpc_methods = self.dispatcher.methods
        source = self.options.config or ""
        ignore = self.options.ignore_init_errors
        self._replay = Replay(replayer, source, entries, ignore=ignore)
        await self._replay.run(STARTUP)
        if self.options.wait_for_rpc:
            if self.server is not None:
                await self.server.listen()
            return
        self.target.start_runtime()
        await self._finish()
        if self.server is not None:
            await self.server.listen()

    async def serve(self) -> None:
        """Finish a start that waits for framework_start_init; then wait for ever.

        Raises: DrivebayError when the rest of the configuration fails.
        """
        if self.options.wait_for_rpc:
            await self.target.wait_runtime()
            await self._finish()
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """End everything; safe after a start that failed."""
        if self.server is not None:
            await self.server.close()
        await self.target.stop()

    def _read_entries(self) -> list[Entry]:
        if self.options.config is None:
            return []
        path = Path(self.options.config)
        if self.options.autosave and not path.exists():
            return []  # the first change makes it
        return read_config(path)

    async def _finish(self) -> None:
        assert self._replay is not None
        await self._replay.run(RUNTIME)
        if self.options.autosave:
            self.dispatcher.after_change = self._autosave
        self.target.finish_init()

    async def _autosave(self) -> None:
        """Write the file before a change is answered; calls that come together share a write."""
        assert self.options.config is not None
        self._changes += 1
        mine = self._changes
        async with self._saving:
            if self._saved >= mine:
                return
            covered = self._changes
            config = saved_config(self.target)
            try:
                await asyncio.to_thread(write_config, Path(self.options.config), config)
            except HostError as error:
                _log.error("%s: the change is made, but a restart would lose it", error)
                return
            self._saved = covered
