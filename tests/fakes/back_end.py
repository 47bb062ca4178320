"""A vhost-user back end that only talks: it answers a front end and keeps what it was told.

Written from the vhost-user document; it serves no ring. Context: tests, in a thread of its own.
Never imports drivebay.
"""

from __future__ import annotations

import array
import os
import socket
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path

_HEADER = struct.Struct("=III")
_VERSION, _REPLY, _NEED_REPLY = 1, 4, 8
GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_VRING_BASE, GET_VRING_BASE = 10, 11
GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_CONFIG = 15, 17, 24
GET_INFLIGHT_FD, SET_INFLIGHT_FD = 31, 32
# VERSION_1, PROTOCOL_FEATURES; REPLY_ACK, CONFIG, INFLIGHT_SHMFD
FEATURES = 1 << 32 | 1 << 30
PROTOCOL = 1 << 3 | 1 << 9 | 1 << 12


@dataclass
class Told:
    """One message of the front end; of its descriptors the inode."""

    request: int
    payload: bytes
    inodes: list[int] = field(default_factory=list)


class BackEnd:
    """Listens at ``path``; ``sessions`` holds what each connection said, in order."""

    features = FEATURES
    protocol = PROTOCOL
    capacity_sectors = 1000
    inflight_answer: bytes | None = None  # None: as it should be

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sessions: list[list[Told]] = []
        self.inflight_inode = 0
        self._peer: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))

    def start(self, connections: int = 1) -> None:
        """Serve so many connections, one after the other."""
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, args=(connections,))
        self._thread.start()

    def hang_up(self) -> None:
        """End the connection, as a killed process does."""
        assert self._peer is not None
        self._peer.shutdown(socket.SHUT_RDWR)

    def wait(self) -> None:
        """Wait for the end of the connections that it was started for."""
        assert self._thread is not None
        self._thread.join(30)
        assert not self._thread.is_alive(), "a connection is still open"

    def close(self) -> None:
        self._listener.close()
        self.path.unlink()
        if self._thread is not None:
            self.wait()

    def told(self, session: int, request: int) -> list[Told]:
        return [one for one in self.sessions[session] if one.request == request]

    def _serve(self, connections: int) -> None:
        for _ in range(connections):
            self._peer, _ = self._listener.accept()
            self.sessions.append([])
            with self._peer:
                while self._one(self._peer):
                    pass

    def _one(self, peer: socket.socket) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(peer, _HEADER.size, 8)
            if not data:
                return False
            request, flags, size = _HEADER.unpack(data)
            payload = peer.recv(size, socket.MSG_WAITALL) if size else b""
            inodes = [os.fstat(fd).st_ino for fd in fds]
            for fd in fds:
                os.close(fd)
            self.sessions[-1].append(Told(request, payload, inodes))
            self._answer(peer, request, flags, payload)
        except ConnectionError:
            return False
        return True

    def _answer(self, peer: socket.socket, request: int, flags: int, payload: bytes) -> None:
        config = struct.pack("<Q", self.capacity_sectors)
        answers = {
            GET_FEATURES: struct.pack("=Q", self.features),
            GET_PROTOCOL_FEATURES: struct.pack("=Q", self.protocol),
            GET_QUEUE_NUM: struct.pack("=Q", 1),
            GET_VRING_BASE: payload,
            GET_CONFIG: payload[:12] + config.ljust(len(payload) - 12, b"\0"),
        }
        fds: list[int] = []
        if request == GET_INFLIGHT_FD:
            fds.append(os.memfd_create("inflight"))
            self.inflight_inode = os.fstat(fds[0]).st_ino
            right = struct.pack("=QQ", 4096, 64) + payload[16:]
            answer = right if self.inflight_answer is None else self.inflight_answer
        elif request in answers:
            answer = answers[request]
        elif flags & _NEED_REPLY:
            answer = bytes(8)
        else:
            return
        header = _HEADER.pack(request, _VERSION | _REPLY, len(answer))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        peer.sendmsg([header + answer], rights)
        for fd in fds:
            os.close(fd)
