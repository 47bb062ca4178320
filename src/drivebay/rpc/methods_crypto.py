"""Methods about encrypted bdevs and their keys. No answer but those of SPDK shows a key."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from drivebay.bdev.keyring import NamedKey, read_key_file
from drivebay.bdev.stack import derived_uuid, stack
from drivebay.bdev.wishes import Wish
from drivebay.errors import AlreadyExists, DrivebayError, InUse, NotFound, UsageError
from drivebay.rpc.jsonrpc import INTERNAL_ERROR, INVALID_PARAMS, PARSE_ERROR, RpcError
from drivebay.rpc.schema import (
    RUNTIME,
    Choice,
    ErrorStyle,
    Param,
    Params,
    String,
    method,
)

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.bdev.crypto import CryptoKey
    from drivebay.target.target import Target

_KEYS: Final = ErrorStyle(PARSE_ERROR, "spdk_json_decode_object failed", INVALID_PARAMS)
_CREATE: Final = ErrorStyle(PARSE_ERROR, "Failed to decode crypto disk create parameters.", None)
_DELETE: Final = ErrorStyle(INVALID_PARAMS, "Invalid parameters", None)
# SPDK derives the disk's uuid from its base's, so that it is the same after each start.
_NAMESPACE: Final = UUID("078e3cf7-f4b4-4545-b2c3-d40045a64ae2")
_SECRET: Final = String(secret=True)


def _reasoned(code: int, message: str, error: DrivebayError) -> RpcError:
    data = {"reason": str(error)}
    if isinstance(error, UsageError) and error.field is not None:
        data["field"] = error.field
    if error.hint is not None:
        data["hint"] = error.hint
    return RpcError(code, message, data)


def _key(name: str, cipher: str, key: str | None, key2: str | None) -> CryptoKey:
    """Raises: UsageError."""
    from drivebay.bdev.crypto import CryptoKey  # compiled; loaded when the first is made

    if cipher != "AES_XTS":
        raise UsageError(f"the cipher {cipher[:40]} is not offered", hint="take AES_XTS")
    if key2 is None or key is None:
        missing = "key" if key is None else "key2"
        raise UsageError(f"AES_XTS needs two keys, '{missing}' is missing", field=missing)
    return CryptoKey(name, key, key2)


@method(
    "accel_crypto_key_create",
    RUNTIME,
    params=(
        Param("cipher", Choice("AES_CBC", "AES_XTS"), required=True, doc="only AES_XTS is offered"),
        Param("key", _SECRET, doc="hexadecimal, 128 or 256 bits; required without key_file"),
        Param("key2", _SECRET, doc="the same, another one, for the tweak"),
        Param(
            "tweak_mode",
            Choice(
                "SIMPLE_LBA", "JOIN_NEG_LBA_WITH_LBA", "INCR_512_FULL_LBA", "INCR_512_UPPER_LBA"
            ),
            doc="only SIMPLE_LBA, the block's number, is offered",
        ),
        Param("name", String(), required=True, doc="its name"),
        Param("key_file", String(), doc="ours: a file of mode 0600 with both keys, saved by name"),
    ),
    style=_KEYS,
    changes=True,
)
async def accel_crypto_key_create(target: Target, params: Params) -> Any:
    """Take a key for encrypted disks."""
    path = params["key_file"]
    if (path is None) == (params["key"] is None):
        hint = "give either key and key2, or key_file"
        raise RpcError(_KEYS.params_code, _KEYS.params_message, {"field": "key", "hint": hint})
    # SPDK saves the mode always: it decodes an absent one as the first.
    mode = params["tweak_mode"] or "SIMPLE_LBA"
    try:
        if mode != "SIMPLE_LBA":
            raise UsageError(f"the tweak mode {mode} is not offered", hint="take SIMPLE_LBA")
        halves: tuple[str | None, str | None] = (params["key"], params["key2"])
        if path is not None:
            halves = await asyncio.to_thread(read_key_file, path)
        key = _key(params["name"], params["cipher"], *halves)
        target.keyring.add(NamedKey(key, path, mode))
    except DrivebayError as error:
        message = f"failed to create DEK, rc {-error.errno}"
        raise _reasoned(INVALID_PARAMS, message, error) from error
    return True


@method(
    "accel_crypto_keys_get",
    RUNTIME,
    params=(Param("key_name", String(), doc="one; all without it"),),
    style=_KEYS,
)
async def accel_crypto_keys_get(target: Target, params: Params) -> Any:
    """Show keys: what they are made of too, unless they came from a file."""
    name = params["key_name"]
    if name is None:
        return [named.params() for named in target.keyring]
    try:
        return [target.keyring.get(name).params()]
    except NotFound as error:
        raise _reasoned(INVALID_PARAMS, "key was not found", error) from error


@method(
    "accel_crypto_key_destroy",
    RUNTIME,
    params=(Param("key_name", String(), required=True, doc="the key"),),
    style=_KEYS,
    changes=True,
)
async def accel_crypto_key_destroy(target: Target, params: Params) -> Any:
    """Forget a key, which no disk may use; its bytes are wiped."""
    name = params["key_name"]
    try:
        target.keyring.get(name)
    except NotFound as error:
        raise _reasoned(INVALID_PARAMS, "No key object found", error) from error
    users = [
        wish.name
        for wish in target.wishes
        if wish.module == "crypto" and wish.call()[1]["key_name"] == name
    ]
    if users:
        used = InUse(
            f"key '{name[:80]}' is used by bdev '{users[0]}'",
            hint="delete it with bdev_crypto_delete",
        )
        raise _reasoned(INVALID_PARAMS, f"Failed to destroy key, rc {-used.errno}", used)
    target.keyring.remove(name)
    return True


@method(
    "bdev_crypto_create",
    RUNTIME,
    params=(
        Param("base_bdev_name", String(), required=True, doc="what it stands on; may come later"),
        Param("name", String(), required=True, doc="its name"),
        Param("crypto_pmd", String(), doc="of no effect"),
        Param("key", _SECRET, doc="without key_name: the key, which then goes with the disk"),
        Param("cipher", String(), doc="of that key: AES_XTS"),
        Param("key2", _SECRET, doc="its second half"),
        Param("key_name", String(), doc="a key made by accel_crypto_key_create"),
    ),
    style=_CREATE,
    changes=True,
)
async def bdev_crypto_create(target: Target, params: Params) -> Any:
    """Make a disk that is encrypted on another."""
    name, base_name = params["name"], params["base_bdev_name"]
    if target.wishes.find("crypto", name) is not None:
        raise AlreadyExists(f"a crypto bdev '{name[:80]}' is wanted already")
    named = _find_key(target, params)

    async def make(base: Bdev) -> Bdev:
        from drivebay.bdev.crypto import CryptoBdev  # compiled; loaded when the first is made

        uuid = derived_uuid(_NAMESPACE, base.uuid)
        return await stack(
            target.registry,
            [base],
            name,
            uuid,
            lambda: CryptoBdev(name, uuid, base, named.key),
            by=f"crypto bdev '{name}'",
        )

    def call() -> tuple[str, dict[str, Any]]:
        saved = {"base_bdev_name": base_name, "name": name, "key_name": named.key.name}
        return "bdev_crypto_create", saved

    try:
        await target.wishes.add(Wish("crypto", name, (base_name,), make, call))
    except BaseException:
        if named.owner == name:
            target.keyring.remove(named.key.name)
        raise
    return name


def _find_key(target: Target, params: Params) -> NamedKey:
    """The key that is meant, or a new one that goes with the disk."""
    if params["key_name"] is not None:
        try:
            return target.keyring.get(params["key_name"])
        except NotFound as error:
            raise _reasoned(INVALID_PARAMS, "Key was not found", error) from error
    cipher = params["cipher"] or "AES_CBC"
    name = f"{params['name']}_{cipher}"[:127]  # as SPDK calls it
    with contextlib.suppress(NotFound):
        return target.keyring.get(name)
    try:
        key = _key(name, cipher, params["key"], params["key2"])
    except UsageError as error:
        raise _reasoned(INTERNAL_ERROR, "No key was found", error) from error
    named = NamedKey(key, owner=params["name"])
    target.keyring.add(named)
    return named


@method(
    "bdev_crypto_delete",
    RUNTIME,
    params=(Param("name", String(), required=True, doc="the crypto bdev"),),
    style=_DELETE,
    changes=True,
)
async def bdev_crypto_delete(target: Target, params: Params) -> Any:
    """Remove an encrypted disk; what lies on its base stays, and its key if that has a name."""
    name = params["name"]
    wish = target.wishes.find("crypto", name)
    bdev = target.registry.get_of_module(name, "crypto")
    if wish is None:
        raise NotFound(f"no crypto bdev is called '{name[:80]}'")
    target.wishes.forget(wish)
    await target.registry.remove(bdev.name)
    for named in target.keyring:
        if named.owner == name:
            target.keyring.remove(named.key.name)
    return True
