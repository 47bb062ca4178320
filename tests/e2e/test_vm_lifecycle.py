"""VMs from their making to their end, with a real target and a real QEMU; the guests need not be
up for what is tested here.
"""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.vm.guest_image import GuestImage
from tests.e2e.vm_bay import Done, VmBay, tiny_kernel
from tests.fakes.process import wait_until

pytestmark = pytest.mark.needs_qemu


@pytest.fixture(scope="module")
def boot(vm_bay: VmBay, guest_image: GuestImage) -> list[str]:
    return tiny_kernel(vm_bay.folder, guest_image)


@pytest.fixture
def vm(vm_bay: VmBay, boot: list[str]) -> Iterator[str]:
    """A VM with one empty disk, which is not started."""
    vm_bay.vm("create", "one", "--disk", "64M", "--memory", "128M", "--cpus", "1", *boot)
    yield "one"
    vm_bay.run("vm", "delete", "one", "--force", "--yes")
    assert vm_bay.json("vm", "list") == []
    assert vm_bay.controllers() == []


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_the_target_starts_by_itself_and_keeps_its_state(vm_bay: VmBay, vm: str) -> None:
    assert vm_bay.json("target", "status")["state"] == "running"
    assert (vm_bay.folder / "data/drivebay/target.json").is_file()
    assert vm_bay.disks() == ["one-system"]
    said = vm_bay.refused("disk", "delete", "one-system", "--yes")
    assert "it is VM 'one' that has it: drivebay vm detach one system" in said


def test_a_vm_starts_is_found_again_and_ends(vm_bay: VmBay, vm: str) -> None:
    started = vm_bay.json("vm", "start", vm)
    assert vm_bay.info(vm)["state"] == "running"
    assert vm_bay.pid(vm) == started["pid"]
    shown = vm_bay.json("vm", "list")
    assert [(entry["name"], entry["state"]) for entry in shown] == [("one", "running")]
    assert "runs already" in vm_bay.refused("vm", "start", vm)
    assert "vm stop one first" in vm_bay.refused("vm", "delete", vm, "--yes")
    assert "by force" in vm_bay.vm("stop", vm, "--force")
    assert vm_bay.info(vm)["state"] == "off"
    assert "was not running" in vm_bay.vm("stop", vm)


def test_qemu_has_no_rights_and_the_folder_is_its_starters(vm_bay: VmBay, vm: str) -> None:
    vm_bay.vm("start", vm)
    status = status_of(vm_bay.pid(vm))
    assert status["Seccomp"] == "2"
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    if os.geteuid() == 0:
        assert "0" not in status["Uid"].split()
        assert "0" not in status["Gid"].split()
        assert int(status["CapBnd"], 16) == 0
    folder = vm_bay.vm_folder(vm)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("vm.toml", "monitor.sock", "console.sock", "agent.sock", "running.json",
                 "console.log", "keys/id_ed25519"):  # fmt: skip
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name
        assert (folder / name).stat().st_uid == os.geteuid()
    assert stat.S_IMODE((folder / "keys").stat().st_mode) == 0o700


def test_two_starts_at_once_start_one(vm_bay: VmBay, vm: str) -> None:
    command = [sys.executable, "-m", "drivebay", "vm", "start", vm]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], said
    assert any("runs already" in text or "right now" in text for text in said)
    assert vm_bay.info(vm)["state"] == "running"


def test_a_killed_qemu_is_noticed_and_starts_again(vm_bay: VmBay, vm: str) -> None:
    vm_bay.vm("start", vm)
    pid = vm_bay.pid(vm)
    os.kill(pid, 9)
    wait_until(lambda: vm_bay.info(vm)["state"] != "running", "its end", 20)
    vm_bay.vm("start", vm)
    assert vm_bay.pid(vm) != pid


def test_a_killed_target_comes_back_with_the_sockets_of_qemus_user(vm_bay: VmBay, vm: str) -> None:
    vm_bay.vm("start", vm)
    os.kill(vm_bay.target_pid(), 9)
    vm_bay.vm("create", "two", "--disk", "64M", "--kernel", "/dev/null")  # needs a target
    try:
        wait_until(lambda: bool(sessions(vm_bay, "vm.one.system")), "QEMU, connected again", 20)
    finally:
        vm_bay.vm("delete", "two", "--yes")


def sessions(vm_bay: VmBay, controller: str) -> int:
    shown = {
        entry["name"]: entry["sessions"] for entry in vm_bay.json("target", "status")["controllers"]
    }
    return int(shown.get(controller, 0))


def test_set_waits_for_a_restart_and_keeps_comments(vm_bay: VmBay, vm: str) -> None:
    toml = vm_bay.vm_folder(vm) / "vm.toml"
    toml.write_text("# mine\n" + toml.read_text())
    vm_bay.vm("start", vm)
    said = vm_bay.vm("set", vm, "--memory", "192M")
    assert "memory: 128 MiB now, 192 MiB then" in said
    assert vm_bay.info(vm)["pending"] == ["memory: 128 MiB now, 192 MiB then"]
    assert toml.read_text().startswith("# mine\n")
    vm_bay.vm("restart", vm, "--force")
    assert vm_bay.info(vm)["pending"] == []
    words = Path(f"/proc/{vm_bay.pid(vm)}/cmdline").read_text().split("\0")
    assert words[words.index("-m") + 1] == "192M"


def test_what_a_person_writes_wrongly_is_named(vm_bay: VmBay, vm: str) -> None:
    toml = vm_bay.vm_folder(vm) / "vm.toml"
    good = toml.read_text()
    toml.write_text(good + "colour = 3\n")
    try:
        done = vm_bay.run("vm", "start", vm)
        assert done.code == 2
        assert "'colour'" in done.err
        assert str(toml) in done.err or "known are" in done.err
        assert vm_bay.json("vm", "list")[0]["state"] == "broken"
    finally:
        toml.write_text(good)


def test_qemus_own_words_are_shown_when_it_dies_at_its_start(vm_bay: VmBay, vm: str) -> None:
    toml = vm_bay.vm_folder(vm) / "vm.toml"
    good = toml.read_text()
    toml.write_text('qemu_args = ["-device", "no-such-device"]\n' + good)
    said = vm_bay.refused("vm", "start", vm)
    assert "'no-such-device' is not a valid device model name" in said
    assert vm_bay.info(vm)["state"] == "off"
    toml.write_text('qemu = "/nonexistent/qemu"\n' + good)
    assert "there is no QEMU '/nonexistent/qemu'" in vm_bay.refused("vm", "start", vm)
    toml.write_text(good)
    vm_bay.vm("start", vm)


def test_a_port_in_use_is_refused_with_another(vm_bay: VmBay, vm: str, boot: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        vm_bay.vm("set", vm, "--forward", f"{port}:22")
        said = vm_bay.refused("vm", "start", vm)
        assert "Could not set up host forwarding rule" in said
        assert "vm set one --forward" in said
    said = vm_bay.refused("vm", "create", "two", "--disk", "64M", *boot, "--forward", f"{port}:22")
    assert f"port {port} leads to VM 'one' already" in said
    assert vm_bay.disks() == ["one-system"]


def test_a_disk_has_one_writer_unless_all_say_shared(
    vm_bay: VmBay, vm: str, boot: list[str]
) -> None:
    vm_bay.ok("disk", "create", "common", "--size", "64M")
    two = ("create", "two", "--disk", "bdev=default/common", *boot)
    vm_bay.vm("attach", vm, "--disk", "bdev=common")
    said = vm_bay.refused("vm", *two)
    assert "disk 'default/common' belongs to VM 'one'" in said
    assert "disk clone default/common" in said
    vm_bay.vm("detach", vm, "disk1")
    done = vm_bay.run("vm", "attach", vm, "--disk", "bdev=common,shared")
    assert "ext4, XFS and NTFS are destroyed" in done.err
    assert vm_bay.run("vm", *two).code == 1  # two does not say so
    shared = ("create", "two", "--disk", "bdev=default/common,shared", "--memory", "128M", *boot)
    vm_bay.vm(*shared)
    vm_bay.vm("start", vm)
    vm_bay.vm("start", "two")
    assert sessions(vm_bay, "vm.one.disk1") == sessions(vm_bay, "vm.two.system") == 1
    toml = vm_bay.vm_folder("two") / "vm.toml"
    toml.write_text(toml.read_text().replace("shared = true\n", ""))
    vm_bay.vm("stop", "two", "--force")
    assert "belongs to VM 'one'" in vm_bay.refused("vm", "start", "two")
    vm_bay.vm("delete", "two", "--yes")
    vm_bay.vm("detach", vm, "disk1") if vm_bay.info(vm)["state"] == "off" else None
    vm_bay.vm("stop", vm, "--force")
    vm_bay.vm("detach", vm, "disk1")
    assert "common" in vm_bay.disks(), "a disk that was not made for a VM stays"
    vm_bay.ok("disk", "delete", "common", "--yes")


def test_a_session_that_is_no_vms_counts(vm_bay: VmBay, vm: str) -> None:
    vm_bay.ok("disk", "create", "foreign", "--size", "64M")
    vm_bay.ok("rpc", "vhost_create_blk_controller",
              '{"ctrlr": "mine", "dev_name": "default/foreign"}')  # fmt: skip
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(vm_bay.folder / "run/drivebay/mine"))
        wait_until(lambda: bool(sessions(vm_bay, "mine")), "our session", 10)
        said = vm_bay.refused("vm", "attach", vm, "--disk", "bdev=foreign")
        assert "controller 'mine' has 1 connected session" in said
    vm_bay.ok("rpc", "vhost_delete_controller", '{"ctrlr": "mine", "force": true}')
    vm_bay.ok("disk", "delete", "foreign", "--yes")


def test_a_disk_comes_and_a_failed_one_leaves_nothing(vm_bay: VmBay, vm: str) -> None:
    vm_bay.vm("start", vm)
    vm_bay.vm("attach", vm, "--disk", "32M")
    assert sessions(vm_bay, "vm.one.disk1") == 1
    before = vm_bay.disks()
    said = vm_bay.refused("vm", "attach", vm, "--disk", "32M,bus=sata")
    assert "adds no SATA disk to a running machine" in said
    assert vm_bay.disks() == before
    assert [disk["name"] for disk in vm_bay.info(vm)["disks"]] == ["system", "disk1"]


def test_other_buses_need_another_qemu(vm_bay: VmBay, vm: str, boot: list[str]) -> None:
    said = vm_bay.refused("vm", "create", "two", "--bus", "nvme", "--disk", "64M", *boot)
    assert "--bus nvme needs the block driver virtio-blk-vhost-user" in said
    assert "--qemu PATH" in said
    assert vm_bay.disks() == ["one-system"]


def test_a_clone_of_a_running_vm(vm_bay: VmBay, vm: str) -> None:
    vm_bay.vm("start", vm)
    said = vm_bay.vm("clone", vm, "copy", "--count", "2")
    assert "as after a power cut" in said
    assert "machine-id" in said
    one, two = vm_bay.info("copy-1"), vm_bay.info("copy-2")
    original = vm_bay.info(vm)
    assert len({info["nets"][0]["mac"] for info in (original, one, two)}) == 3
    assert len({info["uuid"] for info in (original, one, two)}) == 3
    assert len({str(info["nets"][0]["forward"]) for info in (original, one, two)}) == 3
    assert vm_bay.info(vm)["state"] == "running"
    vm_bay.vm("start", "copy-1")
    for name in ("copy-1", "copy-2"):
        vm_bay.vm("delete", name, "--force", "--yes")
    (disk,) = vm_bay.json("disk", "list")
    assert (disk["name"], disk["snapshots"]) == ("one-system", [])


def test_delete_keeps_disks_when_told(vm_bay: VmBay, vm: str, boot: list[str]) -> None:
    vm_bay.vm("create", "two", "--disk", "64M", *boot)
    vm_bay.vm("delete", "two", "--yes", "--keep-disks")
    assert "two-system" in vm_bay.disks()
    said = vm_bay.refused("vm", "create", "two", "--disk", "64M", *boot)
    assert "there is a disk 'two-system' in pool 'default' already" in said
    vm_bay.ok("disk", "delete", "two-system", "--yes")


def test_what_is_asked_for_wrongly_makes_nothing(vm_bay: VmBay, vm: str, boot: list[str]) -> None:
    refusals: list[Done] = [
        vm_bay.run("vm", "create", "one", "--disk", "64M", *boot),
        vm_bay.run("vm", "create", "a b", "--disk", "64M", *boot),
        vm_bay.run("vm", "create", "../x", "--disk", "64M", *boot),
        vm_bay.run("vm", "create", "two", "--image", "nosuch"),
        vm_bay.run("vm", "create", "two", "--disk", "pool=nosuch,size=64M", *boot),
        vm_bay.run("vm", "create", "two", "--disk", "bdev=nosuch", *boot),
        vm_bay.run("vm", "create", "two", "--disk", "64M,colour=red", *boot),
        vm_bay.run("vm", "create", "two", "--disk", "64M", "--kernel", "/nonexistent"),
        vm_bay.run("vm", "create", "two", "--disk", "64M", "--address", "10.0.2.300/24", *boot),
        vm_bay.run("vm", "create", "two", "--disk", "64M", "--forward", "22", *boot),
        vm_bay.run("vm", "create", "two", "--disk", "64M", "--user", "joe", *boot),
        vm_bay.run("vm", "create", "two", "--overlay", "--disk", "64M", *boot),
        vm_bay.run("vm", "start", "nosuch"),
        vm_bay.run("vm", "delete", "one"),  # nobody can be asked
    ]
    for done in refusals:
        assert done.code in (1, 2), done
        assert "drivebay: error: " in done.err, done
        assert "Traceback" not in done.err
    assert [entry["name"] for entry in vm_bay.json("vm", "list")] == ["one"]
    assert vm_bay.disks() == ["one-system"]
    assert threading.active_count() == 1


def test_the_command_line_that_is_shown_is_one_that_qemu_takes(vm_bay: VmBay, vm: str) -> None:
    line = vm_bay.json("vm", "qemu-command", vm)
    assert "memory-backend-memfd,id=memory,size=128M,share=on" in line
    done = subprocess.run(
        [*line, "-no-such-option"], capture_output=True, text=True, timeout=60, check=False
    )
    assert "-no-such-option: invalid option" in done.stderr
