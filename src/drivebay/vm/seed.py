"""cloud-init's NoCloud disk: what the guest is told about itself, as the bytes of an ISO image.

Context: any; pure.

    meta-data        instance id, host name
    network-config   addresses of the interfaces, found by their MAC addresses
    user-data        user, keys, password, packages; behind a person's own user-data, if any

All is JSON, which YAML contains: no text of vm.toml can become a key or a line of its own.

When what happens. cloud-init makes users, keys and packages once for an instance id. The
guest gets ours with a hash of those settings behind it, so that a change of one is carried out
at the next start; the machine-id is made once for ours alone. Network, host name and shared
folders count at each start. With ``dsmode: local`` all that is done before the network is up: a
clone has its own machine-id, from which its DHCP client id comes, before it asks for an address.
"""

from __future__ import annotations

import hashlib
import io
import ipaddress
import json
import re
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Any, Final

from drivebay.errors import UsageError
from drivebay.vm.identity import NEW_MACHINE_ID
from drivebay.vm.spec import DHCP, CloudInit, NetSpec, ShareSpec, VmSpec

__all__ = ["HostKey", "check_cloud_init", "check_net", "seed_iso"]

VOLUME: Final = "cidata"  # cloud-init finds its disk by this label
# All of our lists go behind those of a person's user-data; values that it has stay.
_MERGE: Final = "dict(no_replace,recurse_list)+list(append)"
_BOUNDARY: Final = "==drivebay-user-data=="
_USER_DATA_MOST: Final = 1 << 20
_METRIC: Final = 100  # of the first interface's default route

_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", re.ASCII)
_USER_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}", re.ASCII)
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.:_=~^@/-]{0,199}", re.ASCII)
_PASSWORD_HASH = re.compile(r"\$[0-9a-z]{1,8}\$[A-Za-z0-9./$=,-]{8,200}", re.ASCII)
_SSH_KEY = re.compile(r"[a-z0-9@.-]{4,60} [A-Za-z0-9+/]{16,8192}={0,2}( .*)?", re.ASCII)
_INSTANCE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)


@dataclass(frozen=True)
class HostKey:
    """The key by which a guest's sshd is recognized: OpenSSH's file formats, Ed25519."""

    private: str
    public: str


def seed_iso(spec: VmSpec, public_key: str, host_key: HostKey, user_data: str | None) -> bytes:
    """Return the disk; ``user_data`` is the content of a person's own file.

    Raises: UsageError when a value makes no sense to a guest.
    """
    cloud_init = spec.cloud_init
    if cloud_init is None:
        raise UsageError(
            f"VM '{spec.name}' has no cloud-init", hint="add a table [cloud_init] to its vm.toml"
        )
    check_cloud_init(cloud_init)
    settings = _hash(cloud_init, public_key, host_key, user_data)
    meta_data = {
        "instance-id": f"{cloud_init.instance_id}-{settings}",
        "local-hostname": cloud_init.hostname,
        "dsmode": "local",
    }
    ours = _cloud_config(cloud_init, public_key.strip(), host_key, beside_own=user_data is not None)
    ours["bootcmd"] += [_mount(share) for share in spec.shares]
    text = "#cloud-config\n" + _json(ours)
    return _iso(
        {
            "meta-data": _json(meta_data),
            "network-config": _json(_network_config(spec.nets)),
            "user-data": text if user_data is None else _joined(user_data, text),
        }
    )


def check_cloud_init(cloud_init: CloudInit) -> None:
    """Refuse values that a guest could not use, or would take for something else.

    Raises: UsageError, naming the value.
    """
    _check(_INSTANCE_ID, cloud_init.instance_id, "an instance id", "instance_id")
    _check(_HOST_NAME, cloud_init.hostname, "a host name", "hostname")
    _check(_USER_NAME, cloud_init.user, "a user's name in the guest", "user")
    for package in cloud_init.packages:
        _check(_PACKAGE, package, "a package's name", "packages")
    for key in cloud_init.ssh_keys:
        if not key.isprintable():
            raise UsageError(f"the SSH key {key[:40]!r} is more than one line", field="ssh_keys")
        _check(_SSH_KEY, key.strip(), "an SSH public key", "ssh_keys")
    if cloud_init.password_hash is not None:
        _check(_PASSWORD_HASH, cloud_init.password_hash, "a hashed password", "password_hash")


def _hash(cloud_init: CloudInit, public_key: str, host_key: HostKey, user_data: str | None) -> str:
    """A hash of what cloud-init carries out once for an instance.

    Of the settings only, not of what we make of them: another version of this tool must not
    have everything done anew.
    """
    settings = {
        "user": cloud_init.user,
        "keys": [public_key.strip(), *cloud_init.ssh_keys],
        "host": host_key.public.strip(),
        "password": cloud_init.password_hash,
        "packages": cloud_init.packages,
        "own": user_data,
    }
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]


def _check(pattern: re.Pattern[str], value: str, what: str, field: str) -> None:
    if not pattern.fullmatch(value):
        raise UsageError(f"cloud-init: '{value[:80]}' is not {what}", field=field)


# ---- user-data ----------------------------------------------------------------------------------


def _cloud_config(
    cloud_init: CloudInit, public_key: str, host_key: HostKey, *, beside_own: bool
) -> dict[str, Any]:
    user: dict[str, Any] = {
        "name": cloud_init.user,
        "gecos": cloud_init.user,
        "shell": "/bin/bash",
        "sudo": "ALL=(ALL) NOPASSWD:ALL",
        "ssh_authorized_keys": [public_key, *(key.strip() for key in cloud_init.ssh_keys)],
    }
    if cloud_init.password_hash is not None:
        # Unlike 'passwd' it is set for a user who exists, too: in a clone.
        user |= {"lock_passwd": False, "hashed_passwd": cloud_init.password_hash}
    renew_once = ["cloud-init-per", "once", f"machine-id-{cloud_init.instance_id}"]
    config: dict[str, Any] = {
        # A person's user-data without a user of its own expects the image's.
        "users": ["default", user] if beside_own else [user],
        "ssh_deletekeys": True,
        "ssh_keys": {
            "ed25519_private": host_key.private,
            "ed25519_public": host_key.public.strip(),
        },
        "manage_etc_hosts": True,
        "bootcmd": [[*renew_once, "sh", "-c", NEW_MACHINE_ID]],
        "updates": {"network": {"when": ["boot-new-instance", "boot"]}},
    }
    if cloud_init.packages:
        config |= {"packages": list(cloud_init.packages), "package_update": True}
    return config


def _mount(share: ShareSpec) -> list[str]:
    """At each start, and not by fstab, where a share that is gone would stay."""
    place = f"/mnt/{share.tag}"
    return ["sh", "-c", f"mkdir -p {place} && mount -t virtiofs {share.tag} {place} || true"]


def _joined(own: str, ours: str) -> str:
    """A person's user-data, of whatever kind, and then ours, as one MIME message."""
    if len(own) > _USER_DATA_MOST:
        raise UsageError(f"user-data is limited to {_USER_DATA_MOST} characters, not {len(own)}")
    if own.lstrip().startswith("#include"):
        raise UsageError(
            "user-data that includes others from a network cannot be used: it is read before the "
            "network is up",
            hint="put their content into the file",
        )
    message = EmailMessage()
    message["Content-Type"] = f'multipart/mixed; boundary="{_BOUNDARY}"'
    message["MIME-Version"] = "1.0"
    for text in (own, ours):
        part = EmailMessage()
        # As 'plain' cloud-init looks at the first line, as if the text came alone.
        part.set_content(text, subtype="plain", cte="base64")
        if text is ours:
            part["Merge-Type"] = _MERGE
        message.attach(part)
    return message.as_string()


# ---- network-config -----------------------------------------------------------------------------


def _network_config(nets: tuple[NetSpec, ...]) -> dict[str, Any]:
    """Of several default routes that of the first interface counts, and so on: else each guest
    would choose one by chance.
    """
    several = len(nets) > 1
    ethernets = {
        f"net{number}": _ethernet(net, _METRIC * (number + 1) if several else None)
        for number, net in enumerate(nets)
    }
    return {"version": 2, "ethernets": ethernets}


def _ethernet(net: NetSpec, metric: int | None) -> dict[str, Any]:
    check_net(net)
    found: dict[str, Any] = {"match": {"macaddress": net.mac}}
    if net.address == DHCP:
        found["dhcp4"] = True
        if metric is not None:
            found["dhcp4-overrides"] = {"route-metric": metric}
    else:
        found["addresses"] = [net.address]
        if net.gateway is not None:
            # Not 'default': cloud-init 22.4 takes that for an address, and gives up.
            route: dict[str, Any] = {"to": "0.0.0.0/0", "via": net.gateway}
            found["routes"] = [route if metric is None else route | {"metric": metric}]
    if net.dns:
        found["nameservers"] = {"addresses": list(net.dns)}
    return found


def check_net(net: NetSpec) -> None:
    """Raises: UsageError when the addresses of an interface do not fit together."""
    for server in net.dns:
        try:
            ipaddress.ip_address(server)
        except ValueError:
            raise UsageError(
                f"'{server[:80]}' is no address of a name server", field="dns"
            ) from None
    if net.address == DHCP:
        if net.gateway is not None:
            raise UsageError(
                f"a gateway ({net.gateway[:80]}) needs a static address: with DHCP the guest is "
                "told its gateway",
                hint="give an address, such as 10.0.2.50/24",
                field="gateway",
            )
        return
    try:
        interface = ipaddress.IPv4Interface(net.address)
    except ValueError:
        interface = None
    if interface is None or "/" not in net.address:
        raise UsageError(
            f"'{net.address[:80]}' is neither 'dhcp' nor an IPv4 address with its network's size",
            hint="such as 10.0.2.50/24",
            field="address",
        )
    network = interface.network
    if network.prefixlen < 31 and interface.ip in (
        network.network_address, network.broadcast_address
    ):  # fmt: skip
        raise UsageError(f"{interface} is the network itself or everybody in it", field="address")
    if net.gateway is None:
        return
    try:
        gateway = ipaddress.IPv4Address(net.gateway)
    except ValueError:
        raise UsageError(f"'{net.gateway[:80]}' is no IPv4 address", field="gateway") from None
    if gateway not in network or gateway == interface.ip:
        raise UsageError(
            f"the gateway {gateway} is not another machine of the network {network}",
            hint="a guest reaches its gateway without one, so both are in one network",
            field="gateway",
        )


# ---- the disk -----------------------------------------------------------------------------------


def _json(value: Any) -> str:
    """JSON that YAML reads as the same: no surrogate pairs, which it would not join."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _iso(files: dict[str, str]) -> bytes:
    import pycdlib  # slow to import, and only a start writes the disk

    image = pycdlib.PyCdlib()
    image.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=VOLUME)
    for number, (name, text) in enumerate(sorted(files.items())):
        content = text.encode()
        image.add_fp(
            io.BytesIO(content), len(content), f"/FILE{number}.;1", rr_name=name,
            joliet_path=f"/{name}",
        )  # fmt: skip
    disk = io.BytesIO()
    image.write_fp(disk)
    image.close()
    return disk.getvalue()
