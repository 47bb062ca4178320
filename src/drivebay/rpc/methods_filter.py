"""Methods about bdevs that stand on one other and change what passes: passthru, delay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from drivebay.bdev.stack import derived_uuid, stack
from drivebay.bdev.wishes import Wish
from drivebay.errors import AlreadyExists, NotFound, UsageError
from drivebay.rpc.jsonrpc import INVALID_PARAMS, RpcError
from drivebay.rpc.schema import BDEV, RUNTIME, Choice, Integer, Param, Params, String, Uuid, method

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.target.target import Target

# SPDK derives a filter's uuid from its base's, so that it is the same after each start.
_PASSTHRU_NAMESPACE: Final = UUID("7e25812e-c8c0-4d3f-8599-16d790555b85")
_DELAY_NAMESPACE: Final = UUID("4009b574-6430-4f1b-bc40-ace811091027")

_NAME: Final = Param("name", String(), required=True, doc="its name")
_BASE: Final = Param(
    "base_bdev_name", String(), required=True, doc="what it stands on; may come later"
)
_UUID: Final = Param("uuid", Uuid(), doc="derived from the base's without it")


def filter_wish(
    target: Target,
    module: str,
    name: str,
    base_name: str,
    build: Callable[[Bdev], tuple[UUID, Callable[[], Bdev]]],
    call: Callable[[], tuple[str, dict[str, Any]]],
    *,
    once: bool = False,
) -> Wish:
    """A wish for one filter; ``build`` gives its uuid on a base, and what constructs it.

    Raises: AlreadyExists.
    """
    if target.wishes.find(module, name) is not None:
        raise AlreadyExists(f"{module} bdev '{name[:80]}' is wanted already")

    async def make(base: Bdev) -> Bdev:
        uuid, construct = build(base)
        by = f"{module} bdev '{name}'"
        return await stack(target.registry, [base], name, uuid, construct, by=by)

    return Wish(module, name, (base_name,), make, call, once=once)


async def remove_filter(target: Target, module: str, name: str) -> None:
    """Remove a filter that is there, and the wish for it. Raises: NotFound."""
    bdev = target.registry.get_of_module(name, module)
    wish = target.wishes.find(module, bdev.name)
    if wish is None:
        raise NotFound(f"no {module} bdev is called '{name[:80]}'")
    target.wishes.forget(wish)
    await target.registry.remove(bdev.name)


def _saved_uuid(target: Target, name: str, module: str, given: UUID | None) -> dict[str, str]:
    """The uuid that a filter has, or was given while it waits for its base."""
    with contextlib.suppress(NotFound):
        given = target.registry.get_of_module(name, module).uuid
    return {} if given is None else {"uuid": str(given)}


@method("bdev_passthru_create", RUNTIME, params=(_NAME, _BASE, _UUID), style=BDEV, changes=True)
async def bdev_passthru_create(target: Target, params: Params) -> Any:
    """Make a disk that hands every request to another."""
    name, base_name = params["name"], params["base_bdev_name"]

    def build(base: Bdev) -> tuple[UUID, Callable[[], Bdev]]:
        uuid = params["uuid"] or derived_uuid(_PASSTHRU_NAMESPACE, base.uuid)

        def construct() -> Bdev:
            from drivebay.bdev.passthru import PassthruBdev  # compiled; when the first is made

            return PassthruBdev(name, uuid, base)

        return uuid, construct

    def call() -> tuple[str, dict[str, Any]]:
        uuid = _saved_uuid(target, name, "passthru", params["uuid"])
        return "bdev_passthru_create", {"base_bdev_name": base_name, "name": name, **uuid}

    await target.wishes.add(filter_wish(target, "passthru", name, base_name, build, call))
    return name


@method("bdev_passthru_delete", RUNTIME, params=(_NAME,), style=BDEV, changes=True)
async def bdev_passthru_delete(target: Target, params: Params) -> Any:
    """Remove a passthru bdev; its base is free again."""
    await remove_filter(target, "passthru", params["name"])
    return True


_LATENCIES: Final = ("avg_read", "p99_read", "avg_write", "p99_write")


def _latency(which: str, doc: str) -> Param:
    return Param(f"{which}_latency", Integer(64), required=True, doc=doc)


def _check_latencies(latencies: dict[str, int]) -> None:
    for kind in ("read", "write"):
        if latencies[f"p99_{kind}"] < latencies[f"avg_{kind}"]:
            raise UsageError(
                f"a p99_{kind}_latency of {latencies[f'p99_{kind}']} us is less than the average "
                f"of {latencies[f'avg_{kind}']} us",
                field=f"p99_{kind}_latency",
            )


@method(
    "bdev_delay_create",
    RUNTIME,
    params=(
        _NAME,
        _BASE,
        _latency("avg_read", "microseconds that 99 of 100 reads take longer"),
        _latency("p99_read", "the same of the hundredth; not less"),
        _latency("avg_write", "microseconds that 99 of 100 writes take longer"),
        _latency("p99_write", "the same of the hundredth; not less"),
        _UUID,
    ),
    style=BDEV,
    changes=True,
)
async def bdev_delay_create(target: Target, params: Params) -> Any:
    """Make a disk that answers later than the one it stands on."""
    name, base_name = params["name"], params["base_bdev_name"]
    latencies = {which: params[f"{which}_latency"] for which in _LATENCIES}
    _check_latencies(latencies)

    def build(base: Bdev) -> tuple[UUID, Callable[[], Bdev]]:
        uuid = params["uuid"] or derived_uuid(_DELAY_NAMESPACE, base.uuid)

        def construct() -> Bdev:
            from drivebay.bdev.delay import DelayBdev

            return DelayBdev(name, uuid, base, latencies)

        return uuid, construct

    def call() -> tuple[str, dict[str, Any]]:
        return "bdev_delay_create", {
            "name": name,
            "base_bdev_name": base_name,
            **_saved_uuid(target, name, "delay", params["uuid"]),
            **{f"{which}_latency": us for which, us in latencies.items()},
        }

    wish = filter_wish(target, "delay", name, base_name, build, call)
    wish.settings = latencies
    await target.wishes.add(wish)
    return name


@method(
    "bdev_delay_update_latency",
    RUNTIME,
    params=(
        Param("delay_bdev_name", String(), required=True, doc="the delay bdev"),
        Param("latency_type", Choice(*_LATENCIES), required=True, doc="which latency"),
        Param("latency_us", Integer(64), required=True, doc="microseconds"),
    ),
    style=BDEV,
    changes=True,
)
async def bdev_delay_update_latency(target: Target, params: Params) -> Any:
    """Change one latency, for requests that complete from now on."""
    try:
        bdev: Any = target.registry.get_of_module(params["delay_bdev_name"], "delay")
    except NotFound as error:
        raise RpcError(
            INVALID_PARAMS, "The requested bdev does not exist.", {"reason": str(error)}
        ) from error
    bdev.set_latency(params["latency_type"], params["latency_us"])
    wish = target.wishes.find("delay", bdev.name)
    if wish is not None:
        wish.settings[params["latency_type"]] = params["latency_us"]
    return True


@method("bdev_delay_delete", RUNTIME, params=(_NAME,), style=BDEV, changes=True)
async def bdev_delay_delete(target: Target, params: Params) -> Any:
    """Remove a delay bdev; its base is free again."""
    await remove_filter(target, "delay", params["name"])
    return True
