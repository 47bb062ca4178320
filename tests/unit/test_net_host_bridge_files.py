"""A confirmed bridge in the host's configuration: each writer is judged by its own reader.

The readers work on folders of the test and change nothing: `netplan generate --root-dir`,
`ifup --no-act`, `nmcli --offline`.
"""

from __future__ import annotations

import configparser
import subprocess
from pathlib import Path

import pytest

from drivebay.errors import HostError, StateError
from drivebay.net.hostbridge import managers
from drivebay.net.hostbridge.confirmation import files_for, wanted
from drivebay.net.hostbridge.managers import Manager, find_manager
from drivebay.net.hostbridge.state import Before, LinkState
from drivebay.net.hostbridge.writers.files import (
    NewFile,
    kept_beside,
    put_back_files,
    write_files,
)
from tests.unit.nmcli import nmcli

MAC = "52:54:00:12:34:56"
UPLINK = LinkState("eno1", 2, MAC, 1400, True)
VLAN = LinkState("eno1.5", 7, MAC, 1400, True, vlan=5)
BEFORE = Before("br0", UPLINK, [VLAN], [], [], "boot", 0.0)
NETPLAN = Manager(managers.NETPLAN, managers.NETWORKD,
                  "/run/systemd/network/10-netplan-eno1.network", identity=77)  # fmt: skip


def put(root: Path, name: str, text: str, mode: int = 0o600) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def ran(*command: str, stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout + done.stderr


def written(root: Path, manager: Manager) -> list[NewFile]:
    files = files_for(BEFORE, manager, root)
    write_files(files, lambda noted: None)
    return files


# ---- netplan ------------------------------------------------------------------------------------

STATIC = """\
# Written by hand.
network:
  version: 2
  ethernets:
    # the uplink
    eno1:
      match: {macaddress: "52:54:00:12:34:56"}  # by MAC
      set-name: eno1
      addresses: [10.0.0.2/24]
      gateway4: 10.0.0.1
      nameservers: {addresses: [1.1.1.1], search: [lan]}
      mtu: 1400
    other:
      dhcp4: true
  vlans:
    eno1.5: {id: 5, link: eno1, dhcp4: true}
"""
MORE = """\
network:
  ethernets:
    eno1:
      addresses: [10.0.0.3/24, "fd00::2/64"]
      routes:
        - {to: default, via: "fd00::1"}
"""


def generated(root: Path) -> dict[str, str]:
    """What netplan makes of it for networkd."""
    ran("netplan", "generate", "--root-dir", str(root))
    folder = root / "run/systemd/network"
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_netplan_gives_the_bridge_what_the_uplink_had(tmp_path: Path) -> None:
    one = put(tmp_path, "etc/netplan/50-cloud-init.yaml", STATIC)
    put(tmp_path, "etc/netplan/60-more.yaml", MORE)
    files = files_for(BEFORE, NETPLAN, tmp_path)
    assert [file.path.name for file in files] == [
        "50-cloud-init.yaml", "60-more.yaml", "drivebay.conf",
    ]  # fmt: skip
    write_files(files, lambda noted: None)
    text = one.read_text()
    assert "# Written by hand." in text
    assert '      match: {macaddress: "52:54:00:12:34:56"}  # by MAC\n' in text
    assert "gateway4" not in text
    found = generated(tmp_path)
    bridge = found["10-netplan-br0.network"]
    for line in ("Address=10.0.0.2/24", "Address=10.0.0.3/24", "Address=fd00::2/64",
                 "DNS=1.1.1.1", "MTUBytes=1400", "VLAN=eno1.5", "Gateway=10.0.0.1",
                 "Gateway=fd00::1", "Destination=0.0.0.0/0", "Destination=::/0"):  # fmt: skip
        assert line in bridge, line
    uplink = found["10-netplan-eno1.network"]
    assert "Bridge=br0" in uplink
    assert "\nAddress=" not in uplink
    device = found["10-netplan-br0.netdev"]
    assert f"MACAddress={MAC}" in device
    assert "STP=false" in device
    assert "DHCP=ipv4" in found["10-netplan-other.network"], "others are as they were"
    drop_in = tmp_path / "etc/systemd/network/10-netplan-br0.network.d/drivebay.conf"
    assert "IAID=77" in drop_in.read_text()


def test_netplan_with_dhcp_asks_for_the_bridge(tmp_path: Path) -> None:
    text = "network:\n  version: 2\n  ethernets:\n    eno1: {dhcp4: true, dhcp6: true}\n"
    put(tmp_path, "etc/netplan/01.yaml", text)
    put(tmp_path, "etc/cloud/cloud.cfg", "")
    written(tmp_path, Manager(managers.NETPLAN, managers.NETWORKD))
    found = generated(tmp_path)
    assert "DHCP=yes" in found["10-netplan-br0.network"]
    assert "DHCP" not in found["10-netplan-eno1.network"]
    switch = tmp_path / "etc/cloud/cloud.cfg.d/99-drivebay-network.cfg"
    assert "network: {config: disabled}" in switch.read_text()


def test_netplan_of_networkmanager(tmp_path: Path) -> None:
    text = (
        "network:\n  version: 2\n  renderer: NetworkManager\n  ethernets:\n"
        "    eno1: {dhcp4: true}\n"
    )
    put(tmp_path, "etc/netplan/01.yaml", text)
    written(tmp_path, Manager(managers.NETPLAN, managers.NETWORK_MANAGER))
    ran("netplan", "generate", "--root-dir", str(tmp_path))
    profiles = tmp_path / "run/NetworkManager/system-connections"
    bridge = (profiles / "netplan-br0.nmconnection").read_text()
    assert "type=bridge" in bridge
    assert "method=auto" in bridge
    assert "master=br0" in (profiles / "netplan-eno1.nmconnection").read_text()


@pytest.mark.parametrize(
    ("place", "text", "said"),
    [
        ("etc/netplan/a.yaml", "network: [", "can't read"),
        ("etc/netplan/a.yaml", "network:\n  ethernets: {eth7: {dhcp4: true}}\n", "no file of"),
        ("etc/netplan/a.yaml", "- 1\n", "no file of netplan"),
        ("run/netplan/a.yaml", STATIC, "made anew at each start"),
    ],
)
def test_netplan_files_that_do_not_fit_are_refused(
    tmp_path: Path, place: str, text: str, said: str
) -> None:
    put(tmp_path, place, text)
    with pytest.raises(StateError, match=said):
        files_for(BEFORE, NETPLAN, tmp_path)


# ---- networkd -----------------------------------------------------------------------------------

NETWORKD_FILE = f"""\
[Match]
Name=en*

[Link]
MACAddress={MAC}
MTUBytes=1400

[Network]
Address=10.0.0.2/24
DHCP=no
VLAN=eno1.5

[Route]
Gateway=10.0.0.1
"""


def test_networkd_has_a_device_a_network_and_the_uplink_in_it(tmp_path: Path) -> None:
    old = put(tmp_path, "etc/systemd/network/20-wired.network", NETWORKD_FILE)
    put(tmp_path, "etc/systemd/network/20-wired.network.d/x.conf", "[Network]\nDNS=1.1.1.1\n")
    manager = Manager(managers.NETWORKD, managers.NETWORKD,
                      "/etc/systemd/network/20-wired.network", identity=77)  # fmt: skip
    files = {file.path.name: file.text or "" for file in files_for(BEFORE, manager, tmp_path)}
    assert sorted(files) == [
        "00-drivebay-br0.netdev", "00-drivebay-br0.network", "00-drivebay-eno1.network",
    ]  # fmt: skip
    bridge = files["00-drivebay-br0.network"]
    assert bridge.startswith("[Match]\nName=br0\n")
    assert bridge.count("[Match]") == 1
    assert MAC not in bridge, "the device's file has it"
    for line in ("Address=10.0.0.2/24", "VLAN=eno1.5", "Gateway=10.0.0.1", "DNS=1.1.1.1",
                 "IAID=77", "MTUBytes=1400"):  # fmt: skip
        assert line in bridge.splitlines(), line
    assert f"MACAddress={MAC}" in files["00-drivebay-br0.netdev"]
    assert "Bridge=br0" in files["00-drivebay-eno1.network"]
    assert old.read_text() == NETWORKD_FILE


def test_a_networkd_file_that_would_come_first_is_named(tmp_path: Path) -> None:
    put(tmp_path, "etc/systemd/network/00-a.network", NETWORKD_FILE)
    manager = Manager(managers.NETWORKD, managers.NETWORKD, "/etc/systemd/network/00-a.network")
    with pytest.raises(StateError, match="comes before any file of ours"):
        files_for(BEFORE, manager, tmp_path)


# ---- ifupdown -----------------------------------------------------------------------------------

INTERFACES = """\
source /etc/network/interfaces.d/*
auto lo
iface lo inet loopback
"""
STANZAS = """\
# eno1 is the uplink
allow-hotplug eno1 eth9
iface eno1 inet static
    address 10.0.0.2/24
    gateway 10.0.0.1
    up ip route add 10.5.0.0/16 via 10.0.0.9 dev eno1
iface eno1 inet6 static
    address fd00::2/64

auto eno1.5
iface eno1.5 inet manual
    vlan-raw-device eno1
iface eno1x inet manual
"""


def test_ifupdown_brings_the_bridge_up_as_the_uplink_was(tmp_path: Path) -> None:
    main = put(tmp_path, "etc/network/interfaces", INTERFACES)
    part = put(tmp_path, "etc/network/interfaces.d/uplink", STANZAS)
    written(tmp_path, Manager(managers.IFUPDOWN))
    assert main.read_text() == INTERFACES
    text = part.read_text()
    assert text.startswith("# eno1 is the uplink\nallow-hotplug eth9\nauto br0\n")
    assert "    vlan-raw-device br0\n" in text
    assert "iface eno1x inet manual\n" in text
    # ifup's `source` looks below /, and so the part is read by itself.
    said = ran(
        "ifup", "--no-act", "--verbose", "-i", str(part), "--state-dir", str(tmp_path), "br0"
    )
    steps = [line for line in said.splitlines() if line.lstrip().startswith("ip ")]
    assert f"ip link add br0 address {MAC} type bridge stp_state 0 forward_delay 0" in steps[0]
    assert "ip link set eno1 master br0 up" in steps
    assert any("ip addr add 10.0.0.2/255.255.255.0" in step and "dev br0" in step for step in steps)
    assert any("ip route add default via 10.0.0.1" in step for step in steps)
    assert "ip route add 10.5.0.0/16 via 10.0.0.9 dev br0" in steps
    assert any("fd00::2/64" in line and "br0" in line for line in said.splitlines())
    assert said.count("ip link add br0") == 1, "by the first of the two stanzas"


def test_ifupdown_uses_bridge_utils_where_they_are(tmp_path: Path) -> None:
    path = put(tmp_path, "etc/network/interfaces", "auto eno1\niface eno1 inet dhcp\n")
    put(tmp_path, "etc/network/if-pre-up.d/bridge", "", 0o755)
    written(tmp_path, Manager(managers.IFUPDOWN))
    assert path.read_text() == (
        "auto br0\niface eno1 inet manual\n\niface br0 inet dhcp\n    bridge_ports eno1\n"
        f"    bridge_stp off\n    bridge_fd 0\n    bridge_hw {MAC}\n"
    )
    ran("ifup", "--no-act", "-i", str(path), "--state-dir", str(tmp_path), "br0")


# ---- NetworkManager -----------------------------------------------------------------------------

PROFILE = """\
[connection]
id=Wired
uuid=5ea2d7ee-6e5c-4b9f-9a4f-000000000001
type=ethernet
interface-name=eno1
zone=public

[ethernet]
wake-on-lan=64

[ipv4]
method=manual
address1=10.0.0.2/24,10.0.0.1
dns=1.1.1.1;

[ipv6]
method=auto
"""


def test_networkmanager_has_a_profile_of_the_bridge_and_one_of_its_port(tmp_path: Path) -> None:
    name = "etc/NetworkManager/system-connections/Wired.nmconnection"
    old = put(tmp_path, name, PROFILE)
    manager = Manager(managers.NETWORK_MANAGER, managers.NETWORK_MANAGER, f"/{name}", "5ea2")
    written(tmp_path, manager)
    assert not old.exists()
    assert kept_beside(old).read_text() == PROFILE
    read = {}
    for device in ("br0", "eno1"):
        path = old.with_name(f"drivebay-{device}.nmconnection")
        assert path.stat().st_mode & 0o777 == 0o600, "NetworkManager reads no other"
        # It reads the profile, and writes what it has understood.
        text = ran(nmcli(), "--offline", "connection", "modify", "connection.autoconnect", "yes",
                   stdin=path.read_text())  # fmt: skip
        read[device] = configparser.ConfigParser(interpolation=None)
        read[device].read_string(text)
    bridge, port = read["br0"], read["eno1"]
    assert bridge["connection"]["type"] == "bridge"
    assert bridge["connection"]["zone"] == "public"
    assert bridge["bridge"]["mac-address"] == MAC
    assert bridge["bridge"]["stp"] == "false"
    assert bridge["ethernet"]["mtu"] == "1400"
    assert bridge["ipv4"]["address1"] == "10.0.0.2/24,10.0.0.1"
    assert bridge["ipv4"]["dns"] == "1.1.1.1;"
    assert (port["connection"]["master"], port["connection"]["slave-type"]) == ("br0", "bridge")
    assert port["ethernet"]["wake-on-lan"] == "64"
    assert "ipv4" not in port


def test_a_profile_that_is_nowhere_is_said(tmp_path: Path) -> None:
    manager = Manager(managers.NETWORK_MANAGER, managers.NETWORK_MANAGER, "", "5ea2")
    with pytest.raises(StateError, match="is not in a file"):
        files_for(BEFORE, manager, tmp_path)


# ---- whose configuration it is ------------------------------------------------------------------


def test_nobody_is_told_from_somebody(tmp_path: Path) -> None:
    assert find_manager(UPLINK, tmp_path) == Manager()
    assert files_for(BEFORE, Manager(), tmp_path) == []
    assert "a bridge 'br0' with the MAC 52:54:00:12:34:56" in wanted(BEFORE)
    put(tmp_path, "etc/network/interfaces", "iface eno1 inet dhcp\n")
    assert find_manager(UPLINK, tmp_path).name == managers.IFUPDOWN
    put(tmp_path, "run/NetworkManager/devices/2", "[device]\nconnection-uuid=5ea2\n")
    put(tmp_path, "etc/NetworkManager/system-connections/x", "[connection]\nuuid=5ea2\n")
    assert find_manager(UPLINK, tmp_path) == Manager(
        managers.NETWORK_MANAGER, managers.NETWORK_MANAGER,
        "/etc/NetworkManager/system-connections/x", "5ea2",
    )  # fmt: skip
    links = "ADMIN_STATE=configured\nNETWORK_FILE=/run/systemd/network/10-netplan-eno1.network\n"
    put(tmp_path, "run/systemd/netif/links/2", links)
    put(tmp_path, "run/systemd/netif/leases/2", "CLIENTID=ff0000004d00020000ab11\n")
    assert find_manager(UPLINK, tmp_path) == NETPLAN
    put(tmp_path, "run/systemd/netif/links/2", links.replace("configured", "unmanaged"))
    assert find_manager(UPLINK, tmp_path).name == managers.NETWORK_MANAGER


# ---- files --------------------------------------------------------------------------------------


def test_files_are_put_back_with_their_mode(tmp_path: Path) -> None:
    old, new, gone = tmp_path / "old", tmp_path / "new", tmp_path / "gone"
    put(tmp_path, "old", "was", 0o640)
    put(tmp_path, "gone", "was")
    noted: list[dict[str, object]] = []

    def note(written: list[dict[str, object]]) -> None:
        noted[:] = [dict(each) for each in written]

    below = tmp_path / "folder/below"
    write_files(
        [NewFile(old, "is"), NewFile(new, "is", 0o600), NewFile(gone, None), NewFile(below, "is")],
        note,
    )
    assert below.read_text() == "is"
    assert (old.read_text(), old.stat().st_mode & 0o777) == ("is", 0o640)
    assert new.stat().st_mode & 0o777 == 0o600
    assert not gone.exists()
    for _ in range(2):
        put_back_files(noted)
        assert (old.read_text(), old.stat().st_mode & 0o777) == ("was", 0o640)
        assert gone.read_text() == "was"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["gone", "old"]


def test_if_one_file_can_not_be_written_all_are_as_before(tmp_path: Path) -> None:
    old = put(tmp_path, "old", "was")
    put(tmp_path, "file", "")
    with pytest.raises(HostError):
        write_files(
            [NewFile(old, "is"), NewFile(tmp_path / "file/below", "is")], lambda noted: None
        )
    assert old.read_text() == "was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "old"]
