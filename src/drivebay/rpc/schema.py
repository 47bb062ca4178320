"""What a method is: its name, when it may be called, its parameters, how it refuses.

Each method is declared once, by the ``@method`` decorator above the function that does
the work (methods_*.py). Checking of parameters, ``rpc_get_methods``, ``docs/rpc.md`` and
the tests all come from these declarations.

SPDK's methods refuse in different ways, and a client may depend on the code and text, so
both are kept per family (``ErrorStyle``). What SPDK's answers leave out, the field at
fault, the value seen and the next step, is added as ``error.data``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from drivebay.errors import DrivebayError, UsageError
from drivebay.rpc.jsonrpc import INTERNAL_ERROR, INVALID_PARAMS, DuplicateKeys, RpcError

if TYPE_CHECKING:
    from drivebay.target.target import Target

__all__ = [
    "APP",
    "BDEV",
    "METHODS",
    "RUNTIME",
    "STARTUP",
    "VHOST",
    "VHOST_LIST",
    "Array",
    "Boolean",
    "Choice",
    "ErrorStyle",
    "Integer",
    "Kind",
    "Method",
    "Param",
    "Params",
    "String",
    "Structure",
    "Uuid",
    "method",
    "rpc_error_of",
    "shorten",
]

STARTUP: Final = "startup"
RUNTIME: Final = "runtime"

Params = Mapping[str, Any]
Handler = Callable[["Target", Params], Awaitable[Any]]


class Kind:
    """A parameter's type: ``name`` for the documentation, ``read`` to check a value."""

    name: str
    secret = False

    def read(self, value: object) -> Any:
        """Return the checked value. Raises: ValueError, saying what was expected."""
        raise NotImplementedError


class String(Kind):
    """A ``secret`` one is never shown, and no value that its method refuses."""

    name = "string"

    def __init__(self, *, secret: bool = False) -> None:
        self.secret = secret

    def read(self, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError("expected a string")
        if "\0" in value:
            raise ValueError("expected a string without a NUL character")
        return value


class Boolean(Kind):
    name = "boolean"

    def read(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        return value


class Integer(Kind):
    """A whole number of a fixed width; 1e3 is one, "1000" and true are not."""

    def __init__(self, bits: int, signed: bool = False) -> None:
        self.name = f"{'i' if signed else 'u'}{bits}"
        self._least = -(1 << (bits - 1)) if signed else 0
        self._most = (1 << (bits - 1 if signed else bits)) - 1

    def read(self, value: object) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError("expected a whole number")
        if not self._least <= value <= self._most:
            raise ValueError(f"expected a number from {self._least} to {self._most}")
        return value


class Uuid(Kind):
    name = "uuid"

    def read(self, value: object) -> UUID:
        if not isinstance(value, str) or len(value) != 36:
            raise ValueError("expected a UUID such as 0a0a0a0a-0000-4000-8000-000000000001")
        try:
            return UUID(value)
        except ValueError:
            raise ValueError("expected a UUID of hexadecimal digits") from None


class Choice(Kind):
    """One word of a fixed list, in the right case."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.name = " \\| ".join(words)

    def read(self, value: object) -> str:
        if value not in self.words or not isinstance(value, str):
            raise ValueError(f"expected one of {', '.join(self.words)}")
        return value


class Array(Kind):
    """A list of one kind, at most ``most`` long."""

    def __init__(self, item: Kind, most: int = 1024) -> None:
        self._item = item
        self._most = most
        self.name = f"array of {item.name}"

    def read(self, value: object) -> list[Any]:
        if not isinstance(value, list):
            raise ValueError("expected an array")
        if len(value) > self._most:
            raise ValueError(f"expected at most {self._most} entries")
        return [self._item.read(item) for item in value]


class Structure(Kind):
    """An object that is kept as it came (settings of parts that are not here)."""

    name = "object"

    def read(self, value: object) -> dict[str, Any]:
        if not isinstance(value, dict) or isinstance(value, DuplicateKeys):
            raise ValueError("expected an object")
        return value


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter; absent optional ones arrive as ``default``."""

    name: str
    kind: Kind
    required: bool = False
    default: Any = None
    doc: str = ""


@dataclass(frozen=True, slots=True)
class ErrorStyle:
    """How a family of methods refuses; ``failure_code`` None means the negated errno."""

    params_code: int
    params_message: str
    failure_code: int | None


BDEV: Final = ErrorStyle(INTERNAL_ERROR, "spdk_json_decode_object failed", None)
VHOST: Final = ErrorStyle(INVALID_PARAMS, "Invalid argument", INVALID_PARAMS)
VHOST_LIST: Final = ErrorStyle(INTERNAL_ERROR, "Invalid argument", INTERNAL_ERROR)
APP: Final = ErrorStyle(INVALID_PARAMS, "Invalid parameters", INVALID_PARAMS)


@dataclass(frozen=True, slots=True)
class Method:
    """One declared method."""

    name: str
    handler: Handler
    states: frozenset[str]
    params: tuple[Param, ...]
    style: ErrorStyle
    doc: str
    relaxed: bool  # unknown parameters are ignored, as SPDK does for a few methods
    waits: bool  # may wait long, and ends when its client hangs up
    changes: bool  # what save_config shows may differ afterwards
    takes_nothing: str  # the refusal of any parameter at all
    takes_object: bool = False  # an object must be there, if only an empty one

    def read_params(self, given: dict[str, Any] | list[Any] | None) -> dict[str, Any]:
        """Check what a client gave. Raises: RpcError in this method's style."""
        if not self.params:
            if given is not None:
                raise RpcError(INVALID_PARAMS, self.takes_nothing)
            return {}
        if given is None and self.takes_object:
            raise self._refuse(None, None, "expected an object")
        if isinstance(given, list | DuplicateKeys):
            shape = "an array" if isinstance(given, list) else "an object with a member twice"
            raise self._refuse(None, shape, "expected an object, each member once")
        return self._read_object(given or {})

    def _read_object(self, given: dict[str, Any]) -> dict[str, Any]:
        checked: dict[str, Any] = {}
        for param in self.params:
            if param.name not in given:
                if param.required:
                    raise self._refuse(param.name, None, "this parameter is required")
                checked[param.name] = param.default
                continue
            try:
                checked[param.name] = param.kind.read(given[param.name])
            except ValueError as error:
                raise self._refuse(param.name, given[param.name], str(error)) from None
        if not self.relaxed:
            for name in given:
                if name not in checked:
                    known = ", ".join(param.name for param in self.params)
                    raise self._refuse(name, given[name], f"unknown parameter; known: {known}")
        return checked

    def _refuse(self, field: str | None, value: object, hint: str) -> RpcError:
        data: dict[str, Any] = {"hint": hint}
        if field is not None:
            # A secret may stand under a name that is misspelt.
            secretive = any(param.kind.secret for param in self.params)
            shown = None if secretive else shorten(value)
            data = {"field": shorten(field), "value": shown, "hint": hint}
        return RpcError(self.style.params_code, self.style.params_message, data)


METHODS: Final[dict[str, Method]] = {}


def method(
    name: str,
    *states: str,
    params: tuple[Param, ...] = (),
    style: ErrorStyle = APP,
    relaxed: bool = False,
    waits: bool = False,
    changes: bool = False,
    takes_nothing: str = "",
    takes_object: bool = False,
) -> Callable[[Handler], Handler]:
    """Declare the method that the decorated function answers; its docstring documents it."""

    def declare(handler: Handler) -> Handler:
        METHODS[name] = Method(
            name=name,
            handler=handler,
            states=frozenset(states),
            params=params,
            style=style,
            doc=(handler.__doc__ or "").strip(),
            relaxed=relaxed,
            waits=waits,
            changes=changes,
            takes_nothing=takes_nothing or f"{name} requires no parameters",
            takes_object=takes_object,
        )
        return handler

    return declare


def shorten(value: object) -> object:
    """A value fit to be shown in an error: as it is when small, cut otherwise."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value if abs(value) < 1 << 64 else "a number beyond 64 bits"
    text = value if isinstance(value, str) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def rpc_error_of(style: ErrorStyle, error: DrivebayError) -> RpcError:
    """SPDK's code and text for a refusal, and ours in ``data``."""
    data: dict[str, Any] = {"reason": str(error)}
    if isinstance(error, UsageError) and error.field is not None:
        data["field"] = error.field
    if error.hint is not None:
        data["hint"] = error.hint
    code = style.failure_code
    if code is None:
        code = -(error.errno or errno.EIO)
    return RpcError(code, os.strerror(error.errno or errno.EIO), data)
