"""Encrypted disks over RPC: SPDK's answers, a key's way through save_config, and that no key
is seen where it does not belong.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.driver import Session
from tests.fakes.process import TargetProcess
from tests.fakes.rpc_client import exchange

KEY = "00112233445566778899aabbccddeeff"
KEY2 = "ffeeddccbbaa99887766554433221100"
XTS = {"cipher": "AES_XTS", "key": KEY, "key2": KEY2}


@contextlib.contextmanager
def discreet_target() -> Iterator[TargetProcess]:
    """One that logs every request, and no key."""
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        process = TargetProcess(Path(name), "-L", "rpc")
        yield process
        log = process.log()
        assert process.stop() == 0
        assert "accel_crypto_key" in log or "bdev_crypto" in log
        assert KEY not in log
        assert KEY2 not in log


@pytest.fixture
def target() -> Iterator[TargetProcess]:
    with discreet_target() as process:
        yield process


@pytest.fixture(scope="module")
def shared() -> Iterator[TargetProcess]:
    with discreet_target() as process:
        process.rpc("accel_crypto_key_create", name="there", cipher="AES_XTS", key=KEY2, key2=KEY)
        yield process


def answer(target: TargetProcess, method: str, **params: Any) -> Any:
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    return json.loads(exchange(target.rpc_path, json.dumps(request).encode()))


def refusal(target: TargetProcess, method: str, **params: Any) -> tuple[int, str]:
    error = answer(target, method, **params)["error"]
    assert KEY not in json.dumps(error)
    return error["code"], error["message"]


def key_file(folder: Path, mode: int = 0o600, text: str = f"{KEY}\n{KEY2}\n") -> str:
    path = folder / "disk.key"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_key_and_a_disk_from_beginning_to_end(target: TargetProcess) -> None:
    target.malloc("M0")
    assert target.rpc("accel_crypto_key_create", name="k0", **XTS) is True
    assert target.rpc("bdev_crypto_create", base_bdev_name="M0", name="C0", key_name="k0") == "C0"
    (found,) = target.rpc("bdev_get_bdevs", name="C0")
    assert found["product_name"] == "crypto"
    assert found["driver_specific"] == {
        "crypto": {"base_bdev_name": "M0", "name": "C0", "key_name": "k0"}
    }
    assert target.rpc("bdev_get_bdevs", name="M0")[0]["claimed"] is True
    with Session(target.controller("vhost.0", "C0")) as guest:
        guest.disk.write(0, KEY.encode() * 128)
        assert guest.disk.read(0, 4096) == KEY.encode() * 128
    assert refusal(target, "accel_crypto_key_destroy", key_name="k0") == (
        -32602,
        "Failed to destroy key, rc -16",
    )
    target.rpc("vhost_delete_controller", ctrlr="vhost.0")
    assert target.rpc("bdev_crypto_delete", name="C0") is True
    assert target.rpc("accel_crypto_key_destroy", key_name="k0") is True
    assert target.rpc("accel_crypto_keys_get") == []


def test_keys_are_shown_as_spdk_shows_them(target: TargetProcess) -> None:
    target.rpc("accel_crypto_key_create", name="k0", **XTS)
    shown = {"name": "k0", **XTS, "tweak_mode": "SIMPLE_LBA"}
    shown["cipher"] = "AES_XTS"
    assert target.rpc("accel_crypto_keys_get") == [shown]
    assert target.rpc("accel_crypto_keys_get", key_name="k0") == [shown]
    calls = target.rpc("framework_get_config", name="accel")
    assert {"method": "accel_crypto_key_create", "params": shown} in calls
    warnings = [line for line in target.log().splitlines() if "give it by key_file" in line]
    target.rpc("framework_get_config", name="accel")
    assert len(warnings) == 1


def test_a_key_from_a_file_is_saved_as_the_files_name(target: TargetProcess) -> None:
    path = key_file(target.folder)
    assert target.rpc("accel_crypto_key_create", name="k0", cipher="AES_XTS", key_file=path)
    shown = {"name": "k0", "cipher": "AES_XTS", "key_file": path, "tweak_mode": "SIMPLE_LBA"}
    assert target.rpc("accel_crypto_keys_get") == [shown]
    assert target.rpc("framework_get_config", name="accel")[-1]["params"] == shown
    assert "give it by key_file" not in target.log()


def test_a_saved_configuration_brings_the_disk_back(target: TargetProcess) -> None:
    target.rpc("bdev_crypto_create", base_bdev_name="M0", name="C0", **XTS)
    target.malloc("M0")
    assert target.rpc("bdev_get_bdevs", name="C0")
    subsystems = [
        {"subsystem": name, "config": target.rpc("framework_get_config", name=name)}
        for name in ("accel", "bdev")
    ]
    uuid = target.rpc("bdev_get_bdevs", name="C0")[0]["uuid"]
    with tempfile.TemporaryDirectory(prefix="drivebay-") as name:
        config = Path(name) / "saved.json"
        config.write_text(json.dumps({"subsystems": subsystems}))
        again = TargetProcess(Path(name), "-c", str(config))
        (found,) = again.rpc("bdev_get_bdevs", name="C0")
        assert found["uuid"] == uuid
        assert found["driver_specific"]["crypto"]["key_name"] == "C0_AES_XTS"
        assert again.stop() == 0


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"name": "k", "cipher": "AES_XTS"}, (-32700, "spdk_json_decode_object failed")),
        ({"name": "k", "cipher": "DES", "key": KEY}, (-32700, "spdk_json_decode_object failed")),
        ({"name": "k", **XTS, "key": 5}, (-32700, "spdk_json_decode_object failed")),
        ({"name": "k", **XTS, "kye": KEY}, (-32700, "spdk_json_decode_object failed")),
        ({"name": "k", **XTS, "key": KEY + "\0"}, (-32700, "spdk_json_decode_object failed")),
        ({"name": "k", **XTS, "key2": KEY}, (-32602, "failed to create DEK, rc -22")),
        ({"name": "k", **XTS, "key": KEY[:-2]}, (-32602, "failed to create DEK, rc -22")),
        ({"name": "k", **XTS, "cipher": "AES_CBC"}, (-32602, "failed to create DEK, rc -22")),
        (
            {"name": "k", **XTS, "tweak_mode": "INCR_512_FULL_LBA"},
            (-32602, "failed to create DEK, rc -22"),
        ),
        ({"name": "there", **XTS}, (-32602, "failed to create DEK, rc -17")),
        (
            {"name": "k", "cipher": "AES_XTS", "key_file": "/nonexistent"},
            (-32602, "failed to create DEK, rc -2"),
        ),
    ],
)
def test_keys_that_are_refused(
    shared: TargetProcess, params: dict[str, Any], expected: tuple[int, str]
) -> None:
    assert refusal(shared, "accel_crypto_key_create", **params) == expected


@pytest.mark.parametrize(
    ("mode", "text", "words"),
    [
        (0o640, f"{KEY} {KEY2}", "its mode is 0640"),
        (0o604, f"{KEY} {KEY2}", "its mode is 0604"),
        (0o600, KEY, "must hold two words"),
        (0o600, f"{KEY} {KEY2} x", "must hold two words"),
        (0o600, f"{KEY} {KEY2}" + " " * 2000, "must hold two words"),
        (0o600, f"{KEY} {KEY2[:-1]}\udcff", "hexadecimal"),
    ],
)
def test_key_files_that_are_refused(
    shared: TargetProcess, mode: int, text: str, words: str
) -> None:
    path = shared.folder / "disk.key"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    path.chmod(mode)
    found = answer(
        shared, "accel_crypto_key_create", name="k", cipher="AES_XTS", key_file=str(path)
    )
    assert found["error"]["message"] == "failed to create DEK, rc -22"
    assert words in found["error"]["data"]["reason"]
    assert KEY not in json.dumps(found)


def test_disks_that_are_refused(target: TargetProcess) -> None:
    target.malloc("M0")
    target.rpc("accel_crypto_key_create", name="k0", **XTS)
    target.rpc("bdev_crypto_create", base_bdev_name="M0", name="C0", key_name="k0")
    base = {"base_bdev_name": "M0", "key_name": "k0"}
    create = "bdev_crypto_create"
    assert refusal(target, create, name="C0", **base) == (-17, "File exists")
    assert refusal(target, create, name="C1", **base) == (-1, "Operation not permitted")
    assert refusal(target, create, **base) == (
        -32700,
        "Failed to decode crypto disk create parameters.",
    )
    base["key_name"] = "none"
    assert refusal(target, create, name="C1", **base) == (-32602, "Key was not found")
    del base["key_name"]
    assert refusal(target, create, name="C1", **base) == (-32603, "No key was found")
    assert refusal(target, create, name="C1", key=KEY, key2=KEY, cipher="AES_XTS", **base) == (
        -32603,
        "No key was found",
    )
    assert refusal(target, "bdev_crypto_delete") == (-32602, "Invalid parameters")
    assert refusal(target, "bdev_crypto_delete", name="M0") == (-19, "No such device")
    assert refusal(target, "accel_crypto_keys_get", key_name="x") == (-32602, "key was not found")
    assert refusal(target, "accel_crypto_key_destroy", key_name="x") == (
        -32602,
        "No key object found",
    )


def test_a_disk_brings_its_own_key_and_takes_it_along(target: TargetProcess) -> None:
    target.malloc("M0")
    target.rpc("bdev_crypto_create", base_bdev_name="M0", name="C0", crypto_pmd="x", **XTS)
    assert [key["name"] for key in target.rpc("accel_crypto_keys_get")] == ["C0_AES_XTS"]
    target.rpc("bdev_crypto_delete", name="C0")
    assert target.rpc("accel_crypto_keys_get") == []
