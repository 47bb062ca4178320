"""`drivebay vm clone --full`: nothing is left in the pool but the two disks."""

from __future__ import annotations

from drivebay.cli.vm import main
from drivebay.vm.spec import DiskSpec
from tests.unit.vm_world import World


def made(world: World) -> None:
    world.folder.chmod(0o711)  # QEMU, who is nobody where root tests, has to pass
    world.pool()
    world.vm("web", DiskSpec("system", bdev=world.volume("web-system"), made=True))


def test_a_clone_begins_with_a_snapshot_that_stays(world: World) -> None:
    made(world)
    assert main(["clone", "web", "other", "-s", world.socket]) == 0
    names = [name.partition("@clone-")[0] for name in world.volumes()]
    assert names == ["p/other-system", "p/web-system", "p/web-system"]


def test_a_full_clone_leaves_no_snapshot_behind(world: World) -> None:
    made(world)
    assert main(["clone", "web", "other", "--full", "--count", "2", "-s", world.socket]) == 0
    assert world.volumes() == ["p/other-1-system", "p/other-2-system", "p/web-system"]
