"""Which running target a command talks to, and what is said when none answers.

A command names the socket with ``--socket``; otherwise it is that of the
background target (`drivebay target start`), and SPDK's default one without it.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Any

from drivebay.errors import DrivebayError, HostError, PeerError, Unreachable
from drivebay.target.daemon import find_background
from drivebay.target.options import DEFAULT_RPC_SOCKET

if TYPE_CHECKING:
    from drivebay.rpc.client import Client, RpcError

__all__ = ["RpcRefused", "answers", "call", "connect", "find_socket", "target_owner", "target_pid"]

_UCRED = struct.Struct("iII")


class RpcRefused(DrivebayError):
    """The target answered a call with an error; ``code`` is the RPC's."""

    def __init__(self, message: str, code: int, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code


def find_socket(named: str | None) -> str:
    """Return the RPC socket's path: the one that was named, or where a target would be."""
    if named is not None:
        return named
    background = find_background()
    return DEFAULT_RPC_SOCKET if background is None else background.rpc_socket


def connect(named: str | None, timeout_s: float = 60.0) -> Client:
    """Open a connection to the target. Raises: Unreachable, saying why and what to do."""
    from drivebay.rpc.client import Client

    try:
        return Client(find_socket(named), timeout_s)
    except HostError as error:
        raise Unreachable(str(error), hint=error.hint) from error


def call(client: Client, method: str, params: Any = None) -> Any:
    """Call a method and return its result.

    Raises: RpcRefused when the target says no, Unreachable when it ends or is silent.
    """
    from drivebay.rpc.client import RpcError

    try:
        return client.call(method, params)
    except RpcError as error:
        raise _refusal(method, error) from error
    except (HostError, PeerError) as error:
        raise Unreachable(str(error), hint=error.hint) from error


def _refusal(method: str, error: RpcError) -> RpcRefused:
    """SPDK's text and code first, then what our target adds to them."""
    data = error.data or {}
    message = f"{method}: {error.message} (code {error.code})"
    if "reason" in data:
        message += f": {data['reason']}"
    elif "field" in data:
        message += f": '{data['field']}' is {data.get('value')!r}"
    hint = data.get("hint")
    return RpcRefused(message, error.code, hint=None if hint is None else str(hint))


def answers(path: str) -> bool:
    """Whether a target's RPC answers there now."""
    try:
        with connect(path) as client:
            call(client, "spdk_get_version")
    except DrivebayError:
        return False
    return True


def target_pid(path: str) -> int:
    """Return the id of the process that listens on the RPC socket, as the kernel knows it.

    Raises: Unreachable.
    """
    return target_owner(path)[0]


def target_owner(path: str) -> tuple[int, int]:
    """Return the id of the process that listens on the RPC socket, and of its user.

    Raises: Unreachable.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            raise Unreachable(f"can't reach the target at '{path}': {error.strerror}") from error
        # struct ucred (unix(7)): pid, uid, gid of the process that called listen().
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(credentials)
    if pid == 0:
        raise Unreachable(
            f"the target behind '{path}' lives in another process namespace, where it has to be "
            "stopped"
        )
    return pid, uid
