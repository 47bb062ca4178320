"""`drivebay doctor`: what it finds on hosts that lack something, and in VMs that cannot start."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from drivebay.cli.main import main
from drivebay.disks.inventory import Disk, Inventory, Pool, Use
from drivebay.errors import HostError
from drivebay.host import emulator, machine, resources, storage, tools
from drivebay.host.emulator import check_emulator
from drivebay.host.finding import Finding
from drivebay.host.folders import check_folders
from drivebay.host.resources import check_memory
from drivebay.host.storage import check_storage
from drivebay.host.tools import check_tools
from drivebay.target.daemon import BackgroundTarget
from drivebay.vm.kvm import Accelerator
from drivebay.vm.packages import install_command
from drivebay.vm.run import Running
from drivebay.vm.spec import DiskSpec, Forward, NetSpec, VmSpec, VncSpec
from drivebay.vm.spec_file import write_spec
from drivebay.vm.store import Vm, Vms
from tests.fakes.qemu import stand_in

GIB = 1 << 30
KVM = Accelerator("kvm", "it ran")
TCG = Accelerator("tcg", "no /dev/kvm")
SPEC = VmSpec("web", "0f5b5f3e-9d46-4f4c-8a3e-0c5c6a1f7f11", "pc-q35-9.2", GIB, 1)
POOL = Pool("default", "u", "pool-default", None, "aio", 1 << 20, 100, 90, 0)
VOLUME = Disk("web", "lvol0", ("default/web",), "thin", "default", 10 << 20, 512)


@dataclass(frozen=True)
class Answer:
    """What a run of the command said, and how it ended."""

    code: int
    out: str

    @property
    def findings(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.out)
        return found


Run = Callable[..., Answer]


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A host of the test: short folders, as sockets want them, and a QEMU that can everything."""
    folder = Path(tempfile.mkdtemp(prefix="bay", dir="/tmp"))
    folder.chmod(0o755)
    for name in ("DATA_HOME", "CACHE_HOME", "RUNTIME_DIR", "STATE_HOME"):
        monkeypatch.setenv(f"XDG_{name}", str(folder / name))
    blkio = {"block_driver": "blkio_connect failed: no such file"}
    monkeypatch.setenv("DRIVEBAY_QEMU", str(stand_in(folder / "qemu", **blkio)))
    monkeypatch.setattr(emulator, "choose_accelerator", lambda: KVM)
    monkeypatch.setattr(storage, "find_socket", lambda named: named or "/nonexistent/rpc.sock")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str) -> Answer:
        code = main(["doctor", "-s", "/nonexistent/rpc.sock", *words])
        return Answer(code, capsys.readouterr().out)

    return call


@pytest.fixture
def vms() -> Vms:
    return Vms()


@pytest.fixture
def make(vms: Vms) -> Callable[..., Vm]:
    def call(**changed: Any) -> Vm:
        return vms.create(replace(SPEC, **changed), lambda vm: None)

    return call


def bad(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level != "ok"]


def only(findings: Iterable[Finding]) -> Finding:
    (found,) = bad(findings)
    return found


# ---- the command --------------------------------------------------------------------------------


def test_a_good_host_has_no_problem_and_each_finding_its_line(run: Run) -> None:
    shown = run()
    assert shown.code == 0
    assert "QEMU 9.2" in shown.out
    lines = shown.out.splitlines()
    at = next(n for n, line in enumerate(lines) if line.split()[:2] == ["note", "target"])
    assert lines[at + 1] == "         mend: drivebay target start"
    found = run("--json").findings
    assert {entry["level"] for entry in found} <= {"ok", "note", "warning"}
    assert {
        "qemu",
        "kvm",
        "tools",
        "folders",
        "space",
        "sockets",
        "memory",
        "limits",
        "target",
    } == {entry["about"] if "about" in entry else entry["subject"] for entry in found}


def test_a_problem_is_the_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVEBAY_QEMU", "/nowhere")
    assert run().code == 1
    shown = run("-q")
    assert "name the program's path with --qemu PATH\n" in shown.out
    assert "QEMU 9.2" not in shown.out


@pytest.mark.parametrize("words", [["vm"], ["host"], ["vm", "a", "b"]])
def test_what_cannot_be_checked_is_refused(run: Run, words: list[str]) -> None:
    assert run(*words).code == 2


def test_a_vm_that_cannot_be_read_does_not_stop_the_doctor(
    run: Run, make: Callable[..., Vm]
) -> None:
    vm = make()
    (vm.folder / "vm.toml").write_text("memory = 7")
    shown = run()
    assert shown.code == 0
    assert "warning  VMs" in shown.out
    assert f"mend it: {vm.folder}/vm.toml" in shown.out


def test_a_folder_of_vms_that_cannot_be_read_is_a_problem(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Vms) -> list[str]:
        raise HostError("can't look into '/x'", 13)

    monkeypatch.setattr(Vms, "names", refuse)
    shown = run()
    assert shown.code == 1
    assert "can't look into '/x': Permission denied" in shown.out


# ---- QEMU and KVM -------------------------------------------------------------------------------


def test_without_qemu_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DRIVEBAY_QEMU")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("drivebay.vm.qemu.ELSEWHERE", [])
    monkeypatch.setattr("drivebay.vm.packages.this_distribution", lambda: "fedora")
    found = only(check_emulator())
    assert (found.level, found.what) == ("problem", "qemu-system-x86_64 is not installed")
    assert str(found.mend).startswith("sudo dnf install qemu-system-x86;")
    monkeypatch.setattr("drivebay.vm.packages.this_distribution", lambda: None)
    assert only(check_emulator()).mend == (
        "install QEMU: qemu-system-x86 (Debian, Ubuntu, Fedora), qemu (openEuler)"
    )


@pytest.mark.parametrize(
    ("changed", "level", "loss"),
    [
        ({"vhost_user_blk": "no"}, "problem", "no VM can have disks of the target"),
        ({"memfd": "no"}, "problem", "no guest can share its memory"),
        ({"seccomp": "no"}, "problem", "no VM starts"),
        ({"user_net": "no"}, "problem", "VMs need --net none"),
        ({"nvme": "no"}, "note", "no VM can have --bus nvme"),
        ({"scsi": "no"}, "note", "no VM can have --bus scsi"),
        ({"ahci": "no"}, "note", "no VM can have --bus sata"),
        ({"kvm": "no"}, "problem", "guests would run by kvm (it ran), for which"),
    ],
)
def test_what_qemu_lacks_has_a_loss_and_a_mend(
    host: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], level: str, loss: str
) -> None:
    changed["block_driver"] = "blkio_connect failed"
    monkeypatch.setattr("drivebay.vm.packages.this_distribution", lambda: "debian")
    found = only(check_emulator(str(stand_in(host / "lacking", **changed))))
    assert found.level == level
    assert loss in found.what
    assert "QEMU" in str(found.mend)
    assert "it comes with" not in str(found.mend)


def test_where_no_package_is_known_those_of_others_are_named(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drivebay.vm.packages.this_distribution", lambda: None)
    found = only(check_emulator(str(stand_in(host / "lacking"))))
    assert found.level == "note"
    assert str(found.mend).endswith(
        "; it comes with qemu-block-extra (Debian, Ubuntu), qemu-block-blkio (Fedora)"
    )


@pytest.mark.parametrize(
    ("flags", "device", "mend"),
    [
        ("fpu vmx", False, "sudo modprobe kvm_intel"),
        ("fpu svm", False, "sudo modprobe kvm_amd"),
        ("fpu", False, "turn on virtualization"),
        ("fpu vmx", True, "sudo usermod -aG kvm"),
        ("fpu", True, "none in a virtual machine"),
    ],
)
def test_without_kvm_guests_are_slow_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, device: bool, mend: str
) -> None:
    monkeypatch.setattr(emulator, "choose_accelerator", lambda: TCG)
    found = only(check_emulator())
    assert (found.level, found.what) == ("warning", "guests are emulated, and slow: no /dev/kvm")
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    path = tmp_path / "kvm"
    if device:
        path.touch()
    assert emulator._mend_of_kvm(path, tmp_path / "cpuinfo").startswith(mend)


# ---- tools --------------------------------------------------------------------------------------


def test_each_absent_tool_has_its_use_and_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(tools, "_MORE_PATHS", ())
    found = bad(check_tools(tmp_path))
    assert [finding.level for finding in found].count("problem") == 1
    assert found[0].what == "no qemu-img: to import and convert images"
    assert found[0].mend == (install_command("qemu-img") or found[0].mend)
    assert f"no {tmp_path}/i386-pc: for images that start by BIOS" in [f.what for f in found]
    assert all(finding.mend for finding in found)


def test_tools_of_sbin_and_other_names_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(tools, "_MORE_PATHS", (str(tmp_path),))
    stand_in(tmp_path / "grub2-mkimage")
    (tmp_path / "x86_64-efi").mkdir()
    listed = [finding.what for finding in check_tools(tmp_path) if finding.level == "ok"]
    assert f"{tmp_path}/grub2-mkimage: for 'image build'" in listed
    assert f"{tmp_path}/x86_64-efi: for images that start by UEFI" in listed


# ---- memory and limits --------------------------------------------------------------------------


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text(f"MemTotal: 1 kB\nMemAvailable:    {2 * GIB // 1024} kB\n")
    return path


def test_a_vm_with_more_memory_than_there_is_is_a_warning(
    make: Callable[..., Vm], meminfo: Path
) -> None:
    found = only(check_memory([make(memory=3 * GIB)], meminfo))
    assert found.level == "warning"
    assert "VM 'web' has 3 GiB of memory, and 2 GiB is free" in found.what
    assert found.mend == "drivebay vm set web --memory 1024M"


def test_vms_that_do_not_fit_together_are_a_note(make: Callable[..., Vm], meminfo: Path) -> None:
    both = [make(memory=3 * GIB // 2), make(name="db", memory=GIB)]
    found = only(check_memory(both, meminfo))
    assert found.level == "note"
    assert "the VMs that do not run have 2.5 GiB together" in found.what
    assert bad(check_memory(both[:1], meminfo)) == []


def test_running_vms_have_their_memory(
    make: Callable[..., Vm], meminfo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "running", lambda vm: Running(1, 1, "tcg", "", ""))
    assert bad(check_memory([make(memory=3 * GIB)], meminfo)) == []


def test_few_open_files_are_a_warning(meminfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    found = only(check_memory([], meminfo))
    assert (found.level, found.mend) == ("warning", "ulimit -n 4096")


# ---- folders ------------------------------------------------------------------------------------


def test_folders_that_are_not_there_can_be_made(host: Path) -> None:
    assert bad(check_folders()) == []
    assert not (host / "DATA_HOME").exists()
    assert not (host / "CACHE_HOME").exists()


def test_a_file_in_a_folders_place_is_a_problem(host: Path) -> None:
    (host / "DATA_HOME").touch()
    found = only(check_folders())
    assert found.level == "problem"
    assert f"'{host}/DATA_HOME' should be a folder, for VMs" in found.what


def test_a_folder_of_somebody_else_is_a_problem(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: "CACHE" not in str(path))
    (host / "CACHE_HOME").mkdir()
    found = only(check_folders())
    assert found.level == "problem"
    assert "may not write in" in found.what
    assert str(found.mend).endswith(f"-m 700 {host}/CACHE_HOME/drivebay")


def test_a_full_file_system_is_a_warning(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.statvfs_result((4096, 4096, 1000, 100, 50, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    found = only(check_folders())
    assert (found.level, found.subject) == ("warning", "space")
    assert "is 95% full, 200 KiB are free" in found.what


def test_a_long_way_leaves_few_letters_for_names(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = host / ("x" * (79 - len(str(host))))
    monkeypatch.setenv("XDG_DATA_HOME", str(long))
    found = only(check_folders())
    # 80 + /drivebay/vms/ + /monitor.sock = 107
    assert (found.level, found.mend) == ("problem", "XDG_DATA_HOME=/a/shorter/folder")
    assert "a VM's name may have 0 letters only" in found.what
    monkeypatch.setenv("XDG_DATA_HOME", str(host))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    found = only(check_folders())
    assert found.mend == "drivebay target start -S /a/shorter/folder"
    # 80 + /drivebay/ + vm. and the dot between = 94
    assert "may have 13 letters together" in found.what


@pytest.mark.needs_root
def test_qemus_user_must_get_through_to_the_sockets(host: Path) -> None:
    (host / "RUNTIME_DIR/drivebay").mkdir(parents=True)
    (host / "RUNTIME_DIR").chmod(0o700)
    found = only(check_folders())
    assert found.level == "problem"
    assert "may not pass through the folder" in found.what
    assert str(found.mend).startswith(f"chmod o+x {host}/RUNTIME_DIR")


# ---- the target and its pools -------------------------------------------------------------------


def test_no_target_is_a_note() -> None:
    found = only(check_storage(None))
    assert (found.level, found.mend) == ("note", "drivebay target start")


def test_a_target_that_is_silent_is_a_problem(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(host / "rpc.sock")
    background = BackgroundTarget(7, 1, path, str(host), "log")
    monkeypatch.setattr(storage, "find_background", lambda: background)
    found = only(check_storage(path))
    assert found.level == "problem"
    assert "process 7 runs, and does not answer" in found.what


def test_a_full_pool_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = (POOL, replace(POOL, name="full", free_clusters=10))
    monkeypatch.setattr(storage, "look", lambda named: (Inventory(pools, ()), []))
    found = only(check_storage(None))
    assert (found.level, found.mend) == ("warning", "drivebay pool grow full")
    assert "pool 'full' is 90% full" in found.what


# ---- one VM -------------------------------------------------------------------------------------


def check(vms: Vms, name: str = "web") -> list[Finding]:
    return bad(machine.check_machine(vms, name, None))


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> list[Disk]:
    """The target's disks, to be changed."""
    volumes = [VOLUME]
    monkeypatch.setattr(machine, "look", lambda named: (Inventory((POOL,), tuple(volumes)), []))
    return volumes


def test_a_vm_that_would_start_has_nothing_to_mend(
    vms: Vms, make: Callable[..., Vm], target: list[Disk], run: Run
) -> None:
    make(disks=(DiskSpec("system", "default/web", made=True),))
    assert check(vms) == []
    assert run("vm", "web", "--json").code == 0


def test_no_vm_of_that_name_is_said(run: Run) -> None:
    shown = run("vm", "web")
    assert (shown.code, shown.out) == (1, "")


def test_a_vm_toml_that_is_wrong_is_the_problem(vms: Vms, make: Callable[..., Vm]) -> None:
    (make().folder / "vm.toml").write_text("cpus = 0")
    (found,) = check(vms)
    assert (found.level, found.subject) == ("problem", "vm.toml")
    assert "mend it: " in str(found.mend)


def test_a_qemu_that_is_not_able_or_not_there(
    vms: Vms, make: Callable[..., Vm], target: list[Disk], host: Path
) -> None:
    make(machine="pc-q35-2.4")
    make(name="gone", qemu="/nowhere")
    make(name="lacking", qemu=str(stand_in(host / "old", memfd="no")))
    assert [check(vms, name)[0].what[:40] for name in ("web", "gone", "lacking")] == [
        "VM 'web' was made as a 'pc-q35-2.4', whi",
        "there is no QEMU '/nowhere'",
        "VM 'lacking' needs guest memory in a mem",
    ]


def test_disks_that_are_gone_or_somebody_elses(
    vms: Vms, make: Callable[..., Vm], target: list[Disk]
) -> None:
    make(disks=(DiskSpec("system", "default/gone"), DiskSpec("over", overlay="over.qcow2")))
    assert [found.level for found in check(vms)] == ["problem", "problem"]
    target[:] = [replace(VOLUME, uses=(Use("stranger", 1),))]
    make(name="db", disks=(DiskSpec("system", "default/web"),))
    (found,) = check(vms, "db")
    assert "controller 'stranger' has 1 connected session" in found.what


def test_secrets_that_others_may_read(
    vms: Vms, make: Callable[..., Vm], target: list[Disk]
) -> None:
    vm = make()
    (vm.folder / "seed.iso").touch(0o644)
    assert check(vms) == []  # nobody gets to it
    vm.folder.chmod(0o755)
    (found,) = check(vms)
    assert (found.level, found.mend) == ("warning", f"chmod -R go= {vm.folder}")
    assert "web/seed.iso" in found.what


def test_ports_in_use_and_ports_of_root(
    vms: Vms, make: Callable[..., Vm], target: list[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        net = NetSpec("user", "52:54:00:12:34:56", (Forward(port, 22),))
        make(nets=(net,), vnc=VncSpec("127.0.0.1", port))
        found, of_vnc = check(vms)
    assert found.what == f"another program listens at port {port} of this host"
    assert of_vnc.mend == f"ss -ltnp 'sport = :{port}'; drivebay vm set web --vnc 127.0.0.1:PORT"
    assert found.mend == (f"ss -ltnp 'sport = :{port}'; drivebay vm set web --forward PORT:22")
    assert check(vms) == []
    monkeypatch.setattr(machine, "_port_problem", lambda protocol, address, port: 13)
    assert f"port {port} can't be used: Permission denied" in check(vms)[0].what


def test_a_running_vm_says_its_state_and_what_waits(
    vms: Vms, make: Callable[..., Vm], target: list[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = make()
    record = Running(7, 1, "tcg", "", write_spec(replace(SPEC, cpus=2)))
    monkeypatch.setattr("drivebay.vm.run.running", lambda vm: record)
    found = check(vms)
    assert [finding.level for finding in found] == ["problem", "note"]
    assert "the monitor of VM 'web' does not answer" in found[0].what
    assert found[1].mend == "drivebay vm restart web"
    monkeypatch.setattr("drivebay.vm.run.running", lambda vm: replace(record, text=vm.text))
    assert len(check(vms)) == 1
    assert vm.text
