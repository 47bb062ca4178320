"""vm/identity.py: addresses that differ and stay, and clones that are machines of their own."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from drivebay.errors import HostError
from drivebay.vm import identity
from drivebay.vm.identity import (
    Origin,
    free_mac,
    host_machine_id,
    mac_address,
    new_identity,
    new_instance_id,
    new_uuid,
)
from drivebay.vm.spec import CloudInit, Forward, NetSpec, VmSpec

HERE = Origin("0123456789abcdef0123456789abcdef", Path("/var/lib/drivebay/vms"))


def web() -> VmSpec:
    return VmSpec(
        name="web",
        uuid=new_uuid(),
        machine="pc-q35-7.2",
        memory=1 << 30,
        cpus=1,
        nets=tuple(
            NetSpec("user", mac_address(HERE, "web", index), (Forward(2222 + index, 22),))
            for index in range(2)
        ),
        cloud_init=CloudInit(instance_id="drivebay-1", hostname="web", user="joe"),
    )


def test_an_address_is_of_one_machine_and_the_same_each_time() -> None:
    mac = mac_address(HERE, "web", 0)
    assert re.fullmatch(r"52:54:00(:[0-9a-f]{2}){3}", mac)
    assert mac == mac_address(HERE, "web", 0)


@pytest.mark.parametrize(
    "other",
    [
        mac_address(HERE, "web", 1),
        mac_address(HERE, "db", 0),
        mac_address(Origin("f" * 32, HERE.folder), "web", 0),
        mac_address(Origin(HERE.machine_id, Path("/srv/vms")), "web", 0),
        mac_address(HERE, "we", 0),
    ],
)
def test_host_folder_name_and_interface_each_make_another_address(other: str) -> None:
    assert other != mac_address(HERE, "web", 0)


def test_an_address_that_somebody_has_is_not_given_again() -> None:
    first = free_mac(HERE, "web", 0, ())
    second = free_mac(HERE, "web", 0, {first})
    third = free_mac(HERE, "web", 0, {first, second})
    assert len({first, second, third}) == 3
    assert first == mac_address(HERE, "web", 0)


def test_a_clone_is_a_machine_of_its_own() -> None:
    spec = web()
    clone = new_identity(spec, "web2", HERE, ())
    assert clone.cloud_init is not None
    assert spec.cloud_init is not None
    assert clone.name == "web2"
    assert clone.uuid != spec.uuid
    assert clone.cloud_init.instance_id != spec.cloud_init.instance_id
    assert clone.cloud_init.hostname == "web2"
    assert clone.cloud_init.user == "joe"
    assert len({net.mac for net in clone.nets + spec.nets}) == 4
    assert all(net.forward == () for net in clone.nets)


def test_a_clone_keeps_forwards_only_when_told() -> None:
    spec = web()
    clone = new_identity(spec, "web2", HERE, (), forwards=True)
    assert [net.forward for net in clone.nets] == [net.forward for net in spec.nets]


def test_a_clone_takes_no_address_of_another_vm_nor_twice_the_same() -> None:
    taken = {mac_address(HERE, "web2", 0), mac_address(HERE, "web2", 1)}
    clone = new_identity(web(), "web2", HERE, taken)
    assert len({net.mac for net in clone.nets} | taken) == 4


def test_a_clone_takes_neither_its_originals_addresses_nor_one_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However unlucky the hash is."""

    def unlucky(origin: Origin, name: str, index: int, attempt: int = 0) -> str:
        return f"52:54:00:00:00:{attempt:02x}"

    monkeypatch.setattr(identity, "mac_address", unlucky)
    spec = web()
    nets = (replace(spec.nets[0], mac="52:54:00:00:00:00"), spec.nets[1])
    clone = new_identity(replace(spec, nets=nets), "web2", HERE, {"52:54:00:00:00:02"})
    assert [net.mac for net in clone.nets] == ["52:54:00:00:00:01", "52:54:00:00:00:03"]


def test_a_host_name_that_was_chosen_stays() -> None:
    spec = web()
    assert spec.cloud_init is not None
    spec = replace(spec, cloud_init=replace(spec.cloud_init, hostname="shop"))
    clone = new_identity(spec, "web2", HERE, ())
    assert clone.cloud_init is not None
    assert clone.cloud_init.hostname == "shop"


def test_without_cloud_init_a_clone_has_none() -> None:
    assert new_identity(replace(web(), cloud_init=None), "web2", HERE, ()).cloud_init is None


def test_instance_ids_differ() -> None:
    assert new_instance_id() != new_instance_id()


def test_the_hosts_id_is_its_machine_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "id").write_text("a" * 32 + "\n")
    monkeypatch.setattr(identity, "_MACHINE_ID_FILE", tmp_path / "id")
    assert host_machine_id(tmp_path / "data") == "a" * 32
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("text", [None, "", "uninitialized\n", "a" * 31, "a" * 33, "ä" * 32])
def test_a_host_without_an_id_is_given_one_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "id").write_text(text)
    monkeypatch.setattr(identity, "_MACHINE_ID_FILE", tmp_path / "id")
    made = host_machine_id(tmp_path / "data")
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert host_machine_id(tmp_path / "data") == made
    assert os.listdir(tmp_path / "data") == ["machine-id"]


def test_an_id_that_can_not_be_kept_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_MACHINE_ID_FILE", tmp_path / "id")
    (tmp_path / "data").write_text("a file")
    with pytest.raises(HostError, match="there is no .*/id, and can't keep one"):
        host_machine_id(tmp_path / "data")
