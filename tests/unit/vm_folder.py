"""VMs in a folder of a test, which seem to run: their QEMU is a process that does nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from drivebay.system.processes import start_ticks
from drivebay.vm.spec import CloudInit, Forward, NetSpec, VmSpec
from drivebay.vm.ssh import make_keys
from drivebay.vm.store import Vm, Vms

__all__ = ["make_vm", "seem_to_run", "spec_of"]

UUID = "6f2d0c4e-3c53-4d8a-9d0f-111122223333"


def spec_of(name: str, *forwards: Forward) -> VmSpec:
    """A VM with cloud-init, and an interface with those forwards."""
    return VmSpec(
        name=name,
        uuid=UUID,
        machine="pc-q35-7.2",
        memory=1 << 30,
        cpus=1,
        nets=(NetSpec("user", "52:54:00:12:34:56", forwards),),
        cloud_init=CloudInit(instance_id="drivebay-1", hostname=name, user="joe"),
    )


def make_vm(spec: VmSpec) -> Vm:
    """Make its folder where `XDG_DATA_HOME` says."""

    def fill(vm: Vm) -> None:
        make_keys(vm.keys, spec.uuid)

    return Vms().create(spec, fill)


def seem_to_run(vm: Vm, process: subprocess.Popen[bytes]) -> None:
    """Write the record by which the tool finds a running VM."""
    record = {
        "pid": process.pid,
        "start_ticks": start_ticks(process.pid),
        "accelerator": "tcg",
        "qemu": "/usr/bin/qemu-system-x86_64",
        "text": Path(vm.folder / "vm.toml").read_text(encoding="utf-8"),
    }
    vm.running_file.write_text(json.dumps(record), encoding="utf-8")
