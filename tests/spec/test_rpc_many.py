"""Much at once on the RPC socket: thousands of bdevs, 64 clients, requests in two pieces."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.process import TargetProcess
from tests.fakes.rpc_client import RawClient

MANY = 6300
CLIENTS = 64


@pytest.fixture(scope="module")
def target() -> Iterator[TargetProcess]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        process = TargetProcess(Path(name))
        yield process
        assert process.stop() == 0


def request(number: int, method: str, **params: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"jsonrpc": "2.0", "id": number, "method": method}
    return {**made, "params": params} if params else made


def batches(method: str, params: list[dict[str, Any]]) -> Iterator[bytes]:
    for first in range(0, len(params), 250):
        calls = [request(i, method, **each) for i, each in enumerate(params[first : first + 250])]
        yield json.dumps(calls, ensure_ascii=False).encode()


@pytest.fixture
def crowded() -> Iterator[TargetProcess]:
    """A target for so many bdevs that its orderly end would take long."""
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        process = TargetProcess(Path(name))
        yield process
        process.kill()


def test_an_answer_of_ten_megabytes(crowded: TargetProcess) -> None:
    """Names with many letters that JSON writes with six characters each."""
    names = [f"{i:07}".ljust(127, "\u00e9") for i in range(MANY)]
    with RawClient(crowded.rpc_path) as client:
        made = [{"name": name, "num_blocks": 8, "block_size": 512} for name in names]
        for batch in batches("bdev_null_create", made):
            client.send(batch)
            assert all("result" in answer for answer in json.loads(client.read_line()))
        client.send(json.dumps(request(1, "bdev_get_bdevs")).encode())
        text = client.read_line()
        assert len(text) > 10_000_000
        assert [bdev["name"] for bdev in json.loads(text)["result"]] == names
        # Others are answered meanwhile, and a client that reads slowly gets all of it.
        client.send(json.dumps(request(2, "bdev_get_bdevs")).encode())
        assert crowded.rpc("log_get_level") == "NOTICE"
        assert len(client.read_line()) == len(text)


def test_sixty_four_clients_at_once(target: TargetProcess) -> None:
    """Each makes, lists and removes disks of its own; all at the same time."""
    wrong: list[str] = []
    together = threading.Barrier(CLIENTS)

    def one(number: int) -> None:
        with RawClient(target.rpc_path) as client:
            together.wait(30)
            for turn in range(5):
                name = f"C{number}-{turn}"
                calls: tuple[tuple[str, dict[str, Any]], ...] = (
                    ("bdev_null_create", {"name": name, "num_blocks": 8, "block_size": 512}),
                    ("bdev_get_bdevs", {"name": name}),
                    ("bdev_null_delete", {"name": name}),
                    ("bdev_get_bdevs", {"name": name}),
                )
                for i, (method, params) in enumerate(calls):
                    client.send(json.dumps(request(i, method, **params)).encode())
                    answer = json.loads(client.read_line())
                    if answer["id"] != i or ("error" in answer) != (i == 3):
                        wrong.append(f"{name}: {answer}")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert target.rpc("bdev_get_bdevs") == []


def test_a_request_split_at_every_byte(target: TargetProcess) -> None:
    """In two pieces that come as two packets, for each place where it can be cut."""
    text = json.dumps(
        [request(1, "log_get_level"), request(2, "bdev_get_bdevs", name='h\u00e9\\"{[')],
        ensure_ascii=False,
    ).encode()
    with RawClient(target.rpc_path) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for cut in range(1, len(text)):
            client.send(text[:cut])
            # Answered on another connection: the first piece has been read by then.
            if cut % 16 == 0:
                target.rpc("log_get_level")
            client.send(text[cut:])
            first, second = json.loads(client.read_line())
            assert (first["id"], first["result"]) == (1, "NOTICE")
            assert (second["id"], second["error"]["code"]) == (2, -19)
