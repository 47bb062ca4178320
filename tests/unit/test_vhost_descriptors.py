"""Descriptors of kinds that nobody thought of."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from drivebay.errors import PeerError
from drivebay.vhost.descriptors import Received, take_stream_socket

AF_XDP = 44


def test_a_socket_of_a_family_whose_address_cannot_be_asked(needs_root: None) -> None:
    with socket.socket(AF_XDP, socket.SOCK_RAW) as strange:
        received = Received()
        fd = os.dup(strange.fileno())
        received.add([fd])
        with pytest.raises(PeerError, match="the back-end channel is a socket of"):
            take_stream_socket(received, "the back-end channel")
        received.close()
        assert not Path(f"/proc/self/fd/{fd}").exists()
