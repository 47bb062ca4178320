"""A Debian guest plays the host whose uplink moves into a bridge: netplan, networkd, a real boot.

The tests share the guest and run in their order. Under emulation each start takes about a minute.
"""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import pytest

from tests.e2e.vm_bay import VmBay

pytestmark = pytest.mark.needs_qemu

BOOT_SECONDS = "900"
ADDRESS = "10.0.2.15/24"
COMMAND = "sudo PYTHONPATH=/opt/drivebay python3 -m drivebay net host-bridge"
SHOW = "ip -brief -4 address; ip -4 route; ip -4 rule; networkctl list --no-legend; resolvectl dns"


@pytest.fixture(scope="module")
def host(vm_bay: VmBay, debian_image: Path) -> VmBay:
    """A VM 'host' with its address by DHCP and our package in it."""
    vm_bay.ok("image", "import", str(debian_image), "--name", "debian", "--format", "raw")
    vm_bay.start_target()
    vm_bay.vm("create", "host", "--image", "debian", "--disk", "3G", "--memory", "768M",
              "--cpus", "1", "--start")  # fmt: skip
    (vm_bay.folder / "package.tar.gz").write_bytes(packed())
    vm_bay.vm("wait", "host", "--for", "ssh", "--timeout", BOOT_SECONDS)
    done = vm_bay.program("vm", "cp", str(vm_bay.folder / "package.tar.gz"), "host:/tmp")
    assert done.returncode == 0, done.stderr
    vm_bay.ssh("host", "sudo mkdir /opt/drivebay && sudo tar -C /opt/drivebay -xzf "
                       "/tmp/package.tar.gz")  # fmt: skip
    return vm_bay


def packed() -> bytes:
    """The Python part of our package and what it imports, for the guest's own Python."""
    import pyroute2
    import ruamel.yaml
    import tomlkit

    import drivebay

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
        for module in (drivebay, pyroute2, tomlkit):
            assert module.__file__ is not None
            folder = Path(module.__file__).parent
            tar.add(folder, folder.name, filter=_python_only)
        yaml = Path(ruamel.yaml.__file__).parent
        tar.add(yaml, "ruamel/yaml", filter=_python_only)
    return out.getvalue()


def _python_only(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return member if member.isdir() or member.name.endswith(".py") else None


def shown(host: VmBay) -> str:
    """The guest's network, once networkd is done with it."""
    busy = 'networkctl list --no-legend | grep -Eq "routable +configuring"'
    wait = f"timeout 60 sh -c 'while {busy}; do sleep 1; done'"
    return re.sub(r" +", " ", host.ssh("host", f"{wait}; {SHOW}", timeout_s=300))


def test_not_confirmed_the_host_is_as_it_was(host: VmBay) -> None:
    before = shown(host)
    (uplink,) = re.findall(r"default via \S+ dev (\w+)", before)
    plan = host.ssh("host", f"{COMMAND} plan {uplink}", timeout_s=300)
    assert "configured by netplan" in plan
    assert f"address {ADDRESS}" in plan
    # This very login goes on while its address moves. The seconds count from the guardian's start,
    # and in a slow guest the moves alone take more than ten.
    host.ssh("host", f"{COMMAND} apply {uplink} --yes --seconds 60", timeout_s=300)
    gone = "! ip link show br0 2>/dev/null"
    host.ssh("host", f"timeout 200 sh -c 'until {gone}; do sleep 1; done'", timeout_s=300)
    assert shown(host) == before
    assert host.ssh("host", "ls /run/systemd/network | grep drivebay || true") == ""


def test_confirmed_by_another_login_the_bridge_has_the_address_after_a_boot(host: VmBay) -> None:
    (uplink,) = re.findall(r"default via \S+ dev (\w+)", shown(host))
    host.ssh("host", f"{COMMAND} apply {uplink} --yes --seconds 300", timeout_s=300)
    said = host.ssh("host", f"{COMMAND} confirm {uplink}", timeout_s=300)
    assert "written: /etc/netplan/50-cloud-init.yaml" in said
    assert "written: /etc/cloud/cloud.cfg.d/99-drivebay-network.cfg" in said
    at_once = shown(host)
    _bridge_has_it(at_once, uplink)
    host.vm("restart", "host", "--timeout", "300")
    host.vm("wait", "host", "--for", "ssh", "--timeout", BOOT_SECONDS)
    _bridge_has_it(shown(host), uplink)


def test_undo_puts_files_and_devices_back_even_after_a_boot(host: VmBay) -> None:
    (uplink,) = re.findall(r"Link \d+ \((enp\w+)\)", shown(host))
    host.ssh("host", f"{COMMAND} undo {uplink}", timeout_s=300)
    text = shown(host)
    assert re.search(rf"^{uplink} UP {re.escape(ADDRESS)}", text, re.MULTILINE), text
    assert "br0" not in text
    files = host.ssh("host", "cat /etc/netplan/*; find /etc/systemd/network /etc/cloud/cloud.cfg.d")
    assert "dhcp4: true" in files
    assert "bridges" not in files
    assert not re.search(r"99-drivebay|10-netplan-br0", files)


def _bridge_has_it(text: str, uplink: str) -> None:
    assert re.search(rf"^br0 UP {re.escape(ADDRESS)}", text, re.MULTILINE), text
    assert f"{uplink} UP" not in text, "it has no address"
    assert "default via 10.0.2.2 dev br0" in text
    assert re.search(r"br0 bridge routable configured", text), text
    assert re.search(r"\(br0\): 10.0.2.3", text), "its name server"
