"""The RPC socket: who may have its path, its mode, and what is left when it closes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from drivebay.errors import HostError, InUse, UsageError
from drivebay.rpc import dispatch
from drivebay.rpc.jsonrpc import RpcError, encode_result
from drivebay.rpc.schema import BDEV, RUNTIME, Method
from drivebay.rpc.server import RpcServer


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        yield Path(name)


def server_at(path: Path, **more: Any) -> RpcServer:
    target: Any = SimpleNamespace(state=RUNTIME)
    return RpcServer(target, str(path), **more)


def run_listening(server: RpcServer, test: Any) -> None:
    async def listening() -> None:
        await server.listen()
        try:
            await test()
        finally:
            await server.close()

    asyncio.run(listening())


async def call(path: Path, request: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(request)
    line = await reader.readline()
    writer.close()
    return line


def test_it_is_private_and_leaves_nothing(folder: Path) -> None:
    path = folder / "rpc.sock"

    async def look() -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (folder / "rpc.sock.lock").read_text() == f"{os.getpid()}\n"

    run_listening(server_at(path), look)
    assert list(folder.iterdir()) == []


def test_mode_and_group_are_as_asked_and_the_umask_stays(folder: Path) -> None:
    path = folder / "rpc.sock"
    before = os.umask(0o022)
    os.umask(before)

    async def look() -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert path.stat().st_gid == os.getgid()
        now = os.umask(0o022)
        os.umask(now)
        assert now == before

    run_listening(server_at(path, mode=0o660, group=os.getgid()), look)


def test_a_path_that_is_too_long_is_refused_with_its_length(folder: Path) -> None:
    with pytest.raises(UsageError, match="at most 107"):
        server_at(folder / ("x" * 107)).claim()


def test_a_running_target_keeps_its_socket(folder: Path) -> None:
    path = folder / "rpc.sock"

    async def intrude() -> None:
        other = server_at(path)
        with pytest.raises(InUse, match=f"'{path}'.*pid {os.getpid()}"):
            other.claim()
        await other.close()
        assert path.is_socket()
        assert (folder / "rpc.sock.lock").exists()

    run_listening(server_at(path), intrude)


def test_the_lock_is_the_one_that_spdk_takes(folder: Path) -> None:
    path = folder / "rpc.sock"
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(InUse, match="another running target"):
            server_at(path).claim()
    finally:
        os.close(lock)
    server = server_at(path)
    server.claim()
    asyncio.run(server.close())


def test_a_stale_socket_is_replaced(folder: Path) -> None:
    path = folder / "rpc.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    (folder / "rpc.sock.lock").touch()

    async def ask() -> None:
        assert b"Method not found" in await call(path, b'{"id":1,"method":"x"}')

    run_listening(server_at(path), ask)


def test_a_listener_without_a_lock_is_left_alone(folder: Path) -> None:
    path = folder / "rpc.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(1)
        with pytest.raises(InUse, match="another program listens"):
            server_at(path).claim()
        assert path.is_socket()
        assert not (folder / "rpc.sock.lock").exists()


def test_another_kind_of_file_is_left_alone(folder: Path) -> None:
    path = folder / "rpc.sock"
    path.write_text("precious")
    with pytest.raises(UsageError, match="is not a socket"):
        server_at(path).claim()
    assert path.read_text() == "precious"


def test_a_lock_that_is_a_link_is_not_followed(folder: Path) -> None:
    victim = folder / "victim"
    victim.write_text("precious")
    (folder / "rpc.sock.lock").symlink_to(victim)
    with pytest.raises(HostError, match=r"rpc\.sock\.lock"):
        server_at(folder / "rpc.sock").claim()
    assert victim.read_text() == "precious"


def test_a_folder_that_is_absent_is_named(folder: Path) -> None:
    with pytest.raises(HostError, match="nowhere"):
        server_at(folder / "nowhere" / "rpc.sock").claim()


def declared(name: str, handler: Any) -> Method:
    return Method(
        name=name,
        handler=handler,
        states=frozenset({RUNTIME}),
        params=(),
        style=BDEV,
        doc="",
        relaxed=False,
        waits=False,
        changes=True,
        takes_nothing="",
    )


def test_a_fault_of_ours_is_an_answer_and_a_log_entry(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "rpc.sock"
    server = server_at(path)

    async def broken(target: Any, params: Any) -> Any:
        raise ZeroDivisionError("by nought")

    server.dispatcher.methods["broken"] = declared("broken", broken)

    async def ask() -> None:
        answer = await call(path, b'{"id":1,"method":"broken"}')
        assert b'"code":-32603' in answer
        assert b"by nought" in answer
        assert b"Method not found" in await call(path, b'{"id":1,"method":"x"}')

    run_listening(server, ask)
    assert "ZeroDivisionError" in caplog.text


def test_a_change_is_answered_after_it_was_saved(folder: Path) -> None:
    path = folder / "rpc.sock"
    server = server_at(path)
    order: list[str] = []

    async def change(target: Any, params: Any) -> Any:
        order.append("made")
        return True

    async def refuse(target: Any, params: Any) -> Any:
        raise RpcError(-22, "Invalid argument")

    async def save() -> None:
        await asyncio.sleep(0.01)
        order.append("saved")

    server.dispatcher.methods["change"] = declared("change", change)
    server.dispatcher.methods["refuse"] = declared("refuse", refuse)
    server.dispatcher.after_change = save

    async def ask() -> None:
        assert b'"result":true' in await call(path, b'{"id":1,"method":"change"}')
        assert order == ["made", "saved"]
        assert b'"code":-22' in await call(path, b'{"id":1,"method":"refuse"}')
        assert order == ["made", "saved"]

    run_listening(server, ask)


def test_closing_cuts_off_a_client_that_waits(folder: Path) -> None:
    path = folder / "rpc.sock"
    server = server_at(path)
    ended: list[str] = []

    async def wait(target: Any, params: Any) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("yes")

    server.dispatcher.methods["wait"] = declared("wait", wait)

    async def test() -> None:
        await server.listen()
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b'{"id":1,"method":"wait"}')
        await asyncio.sleep(0.05)
        await server.close()
        assert await reader.read() == b""
        writer.close()

    asyncio.run(test())
    assert ended == ["yes"]


def test_a_long_list_is_encoded_with_turns_for_others_and_as_a_short_one(folder: Path) -> None:
    items = [{"name": f"disk {number}"} for number in range(1001)]
    path, turns = folder / "rpc.sock", 0

    async def many(target: Any, params: Any) -> Any:
        return items

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    server = server_at(path)
    server.dispatcher.methods["many"] = declared("many", many)

    async def ask() -> None:
        counting = asyncio.create_task(count())
        answer = await server.dispatcher.answer(b'{"jsonrpc":"2.0","id":7,"method":"many"}')
        counting.cancel()
        assert answer == encode_result(7, items)
        assert turns > len(items) // dispatch._ENCODED_AT_ONCE, turns

    run_listening(server, ask)
