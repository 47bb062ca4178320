"""`drivebay vm create|set|attach|detach|clone|delete|list|…`: what they do, ask, say and refuse.

The target is a model; tests/e2e has the real one, and real QEMUs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.cli import vm_change, vm_create
from drivebay.vm import run as vm_run
from drivebay.vm.qemu import Qemu
from drivebay.vm.spec import DiskSpec, ShareSpec
from tests.fakes.qemu_monitor import FakeMonitor, Refuses
from tests.unit.command import Done, Run, run_command
from tests.unit.vm_folder import seem_to_run
from tests.unit.vm_world import MIB, World, idle_process

ABLE = frozenset({"memfd", "user-net", "vhost-user-blk", "vhost-user-fs"})
QEMU = Qemu(Path("/q"), (7, 2), ABLE, ("pc-q35-7.2",), "pc-q35-7.2")


@pytest.fixture
def run(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command; the world has a pool 'p'."""
    for module in (vm_create, vm_change):
        monkeypatch.setattr(module, "find_qemu", lambda named: QEMU)
    world.pool()

    def words(subcommand: str, *more: str) -> Done:
        return run_command(capsys, "vm", subcommand, *more, "-s", world.socket)

    return words


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with idle_process() as process:
        yield process


@pytest.fixture
def web(run: Run, world: World) -> str:
    """A VM with an empty disk and no image."""
    assert run("create", "web", "--image", "none", "--disk", "64M").code == 0
    world.target.calls.clear()
    return "web"


@pytest.fixture
def monitor(web: str, world: World, process: subprocess.Popen[bytes]) -> Iterator[FakeMonitor]:
    """The VM seems to run."""
    vm = world.vms.load(web)
    seem_to_run(vm, process)
    fake = FakeMonitor(vm.monitor_socket)
    port = {"qdev_id": "port1", "pci_bridge": {}}
    fake.answers["query-pci"] = [{"devices": [port]}]
    yield fake
    fake.close()


# ---- create -------------------------------------------------------------------------------------


def test_create_says_how_to_go_on(run: Run, world: World) -> None:
    done = run("create", "web", "--image", "none", "--disk", "64M", "--memory", "512M")
    assert done.code == 0, done.err
    assert "VM 'web' is made" in done.out
    assert "drivebay vm start web --wait" in done.out
    assert "drivebay vm ssh web" in done.out
    shown = run("info", "web", "--json").json
    assert (shown["memory"], shown["state"], shown["pid"]) == (512 * MIB, "off", None)
    assert [disk["bdev"] for disk in shown["disks"]] == ["p/web-system"]


def test_a_dry_run_makes_nothing(run: Run, world: World) -> None:
    done = run("create", "web", "--image", "none", "--disk", "64M", "--dry-run", "--start")
    assert done.code == 0
    assert "would make the disk 'web-system' of 64 MiB in pool 'p'" in done.out
    assert (world.target.calls, world.vms.names()) == ([], [])
    done = run("create", "--dry-run")
    assert done.code == 1
    assert "a dry run builds none" in done.err


def test_names_are_found_where_none_is_given(run: Run, world: World) -> None:
    world.image("a_b.c")
    world.vms.folder.mkdir(parents=True)
    (world.vms.folder / "a-b-c-2").mkdir()  # no VM, and yet in the way
    made = [run("create", "--image", "a_b.c", "--json").json["name"] for _ in range(2)]
    assert made == ["a-b-c", "a-b-c-3"]
    world.image("x" * 31 + ".y")
    assert run("create", "--image", "x" * 31 + ".y", "--json").json["name"] == "x" * 31
    assert run("create", "--image", "none", "--json").json["name"] == "vm"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--initrd", "/i"], "--initrd and --append need a --kernel"),
        (["--append", "quiet"], "--initrd and --append need a --kernel"),
        (["--kernel", "/nonexistent"], "can't read '/nonexistent'"),
        (["--net", "none", "--forward", "1:2"], "needs --net user"),
        (["--user", "joe"], "--user: only cloud-init can do that, and without an image"),
        (["--user-data", "/x"], "--user-data: only cloud-init"),
        (["--address", "10.0.2.9/24"], "--address: only cloud-init"),
        (["--image", "debian", "--no-cloud-init", "--password-file", "/x"],
         "--password-file: only cloud-init can do that, and with --no-cloud-init"),
        (["--disk", "64M,bus=usb"], "there is no bus 'usb'"),
        (["--disk", "64M,colour=red"], "'colour=red' in --disk"),
        (["--disk", ""], "is not understood"),
        (["--disk", "size="], "is not understood"),
        (["--disk", "1.0000001M"], "not a whole number of bytes"),
        (["--cpus", "0"], "'cpus' should be from 1 to 256"),
        (["--memory", "1M"], "'memory' should be whole MiB"),
        (["--firmware", "uefi", "--memory", "64M"], "UEFI needs"),
        (["--image", "gone"], "there is no image 'gone'"),
        (["--image", "../x"], "can't be the name of an image"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_makes_nothing(
    run: Run, world: World, words: list[str], said: str
) -> None:
    world.image()
    done = run("create", "web", "--image", "none", "--disk", "64M", *words)
    assert done.code in (1, 2)
    assert said in done.err
    assert (world.volumes(), world.vms.names()) == ([], [])


def test_a_disk_that_is_shared_is_warned_of(run: Run, world: World) -> None:
    world.volume("x")
    done = run("create", "web", "--image", "none", "--disk", "bdev=p/x,shared")
    assert done.code == 0
    assert "ext4, XFS and NTFS are destroyed" in done.err


def test_a_qemus_path_holds_elsewhere(run: Run, world: World) -> None:
    words = ("--image", "none", "--qemu")
    assert run("create", "a", *words, "bin/qemu", "--json").code == 0
    assert run("create", "b", *words, "qemu-system-x86_64").code == 0
    assert world.vms.load("a").spec.qemu == str(Path("bin/qemu").absolute())
    assert world.vms.load("b").spec.qemu == "qemu-system-x86_64"


# ---- set ----------------------------------------------------------------------------------------


def test_set_changes_what_is_named(run: Run, world: World, web: str) -> None:
    done = run("set", web, "--cpus", "3", "--forward", "8080:80", "--machine", "pc-q35-9.2")
    assert (done.code, done.out) == (0, "VM 'web' is changed\n")
    spec = world.vms.load(web).spec
    assert (spec.cpus, spec.machine) == (3, "pc-q35-9.2")
    assert [str(forward) for forward in spec.nets[0].forward] == ["127.0.0.1:8080:80"]
    assert "nothing to change" in run("set", web, "--cpus", "3").err
    before = world.vms.load(web)
    assert run("set", web, "--cpus", "4", "--dry-run").code == 0
    for words in (["--cpus", "0"], ["--memory", "1M"], ["--address", "x"], ["--user", "joe"],
                  ["--gateway", "10.0.2.2"], ["--forward", "9:9", "--forward", "9:8"]):  # fmt: skip
        assert run("set", web, *words).code in (1, 2), words
    assert world.vms.load(web) == before


def test_values_that_no_guest_takes_are_not_written(run: Run, world: World) -> None:
    world.image()
    assert run("create", "web", "--image", "debian").code == 0
    before = world.vms.load("web")
    for words in (["--user", "Bad User"], ["--hostname", "a b"], ["--packages", "a b"]):
        done = run("set", "web", *words)
        assert (done.code, done.err[:27]) == (2, "drivebay: error: cloud-init"), words
    assert world.vms.load("web") == before


def test_a_static_address_has_qemus_gateway_and_goes_again(run: Run, world: World) -> None:
    world.image()
    assert run("create", "web", "--image", "debian").code == 0
    assert run("set", "web", "--address", "10.0.2.50/24").code == 0
    (net,) = world.vms.load("web").spec.nets
    assert (net.gateway, net.dns) == ("10.0.2.2", ("10.0.2.3",))
    assert run("set", "web", "--address", "dhcp").code == 0
    (net,) = world.vms.load("web").spec.nets
    assert (net.address, net.gateway, net.dns) == ("dhcp", None, ())


def test_a_running_vm_shows_what_waits(
    run: Run, web: str, monitor: FakeMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run("set", web, "--memory", "2G", "--cpus", "3")
    assert "memory: 1 GiB now, 2 GiB then" in done.out
    assert "cpus: 2 now, 3 then" in done.out
    assert "drivebay vm restart web" in done.out
    shown = run("info", web)
    assert "waits for a restart: cpus: 2 now, 3 then" in shown.out


def test_folders_are_shared_shown_and_not_shared_any_more(
    run: Run, world: World, web: str, monitor: FakeMonitor
) -> None:
    source, data = world.folder / "src", world.folder / "data"
    source.mkdir()
    done = run("set", web, "--share", str(source), "--share", f"{data}:d,ro")
    assert "shares: changed" in done.out
    shown = run("info", web)
    assert f"share      src: {source}\n" in shown.out
    assert f"share      d: {data}, read-only\n" in shown.out
    assert run("info", web, "--json").json["shares"] == [
        {"directory": str(source), "tag": "src", "read_only": False},
        {"directory": str(data), "tag": "d", "read_only": True},
    ]
    assert (
        f"serves '{source}' at '{world.vms.folder}/web/share-src.sock'"
        in run("qemu-command", web).err
    )
    twice = run("set", web, "--share", str(source), "--share", f"{data}:src")
    assert (twice.code, "two shares of one tag: src, src" in twice.err) == (2, True)
    assert run("set", web, "--share", f"{source}/gone").code == 1
    assert run("set", web, "--share", "none").code == 0
    assert world.vms.load(web).spec.shares == ()


def test_a_new_vm_has_its_folders(run: Run, world: World) -> None:
    done = run("create", "new", "--image", "none", "--disk", "64M", "--share", f"{world.folder}:s")
    assert done.code == 0
    assert world.vms.load("new").spec.shares == (ShareSpec(str(world.folder), "s"),)
    bad = run("create", "bad", "--image", "none", "--disk", "64M", "--share", f"{world.folder}:a b")
    assert (bad.code, "can't be a tag" in bad.err) == (2, True)
    assert run("list", "-q").out == "new\n"


# ---- attach and detach --------------------------------------------------------------------------


def test_disks_come_and_go_while_it_is_off(run: Run, world: World, web: str) -> None:
    world.volume("x")
    assert run("attach", web, "--disk", "bdev=x,name=data").code == 0
    assert run("attach", web, "--disk", "32M", "--json").json == {
        "name": "web", "disk": "disk1", "bdev": "p/web-disk1",
    }  # fmt: skip
    names = [entry["ctrlr"] for entry in world.target.controllers]
    assert names == ["vm.web.system", "vm.web.data", "vm.web.disk1"]
    assert "p/web-disk1' is still there" in run("detach", web, "disk1").out
    assert [disk.name for disk in world.vms.load(web).spec.disks] == ["system", "data"]
    assert "vm.web.disk1" not in [entry["ctrlr"] for entry in world.target.controllers]
    gone = run("detach", web, "disk9")
    assert (gone.code, "it has: system, data" in gone.err) == (1, True)


@pytest.mark.parametrize(
    ("disk", "said"),
    [
        ("bdev=p/web-system", "belongs to VM 'web' (its disk 'system')"),
        ("64M,name=system", "has a disk 'system' already"),
        ("64M,name=a.b", "can't be the name of a disk"),
        ("bdev=pool-p", "another bdev stands on 'pool-p'"),
        ("bdev=p/none", "there is no disk 'p/none'"),
        ("name=x", "a new disk needs a size"),
    ],
)
def test_what_cannot_be_attached(run: Run, world: World, web: str, disk: str, said: str) -> None:
    before = world.vms.load(web)
    done = run("attach", web, "--disk", disk)
    assert done.code in (1, 2)
    assert said in done.err
    assert world.target.calls == []
    assert world.vms.load(web) == before


def test_a_running_vm_gets_and_loses_a_disk(
    run: Run, world: World, web: str, monitor: FakeMonitor
) -> None:
    assert run("attach", web, "--disk", "32M").code == 0
    assert monitor.commands() == ["query-pci", "chardev-add", "device_add"]
    assert run("info", web, "--json").json["pending"] == []
    event = {"event": "DEVICE_DELETED", "data": {"device": "disk-disk1"}}
    monitor.events["device_del"] = [event]
    assert run("detach", web, "disk1").code == 0
    assert monitor.commands()[3:] == ["device_del", "chardev-remove"]
    assert [entry["ctrlr"] for entry in world.target.controllers] == ["vm.web.system"]


def test_a_disk_that_qemu_refuses_leaves_nothing(
    run: Run, world: World, web: str, monitor: FakeMonitor
) -> None:
    monitor.answers["device_add"] = Refuses("no room")
    before = world.vms.load(web)
    done = run("attach", web, "--disk", "32M")
    assert (done.code, "no room" in done.err) == (1, True)
    assert world.volumes() == ["p/web-system"]
    assert [entry["ctrlr"] for entry in world.target.controllers] == ["vm.web.system"]
    assert world.vms.load(web) == before


# ---- delete -------------------------------------------------------------------------------------


def test_delete_asks_and_removes_what_was_made(run: Run, world: World, web: str) -> None:
    refused = run("delete", web)
    assert refused.code == 1
    assert "Delete VM 'web'?" in refused.err
    assert "delete the disk 'web-system' in pool 'p'" in refused.err
    assert world.target.calls == []
    assert run("delete", web, "--yes", "--json").json == {"deleted": "web"}
    assert (world.volumes(), world.target.controllers, world.vms.names()) == ([], [], [])


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("bdev", "was not made for it"),
        ("shared", "is shared"),
        ("copied", "is that of VM 'copy', too"),
        ("kept", "is to be kept"),
    ],
)
def test_what_delete_leaves(run: Run, world: World, how: str, why: str) -> None:
    world.volume("x")
    world.vm("web", DiskSpec("d", "p/x", made=how != "bdev", shared=how == "shared"))
    if how == "copied":
        world.vm("copy", DiskSpec("d", "p/x", made=True))
    done = run("delete", "web", "--yes", *(["--keep-disks"] if how == "kept" else []))
    assert done.code == 0, done.err
    assert world.volumes() == ["p/x"]
    world.vm("web", DiskSpec("d", "p/x", made=how != "bdev", shared=how == "shared"))
    words = ["--keep-disks"] if how == "kept" else []
    assert f"('p/x') {why}, and stays" in run("delete", "web", "--dry-run", *words).out


def test_one_that_runs_is_deleted_by_force_only(
    run: Run, world: World, web: str, monitor: FakeMonitor, process: subprocess.Popen[bytes]
) -> None:
    refused = run("delete", web, "--yes")
    assert (refused.code, "VM 'web' runs" in refused.err) == (1, True)
    assert run("delete", web, "--yes", "--force").code == 0
    assert process.wait(20) == -15
    assert world.volumes() == []


def test_one_that_libvirt_runs_is_not_deleted(
    run: Run, world: World, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drivebay.vm.disks.LETTING_GO_SECONDS", 0.0)
    world.target.controllers[0]["sessions"] = [{"vid": 0}]
    refused = run("delete", web, "--yes")
    assert (refused.code, "'web' is off, and yet" in refused.err) == (1, True)
    assert world.volumes() == ["p/web-system"]
    assert run("delete", web, "--yes", "--force").code == 0


def test_an_image_that_is_broken_keeps_no_vm(run: Run, world: World) -> None:
    image = world.image()
    assert run("create", "web", "--image", "debian").code == 0
    (image.path.parent / "image.toml").write_text("x")
    assert run("delete", "web", "--yes").code == 0
    assert world.vms.names() == []


def test_a_delete_that_fails_can_be_done_again(run: Run, world: World, web: str) -> None:
    world.target.failing.add("bdev_lvol_delete")
    assert run("delete", web, "--yes").code == 1
    assert world.vms.names() == ["web"]
    world.target.failing.clear()
    assert run("delete", web, "--yes").code == 0


# ---- clone --------------------------------------------------------------------------------------


def test_clones_are_named_and_say_what_is_equal(run: Run, world: World, web: str) -> None:
    done = run("clone", web, "copy", "--count", "2")
    assert done.code == 0, done.err
    assert world.vms.names() == ["copy-1", "copy-2", "web"]
    assert "the machine-id, the host name and sshd's keys stay equal" in done.out
    for count in ("0", "257", "-1"):
        assert "should be from 1 to 256" in run("clone", web, "x", "--count", count).err
    assert run("clone", web, "y", "--json").json == {"clones": ["y"], "consistency": None}


def test_a_full_clone_shares_nothing(run: Run, world: World, web: str) -> None:
    done = run("clone", web, "copy", "--full")
    assert done.code == 0, done.err
    assert world.volumes() == ["p/copy-system", "p/web-system"]
    assert all(volume.parent is None for volume in world.target.volumes.values())


def test_a_full_clone_that_has_no_room_leaves_nothing(run: Run, world: World, web: str) -> None:
    world.target.failing.add("bdev_lvol_decouple_parent")
    assert run("clone", web, "copy", "--full").code == 1
    assert world.volumes() == ["p/web-system"]
    assert world.vms.names() == ["web"]


# ---- what is shown ------------------------------------------------------------------------------


def test_list_shows_broken_ones_too(run: Run, world: World, web: str) -> None:
    world.vm("db")
    (world.vms.folder / "db" / "vm.toml").write_text("x")
    assert run("list", "-q").out == "db\nweb\n"
    done = run("list")
    assert "broken" in done.out
    assert "vm.toml of 'db' is not TOML" in done.err
    shown = run("list", "--json").json
    assert [(entry["name"], entry["state"]) for entry in shown] == [
        ("db", "broken"), ("web", "off"),
    ]  # fmt: skip


def test_list_waits_for_no_guest(
    run: Run, web: str, monitor: FakeMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(vm: object) -> list[str]:
        raise AssertionError("a guest was asked")

    monkeypatch.setattr("drivebay.vm.reaching.said_by_agent", never)
    for words in ([], ["--json"]):
        assert "running" in run("list", *words).out


def test_switching_what_is_off(run: Run, web: str) -> None:
    assert "was not running" in run("stop", web).out
    assert run("stop", web, "--json").json == {"name": "web", "ended": None}
    assert "there is no VM 'gone'" in run("start", "gone").err
    for seconds in ("-1", "x", "nan", "86401"):
        assert "no number of seconds" in run("stop", web, "--timeout", seconds).err


def test_a_command_line_needs_the_sockets(run: Run, world: World, web: str) -> None:
    world.target.controllers.clear()
    done = run("qemu-command", web)
    assert (done.code, "does not offer disk 'system'" in done.err) == (1, True)
    assert vm_run.running(world.vms.load(web)) is None
