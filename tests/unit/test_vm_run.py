"""What is remembered of a running VM: the machine as it runs, also after a disk came or went."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from drivebay.vm.run import note_disk, running
from drivebay.vm.spec import DiskSpec, read_spec
from drivebay.vm.store import Vm, Vms
from tests.unit.vm_folder import make_vm, seem_to_run, spec_of

DISK = DiskSpec("data", bdev="default/web-data", made=True)


@pytest.fixture
def vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vm]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    made = make_vm(spec_of("web"))
    with subprocess.Popen(["sleep", "600"]) as process:
        seem_to_run(made, process)
        yield made
        process.kill()


def started_disks(vm: Vm) -> tuple[DiskSpec, ...]:
    found = running(vm)
    assert found is not None
    return read_spec(vm.name, found.text).disks


def test_a_disk_that_came_and_went_waits_for_no_restart(vm: Vm) -> None:
    saved = Vms().save(vm, replace(vm.spec, disks=(DISK,)))
    note_disk(saved, DISK.name, DISK)
    found = running(saved)
    assert found is not None
    assert found.text == saved.text
    note_disk(saved, DISK.name, None)
    assert started_disks(saved) == ()


def test_a_change_that_waits_goes_on_waiting(vm: Vm) -> None:
    edited = Vms().save(vm, replace(vm.spec, memory=2 << 30))
    note_disk(edited, DISK.name, DISK)
    found = running(edited)
    assert found is not None
    assert read_spec("web", found.text).memory == vm.spec.memory
    assert started_disks(edited) == (DISK,)


def test_a_vm_that_is_off_has_no_record_to_change(vm: Vm) -> None:
    vm.running_file.unlink()
    note_disk(vm, DISK.name, DISK)
    assert not vm.running_file.exists()
