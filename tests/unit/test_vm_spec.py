"""vm.toml: what is read, what is refused, and what a change leaves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from drivebay.errors import UsageError
from drivebay.vm.spec import (
    Boot,
    CloudInit,
    DiskSpec,
    Forward,
    NetSpec,
    ShareSpec,
    VmSpec,
    check_vm_name,
    read_forward,
)
from drivebay.vm.spec_file import read_spec, write_spec
from drivebay.vm.user_net import user_net

MAC = "52:54:00:12:34:56"
SMALL = 'uuid = "u"\nmachine = "pc-q35-7.2"\nmemory = "1G"\ncpus = 2\n'
FULL = VmSpec(
    name="web",
    uuid="u",
    machine="pc-q35-7.2",
    memory=1536 << 20,
    cpus=4,
    firmware="uefi",
    bus="scsi",
    image="debian-12",
    iso="/srv/debian.iso",
    autostart=True,
    lab="shop",
    qemu="/opt/qemu",
    qemu_args=("-device", "virtio-rng-pci"),
    boot=Boot("/boot/vmlinuz", "/boot/initrd", "console=ttyS0"),
    disks=(
        DiskSpec("system", bdev="default/web", made=True),
        DiskSpec("data", bdev="db", shared=True, bus="nvme"),
        DiskSpec("old", overlay="old.qcow2", made=True),
    ),
    nets=(
        NetSpec(
            "user",
            MAC,
            (Forward(2222, 22), Forward(80, 80, "0.0.0.0")),
            "10.0.2.50/24",
            "10.0.2.2",
            ("10.0.2.3",),
        ),
        NetSpec(
            "user",
            "52:54:00:00:00:02",
            (Forward(53, 53, guest_address="192.168.76.20", protocol="udp"),),
            restrict=True,
            subnet="192.168.76.0/24",
            dhcp_start="192.168.76.20",
            model="e1000",
        ),
        NetSpec("network", "52:54:00:00:00:03", network="lan"),
        NetSpec("bridge", "52:54:00:00:00:04", bridge="br0"),
        NetSpec(
            "tap", "52:54:00:00:00:05", ifname="tap1", script="/etc/up", downscript="/etc/down"
        ),
    ),
    shares=(ShareSpec("/srv/files", "files"), ShareSpec("/srv/src", "src.1", True)),
    cloud_init=CloudInit("i-1", "web", "admin", ("ssh-ed25519 A",), "$6$x", ("curl",), "user-data"),
)


@pytest.mark.parametrize("spec", [FULL, read_spec("tiny", SMALL)], ids=["full", "small"])
def test_what_is_written_is_read_back(spec: VmSpec) -> None:
    assert read_spec(spec.name, write_spec(spec)) == spec


def test_a_change_keeps_comments_order_and_spelling() -> None:
    before = (
        "# the shop's web server\ncpus = 2  # do not go below\n"
        'uuid = "u"\nmachine = "pc-q35-7.2"\nmemory = "2048M"\n\n'
        '[[disk]]\nname = "system"\nbdev = "default/web" # the old one\n\n'
        '[[disk]]\nname = "data"\nbdev = "data"\n'
    )
    spec = read_spec("web", before)
    changed = replace(spec, cpus=4, disks=(*spec.disks[:1], DiskSpec("more", bdev="more")))
    after = write_spec(changed, before)
    assert read_spec("web", after) == changed
    assert after.startswith("# the shop's web server\ncpus = 4  # do not go below\n")
    assert '"default/web" # the old one' in after
    assert "data" not in after


def test_writing_the_same_changes_nothing() -> None:
    written = write_spec(read_spec("web", SMALL))
    before = "# mine\n" + written.replace('"1G"', '"1024M"  # enough')
    assert write_spec(read_spec("web", before), before) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cpus = ", "is not TOML"),
        (SMALL.replace("cpus = 2", ""), "has no 'cpus'"),
        (SMALL.replace("cpus = 2", 'cpus = "2"'), "'cpus' is '2', and should be a number"),
        (SMALL.replace("cpus = 2", "cpus = true"), "'cpus' is True, and should be a number"),
        (SMALL.replace("cpus = 2", "cpus = 0"), "from 1 to 256"),
        (SMALL.replace("1G", "1000k"), "whole MiB"),
        (SMALL.replace("1G", "much"), "'much' is not a size"),
        (SMALL + 'firmware = "coreboot"', "one of bios, uefi"),
        (SMALL.replace("1G", "383M") + 'firmware = "uefi"', "UEFI needs 384 MiB"),
        (SMALL + 'colour = "red"', "unknown: 'colour'"),
        (SMALL + 'iso = "debian.iso"', "'iso' is 'debian.iso', and should begin with '/'"),
        (SMALL + '[[share]]\ndirectory = "src"\ntag = "a"', "should begin with '/'"),
        (SMALL + '[[share]]\ndirectory = "/src"\ntag = "a b"', "can't be a tag"),
        (SMALL + 2 * '[[share]]\ndirectory = "/src"\ntag = "a"\n', "two shares of one tag: a, a"),
        (SMALL + "qemu_args = [1]", "a list of texts"),
        (SMALL + 'disk = ["a"]', r"write \[\[disk\]\]"),
        (SMALL + '[[disk]]\nname = "a"', "either 'bdev' or 'overlay'"),
        (SMALL + '[[disk]]\nname = "a,b"\nbdev = "x"', "can't be the name of a disk"),
        (SMALL + '[[disk]]\nname = "a"\noverlay = "../x"', "a file's name in the VM's folder"),
        (SMALL + 2 * '[[disk]]\nname = "a"\nbdev = "x"\n', "two disks of one name"),
        (SMALL + '[[disk]]\nname = "a"\nbdev = "x"\nsize = 3', r"\[\[disk\]\] 1 has .*'size'"),
        (SMALL + '[[net]]\nmac = "53:54:00:12:34:56"', "no MAC address of one interface"),
        (SMALL + f'[[net]]\nmac = "{MAC}"\nkind = "wifi"', "one of user"),
        (SMALL + f'[[net]]\nmac = "{MAC}"\nforward = ["22"]', "is no port forward"),
        (SMALL + 2 * f'[[net]]\nmac = "{MAC}"\n', "two interfaces of one MAC address"),
        (SMALL + '[boot]\ninitrd = "x"', "has no 'kernel'"),
        (SMALL + '[cloud_init]\nhostname = "x"', "has no 'instance_id'"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_spec("web", text)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ('kind = "network"', "the kind 'network' needs 'network'"),
        ('kind = "tap"\nscript = "/up"', "the kind 'tap' needs 'ifname'"),
        ('bridge = "br0"', "'bridge' goes with the kind 'bridge', and .* is of kind 'user'"),
        ('kind = "bridge"\nbridge = "br0"\nrestrict = true', "'restrict' goes with .* 'user'"),
        ('kind = "network"\nnetwork = "lan"\nforward = ["1:2"]', "'forward' goes with"),
        ('kind = "bridge"\nbridge = "a/b"', "'a/b' can't be the name of an interface"),
        ('kind = "tap"\nifname = "sixteen-letters0"', "can't be the name of an interface"),
        ('kind = "tap"\nifname = "t0"\nscript = "up"', "'script' is 'up', and should begin"),
        ('model = "rtl8139"', "one of virtio, e1000"),
        ('subnet = "192.168.76.0"', "'192.168.76.0' is no IPv4 network"),
        ('subnet = "fd00::/64"', "IPv4 only"),
        ('subnet = "192.168.76.1/24"', "is written 192.168.76.0/24"),
        ('subnet = "192.168.76.0/30"', "from /8 to /29"),
        ('subnet = "192.168.76.0/24"\ndhcp_start = "10.0.2.15"', "no free address of the subnet"),
        ('dhcp_start = "10.0.2.3"', "no free address of the subnet"),
        ('forward = ["2222:10.0.3.15:22"]', "which is not in the guest's network 10.0.2.0/24"),
    ],
)
def test_what_is_refused_of_an_interface(keys: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_spec("web", f'{SMALL}[[net]]\nmac = "{MAC}"\n{keys}\n')


def test_the_addresses_of_a_user_network_follow_its_subnet() -> None:
    for subnet, gateway, dns, dhcp in (
        (None, "10.0.2.2", "10.0.2.3", "10.0.2.15"),
        ("192.168.76.0/24", "192.168.76.2", "192.168.76.3", "192.168.76.15"),
        ("10.1.0.0/16", "10.1.0.2", "10.1.0.3", "10.1.0.15"),
        ("10.0.0.8/29", "10.0.0.10", "10.0.0.11", "10.0.0.12"),
    ):
        found = user_net(NetSpec("user", MAC, subnet=subnet))
        assert (str(found.gateway), str(found.dns), str(found.dhcp_start)) == (gateway, dns, dhcp)


def test_forwards() -> None:
    assert read_forward("2222:22") == Forward(2222, 22)
    assert read_forward("0.0.0.0:80:8080") == Forward(80, 8080, "0.0.0.0")
    assert read_forward("udp:53:10.0.2.9:5353") == Forward(
        53, 5353, guest_address="10.0.2.9", protocol="udp"
    )
    for text in ("127.0.0.1:80:10.0.2.9:80", "udp:0.0.0.0:53:53"):
        assert str(read_forward(text)) == text
    for text in ("", "22", ":22", "0:22", "22:65536", "a:b", "host:1:2", "1:2:3:4", "\uff11:2"):
        with pytest.raises(UsageError):
            read_forward(text)


def test_names() -> None:
    for name in ("a", "web-1", "A" * 40):
        check_vm_name(name)
    for name in ("", "-a", "a-", "a b", "a/b", "..", "a.b", "ü", "A" * 41, "a\n"):
        with pytest.raises(UsageError, match="can't be the name of a VM"):
            check_vm_name(name)


def test_a_key_that_is_nearly_right_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        read_spec("tiny", SMALL + 'imagee = "x"')
    assert caught.value.hint == "is 'image' meant?"
