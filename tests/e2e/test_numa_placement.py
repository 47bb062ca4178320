"""Placement on a host with two NUMA nodes, as a kernel shows one: a guest with a disk on each."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from drivebay.vm import initramfs
from drivebay.vm.guest_image import GuestImage
from drivebay.vm.placement import Placement, choose, node_of_device, read_host
from drivebay.vm.qemu import find_qemu

pytestmark = pytest.mark.needs_qemu

GUEST_SECONDS = 120.0
MODULES = ("virtio_pci", "virtio_blk")

# Prints each file and link of /sys that placement reads: a line "PATH<tab>CONTENT".
INIT = r"""#!/bin/busybox sh
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
while read -r module; do busybox insmod "/modules/$module"; done < /modules/order
busybox find /sys/dev/block -type l | while read -r link; do
    printf 'LINK\t%s\t%s\n' "$link" "$(busybox readlink -f "$link")"
done
for file in /sys/devices/system/node/has_memory /sys/devices/system/node/node*/cpulist \
        $(busybox find /sys/devices -name numa_node); do
    printf 'FILE\t%s\t%s\n' "$file" "$(busybox cat "$file")"
done
busybox poweroff -f
"""


@pytest.fixture(scope="module")
def sys_of_two_nodes(guest_image: GuestImage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numa")
    modules = initramfs.modules_in_loading_order(guest_image.modules, MODULES)
    files = {"/init": INIT.encode()}
    (folder / "initrd").write_bytes(
        initramfs.pack(guest_image.busybox.read_bytes(), modules, files)
    )
    words = [str(find_qemu().path), "-nodefaults", "-no-user-config", "-display", "none"]
    words += ["-accel", "tcg", "-machine", "q35", "-cpu", "max", "-smp", "2", "-m", "192M"]
    for node in range(2):
        words += ["-object", f"memory-backend-ram,id=ram{node},size=96M"]
        words += ["-numa", f"node,memdev=ram{node},nodeid={node},cpus={node}"]
        bus = f"bus{node}"
        words += [
            "-device",
            f"pxb-pcie,bus=pcie.0,id={bus},bus_nr={32 * node + 32},numa_node={node}",
        ]
        words += ["-device", f"pcie-root-port,id=port{node},bus={bus},chassis={node + 1}"]
        words += ["-blockdev", f"driver=null-co,node-name=disk{node},size=1048576,read-zeroes=on"]
        words += ["-device", f"virtio-blk-pci,drive=disk{node},bus=port{node}"]
    words += ["-no-reboot", "-serial", "stdio", "-kernel", str(guest_image.kernel)]
    words += ["-initrd", str(folder / "initrd"), "-append", "console=ttyS0 quiet panic=-1"]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=GUEST_SECONDS
    )
    for line in done.stdout.splitlines():
        kind, path, text = (*line.strip().split("\t"), "", "", "")[:3]
        place = folder / path.lstrip("/")
        if kind in ("FILE", "LINK"):
            place.parent.mkdir(parents=True, exist_ok=True)
        if kind == "FILE":
            place.write_text(text + "\n")
        elif kind == "LINK":
            device = folder / text.lstrip("/")
            device.mkdir(parents=True, exist_ok=True)
            place.symlink_to(device)
    assert (folder / "sys/dev/block").is_dir(), done.stdout + done.stderr
    return folder / "sys"


def test_each_disk_draws_its_machine_to_its_node(sys_of_two_nodes: Path) -> None:
    host = read_host(sys_of_two_nodes, range(2))
    assert host.nodes == {0: frozenset({0}), 1: frozenset({1})}
    disks = (sys_of_two_nodes / "dev/block").iterdir()
    nodes = {
        re.sub(r".*/(pci0000:\d\d).*", r"\1", str(link.resolve())): node_of_device(
            link.name, sys_of_two_nodes
        )
        for link in disks
    }
    assert nodes == {"pci0000:20": 0, "pci0000:40": 1}
    assert choose(host, nodes["pci0000:40"], {0}, 1) == Placement(1, (1,), None)
    assert choose(host, nodes["pci0000:20"], {0}, 1) == Placement(0, (1,), "0x1")
