"""From one JSON value to its answer: which method, in which state, with which parameters.

Context: control. A handler runs as a task of its own, so that one that waits holds up its
own connection only, and so that a fault of ours becomes an error answer and a log entry
instead of a lost connection.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from drivebay.errors import DrivebayError, HostError
from drivebay.rpc.jsonrpc import (
    INTERNAL_ERROR,
    INVALID_REQUEST,
    INVALID_STATE,
    MAX_ANSWER_BYTES,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    Id,
    InvalidParamsShape,
    ParseFault,
    RpcError,
    decode,
    encode_batch,
    encode_error,
    encode_items,
    encode_list,
    encode_result,
    parse_request,
)
from drivebay.rpc.lacking import lacking_part
from drivebay.rpc.methods import all_methods
from drivebay.rpc.schema import RUNTIME, STARTUP, Method, rpc_error_of

if TYPE_CHECKING:
    from drivebay.target.target import Target

__all__ = ["Dispatcher"]

_log = logging.getLogger(__name__)
_SHOWN_BYTES = 2000
# The log is no place for the keys of encrypted disks, also when their name is misspelt.
_KEYS = re.compile(r'("key2?"\s*:\s*")[^"]*|(")[0-9a-fA-F]{32,}')

_NEEDS_RUNTIME = (
    "Method may only be called after framework is initialized using framework_start_init RPC."
)
_NEEDS_STARTUP = (
    "Method may only be called before framework is initialized. Use --wait-for-rpc command "
    "line parameter and then issue this RPC before the framework_start_init RPC."
)
_HANGUP_PERIOD_S = 1.0
_ENCODED_AT_ONCE = 200


def _never() -> bool:
    return False


class Dispatcher:
    """Answers requests about one target; ``allowed`` None means every method."""

    def __init__(self, target: Target, allowed: frozenset[str] | None = None) -> None:
        self.target = target
        self.methods: dict[str, Method] = {
            name: method
            for name, method in all_methods().items()
            if allowed is None or name in allowed
        }
        for name in sorted((allowed or frozenset()) - all_methods().keys()):
            _log.warning("the list of allowed methods names '%s', which there is not", name)
        target.rpc_methods = self.methods
        self.after_change: Callable[[], Awaitable[None]] | None = None

    async def call(
        self,
        name: str,
        params: dict[str, Any] | list[Any] | None,
        *,
        hung_up: Callable[[], bool] = _never,
        state: str | None = None,
    ) -> Any:
        """Call one method; ``state`` overrides the target's (a configuration's replay).

        Raises: RpcError.
        """
        method = self.methods.get(name)
        if method is None:
            part = lacking_part(name)
            raise RpcError(METHOD_NOT_FOUND, "Method not found", {"reason": part} if part else None)
        now = state or self.target.state
        if now not in method.states:
            raise RpcError(INVALID_STATE, _NEEDS_RUNTIME if now == STARTUP else _NEEDS_STARTUP)
        checked = method.read_params(params)
        result = await self._run(method, checked, hung_up)
        if method.changes and self.after_change is not None and now == RUNTIME:
            await self.after_change()
        return result

    async def _run(
        self, method: Method, params: dict[str, Any], hung_up: Callable[[], bool]
    ) -> Any:
        handling = asyncio.ensure_future(method.handler(self.target, params))
        try:
            while not handling.done():
                await asyncio.wait([handling], timeout=_HANGUP_PERIOD_S)
                if method.waits and hung_up():
                    handling.cancel()
        finally:
            if not handling.done():
                handling.cancel()
        if handling.cancelled():
            raise RpcError(INTERNAL_ERROR, "the client hung up")
        error = handling.exception()
        if error is None:
            return handling.result()
        raise self._as_rpc_error(method, error) from error

    def _as_rpc_error(self, method: Method, error: BaseException) -> RpcError:
        if isinstance(error, RpcError):
            return error
        if isinstance(error, DrivebayError):
            return rpc_error_of(method.style, error)
        if isinstance(error, OSError):
            code = error.errno or errno.EIO
            return rpc_error_of(method.style, HostError(f"{method.name} failed", code))
        _log.error("'%s' failed: a fault of ours", method.name, exc_info=error)
        reason = f"{type(error).__name__}: {error}"
        return RpcError(INTERNAL_ERROR, "Internal error", {"reason": reason})

    async def answer(self, value: bytes, hung_up: Callable[[], bool] = _never) -> bytes | None:
        """Answer one JSON value of a stream; None when there is nothing to say.

        Bound: the answer stays within MAX_ANSWER_BYTES, a batch's rest is refused then.
        """
        _show("request", value)
        answer = await self._answer(value, hung_up)
        _show("answer", answer or b"(none)")
        return answer

    async def _answer(self, value: bytes, hung_up: Callable[[], bool]) -> bytes | None:
        try:
            message = decode(value)
        except ParseFault as fault:
            return self.parse_error(fault)
        if not isinstance(message, list):
            return await self._answer_one(message, hung_up)
        if not message:
            return encode_error(None, RpcError(INVALID_REQUEST, "Invalid request"))
        return await self._answer_batch(message, hung_up)

    @staticmethod
    def parse_error(fault: ParseFault) -> bytes:
        """The answer to what is not JSON."""
        return encode_error(None, RpcError(PARSE_ERROR, "Parse error", {"reason": str(fault)}))

    async def _answer_batch(self, message: list[Any], hung_up: Callable[[], bool]) -> bytes | None:
        answers: list[bytes] = []
        size = 0
        for item in message:
            if size > MAX_ANSWER_BYTES:
                refusal = RpcError(INTERNAL_ERROR, "the answer to this batch is too large")
                answers.append(encode_error(None, refusal))
                break
            answer = await self._answer_one(item, hung_up)
            if answer is not None:
                answers.append(answer)
                size += len(answer)
            await asyncio.sleep(0)  # a batch of thousands must not hold up the others
        return encode_batch(answers) if answers else None

    async def _answer_one(self, message: Any, hung_up: Callable[[], bool]) -> bytes | None:
        try:
            request = parse_request(message)
        except InvalidParamsShape as refusal:
            return encode_error(refusal.request_id, refusal)
        except RpcError as refusal:
            return encode_error(None, refusal)
        try:
            result = await self.call(request.method, request.params, hung_up=hung_up)
        except RpcError as error:
            return encode_error(request.id, error)
        if request.id is None:
            return None
        answer = await _encode(request.id, result)
        if len(answer) > MAX_ANSWER_BYTES:
            return encode_error(request.id, RpcError(INTERNAL_ERROR, "the answer is too large"))
        return answer


async def _encode(request_id: Id, result: object) -> bytes:
    """What there are thousands of, as bdevs, is encoded in parts: others have their turn."""
    if not isinstance(result, list) or len(result) <= _ENCODED_AT_ONCE:
        return encode_result(request_id, result)
    parts = []
    for start in range(0, len(result), _ENCODED_AT_ONCE):
        parts.append(encode_items(result[start : start + _ENCODED_AT_ONCE]))
        await asyncio.sleep(0)
    return encode_list(request_id, parts)


def _show(what: str, message: bytes) -> None:
    if _log.isEnabledFor(logging.DEBUG):
        text = message[:_SHOWN_BYTES].decode("utf-8", "replace")
        _log.debug("%s of %d bytes: %s", what, len(message), _KEYS.sub(r"\1\2…", text))
