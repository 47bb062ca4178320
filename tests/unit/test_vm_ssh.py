"""vm/ssh.py: keys by the real ssh-keygen, lines that ssh reads, and guests without sshd."""

from __future__ import annotations

import contextlib
import shutil
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from drivebay.errors import AlreadyExists, HostError, StateError, UsageError
from drivebay.vm.spec import CloudInit, Forward, NetSpec, VmSpec
from drivebay.vm.ssh import (
    SshSilent,
    endpoint,
    make_keys,
    read_banner,
    read_keys,
    scp_command,
    ssh_command,
    ssh_config,
)

UUID = "6f2d0c4e-3c53-4d8a-9d0f-111122223333"
SPEC = VmSpec(
    name="web",
    uuid=UUID,
    machine="pc-q35-7.2",
    memory=1 << 30,
    cpus=1,
    nets=(NetSpec("user", "52:54:00:12:34:56", (Forward(8080, 80), Forward(2222, 22))),),
    cloud_init=CloudInit(instance_id="drivebay-1", hostname="web", user="joe"),
)


def at(forward: Forward) -> VmSpec:
    return replace(SPEC, nets=(replace(SPEC.nets[0], forward=(forward,)),))


# ---- keys ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vm") / "keys"
    make_keys(folder, UUID)
    return folder


def test_keys_are_for_their_owner_alone(keys: Path) -> None:
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in keys.iterdir()}
    assert sorted(modes) == [
        "id_ed25519",
        "id_ed25519.pub",
        "known_hosts",
        "ssh_host_ed25519_key",
        "ssh_host_ed25519_key.pub",
    ]
    assert modes["id_ed25519"] == modes["ssh_host_ed25519_key"] == modes["known_hosts"] == 0o600


def test_the_guest_is_known_before_its_first_start(keys: Path) -> None:
    """By OpenSSH's own reading of known_hosts, under the alias that the command line gives."""
    found = subprocess.run(
        ["ssh-keygen", "-F", f"drivebay-{UUID}", "-f", keys / "known_hosts"],
        capture_output=True, text=True,
    )  # fmt: skip
    public = (keys / "ssh_host_ed25519_key.pub").read_text().split()
    assert public[:2] == found.stdout.splitlines()[1].split()[1:3]


def test_keys_are_read_back_and_are_pairs(keys: Path) -> None:
    read = read_keys(keys)
    for private, public in (("id_ed25519", read.login), ("ssh_host_ed25519_key", read.host.public)):
        derived = subprocess.run(
            ["ssh-keygen", "-y", "-f", keys / private], capture_output=True, text=True, check=True
        )
        assert derived.stdout.split()[:2] == public.split()[:2]
    assert read.host.private == (keys / "ssh_host_ed25519_key").read_text()
    assert read.login != read.host.public


def test_keys_are_never_replaced(keys: Path) -> None:
    before = read_keys(keys)
    with pytest.raises(AlreadyExists, match="keys in"):
        make_keys(keys, UUID)
    assert read_keys(keys) == before
    assert [path.name for path in keys.parent.iterdir()] == ["keys"]


def test_where_no_key_can_be_made_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HostError, match="can't make keys"):
        make_keys(tmp_path / "absent" / "keys", UUID)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StateError, match="no ssh-keygen") as caught:
        make_keys(tmp_path / "keys", UUID)
    assert "openssh-client" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_key_is_named(tmp_path: Path, keys: Path) -> None:
    shutil.copytree(keys, tmp_path / "keys")
    (tmp_path / "keys" / "ssh_host_ed25519_key").unlink()
    with pytest.raises(HostError, match="ssh_host_ed25519_key'"):
        read_keys(tmp_path / "keys")


# ---- command lines ------------------------------------------------------------------------------


def as_ssh_reads(*command: str) -> dict[str, list[str]]:
    """The options that ssh itself finds in a command line (`ssh -G`), without connecting."""
    line = [command[0], "-G", "-F", "none", *command[1:]]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = {}
    for entry in done.stdout.splitlines():
        option, _, value = entry.partition(" ")
        found.setdefault(option, []).append(value)
    return found


def check_strict(options: dict[str, list[str]], keys: Path) -> None:
    assert options["hostname"] == ["127.0.0.1"]
    assert options["port"] == ["2222"]
    assert options["user"] == ["joe"]
    # ssh shows this one before it has read its percent signs
    assert [path.replace("%%", "%") for path in options["identityfile"]] == [
        str(keys / "id_ed25519")
    ]
    assert options["identitiesonly"] == ["yes"]
    assert options["userknownhostsfile"] == [str(keys / "known_hosts")]
    assert options["hostkeyalias"] == [f"drivebay-{UUID}"]
    assert options["stricthostkeychecking"] == ["true"]


@pytest.mark.parametrize("folder", ["/vms/web/keys", "/vms of jo/50% off/a\\\\b\\1/keys"])
def test_ssh_understands_the_command_line(folder: str) -> None:
    command = ssh_command(SPEC, Path(folder), ["ls", "-l"])
    assert command[-4:] == ["--", "127.0.0.1", "ls", "-l"]
    check_strict(as_ssh_reads(*command), Path(folder))


@pytest.mark.parametrize("folder", ["/vms/web/keys", "/vms of jo/keys"])
def test_ssh_understands_the_configuration(tmp_path: Path, folder: str) -> None:
    (tmp_path / "config").write_text("Host a\n Port 1\n" + ssh_config(SPEC, Path(folder)))
    done = subprocess.run(
        ["ssh", "-G", "-F", tmp_path / "config", "web"], capture_output=True, text=True, check=True
    )
    pairs = [line.partition(" ") for line in done.stdout.splitlines()]
    options: dict[str, list[str]] = {}
    for option, _, value in pairs:
        options.setdefault(option, []).append(value)
    check_strict(options, Path(folder))


def test_another_user_may_have_keys_of_their_own() -> None:
    options = as_ssh_reads(*ssh_command(SPEC, Path("/k"), user="root"))
    assert options["user"] == ["root"]
    assert options["identitiesonly"] == ["no"]
    assert options["stricthostkeychecking"] == ["true"]


def test_a_guest_without_cloud_init_is_known_from_its_first_key_on() -> None:
    spec = replace(SPEC, cloud_init=None)
    options = as_ssh_reads(*ssh_command(spec, Path("/k")))
    assert options["stricthostkeychecking"] == ["accept-new"]
    assert options["userknownhostsfile"] == ["/k/known_hosts"]
    assert "/k/id_ed25519" not in options["identityfile"]


@pytest.mark.parametrize("user", ["-oProxyCommand=x", "a b", "jo%h", "a\nb", 'a"b\\'])
def test_a_user_that_ssh_would_read_as_something_else_is_refused(user: str) -> None:
    with pytest.raises(UsageError, match="name of a user"):
        ssh_command(SPEC, Path("/k"), user=user)


@pytest.mark.parametrize("folder", ['/a"b', "/a${HOME}", "/a\nb"])
def test_a_folder_that_ssh_can_not_be_told_of_is_refused(folder: str) -> None:
    with pytest.raises(UsageError, match="can't be told of the folder"):
        ssh_config(SPEC, Path(folder))


def test_the_port_is_the_forward_to_ssh() -> None:
    assert endpoint(SPEC) == ("127.0.0.1", 2222)
    assert endpoint(at(Forward(22, 22, "192.0.2.7"))) == ("192.0.2.7", 22)
    assert endpoint(at(Forward(22, 22, "0.0.0.0"))) == ("127.0.0.1", 22)


def test_without_a_way_to_the_guest_the_mend_is_named() -> None:
    with pytest.raises(StateError, match="no port of this host leads to port 22") as caught:
        endpoint(at(Forward(22, 80)))
    assert str(caught.value.hint).startswith("drivebay vm set web --forward 2222:22")
    with pytest.raises(StateError, match="has no network") as caught:
        endpoint(replace(SPEC, nets=()))
    assert caught.value.hint == "drivebay vm console web"


# ---- copies -------------------------------------------------------------------------------------


def copied(*paths: str) -> list[str]:
    command = scp_command(SPEC, Path("/k"), paths[:-1], paths[-1])
    assert command[0] == "scp"
    return command[command.index("--") + 1 :]


def test_paths_in_the_guest_and_here() -> None:
    assert copied("a", "/b", "web:/tmp") == ["./a", "/b", "127.0.0.1:/tmp"]
    assert copied("web:x", "web:y z", ".") == ["127.0.0.1:x", "127.0.0.1:y z", "./."]
    assert copied("-r", "db:x", "web:") == ["./-r", "./db:x", "127.0.0.1:"]


@pytest.mark.parametrize(
    "paths", [("a", "b"), ("web:a", "web:b"), ("a", "web:b", "c"), ("a", "web:b", "web:c")]
)
def test_a_copy_has_one_side_in_the_guest(paths: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="one side of a copy"):
        copied(*paths)


# ---- the guest's sshd ---------------------------------------------------------------------------


@contextlib.contextmanager
def listening(says: bytes | None) -> Iterator[VmSpec]:
    """What QEMU's network shows of a guest: it takes connections, says something, hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                if says is None:
                    connection.recv(1)  # silent, until the other side gives up
                else:
                    connection.sendall(says)

        thread = threading.Thread(target=serve)
        thread.start()
        yield at(Forward(server.getsockname()[1], 22))
        thread.join(20)


def test_an_ssh_server_names_itself() -> None:
    with listening(b"SSH-2.0-OpenSSH_9.2p1\r\n") as spec:
        assert read_banner(spec, 20.0) == "SSH-2.0-OpenSSH_9.2p1"


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (b"", "it closed the connection"),
        (None, "it said nothing for 0.05 s"),
        (b"HTTP/1.0 400 Bad Request\r\n", "it said b'HTTP"),
        (b"S" * 10000, "it said b'SSSS"),
    ],
)
def test_without_an_ssh_server_what_to_install_is_said(says: bytes | None, reason: str) -> None:
    with listening(says) as spec, pytest.raises(SshSilent) as caught:
        read_banner(spec, 0.05 if says is None else 20.0)
    assert reason in str(caught.value)
    assert "apt install openssh-server" in str(caught.value.hint)
    assert "dnf install openssh-server" in str(caught.value.hint)


def test_a_port_that_nobody_has_is_no_ssh_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(SshSilent, match="Connection refused"):
        read_banner(at(Forward(port, 22)), 20.0)
