"""vm/lab: a lab is made, changed and deleted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.errors import (
    AlreadyExists,
    DrivebayError,
    HostError,
    InUse,
    NotFound,
    StateError,
    UsageError,
)
from drivebay.vm.lab.record import Labs
from drivebay.vm.spec import DiskSpec, ShareSpec
from tests.unit.conftest import LoopDevice
from tests.unit.vm_lab_world import LAB, MIB, SMALL, LabWorld, refused
from tests.unit.vm_world import World


@pytest.fixture
def lab(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[LabWorld]:
    made = LabWorld(world, monkeypatch)
    yield made
    made.close()


# ---- made and deleted ---------------------------------------------------------------------------


def test_a_lab_is_made_once_and_a_second_up_does_nothing(lab: LabWorld) -> None:
    done = lab.up()
    assert done[0].startswith("make pool 'four-big' of 1 GiB on '")
    assert done[-1] == "start VMs four-web-1, four-web-2, four-other"
    assert lab.picture() == {
        "bases": ["four-own", "four-ownp0", "four-ownp1", "image-tiny", "pool-four-big"],
        "stores": ["four-big"],
        "volumes": {
            "four-big/four-data-1": 16, "four-big/four-data-2": 16,
            "four-big/four-web-1-system": 2, "four-big/four-web-2-system": 2,
        },
        "controllers": [
            "vm.four-other.part-1", "vm.four-web-1.data", "vm.four-web-1.system",
            "vm.four-web-2.data", "vm.four-web-2.system",
        ],
        "files": {"big.img": 1024 * MIB, "four.toml": len(LAB), "own.img": 32 * MIB},
        "vms": {
            "four-other": [("part-1", "four-ownp0", False)],
            "four-web-1": [("system", "four-big/four-web-1-system", False),
                           ("data", "four-big/four-data-1", False)],
            "four-web-2": [("system", "four-big/four-web-2-system", False),
                           ("data", "four-big/four-data-2", False)],
        },
    }  # fmt: skip
    assert {lab.spec(name).lab for name in lab.world.vms.names()} == {"four"}
    ports = {lab.spec(f"four-web-{number}").nets[0].forward[0].host_port for number in (1, 2)}
    assert len(ports) == 2
    assert lab.spec("four-other").nets == ()
    calls = len(lab.world.target.calls)
    assert lab.up() == []
    assert len(lab.world.target.calls) == calls


def test_only_what_is_off_is_started(lab: LabWorld) -> None:
    lab.up()
    lab.started.clear()
    lab.stop("four-web-2")
    assert lab.up() == ["start VM four-web-2"]
    assert lab.started == ["four-web-2"]


def test_delete_leaves_nothing_and_touches_no_other(lab: LabWorld) -> None:
    lab.world.pool("p")
    lab.world.volume("four-data-1")
    lab.world.vm("web-1")
    before = lab.picture()
    lab.up()
    texts = lab.delete()
    assert texts[0] == "delete VM 'four-other'"
    assert texts[1] == "delete VM 'four-web-2' and its disk 'four-big/four-web-2-system'"
    assert texts[-1] == f"delete pool 'four-big' and the file '{lab.folder / 'big.img'}'"
    assert lab.picture() == {**before, "files": {"four.toml": len(LAB)}}
    assert Labs().names() == []


def test_what_lay_in_the_folder_before_stays(lab: LabWorld) -> None:
    for name in ("big.img", "own.img"):
        with (lab.folder / name).open("wb") as file:
            file.truncate(32 * MIB)
    lab.up()
    lab.delete()
    assert (lab.folder / "big.img").stat().st_size == 1024 * MIB
    assert (lab.folder / "own.img").exists()


def test_two_labs_use_the_same_names(lab: LabWorld) -> None:
    text = '[vm.web]\nsize = "8M"\n[disk.d]\nsize = "8M"\n[pool.p]\nfile = "{}.img"\nsize = "64M"\n'
    lab.up(text.format("a"))
    first = lab.picture()
    lab.file = lab.folder / "b.toml"
    site = lab.site("b")
    lab.file.write_text(text.format("b"))
    from drivebay.vm.lab.planning import plan_delete, plan_up
    from drivebay.vm.lab.reading import read_lab

    plan_up(site, read_lab(lab.file)).plan.run()
    assert lab.world.vms.names() == ["b-web", "four-web"]
    plan_delete(site).run()
    lab.file.unlink()
    assert lab.picture() == first


def test_the_default_pool_serves_those_who_name_none_and_stays(lab: LabWorld) -> None:
    text = '[vm.web]\nimage = "tiny"\n[disk.d]\nsize = "8M"\n'
    assert lab.up(text)[0] == "make pool 'default'"
    assert lab.world.volumes() == ["default/four-d", "default/four-web-system"]
    assert lab.up(text) == []
    lab.delete()
    assert list(lab.world.target.stores) == ["default"]
    assert lab.world.volumes() == []


# ---- what is not ours ---------------------------------------------------------------------------


def test_things_of_others_are_refused_before_anything_is_made(lab: LabWorld) -> None:
    lab.world.pool("four-big")
    assert 'name = "…"' in refused(lab, AlreadyExists, "line 1: there is a pool 'four-big' al", LAB)
    lab.world.target.bdev_lvol_delete_lvstore("four-big")
    lab.world.target.bdev_aio_delete("pool-four-big")
    vm = lab.world.vm("four-web-2")
    refused(lab, AlreadyExists, "line 13: there is a VM 'four-web-2' already", LAB)
    lab.world.vms.delete(vm)
    (lab.folder / "big.img").write_text("a letter")
    refused(lab, InUse, "line 1: .*big.img' is not empty", LAB)
    (lab.folder / "big.img").unlink()
    (lab.folder / "own.img").write_bytes(b"LABELONE" * 64)
    refused(lab, UsageError, "line 7: .*own.img' is there already, with 512 bytes", LAB)


@pytest.mark.parametrize(
    ("old", "new", "kind", "said"),
    [
        ('"tiny"', '"none"', NotFound, "line 15: there is no image 'none'"),
        ('image = "tiny"', 'image = "tiny"\nsize = "4M"', UsageError, "needs 8 MiB, and 'size'"),
        ("nets = []", 'nets = []\nuser = "joe"', UsageError, "line 18: 'user' is for cloud-init"),
        ("nets = []", 'nets = []\nkernel = "none"', DrivebayError, "line 18: can't read '.*/none'"),
    ],
)
def test_what_could_not_be_made_is_refused_before(
    lab: LabWorld, old: str, new: str, kind: type[DrivebayError], said: str
) -> None:
    refused(lab, kind, said, LAB.replace(old, new))
    assert lab.world.target.calls == []


def test_a_port_of_another_vm_is_refused(lab: LabWorld) -> None:
    text = LAB.replace("nets = []", 'nets = [{ net = "n", forward = ["80:80"] }]\n[net.n]')
    lab.up(text)
    other = text.replace("[vm.web]", '[vm.new]\nimage = "tiny"\n[vm.web]')
    spec = lab.spec("four-other")
    assert str(spec.nets[0].forward[0]) == "127.0.0.1:80:80"
    lab.file = lab.folder / "five.toml"
    lab.file.write_text(other.replace("big.img", "b5.img").replace("own.img", "o5.img"))
    from drivebay.vm.lab.planning import plan_up
    from drivebay.vm.lab.reading import read_lab

    with pytest.raises(InUse, match="port 80 leads to VM 'four-other'"):
        plan_up(lab.site("five"), read_lab(lab.file))


# ---- edited -------------------------------------------------------------------------------------


def test_an_edited_file_adds_and_grows(lab: LabWorld) -> None:
    lab.up()
    text = (
        LAB.replace('size = "1G"', 'size = "2G"')
        .replace('size = "64M"', 'size = "96M"')
        .replace("count = 2", "count = 3", 1)
        .replace("[vm.web]\ncount = 2", '[vm.web]\nsize = "16M"\ncount = 3')
        .replace('"128M"', '"256M"')
    )
    lab.started.clear()
    done = lab.up(text)
    assert [line for line in done if line.startswith(("make disk", "make pool"))] == [
        "make pool 'four-big' 2 GiB large (now 1 GiB)",
        "make disk 'four-web-1-system' 16 MiB large (now 8 MiB)",
        "make disk 'four-web-2-system' 16 MiB large (now 8 MiB)",
        "make disk 'four-data-1' 96 MiB large (now 64 MiB)",
        "make disk 'four-data-2' 96 MiB large (now 64 MiB)",
        "make disk 'four-data-3' of 96 MiB in pool 'four-big'",
    ]
    assert lab.started == ["four-web-3"]
    assert lab.picture()["volumes"]["four-big/four-web-1-system"] == 4
    assert {lab.spec(f"four-web-{number}").memory for number in (1, 2, 3)} == {256 * MIB}
    assert lab.up(text) == []


def test_what_the_file_does_not_say_stays_as_a_person_set_it(lab: LabWorld) -> None:
    lab.up()
    lab.world.pool("p")
    vm = lab.world.vms.load("four-web-1")
    mine = DiskSpec("mine", lab.world.volume("mine"), made=True)
    from dataclasses import replace

    lab.world.vms.save(vm, replace(vm.spec, cpus=7, disks=(*vm.spec.disks, mine)))
    assert lab.up() == []
    assert lab.up(LAB.replace('"128M"', '"64M"')) == [
        "change vm.toml of VM 'four-web-1'", "change vm.toml of VM 'four-web-2'",
    ]  # fmt: skip
    spec = lab.spec("four-web-1")
    assert (spec.cpus, spec.memory, spec.disk("mine")) == (7, 64 * MIB, mine)


def test_a_vm_gets_an_iso_to_install_from(lab: LabWorld) -> None:
    text = '[vm.new]\nsize = "8M"\niso = "d.iso"\n'
    with pytest.raises(HostError, match="line 1: can't read the ISO '.*d.iso'"):
        lab.plan(text)
    (lab.folder / "d.iso").write_bytes(bytes(32768) + b"\x01CD001\x01".ljust(2048, b"\0"))
    lab.up(text)
    spec = lab.spec("four-new")
    assert (spec.iso, spec.cloud_init) == (str(lab.folder / "d.iso"), None)
    assert [disk.name for disk in spec.disks] == ["system"]
    assert lab.up(text) == []
    assert lab.up(text.replace("d.iso", "./d.iso")) == []


def test_folders_and_the_start_with_the_host_follow_the_file(lab: LabWorld) -> None:
    lab.up()
    text = LAB + 'autostart = true\nshares = [".:here"]\n'
    assert lab.up(text) == ["change vm.toml of VM 'four-other'"]
    spec = lab.spec("four-other")
    assert (spec.autostart, spec.shares) == (True, (ShareSpec(str(lab.folder), "here"),))
    assert lab.up() == []
    assert lab.up(LAB + "autostart = false\nshares = []\n") != []
    assert lab.spec("four-other").shares == ()


@pytest.mark.parametrize(
    ("old", "new", "said", "name"),
    [
        ('size = "1G"', 'size = "512M"', "line 1: pool 'four-big' is 1 GiB large", "big"),
        ('"big.img"', '"new.img"', "line 1: pool 'four-big' lies on", "big"),
        ('size = "64M"', 'size = "32M"', "line 4: disk 'four-data-1' is 64 MiB large", "data-1"),
        ('size = "64M"', 'size = "64M"\npool="default"', "line 4: disk 'data-1' lies on", "data-1"),
        ('"own.img"', '"new.img"', "line 7: disk 'own' lies on", "own"),
        ('size = "32M"', 'size = "16M"', "line 7: disk 'four-own' is 32 MiB large", "own"),
        ('"own"\ncount = 2', '"own"\ncount = 3', "'part' are 2 parts, and the file says 3", "part"),
        ('"own"\n', '"own"\nsize = "8M"\n', "have 16 MiB each, and the file says 8 MiB", "part"),
        ('"tiny"', '"tiny2"', "line 13: VM 'four-web-1' began with the image 'tiny'", "web-1"),
        ('"tiny"', '"tiny"\npool="default"', "the system disk of VM 'four-web-1' is", "web-1"),
        ('"tiny"', '"tiny"\nsize="4M"', "'four-web-1-system' is 8 MiB large", "web-1"),
        ('"tiny"', '"tiny"\nfirmware="uefi"\nmemory="1G"#', "with the firmware 'bios'", "web-1"),
    ],
)  # fmt: skip
def test_what_would_lose_data_is_refused(
    lab: LabWorld, old: str, new: str, said: str, name: str
) -> None:
    lab.up()
    text = LAB.replace(old, new)
    if "firmware" in new:
        text = text.replace('memory = "128M"\n', "")
    hint = refused(lab, StateError, said, text)
    assert hint.endswith(f"--recreate {name}")


def test_what_left_the_file_is_told_and_deleted_by_prune_alone(lab: LabWorld) -> None:
    lab.up()
    text = LAB.replace("count = 2", "count = 1").partition("[disk.own]")[0]
    text += '[vm.web]\ncount = 1\nimage = "tiny"\ndisks = []\n'
    lab.stop()
    doings = lab.plan(text)
    assert doings.left == [
        "VM 'four-other'", "VM 'four-web-2'", "the parts 'part' of disk 'four-own'",
        "disk 'four-own'", "disk 'four-big/four-data-2'",
    ]  # fmt: skip
    assert doings.up.question is None
    lab.up(text)
    assert lab.spec("four-web-1").disk("data") is None
    assert "four-big/four-data-2" in lab.world.volumes()
    assert lab.world.vms.names() == ["four-other", "four-web-1", "four-web-2"]
    assert lab.plan(text, prune=True).up.question is not None
    done = lab.up(text, prune=True)
    assert [line.split()[1] for line in done[:5]] == ["VM", "VM", "the", "disk", "disk"]
    assert lab.world.vms.names() == ["four-web-1"]
    assert lab.world.volumes() == ["four-big/four-data-1", "four-big/four-web-1-system"]
    assert not (lab.folder / "own.img").exists()
    assert lab.plan(text).left == []


def test_an_interface_comes_changes_and_goes(lab: LabWorld) -> None:
    lab.up()
    text = LAB.replace("nets = []", 'nets = [{{ net = "lan"{} }}]\n[net.lan]')
    lab.up(text.format(""))
    (before,) = lab.spec("four-other").nets
    assert [forward.guest_port for forward in before.forward] == [22]
    lab.up(text.format(', forward = ["8080:80"], address = "10.0.2.50/24"'))
    (after,) = lab.spec("four-other").nets
    assert (after.mac, after.address, after.gateway) == (before.mac, "10.0.2.50/24", "10.0.2.2")
    assert [str(each) for each in after.forward] == ["127.0.0.1:8080:80", str(before.forward[0])]
    lab.up(text.format(', forward = ["2300:22"]'))
    assert [str(each) for each in lab.spec("four-other").nets[0].forward] == ["127.0.0.1:2300:22"]
    lab.up()
    assert lab.spec("four-other").nets == ()


def test_a_disk_changes_hands(lab: LabWorld) -> None:
    text = """\
[disk.d]
size = "8M"
[vm.a]
image = "tiny"
disks = {}
[vm.b]
image = "tiny"
disks = {}
"""
    lab.up(text.format('["d"]', "[]"))
    lab.stop()
    done = lab.up(text.format("[]", '["d"]'))
    assert done[:2] == ["take disk 'd' from VM 'four-a'", "give VM 'four-b' the disk 'd'"]
    assert (lab.spec("four-a").disk("d"), lab.spec("four-b").disk("d")) == (
        None, DiskSpec("d", "default/four-d"),
    )  # fmt: skip
    lab.stop()
    shared = '[{ disk = "d", shared = true }]'
    lab.up(text.format(shared, shared))
    assert lab.spec("four-a").disk("d") == DiskSpec("d", "default/four-d", shared=True)
    assert lab.spec("four-b").disk("d") == DiskSpec("d", "default/four-d", shared=True)


# ---- made anew ----------------------------------------------------------------------------------


def test_a_vm_is_made_anew_and_a_disk_with_its_parts(lab: LabWorld) -> None:
    lab.up()
    whole = lab.picture()
    before = lab.spec("four-web-1").uuid
    lab.up(LAB, "web-1")
    assert lab.picture() == whole
    assert lab.spec("four-web-1").uuid != before
    done = lab.up(LAB, "four-own")
    assert done[:3] == [
        "stop VM four-other", "join the parts 'part' of disk 'four-own'",
        f"delete disk 'four-own' and the file '{lab.folder / 'own.img'}'",
    ]  # fmt: skip
    assert lab.picture() == whole
    assert lab.up() == []


def test_a_pool_is_made_anew_with_all_that_stands_on_it(lab: LabWorld) -> None:
    lab.up()
    text = LAB.replace('size = "1G"', 'size = "512M"')
    done = lab.up(text, "big")
    assert done[0] == "delete VM 'four-web-2' and its disk 'four-big/four-web-2-system'"
    assert (lab.folder / "big.img").stat().st_size == 512 * MIB
    assert len(lab.world.volumes()) == 4
    assert lab.up(text) == []


def test_parts_of_parts_are_made_anew_with_them(lab: LabWorld) -> None:
    text = SMALL + '[disk.quarter]\nsplit = "part-2"\ncount = 2\n'
    lab.up(text)
    whole = lab.picture()
    done = lab.up(text, "own")
    assert [line for line in done if line.startswith(("join", "split"))] == [
        "join the parts 'quarter' of disk 'four-ownp1'", "join the parts 'part' of disk 'four-own'",
        "split disk 'four-own' into 2 parts", "split disk 'four-part-2' into 2 parts",
    ]  # fmt: skip
    assert lab.picture() == whole
    assert lab.plan(text, "part").plan.texts[1:3] == done[1:3]


def test_one_of_two_things_of_a_name_is_made_anew(lab: LabWorld) -> None:
    text = '[pool.x]\nfile = "x.img"\nsize = "64M"\n[disk.x]\nsize = "8M"\n'
    lab.up(text)
    with pytest.raises(StateError, match="'x' is the name of several things") as told:
        lab.plan(text, "x")
    assert told.value.hint == "write pool.x or disk.x"
    assert lab.plan(text, "disk.x").plan.texts[0] == "delete disk 'four-x/four-x'"


def test_only_what_there_is_can_be_made_anew(lab: LabWorld) -> None:
    lab.up()
    with pytest.raises(NotFound, match="has made nothing called 'wub-1'") as caught:
        lab.plan(LAB, "wub-1")
    assert caught.value.hint == "is 'web-1' meant?"


def test_a_pool_with_a_disk_of_somebody_else_stays(lab: LabWorld) -> None:
    lab.up()
    lab.world.volume("theirs", "four-big")
    with pytest.raises(InUse, match="pool 'four-big' holds what this lab did not make: theirs"):
        lab.delete()
    lab.world.target.bdev_lvol_delete("four-big/theirs")
    lab.delete()
    assert not Path(lab.folder / "big.img").exists()


# ---- on a disk ----------------------------------------------------------------------------------


def on_disk(device: Path, size: str) -> str:
    return f'[pool.big]\ndevice = "{device}"\nsize = "{size}"\n[disk.data]\nsize = "64M"\n'


@pytest.mark.needs_root
def test_a_partition_is_made_once(lab: LabWorld, loop_device: LoopDevice) -> None:
    device = loop_device(512 * MIB, "--partscan")
    assert lab.up(on_disk(device, "300M")) == [
        f"make pool 'four-big' of 300 MiB on '{device}'",
        "make disk 'four-data' of 64 MiB in pool 'four-big'",
    ]
    assert lab.up(None) == []


@pytest.mark.needs_root
@pytest.mark.parametrize("size", ["200M", "400M"])
def test_another_size_of_a_partition_is_refused(
    lab: LabWorld, loop_device: LoopDevice, size: str
) -> None:
    device = loop_device(512 * MIB, "--partscan")
    lab.up(on_disk(device, "300M"))
    said = f"line 1: pool 'four-big' lies on '.*', which is 300 MiB large, .*: {size[:-1]} MiB"
    with pytest.raises(StateError, match=said) as caught:
        lab.up(on_disk(device, size))
    assert "put the old value back" in str(caught.value.hint)


@pytest.mark.needs_root
def test_a_pool_on_a_disk_is_made_anew_if_there_is_room(
    lab: LabWorld, loop_device: LoopDevice
) -> None:
    """Its partition stays, so that it would be deleted, and could not be made."""
    device = loop_device(512 * MIB, "--partscan")
    lab.up(on_disk(device, "200M"))
    before = lab.picture()
    doings = lab.plan(None, "big")
    assert doings.up.question == "Delete these, and make them anew?"
    doings.plan.run()
    assert lab.picture() == before
    with pytest.raises(DrivebayError, match="has no room for a partition of 200 MiB"):
        lab.up(None, "big")
    assert lab.picture() == before
