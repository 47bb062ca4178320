"""The beginning of a VNC connection, as its programs make it: RFC 6143, VeNCrypt.

Context: tests. Never imports drivebay. DES is OpenSSL's, which has it only where it is asked for.
"""

from __future__ import annotations

import socket
import ssl
import struct
import subprocess

__all__ = ["is_let_in"]

NONE, PASSWORD, VENCRYPT = 1, 2, 19
X509_NONE, X509_PASSWORD = 260, 261


def is_let_in(port: int, password: str = "", tls: ssl.SSLContext | None = None) -> bool:
    """Whether the server at that port shows its screen to who knows this."""
    with socket.create_connection(("127.0.0.1", port), 20) as plain:
        assert plain.recv(12) == b"RFB 003.008\n"
        plain.sendall(b"RFB 003.008\n")
        kinds = plain.recv(plain.recv(1)[0])
        if tls is None:
            return _prove(plain, kinds[0], password)
        assert kinds == bytes([VENCRYPT]), kinds
        plain.sendall(kinds)
        plain.sendall(plain.recv(2))  # version 0.2
        assert plain.recv(1) == b"\0"
        (kind,) = struct.unpack(">I", plain.recv(plain.recv(1)[0] * 4))
        plain.sendall(struct.pack(">I", kind))
        assert plain.recv(1) == b"\1"
        try:
            with tls.wrap_socket(plain) as secret:
                if kind == X509_PASSWORD:
                    return _answer(secret, password)
                assert kind == X509_NONE
                return secret.recv(4) == bytes(4)
        except (ssl.SSLError, ConnectionError):
            return False


def _prove(connection: socket.socket, kind: int, password: str) -> bool:
    if kind == VENCRYPT:
        return False
    connection.sendall(bytes([kind]))
    return connection.recv(4) == bytes(4) if kind == NONE else _answer(connection, password)


def _answer(connection: socket.socket, password: str) -> bool:
    """The challenge, enciphered with the password's first eight bytes, each bit-reversed."""
    key = bytes(int(f"{byte:08b}"[::-1], 2) for byte in password.encode()[:8].ljust(8, b"\0"))
    words = ["openssl", "enc", "-des-ecb", "-nopad", "-K", key.hex()]
    done = subprocess.run(
        [*words, "-provider", "legacy", "-provider", "default"],
        input=connection.recv(16), capture_output=True, check=True,
    )  # fmt: skip
    connection.sendall(done.stdout)
    return connection.recv(4) == bytes(4)
