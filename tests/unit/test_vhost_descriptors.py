"""Descriptors of kinds that nobody thought of."""

from __future__ import annotations

import os
import socket

import pytest

from drivebay.errors import PeerError
from drivebay.vhost.descriptors import Received, take_stream_socket

AF_XDP = 44


def test_a_socket_of_a_family_that_python_cannot_name(needs_root: None) -> None:
    with socket.socket(AF_XDP, socket.SOCK_RAW) as strange:
        received = Received()
        received.add([os.dup(strange.fileno())])
        with pytest.raises(PeerError, match="socket of kind 44"):
            take_stream_socket(received, "the back-end channel")
        assert len(received) == 0
