"""The blocking client: its calls, and what it says when there is nobody to call."""

from __future__ import annotations

import errno
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.errors import HostError, PeerError
from drivebay.rpc.client import Client, RpcError


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        Path(name).chmod(0o755)
        yield Path(name) / "rpc.sock"


class Peer:
    """A socket that answers each request with what the test gave it."""

    def __init__(self, path: Path, *answers: bytes) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._answers = answers
        self.requests: list[dict[str, object]] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            for answer in self._answers:
                self.requests.append(json.loads(connection.recv(65536)))
                connection.sendall(answer)
            connection.recv(1)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(10)
        self._listener.close()


def test_a_late_answer_is_not_taken_for_the_next_calls(path: Path) -> None:
    """After Ctrl-C what was done is taken back on the same connection."""
    late = b'{"id":1,"error":{"code":-5,"message":"late"}}\n{"id":2,"result":"own"}\n'
    with Peer(path, b"", late) as peer, Client(str(path)) as client:
        client._receive = _interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            client.call("first")
        del client._receive
        while not peer.requests:
            time.sleep(0.001)
        assert client.call("second") == "own"
        client.close()


def _interrupted(method: str) -> object:
    raise KeyboardInterrupt


def test_calls_have_rising_ids_and_leave_out_empty_params(path: Path) -> None:
    answers = (b'{"jsonrpc":"2.0","id":1,"result":true}\n', b'{"id":2,"result":{"a":1}}\n')
    with Peer(path, *answers) as peer, Client(str(path)) as client:
        assert client.call("first") is True
        assert client.call("second", {"name": "N"}) == {"a": 1}
        client.close()
    assert peer.requests == [
        {"jsonrpc": "2.0", "id": 1, "method": "first"},
        {"jsonrpc": "2.0", "id": 2, "method": "second", "params": {"name": "N"}},
    ]


def test_a_refusal_carries_code_text_and_data(path: Path) -> None:
    answer = b'{"id":1,"error":{"code":-19,"message":"No such device","data":{"hint":"h"}}}\n'
    with Peer(path, answer), Client(str(path)) as client:
        with pytest.raises(RpcError) as caught:
            client.call("m")
        client.close()
    assert (caught.value.code, caught.value.message) == (-19, "No such device")
    assert caught.value.data == {"hint": "h"}


@pytest.mark.parametrize(
    "answer", [b"nonsense\n", b"[]\n", b'{"id":7,"result":1}\n', b'{"id":1}\n']
)
def test_nonsense_is_not_taken_for_an_answer(path: Path, answer: bytes) -> None:
    with Peer(path, answer), Client(str(path)) as client:
        with pytest.raises(PeerError, match="'m'"):
            client.call("m")
        client.close()


def test_an_answer_that_never_comes_ends_in_time(path: Path) -> None:
    with Peer(path, b'{"id":1,'), Client(str(path), timeout_s=0.05) as client:
        with pytest.raises(HostError, match="not answered within") as caught:
            client.call("m")
        client.close()
    assert caught.value.errno == errno.ETIMEDOUT


def refusal(path: Path) -> HostError:
    with pytest.raises(HostError) as caught:
        Client(str(path))
    assert str(path) in str(caught.value)
    assert caught.value.hint
    return caught.value


def test_nobody_there(path: Path) -> None:
    assert refusal(path).errno == errno.ENOENT


def test_a_socket_that_was_left_behind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    error = refusal(path)
    assert error.errno == errno.ECONNREFUSED
    assert "nobody listens" in str(error)
    assert "mode 0" in str(error)


def test_another_kind_of_file(path: Path) -> None:
    path.touch()
    assert "not a socket" in str(refusal(path))


def test_a_path_that_is_too_long(path: Path) -> None:
    assert refusal(path.parent / ("x" * 120)).errno == errno.ENAMETOOLONG


def test_a_socket_of_another_user_says_whose_it_is(path: Path) -> None:
    own = os.geteuid()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        path.chmod(0o000 if own else 0o600)
        if own == 0:
            os.seteuid(65534)
        try:
            error = refusal(path)
        finally:
            os.seteuid(own)
    assert error.errno == errno.EACCES
    assert "owner" in str(error)
    assert "mode 0" in str(error)
    assert "run this as" in str(error.hint)
