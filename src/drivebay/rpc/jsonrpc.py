"""JSON-RPC 2.0 as SPDK's server speaks it: pure protocol, no I/O and no methods.

A client writes JSON values one after the other, with white space or nothing between
them; ``StreamParser`` cuts that stream into values, ``decode`` and ``parse_request``
check them, ``encode_*`` write the answers. Everything that arrives is hostile until it
has passed: a value is bounded in bytes, nesting and number of parts *before* the JSON
decoder sees it, so no input can exhaust the stack or hold the event loop.

Deviation: SPDK closes the connection on invalid JSON without an answer; here it is
answered with -32700 and the connection stays usable, because a client that is told
nothing cannot say what was wrong.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, Final, NoReturn

__all__ = [
    "INTERNAL_ERROR",
    "INVALID_PARAMS",
    "INVALID_REQUEST",
    "INVALID_STATE",
    "MAX_ANSWER_BYTES",
    "MAX_REQUEST_BYTES",
    "METHOD_NOT_FOUND",
    "PARSE_ERROR",
    "DuplicateKeys",
    "ParseFault",
    "Request",
    "RpcError",
    "StreamParser",
    "decode",
    "encode_batch",
    "encode_error",
    "encode_items",
    "encode_list",
    "encode_result",
    "parse_request",
]

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
INVALID_STATE: Final = -1

MAX_REQUEST_BYTES: Final = 256 * 1024
MAX_ANSWER_BYTES: Final = 32 * 1024 * 1024
MAX_VALUES: Final = 8192
MAX_DEPTH: Final = 64
MAX_ID_LENGTH: Final = 1024

Id = str | int | float | None

# One token of structure, or the whole of a string up to what ends it. The possessive
# repeat keeps a long string linear and without a backtracking stack.
_STRUCTURE = re.compile(rb'["{}\[\],:]')
_STRING_BODY = re.compile(rb'(?:[^"\\\x00-\x1f]|\\.)*+', re.DOTALL)
_SCALAR = re.compile(rb"-?[0-9][0-9.eE+-]*|true|false|null")
_SPACE = re.compile(rb"[ \t\r\n]*")
_CLOSER = {ord("{"): ord("}"), ord("["): ord("]")}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class RpcError(Exception):
    """An error answer: a stable code, SPDK's text, and our details in ``data``."""

    def __init__(self, code: int, message: str, data: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data


class ParseFault(Exception):
    """What arrived is not JSON, or more of it than a request may hold."""


class DuplicateKeys(dict[str, Any]):
    """An object that names a member twice; no request may."""


@dataclass(frozen=True, slots=True)
class Request:
    """One checked request; ``id`` None makes it a notification."""

    method: str
    params: dict[str, Any] | list[Any] | None
    id: Id


class StreamParser:
    """Cuts a byte stream into JSON values. Context: any; holds at most one request.

    >>> parser = StreamParser()
    >>> parser.feed(b' {"a":[1]}{"b"')
    >>> parser.next_value()
    b'{"a":[1]}'
    >>> parser.next_value() is None
    True
    >>> parser.feed(b':2}')
    >>> parser.next_value()
    b'{"b":2}'
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skipping = False  # inside a value that was refused already
        self._forget_value()

    def feed(self, data: bytes) -> None:
        """Take bytes in the order they came; call next_value() until it returns None."""
        self._buffer += data

    def next_value(self) -> bytes | None:
        """Return the next whole value, or None when more bytes are needed.

        Raises: ParseFault; the parser is ready to go on. Bound: what was fed.
        """
        while True:
            if not self._open and not self._begin_value():
                return None
            finished = self._scan()
            if not finished:
                self._bound_size()
                return None
            value = bytes(self._buffer[: self._pos])
            del self._buffer[: self._pos]
            self._forget_value()
            if self._skipping:
                self._skipping = False
                continue
            return value

    def _forget_value(self) -> None:
        self._pos = 0
        self._open = False
        self._in_string = False
        self._closers = bytearray()
        self._values = 0  # commas, colons, and two for each container
        self._strings = 0

    def _begin_value(self) -> bool:
        """Drop white space and look at the first byte of a value; False if there is none."""
        match = _SPACE.match(self._buffer)
        assert match is not None
        end = match.end()
        del match  # it exports the buffer, which then could not shrink
        del self._buffer[:end]
        if not self._buffer:
            return False
        self._forget_value()
        self._open = True
        return True

    def _scan(self) -> bool:
        """Advance through the open value; True when it ends at ``_pos``."""
        if self._pos == 0 and self._buffer[0] not in b'{["':
            return self._scan_scalar()
        while True:
            if self._in_string:
                if not self._scan_string():
                    return False
            else:
                match = _STRUCTURE.search(self._buffer, self._pos)
                if match is None:
                    self._pos = len(self._buffer)
                    return False
                self._pos = match.end()
                self._take_token(self._buffer[self._pos - 1])
            if not self._closers and not self._in_string:
                return True

    def _scan_scalar(self) -> bool:
        match = _SCALAR.match(self._buffer)
        if match is None:
            self._drop_everything("what was received is not JSON")
        self._pos = match.end()
        return True

    def _scan_string(self) -> bool:
        match = _STRING_BODY.match(self._buffer, self._pos)
        assert match is not None
        self._pos = match.end()
        if self._pos == len(self._buffer):
            return False
        byte = self._buffer[self._pos]
        if byte == ord("\\"):  # its second byte has not come yet
            return False
        if byte != ord('"'):
            self._drop_everything("a string holds a control character")
        self._pos += 1
        self._in_string = False
        return True

    def _take_token(self, byte: int) -> None:
        if byte in b",:":
            self._values += 1
        elif byte == ord('"'):
            self._in_string = True
            self._strings += 1
        elif byte in _CLOSER:
            self._values += 2
            if len(self._closers) == MAX_DEPTH:
                self._drop_everything(f"JSON is nested deeper than {MAX_DEPTH} levels")
            self._closers.append(_CLOSER[byte])
        elif not self._closers or self._closers.pop() != byte:
            self._drop_everything("a bracket is closed that was not opened")
        if self._strings > self._values + 1:
            self._drop_everything("two strings stand side by side")
        if self._values > MAX_VALUES and not self._skipping:
            self._skipping = True
            raise ParseFault(f"a request holds more than {MAX_VALUES} values")

    def _bound_size(self) -> None:
        """Refuse a value that is too long, once; then pass over the rest of it."""
        if self._skipping:
            cut = min(self._pos, len(self._buffer)) - 1
            if cut > 0:
                del self._buffer[:cut]
                self._pos -= cut
        elif len(self._buffer) > MAX_REQUEST_BYTES:
            self._skipping = True
            raise ParseFault(f"a request is longer than {MAX_REQUEST_BYTES} bytes")

    def _drop_everything(self, reason: str) -> NoReturn:
        """Where the next request begins cannot be known: drop what is here."""
        self._skipping = False
        self._buffer = bytearray()
        self._forget_value()
        raise ParseFault(reason)


def _pairs_to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    return members if len(members) == len(pairs) else DuplicateKeys(members)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(object_pairs_hook=_pairs_to_object, parse_constant=_refuse_constant)


def decode(value: bytes) -> Any:
    """Decode one value that StreamParser cut out. Raises: ParseFault.

    >>> decode(b'{"a": 1.5}')
    {'a': 1.5}
    """
    if len(value) > MAX_REQUEST_BYTES:
        raise ParseFault(f"a request is longer than {MAX_REQUEST_BYTES} bytes")
    try:
        text = value.decode("utf-8")
        result = _decoder.decode(text)
        if _SURROGATE.search(text):  # half a surrogate pair is not a character
            json.dumps(result, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ParseFault(f"invalid JSON: {error}") from error
    return result


def parse_request(value: Any) -> Request:
    """Check the envelope of one request. Raises: RpcError, with ``id`` in ``args[1:]``.

    >>> parse_request({"jsonrpc": "2.0", "id": 7, "method": "m"})
    Request(method='m', params=None, id=7)
    """
    if not isinstance(value, dict) or isinstance(value, DuplicateKeys):
        raise RpcError(INVALID_REQUEST, "Invalid request")
    known = value.keys() <= {"jsonrpc", "method", "params", "id"}
    request_id = value.get("id")
    method = value.get("method")
    if not known or value.get("jsonrpc", "2.0") != "2.0" or not isinstance(method, str):
        raise RpcError(INVALID_REQUEST, "Invalid request")
    if not _is_id(request_id):
        raise RpcError(INVALID_REQUEST, "Invalid request")
    params = value.get("params")
    if params is not None and not isinstance(params, dict | list):
        raise InvalidParamsShape(request_id)
    return Request(method, params, request_id)


class InvalidParamsShape(RpcError):
    """``params`` is neither object nor array; the only bad envelope whose id is echoed."""

    def __init__(self, request_id: Id) -> None:
        super().__init__(INVALID_REQUEST, "Invalid request")
        self.request_id = request_id


def _is_id(value: object) -> bool:
    if value is None:
        return True
    if isinstance(value, bool):
        return False
    if isinstance(value, str):
        return len(value) <= MAX_ID_LENGTH
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int)


def _dumps(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def encode_result(request_id: Id, result: object) -> bytes:
    """Encode an answer, without the newline that ends it.

    >>> encode_result(1, True)
    b'{"jsonrpc":"2.0","id":1,"result":true}'
    """
    return _dumps({"jsonrpc": "2.0", "id": request_id, "result": result})


def encode_items(items: list[Any]) -> bytes:
    """Encode a part of a list that is too long to be encoded at once.

    >>> encode_items([1, "a"])
    b'1,"a"'
    """
    return _dumps(items)[1:-1]


def encode_list(request_id: Id, parts: list[bytes]) -> bytes:
    """Encode an answer whose result is a list, from what encode_items() made of its parts.

    >>> encode_list(1, [b"1,2", b"3"])
    b'{"jsonrpc":"2.0","id":1,"result":[1,2,3]}'
    """
    begin, end = encode_result(request_id, [])[: -len(b"]}")], b"]}"
    # One copy of what may be 15 MB: each takes a hundredth of a second.
    *before, last = [begin + parts[0], *parts[1:]]
    return b",".join([*before, last + end])


def encode_error(request_id: Id, error: RpcError) -> bytes:
    """Encode an error answer.

    >>> encode_error(None, RpcError(-32601, "Method not found"))
    b'{"jsonrpc":"2.0","id":null,"error":{"code":-32601,"message":"Method not found"}}'
    """
    body: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.data:
        body["data"] = error.data
    return _dumps({"jsonrpc": "2.0", "id": request_id, "error": body})


def encode_batch(answers: list[bytes]) -> bytes:
    """Join the answers of a batch into its array."""
    return b"[" + b",".join(answers) + b"]"
