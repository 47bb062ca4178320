"""The process of a target: from its options to its exit code.

Context: control, the main thread; reactors and workers are started below it.
First what the process needs from the kernel: fault handlers, the log, signals,
descriptors, a core; then rpc.service brings the target up. The end is the same
backwards, whatever led to it, and leaves no file behind.

A failing start raises a DrivebayError whose sentence the command line prints.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import faulthandler
import logging
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drivebay.errors import HostError
from drivebay.memory.guest_memory import install_sigbus_handler
from drivebay.rpc.service import Service
from drivebay.target.log import LOG
from drivebay.target.options import Options, available_cores
from drivebay.vhost.limited_log import LimitedLog

__all__ = ["main"]

logger = logging.getLogger(__name__)
_shortage = LimitedLog(logger, logging.WARNING)

_ENDING = (signal.SIGTERM, signal.SIGINT)


def main(options: Options) -> int:
    """Be a target until told to end.

    Returns: 0 after SIGTERM, SIGINT or spdk_kill_instance.
    Raises: DrivebayError when the start fails; nothing is left behind then.
    """
    # In this order: our handler answers faults in guest memory and hands every
    # other one to the handler that it found, which prints where Python stood.
    faulthandler.enable()
    install_sigbus_handler()
    LOG.start(options.log_flags, silence_notice=options.silence_notice)
    # A closed terminal must not take the disks away; SIGUSR1 is a no-op as in SPDK.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    _raise_descriptor_limit()
    _place_control_thread(options)
    asyncio.run(_live(options))
    return 0


async def _live(options: Options) -> None:
    """Start, serve until a signal comes (during the start, too), stop."""
    end = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_on_loop_error)
    for number in _ENDING:
        loop.add_signal_handler(number, _on_signal, number, end)
    with _pid_file(options.pid_file):
        service = Service(options)
        running = asyncio.create_task(_run(service))
        ended = asyncio.create_task(end.wait())
        try:
            await asyncio.wait((running, ended), return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
        finally:
            ended.cancel()
            await service.stop()
    logger.info("the target has ended")


async def _run(service: Service) -> None:
    """Serve until cancelled. Raises: DrivebayError when the start fails."""
    await service.start()
    options = service.options
    logger.info(
        "%s: reactors on cores %s, controllers' sockets in '%s', RPC socket %s",
        "waiting for framework_start_init" if options.wait_for_rpc else "ready",
        ",".join(map(str, options.cores)),
        options.socket_dir,
        "none" if options.rpc_socket is None else f"'{options.rpc_socket}'",
    )
    await service.serve()


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Say in one sentence that descriptors ran out; asyncio tries again by itself."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        limit, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        _shortage.add(
            f"a connection to the RPC socket must wait: {error.strerror} (at most {limit} are "
            "allowed, see 'ulimit -Hn')"
        )
        return
    loop.default_exception_handler(context)


def _on_signal(number: signal.Signals, end: asyncio.Event) -> None:
    logger.info("%s: ending", number.name)
    end.set()
    # Should a backend hold requests back for ever, the second signal is the kernel's.
    loop = asyncio.get_running_loop()
    for ending in _ENDING:
        loop.remove_signal_handler(ending)


def _raise_descriptor_limit() -> None:
    """A session has three descriptors for each queue: take all that we may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _place_control_thread(options: Options) -> None:
    """Keep control, and every thread that it starts, off the reactors' cores where others exist."""
    if options.main_core is not None:
        os.sched_setaffinity(0, {options.main_core})
        return
    others = set(available_cores()) - set(options.cores)
    if others:
        os.sched_setaffinity(0, others)


@contextlib.contextmanager
def _pid_file(path: str | None) -> Iterator[None]:
    """Hold our process id in a file; it is removed only if it is still ours."""
    if path is None:
        yield
        return
    file = Path(path)
    text = f"{os.getpid()}\n"
    try:
        file.write_text(text, encoding="ascii")
    except OSError as error:
        raise HostError(
            f"can't write the pid file '{path}'",
            error.errno or errno.EIO,
            path=path,
            hint="name another file with -f, or leave it out",
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if file.read_text(encoding="ascii") == text:
                file.unlink()
