"""One Debian VM, from its image to its clones, as its user sees it: by ssh, inside.

The tests of this module share one guest and run in their order: each goes on where the one
before it has left the guest. Under emulation a start takes about a minute.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.autostart_guest import SHARES, prepare
from tests.e2e.vm_bay import VmBay

pytestmark = pytest.mark.needs_qemu

BOOT_SECONDS = "900"
LSBLK = "lsblk --output NAME,KNAME,MODEL,HCTL,SIZE,VENDOR,SUBSYSTEMS"
LAB = "192.168.177"
CLONES = ("copy-1", "copy-2")


@pytest.fixture(scope="module")
def debian(vm_bay: VmBay, debian_image: Path) -> VmBay:
    """A VM 'web', one of whose addresses is static, of an imported image, started in one line."""
    vm_bay.ok("image", "import", str(debian_image), "--name", "debian", "--format", "raw")
    key = vm_bay.folder / "own"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    vm_bay.start_target()
    work = vm_bay.folder / "work"
    work.mkdir()
    shares = [word for share in (*SHARES, str(work)) for word in ("--share", share)]
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        ports = [server.getsockname()[1] for server in free]
    first = f"user,hostfwd=tcp::{ports[0]}-:22"
    second = f"user,subnet=10.0.4.0/24,address=10.0.4.50/24,hostfwd=tcp::{ports[1]}-10.0.4.50:22"
    vm_bay.vm(
        "create", "web", "--image", "debian", "--disk", "3G", "--memory", "768M", "--cpus", "1",
        "--net", first, "--net", second, "--user", "joe", "--ssh-key", f"{key}.pub", *shares,
        "--start",
    )  # fmt: skip
    vm_bay.vm("wait", "web", "--for", "ssh", "--timeout", BOOT_SECONDS)
    return vm_bay


def test_the_key_logs_in_and_the_address_is_static(debian: VmBay) -> None:
    assert debian.ssh("web", "id -un; hostname") == "joe\nweb\n"
    addresses = debian.ssh("web", "ip -brief -4 address")
    assert re.search(r"^enp0s3 +UP +10\.0\.2\.15/24", addresses, re.MULTILINE), addresses
    assert re.search(r"^enp0s4 +UP +10\.0\.4\.50/24", addresses, re.MULTILINE), addresses
    assert "via 10.0.2.2 dev enp0s3" in debian.ssh("web", "ip route get 192.0.2.1")
    assert "10.0.4.50 (static)" in debian.vm("info", "web")
    key, forward = debian.folder / "own", debian.info("web")["nets"][1]["forward"][0]
    done = subprocess.run(
        ["ssh", "-i", key, "-p", forward.split(":")[1], "-o", "IdentitiesOnly=yes",
         "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
         "joe@127.0.0.1", "echo hello"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "hello\n", done.stderr


def test_the_system_disk_is_vda_of_virtio_and_found_by_its_serial(debian: VmBay) -> None:
    lines = debian.ssh("web", LSBLK).splitlines()
    (vda,) = [line for line in lines if line.startswith("vda ")]
    assert re.search(r"\b3G\b.*block:virtio:pci", vda)
    assert debian.ssh("web", "readlink -f /dev/disk/by-id/virtio-system") == "/dev/vda\n"
    assert debian.ssh("web", "findmnt -no SOURCE /") == "/dev/vda3\n"
    size = int(debian.ssh("web", "df --output=size -B1M / | tail -1"))
    assert size > 2700, "the root file system fills the disk that is larger than the image"


def test_files_and_programs_go_in_and_out(debian: VmBay) -> None:
    file = debian.folder / "file"
    file.write_bytes(os.urandom(100_000))
    assert debian.program("vm", "cp", str(file), "web:/tmp/there").returncode == 0
    assert debian.program("vm", "cp", "web:/tmp/there", f"{file}.back").returncode == 0
    assert file.read_bytes() == Path(f"{file}.back").read_bytes()
    assert debian.program("vm", "cp", "--agent", str(file), "web:/var/tmp").returncode == 0
    assert debian.ssh("web", "sudo cmp /var/tmp/file /tmp/there; stat -c %U /var/tmp/file") == (
        "root\n"
    )
    assert debian.program("vm", "cp", "--agent", "web:/etc/shadow", f"{file}.out").returncode == 0
    assert b"root:" in Path(f"{file}.out").read_bytes()
    done = debian.program("vm", "exec", "web", "--", "sh", "-c", "id -un; echo no >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "root\n", "no\n")


def test_cloud_init_mounts_the_shared_folders(debian: VmBay) -> None:
    (debian.folder / "work/text").write_text("from the host\n")
    assert debian.ssh("web", "cat /mnt/work/text; sudo touch /mnt/work/made") == "from the host\n"
    assert (debian.folder / "work/made").exists()
    said = debian.ssh("web", "sudo touch /mnt/libs/made 2>&1 || true")
    assert "Read-only file system" in said


def test_a_disk_grows_while_its_guest_runs(debian: VmBay) -> None:
    debian.ok("disk", "resize", "default/web-system", "--size", "4G")
    deadline = time.monotonic() + 20
    while "4294967296" not in debian.ssh("web", "lsblk -bdno SIZE /dev/vda"):
        assert time.monotonic() < deadline
        time.sleep(0.3)


def test_a_disk_comes_is_used_and_goes(debian: VmBay) -> None:
    debian.vm("attach", "web", "--disk", "size=64M,name=data")
    by_id = "/dev/disk/by-id/virtio-data"
    debian.ssh("web", f"timeout 20 sh -c 'until test -e {by_id}; do sleep 0.2; done'")
    debian.ssh("web", f"sudo mkfs.ext4 -q {by_id} && sudo mount {by_id} /mnt && "
                      "echo kept | sudo tee /mnt/x && sudo umount /mnt")  # fmt: skip
    debian.vm("detach", "web", "data")
    assert debian.ssh("web", f"test -e {by_id} || echo gone") == "gone\n"
    assert "web-data" in debian.disks(), "detaching deletes nothing"
    debian.ok("disk", "delete", "web-data", "--yes")


def test_a_killed_target_loses_nothing_that_the_guest_writes(debian: VmBay) -> None:
    script = "dd if=/dev/urandom of=/var/tmp/data bs=1M count=24 2>/dev/null; sync; echo written"
    debian.ssh("web", f"nohup sh -c '{script} > /var/tmp/said' > /dev/null 2>&1 &")
    time.sleep(1)
    os.kill(debian.target_pid(), 9)
    time.sleep(0.5)
    debian.start_target()
    wait = "timeout 100 sh -c 'until grep -q written /var/tmp/said; do sleep 0.5; done'"
    debian.ssh("web", f"{wait} && sudo sh -c 'sha256sum /var/tmp/data; echo 3 > "
                      "/proc/sys/vm/drop_caches; sha256sum /var/tmp/data' | uniq | wc -l | "
                      "grep -qx 1")  # fmt: skip
    assert debian.ssh("web", "sudo dmesg | grep -c 'I/O error' || true") == "0\n"


# ---- clones -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lab:
    """A bridge of the host on which a DHCP server gives addresses."""

    leases: Path

    def interface(self, name: str) -> str:
        """Lines for vm.toml: a second interface, on a TAP that QEMU's user may open."""
        run("ip", "tuntap", "add", name, "mode", "tap", "user", "nobody")
        run("ip", "link", "set", name, "master", "dblab0", "up")
        mac = f"52:54:00:77:00:{int(name[-1]):02}"
        words = ["-netdev", f"tap,id=lab,ifname={name},script=no,downscript=no", "-device",
                 f"virtio-net-pci,netdev=lab,romfile=,addr=0xc,mac={mac}"]  # fmt: skip
        return f"qemu_args = {words!r}\n".replace("'", '"')


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def lab(vm_bay: VmBay) -> Iterator[Lab]:
    if os.geteuid() != 0:
        pytest.skip("only root may make a bridge, TAPs and a DHCP server")
    leases = vm_bay.folder / "leases"
    try:
        run("ip", "link", "add", "dblab0", "type", "bridge")
        run("ip", "address", "add", f"{LAB}.1/24", "dev", "dblab0")
        run("ip", "link", "set", "dblab0", "up")
        server = subprocess.Popen(
            ["dnsmasq", "--no-daemon", "--port=0", "--interface=dblab0", "--bind-interfaces",
             "--conf-file=/dev/null", f"--dhcp-range={LAB}.100,{LAB}.150,1h",
             f"--dhcp-leasefile={leases}", "--user=root"],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            yield Lab(leases)
        finally:
            server.terminate()
            server.wait()
    finally:
        for name in ("dbtap1", "dbtap2", "dblab0"):
            with contextlib.suppress(AssertionError):
                run("ip", "link", "delete", name)


@pytest.fixture(scope="module")
def clones(debian: VmBay, lab: Lab) -> str:
    """Two clones of the running 'web', which start at once; returns what `vm clone` said."""
    network = "[Match]\\nName=enp0s12\\n[Network]\\nDHCP=yes\\n"
    debian.ssh("web", f"printf '{network}' | sudo tee /etc/systemd/network/20-lab.network; "
                      "echo both | sudo tee /etc/both; sync")  # fmt: skip
    said = debian.vm("clone", "web", "copy", "--count", "2")
    debian.ssh("web", "echo later | sudo tee /etc/later; sync")
    for number, name in enumerate(CLONES):
        toml = debian.vm_folder(name) / "vm.toml"
        toml.write_text(lab.interface(f"dbtap{number + 1}") + toml.read_text())
        debian.vm("start", name)
    for name in CLONES:
        debian.vm("wait", name, "--for", "ssh", "--timeout", BOOT_SECONDS)
    return said


def test_clones_run_beside_it_and_are_machines_of_their_own(debian: VmBay, clones: str) -> None:
    assert "the guest's agent froze 1 file systems" in clones
    what = (
        "cat /etc/machine-id; hostname; sudo cat /sys/class/dmi/id/product_uuid; "
        "sudo cut -c1-80 /etc/ssh/ssh_host_ed25519_key.pub"
    )
    found = [debian.ssh(name, what).splitlines() for name in ("web", *CLONES)]
    for values in zip(*found, strict=True):
        assert len(set(values)) == 3, values
    assert debian.ssh("copy-1", "cat /etc/both") == "both\n"
    assert debian.ssh("copy-1", "test -e /etc/later || echo none") == "none\n"


def test_two_clones_on_one_network_get_different_addresses(debian: VmBay, clones: str) -> None:
    show = f"ip -4 -brief address show enp0s12 | grep -o '{LAB}[.0-9]*'"
    wait = f'timeout 60 sh -c "until {show}; do sleep 1; done"'
    found = [debian.ssh(name, wait) for name in CLONES]
    assert len(set(found)) == 2, found


def test_deleted_clones_leave_the_original_as_it_was(debian: VmBay, clones: str) -> None:
    for name in CLONES:
        debian.vm("delete", name, "--force", "--yes")
    assert [disk for disk in debian.disks() if disk.startswith("copy")] == []
    (system,) = [disk for disk in debian.json("disk", "list") if disk["name"] == "web-system"]
    assert system["snapshots"] == []
    assert debian.ssh("web", "cat /etc/both /etc/later") == "both\nlater\n"


# ---- a host in the guest, whose uplink moves into a bridge --------------------------------------


HOST_BRIDGE = "sudo PYTHONPATH=/mnt/code:/mnt/libs python3 -B -m drivebay net host-bridge"
SHOW = "ip -brief -4 address; ip -4 route; ip -4 rule; networkctl list --no-legend; resolvectl dns"


def network_of_host(debian: VmBay) -> str:
    """The guest's network, once networkd is done with it."""
    busy = 'networkctl list --no-legend | grep -Eq "routable +configuring"'
    wait = f"timeout 60 sh -c 'while {busy}; do sleep 1; done'"
    return re.sub(r" +", " ", debian.ssh("web", f"{wait}; {SHOW}", timeout_s=300))


def test_a_move_that_is_not_confirmed_leaves_the_host_as_it_was(debian: VmBay) -> None:
    before = network_of_host(debian)
    # This very login goes on while its address moves, and so does the one after it.
    said = debian.ssh("web", f"{HOST_BRIDGE} apply enp0s3 --yes --seconds 10", timeout_s=300)
    assert "'enp0s3' is in the bridge 'br0'" in said
    gone = "! ip link show br0 2>/dev/null"
    debian.ssh("web", f"timeout 200 sh -c 'until {gone}; do sleep 1; done'", timeout_s=300)
    assert network_of_host(debian) == before
    assert debian.ssh("web", "ls /run/systemd/network | grep drivebay || true") == ""


def test_another_login_confirms_a_move(debian: VmBay) -> None:
    debian.ssh("web", f"{HOST_BRIDGE} apply enp0s3 --yes --seconds 300", timeout_s=300)
    said = debian.ssh("web", f"{HOST_BRIDGE} confirm enp0s3", timeout_s=300)
    assert "written: /etc/netplan/50-cloud-init.yaml" in said
    assert "written: /etc/cloud/cloud.cfg.d/99-drivebay-network.cfg" in said
    check_bridge(network_of_host(debian))


def check_bridge(text: str) -> None:
    assert re.search(r"^br0 UP 10.0.2.15/24", text, re.MULTILINE), text
    assert "enp0s3 UP" not in text, "it has no address"
    assert re.search(r"^enp0s4 UP 10.0.4.50/24", text, re.MULTILINE), text
    assert "default via 10.0.2.2 dev br0" in text
    assert re.search(r"br0 bridge routable configured", text), text
    assert re.search(r"\(br0\): 10.0.2.3", text), "its name server"


# ---- a host of VMs in the guest -----------------------------------------------------------------


ACTIVE = 'until [ "$(systemctl is-active drivebay)" = active ]; do sleep 1; done'
INNER = "ps -e -o user=,pid=,args= | grep 'guest=inne[r]'"


def test_a_unit_brings_vms_back_outlives_its_target_and_stops_in_order(
    debian: VmBay, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(debian.folder / "work", monkeypatch)
    show = "systemctl show --value --property"
    debian.ssh("web", "sudo sh /mnt/work/setup", timeout_s=float(BOOT_SECONDS))
    said = debian.ssh(
        "web",
        f"sudo systemctl start drivebay; {ACTIVE}; {show} StatusText drivebay; {INNER}; "
        f"ps -e -o args= | grep 'source=/sr[v]'; {show} MainPID drivebay",
        timeout_s=float(BOOT_SECONDS),
    )
    status, inner, *served, target = said.splitlines()
    assert status.startswith("DEGRADED: 1 of the VMs"), said
    assert "vm.toml of 'broken' is not TOML" in status
    assert inner.startswith("nobody ")
    assert "virtiofsd" in served[0]
    again = debian.ssh(
        "web",
        f"sudo kill -9 {target}; sleep 1; {ACTIVE}; {INNER}; {show} MainPID drivebay",
        timeout_s=float(BOOT_SECONDS),
    ).splitlines()
    assert again[0] == inner, "a crash of the target is none of its VMs"
    assert again[1] not in ("0", target)
    assert debian.vm("stop", "web", "--timeout", BOOT_SECONDS) == "VM 'web' is off\n"
    log = debian.vm("log", "web")
    at = log.index("VM 'inner' is off")
    assert "the target has ended" not in log[:at], "disks are there as long as a VM is"
    assert "the target has ended" in log[at:]


def test_after_a_boot_the_bridge_is_there(debian: VmBay) -> None:
    debian.vm("start", "web")
    debian.vm("wait", "web", "--for", "ssh", "--timeout", BOOT_SECONDS)
    check_bridge(network_of_host(debian))
