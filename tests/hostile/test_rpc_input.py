"""Bad input on the RPC socket of a real target, while another client works beside it.

Whatever arrives, the target lives, the other client is answered, and no descriptor leaks.
"""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.process import TargetProcess, wait_until
from tests.fakes.rpc_client import RawClient, exchange

CONNECTIONS = 64
VERSION = b'{"jsonrpc":"2.0","id":1,"method":"spdk_get_version"}'
LIST = b'{"jsonrpc":"2.0","id":1,"method":"bdev_get_bdevs"}'


@pytest.fixture(scope="module")
def process() -> Iterator[TargetProcess]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        target = TargetProcess(Path(name))
        for number in range(100):
            target.rpc("bdev_null_create", name=f"N{number}", num_blocks=8, block_size=512)
        yield target
        assert target.stop() == 0


@pytest.fixture
def target(process: TargetProcess) -> Iterator[TargetProcess]:
    """The target, held to what it had before the test."""
    before = process.open_files()
    yield process
    process.expect_alive()
    assert process.rpc("bdev_get_bdevs", name="N0")[0]["name"] == "N0"
    wait_until(lambda: process.open_files() <= before, "as few descriptors as before")


def waiting_request(name: str, timeout_ms: int) -> bytes:
    params = {"name": name, "timeout": timeout_ms}
    request = {"jsonrpc": "2.0", "id": 1, "method": "bdev_get_bdevs", "params": params}
    return json.dumps(request).encode()


def resident_kb(target: TargetProcess) -> int:
    for line in Path(f"/proc/{target.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"]" * 10_000,
        b"\xff\xfe\x80" * 5000,
        b"\x00" * 5000,
        b'{"jsonrpc":"2.0","id":1,"method":"\xc3\x28"}',
        b'{"jsonrpc":"2.0","id":1,"method":"\\ud800"}',
        b'{"a":"' + b"x" * 400_000 + b'"}',
        b"[" + b"1," * 100_000 + b"1]",
        b'{"jsonrpc":"2.0","id":' + b"9" * 100_000 + b',"method":"spdk_get_version"}',
    ],
    ids=lambda data: f"{data[:12]!r}",
)
def test_it_is_refused_and_the_connection_stays(target: TargetProcess, data: bytes) -> None:
    found = exchange_while_reading(target, data + b"\n" + VERSION, pause_before=VERSION)
    *refusals, last = [json.loads(line) for line in found.splitlines()]
    assert refusals, "nothing was refused"
    # Where a read begins within what is being dropped, it may look like a bad request.
    codes = {refusal["error"]["code"] for refusal in refusals}
    assert -32700 in codes
    assert codes <= {-32700, -32600}
    assert "result" in last


def exchange_while_reading(
    target: TargetProcess, data: bytes, pause_before: bytes | None = None
) -> str:
    """As exchange(), for more than the sockets' buffers hold.

    What is refused takes with it whatever came in the same read, hence the pause.
    """

    def send() -> None:
        if pause_before is None:
            client.send(data)
            return
        client.send(data.removesuffix(pause_before))
        refused.wait(20)
        client.send(pause_before)

    refused = threading.Event()
    with RawClient(target.rpc_path) as client:
        sender = threading.Thread(target=send)
        sender.start()
        pieces: list[bytes] = []
        client.socket.settimeout(0.2)
        while sender.is_alive():
            try:
                pieces.append(client.socket.recv(65536))
            except TimeoutError:
                if pieces:  # all refusals are here
                    refused.set()
        sender.join()
        client.socket.settimeout(30)
        return b"".join(pieces).decode() + client.read_rest()


def test_half_a_request_and_gone(target: TargetProcess) -> None:
    for cut in range(1, len(VERSION)):
        with RawClient(target.rpc_path) as client:
            client.send(VERSION[:cut])


def test_a_request_byte_by_byte(target: TargetProcess) -> None:
    with RawClient(target.rpc_path) as client:
        for byte in VERSION:
            client.send(bytes([byte]))
        assert "result" in json.loads(client.read_line())


def test_gone_before_the_answer(target: TargetProcess) -> None:
    for _ in range(50):
        with RawClient(target.rpc_path) as client:
            client.send(LIST * 20)


def test_thousands_of_ids_are_answered_in_order(target: TargetProcess) -> None:
    requests = b"".join(
        b'{"jsonrpc":"2.0","id":%d,"method":"log_get_level"}' % number for number in range(3000)
    )
    found = exchange_while_reading(target, requests)
    assert [json.loads(line)["id"] for line in found.splitlines()] == list(range(3000))


def test_a_batch_bomb_is_bounded_and_others_are_answered(target: TargetProcess) -> None:
    bomb = b"[" + b",".join([LIST] * 1000) + b"]"
    with RawClient(target.rpc_path) as client:
        client.send(bomb)
        for _ in range(20):  # served meanwhile, not after
            assert target.rpc("spdk_get_version")
        text = client.read_rest()
    assert len(text) < 40 * 1024 * 1024
    answer = json.loads(text)
    assert 1 < len(answer) < 1000
    assert answer[-1]["error"]["message"] == "the answer to this batch is too large"


def test_a_client_that_never_reads_costs_little(target: TargetProcess) -> None:
    before = resident_kb(target)
    with RawClient(target.rpc_path) as client:
        client.socket.settimeout(1.0)
        sent = 0
        try:
            while sent < 64 * 1024 * 1024:
                client.send(LIST * 1000)
                sent += len(LIST) * 1000
        except TimeoutError:
            pass  # the target takes no more than it can answer
        assert sent < 8 * 1024 * 1024
        assert target.rpc("spdk_get_version")
        assert resident_kb(target) - before < 32 * 1024


def test_more_connections_than_there_may_be(target: TargetProcess) -> None:
    clients = [RawClient(target.rpc_path) for _ in range(CONNECTIONS)]
    try:
        for client in clients:
            client.send(VERSION)
            assert "result" in json.loads(client.read_line())
        with RawClient(target.rpc_path) as extra:
            assert "64 clients" in json.loads(extra.read_line())["error"]["message"]
            with pytest.raises(EOFError):
                extra.read_line()
    finally:
        for client in clients:
            client.socket.close()
    wait_until(lambda: answers_now(target), "an answer after the others have gone")


def answers_now(target: TargetProcess) -> bool:
    try:
        return "result" in json.loads(exchange(target.rpc_path, VERSION).splitlines()[0])
    except (BrokenPipeError, ConnectionResetError):
        return False  # refused before the request was read


def test_a_waiting_call_ends_when_its_client_hangs_up(target: TargetProcess) -> None:
    for _ in range(CONNECTIONS):
        with RawClient(target.rpc_path) as client:
            client.send(waiting_request("never", (1 << 64) - 1))
    wait_until(lambda: answers_now(target), "a free place after the waiting clients hung up")


def test_a_client_that_only_stopped_sending_gets_its_answer(target: TargetProcess) -> None:
    with RawClient(target.rpc_path) as client:
        client.send(waiting_request("late", 20_000))
        client.socket.shutdown(socket.SHUT_WR)
        time.sleep(1.5)  # longer than the period in which hang-ups are looked for
        target.rpc("bdev_null_create", name="late", num_blocks=8, block_size=512)
        assert json.loads(client.read_line())["result"][0]["name"] == "late"
    target.rpc("bdev_null_delete", name="late")


def test_a_waiting_call_holds_up_nobody(target: TargetProcess) -> None:
    with RawClient(target.rpc_path) as waiting:
        waiting.send(waiting_request("never", 600_000))
        for number in range(20):
            name = f"beside{number}"
            target.rpc("bdev_null_create", name=name, num_blocks=8, block_size=512)
            target.rpc("bdev_null_delete", name=name)


def test_the_same_name_from_many_sides_at_once(target: TargetProcess) -> None:
    outcomes: list[Any] = []

    def create_and_delete() -> None:
        create = {"name": "race", "num_blocks": 16, "block_size": 512}
        for _ in range(20):
            for method, params in (
                ("bdev_malloc_create", create),
                ("bdev_malloc_delete", {"name": "race"}),
            ):
                request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
                answer = json.loads(exchange(target.rpc_path, json.dumps(request).encode()))
                outcomes.append(answer.get("error", {}).get("code"))

    threads = [threading.Thread(target=create_and_delete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) <= {None, -17, -19}
    assert outcomes.count(None) > 0
    if "race" in [bdev["name"] for bdev in target.rpc("bdev_get_bdevs")]:
        target.rpc("bdev_malloc_delete", name="race")
