"""vm/creation.py: from a wish to a VM, all or nothing; the target is a model, qemu-img is real."""

from __future__ import annotations

import json
import socket
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drivebay.disks import pools
from drivebay.disks.connection import RpcRefused
from drivebay.errors import (
    AlreadyExists,
    DrivebayError,
    HostError,
    InUse,
    NotFound,
    StateError,
    UsageError,
)
from drivebay.vm.creation import Creation, DiskWish, Wish, plan_creation
from drivebay.vm.qemu import Qemu
from drivebay.vm.spec import Boot, CloudInit, DiskSpec, Forward, NetSpec
from drivebay.vm.spec_file import read_spec
from tests.unit.vm_world import MIB, World, bare

ABLE = ("memfd", "user-net", "vhost-user-blk", "vhost-user-block-driver", "nvme", "scsi", "ahci")
QEMU = Qemu(Path("/q"), (11, 1), frozenset(ABLE), ("pc-q35-11.1",), "pc-q35-11.1")
SMALL = DiskWish(64 * MIB)


def plan(world: World, wish: Wish, qemu: Qemu = QEMU) -> Creation:
    return plan_creation(world.vms, wish, qemu, None, world.client, world.socket)


def make(world: World, **wished: Any) -> Creation:
    made = plan(world, wish(**wished))
    made.plan.run()
    return made


def wish(name: str = "web", **wished: Any) -> Wish:
    values: dict[str, Any] = {"memory": 64 * MIB, "cpus": 2, "nets": (), **wished}
    return Wish(name, **values)


def refused(world: World, kind: type[DrivebayError], said: str, **wished: Any) -> str:
    """The hint; nothing was made."""
    before = world.volumes(), list(world.target.bases), world.vms.names()
    with pytest.raises(kind, match=said) as caught:
        make(world, **wished)
    after = world.volumes(), list(world.target.bases), world.vms.names()
    assert after == before
    assert unfinished(world) == []
    return str(caught.value.hint)


def unfinished(world: World) -> list[str]:
    if not world.vms.folder.exists():
        return []
    names = [path.name for path in world.vms.folder.iterdir()]
    return [name for name in names if name.startswith(".new")]


# ---- disks --------------------------------------------------------------------------------------


def test_a_vm_without_disks(world: World) -> None:
    made = make(world)
    assert world.target.calls == []
    vm = world.vms.load("web")
    assert vm.spec == made.spec
    assert (vm.spec.machine, vm.spec.cpus, vm.spec.disks, vm.spec.nets) == (
        "pc-q35-11.1",
        2,
        (),
        (),
    )
    assert sorted(path.name for path in vm.keys.iterdir()) == [
        "id_ed25519",
        "id_ed25519.pub",
        "known_hosts",
        "ssh_host_ed25519_key",
        "ssh_host_ed25519_key.pub",
    ]


def test_the_first_new_disk_is_the_images(world: World) -> None:
    world.pool()
    world.volume("data")
    disks = [
        DiskWish(bdev="data", name="old", shared=True),
        DiskWish(16 * MIB, bus="scsi", shared=True),
        DiskWish(32 * MIB),
        DiskWish(48 * MIB, name="disk2"),
        DiskWish(64 * MIB),
    ]
    made = make(world, image=world.image(), disks=disks)
    assert made.spec.disks == (
        DiskSpec("system", "p/web-system", made=True, shared=True, bus="scsi"),
        DiskSpec("old", "p/data", shared=True),
        DiskSpec("disk1", "p/web-disk1", made=True),
        DiskSpec("disk2", "p/web-disk2", made=True),
        DiskSpec("disk3", "p/web-disk3", made=True),
    )
    sizes = {name: one.clusters * 4 for (_, name), one in world.target.volumes.items()}
    assert sizes == {
        "data": 64, "web-system": 16, "web-disk1": 32, "web-disk2": 48, "web-disk3": 64,
    }  # fmt: skip
    assert made.spec.image == "debian"
    assert [entry["ctrlr"] for entry in world.target.controllers] == [
        "vm.web.system", "vm.web.old", "vm.web.disk1", "vm.web.disk2", "vm.web.disk3",
    ]  # fmt: skip


def test_without_an_image_the_first_disk_is_the_system(world: World) -> None:
    world.pool()
    made = make(world, disks=[SMALL, SMALL])
    assert [disk.name for disk in made.spec.disks] == ["system", "disk1"]


def test_the_default_pool_is_made_once_for_all_disks(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "default_pool_size", lambda place: 256 * MIB)
    made = make(world, name="default", image=world.image(), disks=[SMALL, SMALL])
    assert [disk.bdev for disk in made.spec.disks] == [
        "default/default-system",
        "default/default-disk1",
    ]
    assert world.target.names().count("bdev_lvol_create_lvstore") == 1
    assert (world.folder / "data/drivebay/pools/default.img").stat().st_size == 256 * MIB


def test_pools_are_named_where_there_are_several(world: World) -> None:
    world.pool("p")
    world.pool("q")
    hint = refused(world, UsageError, "several pools: p, q", disks=[SMALL])
    assert "--pool" in hint
    refused(world, NotFound, "no pool 'r'", disks=[DiskWish(MIB, pool="r")])
    made = make(world, image=world.image(), disks=[DiskWish(pool="q"), DiskWish(MIB, pool="p")])
    assert [disk.bdev for disk in made.spec.disks] == ["q/web-system", "p/web-disk1"]


@pytest.mark.parametrize(
    ("disk", "said"),
    [
        (DiskWish(), "a new disk needs a size"),
        (DiskWish(MIB, bdev="p/x"), "'p/x' is there already: leave size and pool out"),
        (DiskWish(pool="p", bdev="p/x"), "'p/x' is there already"),
        (DiskWish(0), "too small"),
        (DiskWish(MIB, name="a b"), "can't be the name of a disk"),
        (DiskWish(MIB, name="a.b"), "can't be the name of a disk"),
        (DiskWish(MIB, name="x" * 21), "can't be the name of a disk"),
        (DiskWish(bdev="p/x", name="-"), "can't be the name of a disk"),
    ],
)
def test_disks_that_make_no_sense(world: World, disk: DiskWish, said: str) -> None:
    world.pool()
    world.volume("x")
    refused(world, UsageError, said, disks=[disk])


@pytest.mark.parametrize("second", ["p", "q"])
def test_two_disks_of_one_name(world: World, second: str) -> None:
    world.pool("p")
    world.pool("q")
    disks = [DiskWish(MIB, pool="p", name="a"), DiskWish(MIB, pool=second, name="a")]
    refused(world, UsageError, "two disks of one name: a, a", disks=disks)


def test_one_disk_twice(world: World) -> None:
    world.pool()
    world.volume("x")
    twice = [DiskWish(bdev="p/x"), DiskWish(bdev="x")]
    refused(world, InUse, r"belongs to VM 'web' \(its disk 'disk1'\)", disks=twice)
    make(world, disks=[replace(each, shared=True) for each in twice])


def test_a_disk_that_is_there_or_is_anothers(world: World) -> None:
    world.pool()
    world.volume("web-system")
    refused(world, AlreadyExists, "a disk 'web-system' in pool 'p' already", disks=[SMALL])
    world.vm("db", DiskSpec("d", "p/web-system"))
    refused(world, InUse, "belongs to VM 'db'", disks=[DiskWish(bdev="web-system")])
    refused(world, NotFound, "no disk 'p/x'", disks=[DiskWish(bdev="p/x")])


def test_an_image_larger_than_its_disk(world: World) -> None:
    world.pool()
    image = world.image(size=8 * MIB)
    hint = refused(world, UsageError, "needs 8 MiB", image=image, disks=[DiskWish(4 * MIB)])
    assert hint == "--disk 8M, or more"


# ---- failures while it is made ------------------------------------------------------------------


STEPS = {
    "bdev_aio_create": {},
    "bdev_lvol_create_lvstore": {},
    "bdev_lvol_clone_bdev": {},
    "bdev_lvol_resize": {},
    "bdev_lvol_create": {},
    "vhost_create_blk_controller": {"vhost_create_blk_controller": 1},
}


@pytest.mark.parametrize("failing", STEPS)
def test_whatever_fails_nothing_is_left(
    world: World, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "default_pool_size", lambda place: 256 * MIB)
    world.target.failing_after = {failing: STEPS[failing].get(failing, 0)}
    made = plan(world, wish(image=world.image(), disks=[SMALL, SMALL]))
    with pytest.raises(RpcRefused, match=f"{failing}: Input/output error"):
        made.plan.run()
    assert made.plan.left == []
    assert (world.target.bases, world.target.volumes, world.target.controllers) == ({}, {}, [])
    assert world.vms.names() == []
    assert unfinished(world) == []
    assert list((world.folder / "data/drivebay").rglob("*.img")) == []


def test_a_folder_that_cannot_be_filled_leaves_no_disk(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.pool()
    image = world.image()
    monkeypatch.setenv("PATH", "/nowhere")
    refused(world, StateError, "no ssh-keygen", image=image, disks=[SMALL])
    assert list(world.target.bases) == ["pool-p"]


def test_user_data_that_is_not_there_leaves_nothing(world: World) -> None:
    world.pool()
    refused(world, HostError, "can't read the user-data '/nonexistent': No such file",
            image=world.image(), user_data=Path("/nonexistent"),
            cloud_init=CloudInit("", "web"))  # fmt: skip


def test_no_room_for_a_pool(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "default_pool_size", lambda place: 63 * MIB)
    hint = refused(world, StateError, "no room for a pool", disks=[SMALL])
    assert "drivebay pool create" in hint


# ---- the machine --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wished", "said"),
    [
        ({"cpus": 0}, "'cpus' should be from 1 to 256"),
        ({"cpus": -1}, "'cpus' should be"),
        ({"cpus": 257}, "'cpus' should be"),
        ({"memory": MIB}, "'memory' should be whole MiB, at least 16M"),
        ({"memory": 64 * MIB + 1}, "no whole number of MiB"),
        ({"memory": 0}, "'memory' should be"),
        ({"name": "a b"}, "can't be the name of a VM"),
        ({"name": "../x"}, "can't be the name of a VM"),
        ({"name": ""}, "can't be the name of a VM"),
        ({"overlay": True}, "--overlay needs an image"),
    ],
)
def test_machines_that_make_no_sense(world: World, wished: dict[str, Any], said: str) -> None:
    world.pool()
    refused(world, UsageError, said, disks=[SMALL], **wished)


def test_a_name_that_is_taken(world: World) -> None:
    world.pool()
    world.vm("web")
    refused(world, AlreadyExists, "there is a VM 'web' already", disks=[SMALL])


@pytest.mark.parametrize(
    ("lacking", "wished", "said"),
    [
        ("memfd", {}, "VM 'web' needs guest memory in a memfd"),
        (
            "user-net",
            {"nets": [NetSpec("user", "")]},
            "VM 'web' with --net user needs QEMU's user network",
        ),
        ("vhost-user-blk", {"disks": [SMALL]}, "needs the device vhost-user-blk"),
        ("vhost-user-block-driver", {"disks": [DiskWish(MIB, bus="nvme")]}, "with --bus nvme"),
        ("nvme", {"disks": [DiskWish(MIB, bus="nvme")]}, "needs the device nvme"),
        ("scsi", {"disks": [SMALL], "bus": "scsi"}, "needs the device virtio-scsi"),
        ("ahci", {"disks": [DiskWish(MIB, bus="sata")]}, "needs the device ich9-ahci"),
    ],
)
def test_what_this_qemu_lacks(
    world: World, lacking: str, wished: dict[str, Any], said: str
) -> None:
    world.pool()
    unable = replace(QEMU, features=QEMU.features - {lacking})
    with pytest.raises(NotFound, match=said):
        plan(world, wish(**wished), unable)
    plan(world, wish(**wished))


def test_a_disk_of_another_bus_beside_an_overlay_needs_its_driver(world: World) -> None:
    world.pool()
    unable = replace(QEMU, features=QEMU.features - {"vhost-user-block-driver"})
    overlay = wish(image=world.image(), overlay=True, bus="scsi")
    plan(world, overlay, unable)
    with pytest.raises(NotFound, match="--bus scsi"):
        plan(world, replace(overlay, disks=[DiskWish(), SMALL]), unable)


def test_uefi_has_variables_of_its_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = world.folder / "empty.fd"
    empty.write_bytes(b"empty")
    monkeypatch.setattr("drivebay.vm.firmware._PLACES", ((str(empty), str(empty)),))
    make(world, firmware="uefi", memory=512 * MIB)
    variables = world.vms.load("web").firmware_variables
    assert (variables.read_bytes(), stat.S_IMODE(variables.stat().st_mode)) == (b"empty", 0o600)
    empty.unlink()
    world.pool()
    hint = refused(
        world, NotFound, "no UEFI", name="db", firmware="uefi", memory=512 * MIB, disks=[SMALL]
    )
    assert "ovmf" in hint


def test_what_was_wished_is_written(world: World) -> None:
    boot = Boot("/boot/vmlinuz", "/boot/initrd", "quiet")
    wished = wish(boot=boot, qemu_args=["-no-reboot"], bus="scsi")
    made = plan_creation(world.vms, wished, QEMU, "/opt/qemu", world.client, world.socket)
    made.plan.run()
    spec = read_spec("web", (world.vms.folder / "web/vm.toml").read_text())
    assert (spec.boot, spec.qemu_args, spec.bus, spec.qemu) == (
        boot,
        ("-no-reboot",),
        "scsi",
        "/opt/qemu",
    )


# ---- network and cloud-init ---------------------------------------------------------------------


def user(*forward: Forward) -> NetSpec:
    """An interface that somebody wishes for, on QEMU's own network."""
    return NetSpec("user", "", forward)


def test_ssh_gets_a_port_of_its_own(world: World) -> None:
    world.vm("a", nets=(NetSpec("user", "52:54:00:00:00:01", (Forward(2222, 22),)),))
    with socket.create_server(("127.0.0.1", 0)) as server:
        mine = Forward(server.getsockname()[1], 80)
        made = plan(world, wish(nets=[user(mine)]))
    (net,) = made.spec.nets
    assert net.forward[0] == mine
    assert net.forward[1].guest_port == 22
    assert net.forward[1].host_port > 2222
    assert net.mac.startswith("52:54:00:")
    assert len(plan(world, wish(nets=[user(Forward(9, 22))])).spec.nets[0].forward) == 1


def test_ports_that_are_wished_are_not_given_to_ssh(world: World) -> None:
    free = plan(world, wish(nets=[user()])).spec.nets[0].forward[0].host_port
    made = plan(world, wish(nets=[user(Forward(free, 80))]))
    ports = [forward.host_port for forward in made.spec.nets[0].forward]
    assert len(set(ports)) == 2


def test_a_port_of_another_vm(world: World) -> None:
    world.pool()
    world.vm("a", nets=(NetSpec("user", "52:54:00:00:00:01", (Forward(8080, 80),)),))
    hint = refused(
        world, InUse, "port 8080 leads to VM 'a' already",
        nets=[user(Forward(8080, 81))], disks=[SMALL],
    )  # fmt: skip
    assert hint.endswith(":81")


def test_an_address_that_somebody_has_is_not_given_again(world: World) -> None:
    mac = plan(world, wish(nets=[user()])).spec.nets[0].mac
    world.vm("a", nets=(NetSpec("user", mac),))
    assert plan(world, wish(nets=[user()])).spec.nets[0].mac != mac


def test_addresses_that_do_not_fit(world: World) -> None:
    world.pool()
    for wrong in (
        replace(user(), address="10.0.2.300/24"),
        replace(user(), gateway="10.0.2.2"),
    ):
        refused(world, UsageError, "10.0.2", nets=[wrong], disks=[SMALL])


def test_cloud_init_has_an_instance_of_its_own_and_a_copy_of_user_data(world: World) -> None:
    own = world.folder / "mine.yaml"
    own.write_text("#cloud-config\n")
    own.chmod(0o644)
    wished = wish(cloud_init=CloudInit("", "host", user="joe"), user_data=own)
    ids = set()
    for name in ("a", "b"):
        made = plan(world, replace(wished, name=name))
        made.plan.run()
        cloud_init = world.vms.load(name).spec.cloud_init
        assert cloud_init is not None
        assert (cloud_init.user, cloud_init.user_data) == ("joe", "user-data")
        ids.add(cloud_init.instance_id)
        copy = world.vms.folder / name / "user-data"
        assert copy.read_text() == "#cloud-config\n"
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert len(ids) == 2


def test_values_that_no_guest_can_use(world: World) -> None:
    world.pool()
    refused(world, UsageError, "'Bad User' is not a user's name",
            cloud_init=CloudInit("", "web", user="Bad User"), disks=[SMALL])  # fmt: skip


# ---- overlays -----------------------------------------------------------------------------------


def test_an_overlay_lies_on_the_image(world: World) -> None:
    image = world.image(size=8 * MIB)
    disks = [DiskWish(32 * MIB, name="root", bus="sata")]
    made = make(world, image=image, overlay=True, disks=disks)
    assert world.target.calls == []
    (disk,) = made.spec.disks
    assert disk == DiskSpec("root", overlay="root.qcow2", made=True, bus="sata")
    path = world.vms.folder / "web" / "root.qcow2"
    shown = subprocess.run(
        ["qemu-img", "info", "--output=json", str(path)], capture_output=True, check=True
    )
    facts = json.loads(shown.stdout)
    assert (facts["virtual-size"], facts["full-backing-filename"]) == (32 * MIB, str(image.path))
    assert facts["backing-filename-format"] == "raw"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_overlay_is_as_large_as_its_image_unless_told(world: World) -> None:
    made = make(world, image=world.image(size=8 * MIB), overlay=True)
    assert made.spec.disks == (DiskSpec("system", overlay="system.qcow2", made=True),)
    path = world.vms.folder / "web" / "system.qcow2"
    shown = subprocess.run(
        ["qemu-img", "info", "--output=json", str(path)], capture_output=True, check=True
    )
    assert json.loads(shown.stdout)["virtual-size"] == 8 * MIB


@pytest.mark.parametrize(
    ("disk", "said"),
    [
        (DiskWish(pool="p"), "lies in no pool"),
        (DiskWish(shared=True), "can't be shared"),
        (DiskWish(7 * MIB), "the image 'debian' needs 8 MiB, and a disk of 7 MiB is smaller"),
    ],
)
def test_overlays_that_make_no_sense(world: World, disk: DiskWish, said: str) -> None:
    refused(world, UsageError, said, image=world.image(size=8 * MIB), overlay=True, disks=[disk])


@pytest.mark.parametrize("how", ["absent", "fails"])
def test_an_overlay_that_cannot_be_made_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    programs = world.folder / "bin"
    programs.mkdir()
    (programs / "ssh-keygen").symlink_to("/usr/bin/ssh-keygen")
    if how == "fails":
        (programs / "qemu-img").write_text(
            "#!/bin/sh\necho 'No space left on device' >&2; exit 1\n"
        )
        (programs / "qemu-img").chmod(0o755)
    image = world.image()
    monkeypatch.setenv("PATH", str(programs))
    kind, said = (
        (NotFound, "an overlay needs qemu-img")
        if how == "absent"
        else (DrivebayError, "qemu-img made no overlay: No space left on device")
    )
    refused(world, kind, said, image=image, overlay=True)


def test_the_wish_and_the_spec_of_a_bare_vm_agree(world: World) -> None:
    made = make(world)
    assert made.spec == bare("web", uuid=made.spec.uuid, machine="pc-q35-11.1", cpus=2)
