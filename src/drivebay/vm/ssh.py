"""Into a guest by ssh: a VM's keys, the command lines of ssh and scp, and whether sshd answers.

Context: any. ssh itself is run by the caller; here it is only told what to do.

A guest is always recognized before anything is typed into it. With cloud-init the guest has
the host key that we made, and `known_hosts` has it from the beginning. Without, the key that
the guest shows first is kept, and another one refused from then on. The alias, made of the
VM's uuid, stays when the port or the VM's name changes.
"""

from __future__ import annotations

import contextlib
import errno as errno_codes
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from drivebay.errors import AlreadyExists, DrivebayError, HostError, StateError, UsageError
from drivebay.vm.seed import HostKey
from drivebay.vm.spec import SSH_PORT, NetSpec, VmSpec

__all__ = [
    "Keys",
    "SshSilent",
    "endpoint",
    "make_keys",
    "read_banner",
    "read_keys",
    "remote_paths",
    "scp_command",
    "ssh_command",
    "ssh_config",
]

# QEMU takes a connection at once, whatever the guest does, and an emulated guest is slow.
CONNECT_SECONDS: Final = 30
BANNER_MOST: Final = 8192
KEYGEN_SECONDS: Final = 30.0
LOGIN_KEY: Final = "id_ed25519"
HOST_KEY: Final = "ssh_host_ed25519_key"
KNOWN_HOSTS: Final = "known_hosts"
AGENT_SOCKET: Final = "agent.sock"  # beside the folder of the keys
INSTALL_LINES: Final = (
    "Debian, Ubuntu: sudo apt install openssh-server",
    "Fedora, Alma, openEuler: sudo dnf install openssh-server; sudo systemctl enable --now sshd",
    "openSUSE: sudo zypper install openssh-server; sudo systemctl enable --now sshd",
    "Alpine: sudo apk add openssh; sudo rc-update add sshd; sudo rc-service sshd start",
)


class SshSilent(DrivebayError):
    """No ssh server answered."""

    errno = errno_codes.ECONNREFUSED


# ---- keys ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Keys:
    """What a guest is told of a VM's keys."""

    login: str  # public
    host: HostKey


def make_keys(folder: Path, uuid: str) -> Keys:
    """Make the folder of a VM's keys: one to log in, one for the guest's sshd, `known_hosts`.

    Raises: AlreadyExists, HostError.
    """
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        fresh.mkdir(mode=0o700)
        _generate(fresh / LOGIN_KEY, "drivebay")
        _generate(fresh / HOST_KEY, "root")
        keys = read_keys(fresh)
        (fresh / KNOWN_HOSTS).write_text(f"{_alias(uuid)} {keys.host.public}\n", encoding="utf-8")
        (fresh / KNOWN_HOSTS).chmod(0o600)
        fresh.rename(folder)
    except OSError as error:
        if error.errno in (errno_codes.ENOTEMPTY, errno_codes.EEXIST):
            raise AlreadyExists(f"there are keys in '{folder}' already") from None
        code = error.errno or errno_codes.EIO
        raise HostError(f"can't make keys in '{folder}'", code, path=str(folder)) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return keys


def read_keys(folder: Path) -> Keys:
    """Read the keys that `make_keys` has made. Raises: HostError."""
    texts = []
    for name in (f"{LOGIN_KEY}.pub", HOST_KEY, f"{HOST_KEY}.pub"):
        try:
            texts.append((folder / name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            code = getattr(error, "errno", None) or errno_codes.EINVAL
            raise HostError(f"can't read the key '{folder / name}'", code) from error
    login, private, public = texts
    return Keys(login.strip(), HostKey(private, public.strip()))


def _generate(path: Path, comment: str) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=KEYGEN_SECONDS
        )
    except FileNotFoundError:
        raise StateError(
            "there is no ssh-keygen, so a VM gets no keys",
            hint="sudo apt install openssh-client   (Fedora: sudo dnf install openssh-clients)",
        ) from None
    except subprocess.TimeoutExpired:
        raise DrivebayError(f"ssh-keygen did not end in {KEYGEN_SECONDS:g} s") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()[:200]
        raise DrivebayError(f"ssh-keygen made no key '{path}': {said}")


def _alias(uuid: str) -> str:
    return f"drivebay-{uuid}"


# ---- command lines ------------------------------------------------------------------------------


def endpoint(spec: VmSpec, agent: Path | None = None) -> tuple[str, int]:
    """Return the address and port at which a guest's sshd is reached from here.

    ``agent`` is the guest agent's socket, which is asked last. Raises: StateError when no port
    leads there; SshSilent when it should have an address, and none is known yet.
    """
    for net in spec.nets:
        for forward in net.forward:
            if forward.leads_to_ssh:
                # A port open on all addresses is reached by the nearest one.
                every = forward.host_address == "0.0.0.0"
                return "127.0.0.1" if every else forward.host_address, forward.host_port
    if not spec.nets:
        raise StateError(
            f"VM '{spec.name}' has no network, so ssh can't reach it",
            hint=f"drivebay vm console {spec.name}",
        )
    outside = [net for net in spec.nets if net.kind != "user"]
    if not outside:
        raise StateError(
            f"no port of this host leads to port {SSH_PORT} of VM '{spec.name}'",
            hint=f"drivebay vm set {spec.name} --forward 2222:{SSH_PORT}   (from its next start "
            "on)",
        )
    return _address(spec, outside, agent), SSH_PORT


def _address(spec: VmSpec, outside: list[NetSpec], agent: Path | None) -> str:
    from drivebay.vm.reaching import addresses, said_by_agent

    known = [each for net in outside for each in addresses(net)]
    if not known and agent is not None:
        said = said_by_agent(agent)
        known = [each for net in outside for each in addresses(net, said)]
    if known:
        return known[0].text
    raise SshSilent(
        f"no address of VM '{spec.name}' is known yet: it was not seen in its network, and no "
        "guest agent tells it",
        hint=f"drivebay vm console {spec.name}",
    )


def ssh_command(
    spec: VmSpec, keys: Path, words: Sequence[str] = (), user: str | None = None
) -> list[str]:
    """The command line of ssh; ``words`` are joined and read by the guest's shell, as always."""
    host, port = endpoint(spec, keys.with_name(AGENT_SOCKET))
    return ["ssh", *_as_arguments(_options(spec, keys, user, port)), "--", host, *words]


def scp_command(
    spec: VmSpec, keys: Path, sources: Sequence[str], target: str, user: str | None = None
) -> list[str]:
    """The command line of scp; ``NAME:PATH`` is a path in the guest, all else is one here.

    Raises: as `remote_paths`; StateError when ssh can't reach the guest.
    """
    places = remote_paths(spec, sources, target)
    host, port = endpoint(spec, keys.with_name(AGENT_SOCKET))
    there = f"[{host}]" if ":" in host else host
    words = [
        _here(path) if place is None else f"{there}:{place}"
        for path, place in zip((*sources, target), places, strict=True)
    ]
    return ["scp", "-r", *_as_arguments(_options(spec, keys, user, port)), "--", *words]


def remote_paths(spec: VmSpec, sources: Sequence[str], target: str) -> list[str | None]:
    """Of each source, and of the target last, the path in the guest; None for one of this host.

    Raises: UsageError when nothing is in the guest, or a path in another one.
    """
    places = [_place(spec, path) for path in (*sources, target)]
    remote = [place is not None for place in places]
    if any(remote[:-1]) == remote[-1] or len(set(remote[:-1])) > 1:
        raise UsageError(
            "one side of a copy is in the guest, and the other one here",
            hint=f"drivebay vm cp FILE {spec.name}:PATH, or drivebay vm cp {spec.name}:PATH FILE",
        )
    return places


def _place(spec: VmSpec, path: str) -> str | None:
    """The path in the guest that is meant; None for one of this host."""
    name, colon, rest = path.partition(":")
    return rest if colon and name == spec.name else None


def _here(path: str) -> str:
    """A path that scp does not take for another host's, although it has a colon."""
    return path if path.startswith("/") else f"./{path}"


def ssh_config(spec: VmSpec, keys: Path, user: str | None = None) -> str:
    """A section for ~/.ssh/config by which every program of OpenSSH finds the VM."""
    host, port = endpoint(spec, keys.with_name(AGENT_SOCKET))
    lines = [f"Host {spec.name}", f"    HostName {host}"]
    lines += [f"    {option} {value}" for option, value in _options(spec, keys, user, port)]
    return "\n".join(lines) + "\n"


def _as_arguments(options: list[tuple[str, str]]) -> list[str]:
    return [word for option, value in options for word in ("-o", f"{option}={value}")]


def _options(spec: VmSpec, keys: Path, user: str | None, port: int) -> list[tuple[str, str]]:
    cloud_init = spec.cloud_init
    found = [("Port", str(port))]
    name = user or (None if cloud_init is None else cloud_init.user)
    if name is not None:
        if not name.isprintable() or not name or name.startswith("-") or set(name) & set(' "%\\'):
            raise UsageError(f"{name[:80]!r} can't be the name of a user in a guest")
        found.append(("User", name))
    if cloud_init is not None:
        found.append(("IdentityFile", _quoted(keys / LOGIN_KEY)))
        if name == cloud_init.user:
            found.append(("IdentitiesOnly", "yes"))
    found += [
        ("UserKnownHostsFile", _quoted(keys / KNOWN_HOSTS)),
        ("HostKeyAlias", _alias(spec.uuid)),
        ("StrictHostKeyChecking", "accept-new" if cloud_init is None else "yes"),
        ("ConnectTimeout", str(CONNECT_SECONDS)),
    ]
    return found


def _quoted(path: Path) -> str:
    """A path as ssh's configuration spells it. Raises: UsageError for what it can't spell."""
    text = str(path)
    if '"' in text or "${" in text or not text.isprintable():
        raise UsageError(
            f"ssh can't be told of the folder {text!r:.200}", hint="set XDG_DATA_HOME to another"
        )
    return '"' + text.replace("\\", "\\\\").replace("%", "%%") + '"'


# ---- the guest's sshd ---------------------------------------------------------------------------


def read_banner(spec: VmSpec, timeout_s: float, agent: Path | None = None) -> str:
    """Return how the guest's ssh server names itself.

    Raises: SshSilent with what to install in the guest; StateError when no port leads there.
    """
    address = endpoint(spec, agent)
    deadline = time.monotonic() + timeout_s
    try:
        with socket.create_connection(address, timeout=timeout_s) as connection:
            reason, banner = "it closed the connection", _first_line(connection, deadline)
    except TimeoutError:
        reason, banner = f"it said nothing for {timeout_s:g} s", b""
    except OSError as error:
        reason, banner = os.strerror(error.errno or errno_codes.EIO), b""
    if banner.startswith(b"SSH-"):
        return banner.decode(errors="replace").strip()
    if banner:
        reason = f"it said {banner[:40]!r}"
    forwarded = any(forward.leads_to_ssh for net in spec.nets for forward in net.forward)
    where = f"port {address[1]} here" if forwarded else f"at {address[0]}"
    raise SshSilent(
        f"no ssh server answers in VM '{spec.name}' ({where}: {reason}): it is not "
        "up yet, or there is none",
        hint="\n".join(
            [
                f"drivebay vm wait {spec.name} --for ssh",
                f"or install it in the guest (drivebay vm console {spec.name}):",
                *(f"  {line}" for line in INSTALL_LINES),
            ]
        ),
    )


def _first_line(connection: socket.socket, deadline: float) -> bytes:
    received = bytearray()
    while b"\n" not in received and len(received) < BANNER_MOST:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        with contextlib.suppress(ConnectionError):
            data = connection.recv(1024)
            if data:
                received += data
                continue
        break
    return bytes(received.partition(b"\n")[0])
