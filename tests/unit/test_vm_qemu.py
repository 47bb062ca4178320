"""vm/qemu.py and vm/qemu_probe.py: which QEMU, and what it says that it can."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from drivebay.errors import NotFound
from drivebay.vm import qemu_probe
from drivebay.vm.packages import PARTS, install_command, package_of, this_distribution
from drivebay.vm.qemu import FEATURES, Qemu, find_qemu
from tests.fakes.qemu import ABSENT, script, stand_in


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DRIVEBAY_QEMU", raising=False)
    return tmp_path / "cache" / "drivebay" / "qemu.json"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some-qemu"


def test_this_hosts_qemu_says_what_it_can() -> None:
    found = find_qemu()
    assert {"vhost-user-blk", "user-net", "tcg", "memfd", "seccomp", "nvme"} <= found.features
    assert found.features <= set(FEATURES)
    assert found.machine == f"pc-q35-{found.spelled_version}"
    assert found.machine in found.machines
    found.require("vhost-user-blk", "a disk")


def test_a_binary_is_asked_once_and_each_has_its_own_memory(tmp_path: Path, path: Path) -> None:
    other = stand_in(tmp_path / "other", version={"qemu": {"major": 10, "minor": 0}})
    stand_in(path)
    first = find_qemu(str(path))
    assert first.version == (9, 2)
    assert find_qemu(str(other)).version == (10, 0)
    assert find_qemu(str(path)) == first
    assert Path(f"{path}.asked").read_text() == "x\n"
    assert first.machine == "pc-q35-9.2"
    assert first.machines == ("pc-q35-9.1", "pc-q35-9.2")


def test_where_nothing_can_be_remembered_it_is_asked_each_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file
    assert find_qemu(str(path)) == find_qemu(str(path))
    assert Path(f"{path}.asked").read_text() == "x\nx\n"


def test_a_binary_that_changed_is_asked_again(path: Path) -> None:
    stand_in(path)
    find_qemu(str(path))
    stand_in(path, version={"qemu": {"major": 10, "minor": 1}})
    assert find_qemu(str(path)).version == (10, 1)


def test_a_part_that_was_installed_since_is_seen(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setenv("QEMU_MODULE_DIR", str(modules))
    stand_in(path)
    find_qemu(str(path))
    (modules / "block-blkio.so").touch()
    find_qemu(str(path))
    assert Path(f"{path}.asked").read_text() == "x\nx\n"


def test_a_drivebay_that_wants_to_know_more_asks_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(path)
    find_qemu(str(path))
    monkeypatch.setitem(FEATURES, "more", ("more", "qemu", (0, 0)))
    find_qemu(str(path))
    assert Path(f"{path}.asked").read_text() == "x\nx\n"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"PATH": 1}', '{"PATH": {"stamp": "STAMP"}}'])
def test_a_memory_that_makes_no_sense_is_replaced(path: Path, own_cache: Path, text: str) -> None:
    stand_in(path)
    find_qemu(str(path))
    saved = json.loads(own_cache.read_text())
    stamp = json.dumps(saved[str(path)]["stamp"])
    own_cache.write_text(text.replace("PATH", str(path)).replace('"STAMP"', stamp))
    assert find_qemu(str(path)).version == (9, 2)
    assert json.loads(own_cache.read_text()) == saved


@pytest.mark.parametrize(
    ("feature", "changed"),
    [
        ("user-net", {"user_net": "Parameter 'type' does not accept value 'user'"}),
        ("seccomp", {"seccomp": "invalid option name: sandbox"}),
        ("vhost-user-blk", {"vhost_user_blk": "Class not found"}),
        ("kvm", {"kvm": "Class not found"}),
        ("tcg", {"tcg": "Class not found"}),
        ("vhost-user-block-driver", {"block_driver": "Parameter 'driver' does not accept value"}),
        ("vhost-user-block-driver", {"block_driver": "Unknown driver 'virtio-blk-vhost-user'"}),
    ],
)
def test_what_is_lacking_is_named_with_a_mend(
    path: Path, feature: str, changed: dict[str, Any]
) -> None:
    found = find_qemu(str(stand_in(path, **changed)))
    with pytest.raises(NotFound, match=r"^VM 'web' needs .*, which '.*' \(QEMU 9.2\) does not"
                       ) as caught:  # fmt: skip
        found.require(feature, "VM 'web'")
    assert "--qemu PATH" in str(caught.value.hint)


def test_the_block_driver_is_there_when_it_misses_the_socket(path: Path) -> None:
    told = "blkio_connect failed: No such file or directory (os error 2)"
    found = find_qemu(str(stand_in(path, block_driver=told)))
    found.require("vhost-user-block-driver", "--bus nvme")


def test_a_package_is_no_mend_where_the_version_is_too_old() -> None:
    with pytest.raises(NotFound) as caught:
        Qemu(Path("/q"), (9, 2)).require("vhost-user-block-driver", "--bus nvme")
    assert str(caught.value.hint).startswith("name another, newer QEMU")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("exit 1", "is no QEMU that starts$"),
        ("echo hello", "is no QEMU that starts: hello"),
        ("echo 'error while loading shared libraries' >&2; exit 127", "starts: error while load"),
        ("echo '{\"QMP\": {}}'; echo nonsense", "with no JSON: b'nonsense'"),
        ("echo '{\"QMP\": {}}'; echo '[\"id\"]'", "with no JSON"),
        ("echo '{\"QMP\": {}}'", r"before it had answered what it can do \(capabilities\)"),
        ("exec cat /dev/zero", "talks without end"),
    ],
)
def test_what_is_no_qemu_is_refused(path: Path, text: str, complaint: str) -> None:
    with pytest.raises(NotFound, match=complaint):
        find_qemu(str(script(path, text)))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"version": {}}, "does not say its version"),
        ({"machines": {"name": 1}}, "does not say its version"),
        ({"target": {"arch": "i386"}}, "machines for i386 only"),
        ({"machines": [{"name": "microvm"}]}, "no machine 'q35'"),
        ({"nvme": ABSENT}, r"before it had answered what it can do \(nvme\)"),
    ],
)
def test_a_qemu_that_is_of_no_use_is_refused(
    path: Path, own_cache: Path, changed: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(NotFound, match=complaint):
        find_qemu(str(stand_in(path, **changed)))
    assert not own_cache.exists()


def test_a_qemu_that_hangs_is_ended(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_probe, "PROBE_SECONDS", 0.05)
    with pytest.raises(NotFound, match="did not answer as QEMU within 0.05 s"):
        find_qemu(str(script(path, "exec sleep 60")))


def test_the_named_one_comes_before_the_setting_and_that_before_the_path(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    on_path = stand_in(tmp_path / "qemu-system-x86_64")
    setting = stand_in(tmp_path / "setting")
    assert find_qemu().path == on_path
    monkeypatch.setenv("DRIVEBAY_QEMU", str(setting))
    assert find_qemu().path == setting
    assert find_qemu(str(stand_in(path))).path == path


def test_red_hats_place_is_looked_at_last(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(path)
    cat = shutil.which("cat")
    assert cat is not None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/cat").symlink_to(cat)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("drivebay.vm.qemu.ELSEWHERE", [str(path)])
    assert find_qemu().path == path


def test_no_qemu_comes_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("drivebay.vm.qemu.ELSEWHERE", [])
    with pytest.raises(NotFound, match="qemu-system-x86_64 is not installed") as caught:
        find_qemu()
    assert str(install_command("qemu") or "name another") in str(caught.value.hint)


def test_a_named_qemu_that_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFound, match="there is no QEMU '/nowhere/qemu'$"):
        find_qemu("/nowhere/qemu")
    (tmp_path / "text").touch()
    monkeypatch.setenv("DRIVEBAY_QEMU", str(tmp_path / "text"))
    with pytest.raises(NotFound, match="text', which DRIVEBAY_QEMU names, is not a program"):
        find_qemu()


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ({"ID": "debian"}, "debian"),
        ({"ID": "ubuntu", "ID_LIKE": "debian"}, "ubuntu"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "ubuntu"),
        ({"ID": "almalinux", "ID_LIKE": "rhel centos fedora"}, "fedora"),
        ({"ID": "openEuler"}, "openeuler"),
        ({"ID": "arch"}, None),
        ({}, None),
    ],
)
def test_a_distribution_is_known_by_itself_or_its_ancestor(
    release: dict[str, str], expected: str | None
) -> None:
    assert this_distribution(release) == expected


def test_a_package_that_a_distribution_does_not_have_is_none() -> None:
    assert package_of("qemu-blkio", "openeuler") is None
    assert package_of("qemu-blkio", None) is None
    assert package_of("qemu-blkio", "fedora") == "qemu-block-blkio"
    assert {part for _, part, _ in FEATURES.values()} <= set(PARTS)


def test_the_documents_table_names_the_same_packages() -> None:
    text = (Path(__file__).parents[2] / "docs/doctor.md").read_text()
    table = text[text.index("## What needs which package") :]
    for part, packages in PARTS.items():
        for package in packages.values():
            missing = [word for word in package.split() if word not in table]
            assert not missing, f"{part}: {missing}"
