"""Methods about bdevs that stand on one other and change what passes: passthru."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from drivebay.bdev.stack import derived_uuid, stack
from drivebay.bdev.wishes import Wish
from drivebay.errors import AlreadyExists, NotFound
from drivebay.rpc.schema import BDEV, RUNTIME, Param, Params, String, Uuid, method

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.target.target import Target

# SPDK derives a filter's uuid from its base's, so that it is the same after each start.
_PASSTHRU_NAMESPACE: Final = UUID("7e25812e-c8c0-4d3f-8599-16d790555b85")


def _passthru(name: str, uuid: UUID, base: Bdev) -> Bdev:
    from drivebay.bdev.passthru import PassthruBdev  # compiled; loaded when the first is made

    return PassthruBdev(name, uuid, base)


@method(
    "bdev_passthru_create",
    RUNTIME,
    params=(
        Param("name", String(), required=True, doc="its name"),
        Param("base_bdev_name", String(), required=True, doc="what it stands on; may come later"),
        Param("uuid", Uuid(), doc="derived from the base's without it"),
    ),
    style=BDEV,
    changes=True,
)
async def bdev_passthru_create(target: Target, params: Params) -> Any:
    """Make a disk that hands every request to another."""
    name, base_name = params["name"], params["base_bdev_name"]
    if target.wishes.find("passthru", name) is not None:
        raise AlreadyExists(f"a passthru bdev '{name[:80]}' is wanted already")

    async def make(base: Bdev) -> Bdev:
        uuid = params["uuid"] or derived_uuid(_PASSTHRU_NAMESPACE, base.uuid)
        return await stack(
            target.registry,
            [base],
            name,
            uuid,
            lambda: _passthru(name, uuid, base),
            by=f"passthru bdev '{name}'",
        )

    def call() -> tuple[str, dict[str, Any]]:
        saved = {"base_bdev_name": base_name, "name": name}
        return "bdev_passthru_create", saved | (
            {"uuid": str(params["uuid"])} if params["uuid"] else {}
        )

    await target.wishes.add(Wish("passthru", name, (base_name,), make, call))
    return name


@method(
    "bdev_passthru_delete",
    RUNTIME,
    params=(Param("name", String(), required=True, doc="the passthru bdev"),),
    style=BDEV,
    changes=True,
)
async def bdev_passthru_delete(target: Target, params: Params) -> Any:
    """Remove a passthru bdev; its base is free again."""
    name = params["name"]
    wish = target.wishes.find("passthru", name)
    bdev = target.registry.get_of_module(name, "passthru")
    if wish is None:
        raise NotFound(f"no passthru bdev is called '{name[:80]}'")
    target.wishes.forget(wish)
    await target.registry.remove(bdev.name)
    return True
