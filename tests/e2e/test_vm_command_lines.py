"""The command lines of vm/command.py are read by the QEMUs that are to run them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from drivebay.vm.command import command_line
from drivebay.vm.hardware import Cd, Drive, Hardware, Listener, Memory, Nic, OwnNet, Start
from drivebay.vm.kvm import Accelerator
from drivebay.vm.qemu import find_qemu
from drivebay.vm.spec import Forward
from tests.e2e.newer_qemu import system_emulator

pytestmark = pytest.mark.needs_qemu

TCG = Accelerator("tcg", "")
MAC = "52:54:00:12:34:56"


@pytest.mark.parametrize("newer", [False, True], ids=["of Debian 12", "newer"])
def test_qemu_reads_a_machine_with_every_part(tmp_path: Path, newer: bool) -> None:
    """It stops at the kernel that is not there, which is the last thing that it looks at."""
    qemu = find_qemu(str(system_emulator()) if newer else None)
    raw, overlay = tmp_path / "raw,1", tmp_path / "over"
    raw.write_bytes(bytes(1 << 20))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(overlay), "1M"], check=True)
    hardware = Hardware(
        "vm",
        memory=Memory(64 << 10),
        monitor=Listener(tmp_path / "monitor"),
        serials=[("console", Listener(tmp_path / "console", log=str(tmp_path / "log")))],
        uuid="d1b1c2f0-0000-4000-8000-000000000001",
        nics=[Nic(MAC, OwnNet([Forward(0, 22)]))],
        agent=Listener(tmp_path / "agent"),
        start=Start("/nonexistent-kernel"),
        cd=Cd(str(raw), 1),
        ends_at_reboot=True,
        ports=8,
        disks=[
            Drive("over", str(overlay), "qcow2", backing=str(raw), boot_order=0),
            Drive("seed", str(raw), read_only=True),
            Drive("s", str(tmp_path / "raw2"), bus="scsi"),
        ],
    )
    (tmp_path / "raw2").write_bytes(bytes(1 << 20))
    line = command_line(qemu, TCG, hardware)
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "/nonexistent-kernel" in done.stderr
    complaints = [line for line in done.stderr.splitlines() if "deprecated" not in line]
    assert len(complaints) == 1, done.stderr
