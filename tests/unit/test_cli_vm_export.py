"""`drivebay vm export|import`: which words they take, what they say, and what a failure leaves."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivebay.cli import vm_create, vm_import
from drivebay.vm.images.store import Images
from drivebay.vm.qemu import Qemu
from drivebay.vm.spec import CloudInit, DiskSpec
from tests.unit.command import Done, Run, run_command
from tests.unit.vm_world import MIB, World

QEMU = Qemu(
    Path("/q"), (7, 2), frozenset({"memfd", "user-net", "vhost-user-blk"}), ("pc-q35-7.2",),
    "pc-q35-7.2",
)  # fmt: skip


@pytest.fixture
def run(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Run]:
    for module in (vm_create, vm_import):
        monkeypatch.setattr(module, "find_qemu", lambda named: QEMU)
    world.pool()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def words(*given: str | Path) -> Done:
        return run_command(capsys, "vm", *given, "-s", world.socket)

    yield words
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def web(run: Run, world: World) -> None:
    """A VM with two disks."""
    disks = [DiskSpec(name, world.volume(f"web-{name}"), made=True) for name in ("system", "data")]
    world.vm("web", *disks, firmware="uefi", memory=512 * MIB)


@pytest.fixture
def file(world: World) -> Path:
    """A disk image from elsewhere."""
    path = world.folder / "elsewhere.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "8M"], check=True)
    return path


# ---- export -------------------------------------------------------------------------------------


def test_a_disk_is_written_and_the_way_back_is_said(run: Run, web: None, world: World) -> None:
    target = world.folder / "web.qcow2"
    done = run("export", "web", target)
    assert done.out == (
        f"disk 'system' of VM 'web' is in '{target}' (qcow2)\n"
        "  not in it: data (--disk NAME)\n"
        "  a VM of it: drivebay vm import web.qcow2 NEW --memory 512M --cpus 1 --firmware uefi "
        "--no-cloud-init\n"
    )
    again = run("export", "web", target)
    assert (again.code, "there is a file" in again.err) == (1, True)
    other = run("export", "web", world.folder / "d.RAW", "--disk", "data", "--json").json
    assert other == {
        "name": "web", "disk": "data", "file": str(world.folder / "d.RAW"), "format": "raw",
        "consistency": None, "other_disks": ["system"],
    }  # fmt: skip


def test_a_dry_run_writes_nothing(run: Run, web: None, world: World) -> None:
    target = world.folder / "web.vmdk"
    assert run("export", "web", target, "--dry-run").out.splitlines() == [
        "It may need 0 bytes beside the file.",
        f"would write disk 'system' of VM 'web' to '{target}' as vmdk",
    ]
    assert not target.exists()
    assert world.target.calls == []


@pytest.mark.parametrize("name", ["web", "web.img", "web.qcow2.xz", ".qcow2"])
def test_a_name_that_says_no_format(run: Run, web: None, world: World, name: str) -> None:
    refused = run("export", "web", world.folder / name)
    assert refused.code == 2
    assert "doesn't say which format" in refused.err


def test_disks_that_are_not_there(run: Run, web: None, world: World) -> None:
    refused = run("export", "web", "x.qcow2", "--disk", "none")
    assert refused.err.splitlines()[1] == "hint: it has: system, data"
    world.vm("bare")
    assert "VM 'bare' has no disk" in run("export", "bare", "x.qcow2").err


# ---- import -------------------------------------------------------------------------------------


def test_a_file_becomes_an_image_and_a_vm(run: Run, world: World, file: Path) -> None:
    done = run("import", file, "new", "--memory", "64M", "--disk", "16M")
    assert done.code == 0, done.err
    spec = world.vms.load("new").spec
    assert (spec.image, spec.memory) == ("new", 64 * MIB)
    assert spec.disks == (DiskSpec("system", "p/new-system", made=True),)
    assert isinstance(spec.cloud_init, CloudInit), "it may have it, and is told who it is"
    assert Images().get("new").size == 8 * MIB
    assert world.target.volumes["p", "new-system"].clusters == 4
    taken = run("import", file, "new")
    assert "there is a VM 'new' already" in taken.err
    assert run("import", file, "two", "--no-cloud-init", "--json").json["image"] == "two"
    assert world.vms.load("two").spec.cloud_init is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--disk", "4M"], "a disk of 4 MiB is smaller"),
        (["--memory", "1M"], "at least 16M"),
        (["--image", "debian"], "leave --image and --kernel out"),
        (["--disk", "bdev=none"], "there is no disk 'none'"),
        (["--format", "raw"], None),
    ],
)
def test_what_cannot_be_made_is_told_before_the_file_is_copied(
    run: Run, world: World, file: Path, words: list[str], said: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    copied: list[object] = []
    monkeypatch.setattr(vm_import, "import_file", lambda *given, **more: copied.append(given))
    done = run("import", file, "new", *words)
    assert done.code != 0
    if said is None:
        assert copied, "a format that is named is believed"
        return
    assert said in done.err
    assert copied == []
    assert Images().names() == []
    assert world.volumes() == []


def test_a_vm_that_cannot_be_made_leaves_no_image(run: Run, world: World, file: Path) -> None:
    world.target.failing = {"vhost_create_blk_controller"}
    assert run("import", file, "new").code == 1
    assert Images().names() == []
    assert world.vms.names() == []
    assert world.volumes() == []


def test_a_file_that_is_no_image(run: Run, world: World) -> None:
    assert "there is no file" in run("import", "/none.qcow2", "new").err
    (world.folder / "x.qcow2").write_text("no")
    assert "is no qcow2 image" in run("import", world.folder / "x.qcow2", "new").err


def test_a_dry_run_copies_nothing(run: Run, file: Path) -> None:
    assert run("import", file, "new", "--dry-run").out.splitlines() == [
        f"would copy '{file}' in as image 'new'", "would make VM 'new' of it"]  # fmt: skip
    assert Images().names() == []
