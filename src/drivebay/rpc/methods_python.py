"""Methods about disks whose code somebody brings: a Python file, or a compiled module."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

from drivebay.bdev.stack import stack
from drivebay.bdev.wishes import Wish
from drivebay.errors import AlreadyExists, NotFound, UsageError
from drivebay.rpc.schema import (
    BDEV,
    RUNTIME,
    Array,
    Integer,
    Param,
    Params,
    String,
    Structure,
    Uuid,
    method,
)

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev
    from drivebay.target.target import Target

_MODULE: Final = "python"


def _build(params: Params, uuid: UUID, bases: tuple[Bdev, ...]) -> Bdev:
    """In a worker thread: load the class, make the disk."""
    from drivebay.bdev.base import Bdev
    from drivebay.bdev.python_bdev import PythonBdev
    from drivebay.bdev.python_disk import PythonDisk
    from drivebay.bdev.python_loader import construct, load_class

    kind = load_class(params["module"], params["class"])
    name = params["name"]
    sizes = {key: params[key] for key in ("num_blocks", "block_size") if params[key] is not None}
    if issubclass(kind, Bdev):
        made: Bdev = construct(kind, name, uuid, *bases, **params["params"], **sizes)
        if made.name != name:
            raise UsageError(
                f"the class {kind.__name__} calls its bdev '{made.name}', not '{name}'"
            )
        return made
    if not issubclass(kind, PythonDisk):
        raise UsageError(
            f"the class {kind.__name__} is neither a PythonDisk nor a Bdev", field="class"
        )
    if bases:
        raise UsageError("a PythonDisk stands on no bdev", field="base_bdev_names")
    disk = construct(kind, **params["params"])
    for key, value in sizes.items():
        setattr(disk, key, value)
    try:
        return PythonBdev(name, uuid, disk)
    except BaseException:
        disk.close()
        raise


@method(
    "drivebay_bdev_python_create",
    RUNTIME,
    params=(
        Param("name", String(), required=True, doc="its name"),
        Param("module", String(), required=True, doc="path of a Python file or compiled module"),
        Param("class", String(), required=True, doc="a PythonDisk or a Bdev in it"),
        Param("params", Structure(), default={}, doc="what the class is called with"),
        Param("num_blocks", Integer(64), doc="blocks; what the class says without it"),
        Param("block_size", Integer(32), doc="bytes; what the class says without it"),
        Param("base_bdev_names", Array(String(), 64), default=[], doc="what a Bdev stands on"),
        Param("uuid", Uuid(), doc="a random one without it"),
    ),
    style=BDEV,
    changes=True,
)
async def drivebay_bdev_python_create(target: Target, params: Params) -> Any:
    """Make a disk of a class in a file, which root or the target's user owns alone."""
    name, uuid = params["name"], params["uuid"] or uuid4()
    if target.wishes.find(_MODULE, name) is not None:
        raise AlreadyExists(f"a bdev '{name[:80]}' of this kind is wanted already")

    async def make(*bases: Bdev) -> Bdev:
        build = functools.partial(_build, params, uuid, bases)
        return await stack(target.registry, bases, name, uuid, build, by=f"bdev '{name}'")

    def call() -> tuple[str, dict[str, Any]]:
        given = {key: value for key, value in params.items() if value not in (None, [], {})}
        return "drivebay_bdev_python_create", given | {"uuid": str(uuid)}

    bases = tuple(params["base_bdev_names"])
    await target.wishes.add(Wish(_MODULE, name, bases, make, call))
    return name


@method(
    "drivebay_bdev_python_delete",
    RUNTIME,
    params=(Param("name", String(), required=True, doc="the bdev"),),
    style=BDEV,
    changes=True,
)
async def drivebay_bdev_python_delete(target: Target, params: Params) -> Any:
    """Remove a disk that drivebay_bdev_python_create made."""
    name = params["name"]
    wish = target.wishes.find(_MODULE, name)
    if wish is None:
        raise NotFound(f"no bdev '{name[:80]}' was made with drivebay_bdev_python_create")
    target.wishes.forget(wish)
    with contextlib.suppress(NotFound):  # not made yet, or gone with a base
        await target.registry.remove(name)
    return True
