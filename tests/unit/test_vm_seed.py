"""vm/seed.py: what a guest reads from its NoCloud disk, and what it must never be given."""

from __future__ import annotations

import email
import io
import json
from dataclasses import replace
from email import policy
from typing import Any

import pycdlib
import pytest

from drivebay.errors import UsageError
from drivebay.vm.seed import HostKey, check_cloud_init, check_net, seed_iso
from drivebay.vm.spec import CloudInit, NetSpec, ShareSpec, VmSpec

LOGIN = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEXAMPLEEXAMPLE drivebay"
OTHER = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOTHEROTHEROTHER jo at home ☕"
HOST = HostKey("-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n-----END…\n", "ssh-ed25519 AAAAhost\n")
HASH = "$6$salt$" + "x" * 86
CLOUD_INIT = CloudInit(instance_id="drivebay-7", hostname="web", user="joe", ssh_keys=(OTHER,))
NET = NetSpec("user", "52:54:00:12:34:56")


def machine(*nets: NetSpec, **cloud_init: Any) -> VmSpec:
    return VmSpec(
        name="web",
        uuid="6f2d0c4e-3c53-4d8a-9d0f-111122223333",
        machine="pc-q35-7.2",
        memory=1 << 30,
        cpus=1,
        nets=nets or (NET,),
        cloud_init=replace(CLOUD_INIT, **cloud_init),
    )


def files(iso: bytes) -> dict[str, str]:
    """What is on the disk: the Rock Ridge names, as Linux mounts it."""
    image = pycdlib.PyCdlib()
    image.open_fp(io.BytesIO(iso))
    assert image.pvd.volume_identifier.strip() == b"cidata"
    found = {}
    for child in image.list_children(rr_path="/"):
        if child is None or child.is_dir():
            continue
        name = child.rock_ridge.name().decode()
        content = io.BytesIO()
        image.get_file_from_iso_fp(content, rr_path=f"/{name}")
        again = io.BytesIO()
        image.get_file_from_iso_fp(again, joliet_path=f"/{name}")
        assert again.getvalue() == content.getvalue()
        found[name] = content.getvalue().decode()
    image.close()
    return found


def seed(spec: VmSpec, user_data: str | None = None) -> dict[str, str]:
    return files(seed_iso(spec, LOGIN + "\n", HOST, user_data))


def cloud_config(spec: VmSpec) -> dict[str, Any]:
    first, _, rest = seed(spec)["user-data"].partition("\n")
    assert first == "#cloud-config"
    found = json.loads(rest)
    assert isinstance(found, dict)
    return found


def test_the_disk_has_the_three_files_and_no_more() -> None:
    assert sorted(seed(machine())) == ["meta-data", "network-config", "user-data"]


def test_meta_data_is_read_before_the_network_is_up() -> None:
    found = json.loads(seed(machine())["meta-data"])
    assert found.pop("instance-id").startswith("drivebay-7-")
    assert found == {"local-hostname": "web", "dsmode": "local"}


def instance_id(spec: VmSpec, user_data: str | None = None) -> str:
    found = json.loads(seed(spec, user_data)["meta-data"])["instance-id"]
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize(
    "change",
    [
        {"user": "ann"},
        {"ssh_keys": ()},
        {"password_hash": HASH},
        {"packages": ("fio",)},
        {"instance_id": "drivebay-8"},
    ],
)
def test_what_is_done_once_is_done_again_after_a_change(change: dict[str, Any]) -> None:
    assert instance_id(machine(**change)) != instance_id(machine())
    once = cloud_config(machine(**change))["bootcmd"] == cloud_config(machine())["bootcmd"]
    assert once == ("instance_id" not in change)  # the machine-id stays


def test_other_user_data_is_read_again() -> None:
    assert len({instance_id(machine(), own) for own in (None, "#!/bin/sh\n", "#!/bin/ash\n")}) == 3


def test_what_counts_at_each_start_does_nothing_again() -> None:
    other = machine(replace(NET, address="10.0.2.50/24"), hostname="shop")
    assert instance_id(other) == instance_id(machine())


def test_another_version_of_the_tool_does_nothing_again() -> None:
    """If this fails, all guests make their users and host keys anew at their next start."""
    assert instance_id(machine(password_hash=HASH, packages=("fio",))) == "drivebay-7-2bef7889"


def test_the_user_logs_in_with_the_vms_key_and_their_own() -> None:
    (user,) = cloud_config(machine())["users"]
    assert user["name"] == "joe"
    assert user["ssh_authorized_keys"] == [LOGIN, OTHER]
    assert user["sudo"] == "ALL=(ALL) NOPASSWD:ALL"
    assert "lock_passwd" not in user
    assert "hashed_passwd" not in user


def test_yaml_reads_what_json_means() -> None:
    """A pair of escaped surrogates is one sign in JSON, and two wrong ones in YAML."""
    assert "jo 🔑" in seed(machine(ssh_keys=(LOGIN + " jo 🔑",)))["user-data"]


def test_a_password_unlocks_the_user() -> None:
    (user,) = cloud_config(machine(password_hash=HASH))["users"]
    assert user["hashed_passwd"] == HASH
    assert user["lock_passwd"] is False


def test_the_guests_host_key_is_the_one_we_know() -> None:
    config = cloud_config(machine())
    assert config["ssh_deletekeys"] is True
    assert config["ssh_keys"] == {
        "ed25519_private": HOST.private,
        "ed25519_public": HOST.public.strip(),
    }


def test_packages_are_installed_only_when_there_are_some() -> None:
    assert "package_update" not in cloud_config(machine())
    config = cloud_config(machine(packages=("fio", "libfoo-dev:i386", "g++")))
    assert config["packages"] == ["fio", "libfoo-dev:i386", "g++"]
    assert config["package_update"] is True


def test_the_machine_id_is_made_anew_once_for_an_instance() -> None:
    (command,) = cloud_config(machine())["bootcmd"]
    assert command[:5] == ["cloud-init-per", "once", "machine-id-drivebay-7", "sh", "-c"]


def test_shares_are_mounted_at_each_start_and_do_nothing_again() -> None:
    sharing = replace(machine(), shares=(ShareSpec("/src", "src"), ShareSpec("/d", "d", True)))
    assert instance_id(sharing) == instance_id(machine())
    _, *mounts = cloud_config(sharing)["bootcmd"]
    assert [command[:2] for command in mounts] == [["sh", "-c"]] * 2
    assert [command[2] for command in mounts] == [
        f"mkdir -p /mnt/{tag} && mount -t virtiofs {tag} /mnt/{tag} || true" for tag in ("src", "d")
    ]


def test_a_network_config_counts_at_each_start() -> None:
    assert "boot" in cloud_config(machine())["updates"]["network"]["when"]


# ---- network ------------------------------------------------------------------------------------


def ethernets(*nets: NetSpec) -> dict[str, Any]:
    config = json.loads(seed(machine(*nets))["network-config"])
    assert config["version"] == 2
    found = config["ethernets"]
    assert isinstance(found, dict)
    return found


def test_interfaces_are_found_by_their_addresses() -> None:
    second = NetSpec("user", "52:54:00:00:00:02", dns=("9.9.9.9", "2620:fe::fe"))
    assert ethernets(NET, second) == {
        "net0": {
            "match": {"macaddress": NET.mac},
            "dhcp4": True,
            "dhcp4-overrides": {"route-metric": 100},
        },
        "net1": {
            "match": {"macaddress": "52:54:00:00:00:02"},
            "dhcp4": True,
            "dhcp4-overrides": {"route-metric": 200},
            "nameservers": {"addresses": ["9.9.9.9", "2620:fe::fe"]},
        },
    }


def test_the_default_route_of_the_first_interface_counts() -> None:
    first = replace(NET, address="10.0.2.50/24", gateway="10.0.2.2")
    second = NetSpec("network", "52:54:00:00:00:02", (), "10.9.0.5/24", "10.9.0.1", network="lan")
    found = ethernets(first, second)
    assert found["net0"]["routes"] == [{"to": "0.0.0.0/0", "via": "10.0.2.2", "metric": 100}]
    assert found["net1"]["routes"] == [{"to": "0.0.0.0/0", "via": "10.9.0.1", "metric": 200}]


def test_one_interface_by_dhcp_is_told_nothing_else() -> None:
    assert ethernets(NET) == {"net0": {"match": {"macaddress": NET.mac}, "dhcp4": True}}


def test_a_static_address_has_its_route_spelled_out() -> None:
    net = replace(NET, address="10.0.2.50/24", gateway="10.0.2.2", dns=("10.0.2.3",))
    assert ethernets(net)["net0"] == {
        "match": {"macaddress": NET.mac},
        "addresses": ["10.0.2.50/24"],
        "routes": [{"to": "0.0.0.0/0", "via": "10.0.2.2"}],
        "nameservers": {"addresses": ["10.0.2.3"]},
    }


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"address": "10.0.2.50"}, "network's size"),
        ({"address": "10.0.2.50/33"}, "neither 'dhcp' nor"),
        ({"address": "DHCP"}, "neither 'dhcp' nor"),
        ({"address": "fe80::1/64"}, "neither 'dhcp' nor"),
        ({"address": "10.0.2.0/24"}, "the network itself"),
        ({"address": "10.0.2.255/24"}, "everybody in it"),
        ({"address": "10.0.2.50/24", "gateway": "10.0.3.2"}, "not another machine of the network"),
        ({"address": "10.0.2.50/24", "gateway": "10.0.2.50"}, "not another machine"),
        ({"address": "10.0.2.50/24", "gateway": "router"}, "no IPv4 address"),
        ({"gateway": "10.0.2.2"}, "needs a static address"),
        ({"dns": ("9.9.9.9", "dns.example")}, "no address of a name server"),
    ],
)
def test_addresses_that_do_not_fit_are_refused(values: dict[str, Any], says: str) -> None:
    net = replace(NET, **values)
    with pytest.raises(UsageError, match=says):
        check_net(net)
    with pytest.raises(UsageError, match=says):
        seed_iso(machine(net), LOGIN, HOST, None)


@pytest.mark.parametrize("address", ["10.0.2.1/31", "10.0.2.0/31", "10.0.2.7/32", "0.0.0.0/0"])
def test_the_smallest_networks_have_no_broadcast(address: str) -> None:
    if address.endswith("/0"):
        with pytest.raises(UsageError):
            check_net(replace(NET, address=address))
    else:
        check_net(replace(NET, address=address))


# ---- values that could become something else ----------------------------------------------------


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"hostname": "web\nusers: []"}, "hostname"),
        ({"hostname": "-web"}, "hostname"),
        ({"hostname": ""}, "hostname"),
        ({"hostname": "wéb"}, "hostname"),
        ({"instance_id": "a/../b"}, "instance_id"),
        ({"user": "Joe"}, "user"),
        ({"user": "-joe"}, "user"),
        ({"user": "joe:x"}, "user"),
        ({"packages": ("fio", "-o Dpkg::X=1")}, "packages"),
        ({"packages": ("fio\nrm",)}, "packages"),
        ({"ssh_keys": (LOGIN + "\nssh-rsa evil",)}, "ssh_keys"),
        ({"ssh_keys": (LOGIN + "\u2028x",)}, "ssh_keys"),  # for YAML these two are ends of a line
        ({"ssh_keys": (LOGIN + "\x85x",)}, "ssh_keys"),
        ({"ssh_keys": ("my key",)}, "ssh_keys"),
        ({"ssh_keys": ("",)}, "ssh_keys"),
        ({"password_hash": "secret"}, "password_hash"),
        ({"password_hash": "$6$salt$" + "x" * 80 + ":0"}, "password_hash"),
        ({"password_hash": ""}, "password_hash"),
    ],
)
def test_a_value_that_is_something_else_is_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_cloud_init(replace(CLOUD_INIT, **values))
    assert caught.value.field == field
    with pytest.raises(UsageError):
        seed_iso(machine(**values), LOGIN, HOST, None)


def test_a_vm_without_cloud_init_has_no_seed() -> None:
    with pytest.raises(UsageError, match="has no cloud-init"):
        seed_iso(replace(machine(), cloud_init=None), LOGIN, HOST, None)


# ---- a person's own user-data -------------------------------------------------------------------


@pytest.mark.parametrize(
    "own",
    [
        "#cloud-config\nusers: [bob]\n",
        "#!/bin/sh\necho grüß\n",
        "## template: jinja\n#cloud-config\n{{ ds }}\n",
        "--==drivebay-user-data==--\n",
        "From: x\nContent-Type: multipart/mixed\n\nx\n",
    ],
)
def test_own_user_data_comes_first_and_as_it_is_with_ours_behind_it(own: str) -> None:
    message = email.message_from_string(seed(machine(), own)["user-data"], policy=policy.default)
    first, second = message.iter_parts()
    assert first.get_content_type() == second.get_content_type() == "text/plain"
    assert first.get_content() == own
    kind, _, ours = second.get_content().partition("\n")
    assert kind == "#cloud-config"
    assert first["Merge-Type"] is None
    assert second["Merge-Type"] == "dict(no_replace,recurse_list)+list(append)"
    default, user = json.loads(ours)["users"]
    assert default == "default"
    assert user["ssh_authorized_keys"] == [LOGIN, OTHER]


def test_user_data_that_needs_the_network_too_early_is_refused() -> None:
    with pytest.raises(UsageError, match="before the network is up"):
        seed_iso(machine(), LOGIN, HOST, "#include\nhttp://example.org/x\n")


def test_user_data_without_end_is_refused() -> None:
    with pytest.raises(UsageError, match="limited to"):
        seed_iso(machine(), LOGIN, HOST, "#" * ((1 << 20) + 1))
