"""vm/guest_agent.py against a guest that answers well, badly, late or not at all."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from drivebay.errors import PeerError
from drivebay.vm.guest_agent import GuestAgent, GuestOutput, GuestSilent

Speak = Callable[[bytes], None]


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen(1)
        yield listening


@pytest.fixture
def pair(listener: socket.socket, tmp_path: Path) -> Iterator[tuple[GuestAgent, socket.socket]]:
    agent = GuestAgent(tmp_path / "s")
    guest, _ = listener.accept()
    yield agent, guest
    agent.close()
    guest.close()


def test_ready_is_found_behind_noise(pair: tuple[GuestAgent, socket.socket]) -> None:
    agent, guest = pair
    guest.sendall(b"\0SeaBIOS\r\n\rready 2.50\r\n")
    assert agent.wait_ready(5) == 2.5


def test_a_command_and_its_output(pair: tuple[GuestAgent, socket.socket]) -> None:
    agent, guest = pair
    heard: list[bytes] = []

    def answer() -> None:
        heard.append(guest.recv(1000))
        for part in (b"done 3", b" 10\nline\ndo", b"ne 0\n"):
            guest.sendall(part)

    with_answer = threading.Thread(target=answer)
    with_answer.start()
    assert agent.run("echo line; exit 3", 5) == GuestOutput(3, "line\ndone ")
    with_answer.join()
    assert base64.b64decode(heard[0]) == b"echo line; exit 3"
    assert heard[0].endswith(b"\n")


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (b"done 0 99999999\n", "printed 99999999 bytes, at most"),
        (b"done 0 -1\n", "not 'done CODE LENGTH'"),
        (b"done 0\n", "not 'done CODE LENGTH'"),
        (b"ready 1.0\n", "not 'done CODE LENGTH'"),
        (b"x" * 5000, "a line of more than 4096 bytes"),
    ],
)
def test_a_bad_answer_is_refused(
    pair: tuple[GuestAgent, socket.socket], said: bytes, complaint: str
) -> None:
    agent, guest = pair
    guest.sendall(said)
    with pytest.raises(PeerError, match=complaint):
        agent.run("true", 5)


def test_silence_ends_in_a_time_out_that_names_the_command(
    pair: tuple[GuestAgent, socket.socket],
) -> None:
    with pytest.raises(GuestSilent, match=r"did not finish 'sleep 99' within 0\.01 s$"):
        pair[0].run("sleep 99", 0.01)


def test_the_end_of_qemu_is_told_apart(pair: tuple[GuestAgent, socket.socket]) -> None:
    agent, guest = pair
    guest.close()
    with pytest.raises(PeerError, match="QEMU ended while the guest was at work"):
        agent.wait_ready(5)
