"""A Debian guest that is itself a host of VMs: Drivebay is this machine's, in shared folders.

An emulated processor runs Python slowly, so what can be prepared here is prepared here: the files
of a VM, and the unit. What is left to the guest is what its systemd does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tomlkit

import drivebay
from drivebay.vm.spec import ShareSpec, VmSpec
from drivebay.vm.spec_file import write_spec
from drivebay.vm.unit import NAME, unit_text
from tests.fakes.qemu import answers

__all__ = ["SHARES", "prepare"]

CODE = Path(drivebay.__file__).parents[1]
LIBRARIES = Path(tomlkit.__file__).parents[1]
# What `vm create --share` takes; a fourth one, 'work', carries the files and the script.
SHARES = (f"{CODE}:code,ro", f"{LIBRARIES}:libs,ro", "/usr,ro")
INNER = VmSpec(
    name="inner",
    uuid="6f2d0c4e-3c53-4d8a-9d0f-111122223333",
    machine="pc-q35-9.2",
    memory=16 << 20,
    cpus=1,
    autostart=True,
    shares=(ShareSpec("/srv", "srv", read_only=True),),
)
# The guest's own Python is of the same kind, which the compiled modules need.
PYTHON = "/usr/bin/python3"
LOADED = "/mnt/usr/lib/x86_64-linux-gnu"
VIRTIOFSD = f"""\
#!/bin/sh
exec {LOADED}/ld-linux-x86-64.so.2 --library-path {LOADED} /mnt/usr/lib/qemu/virtiofsd "$@"
"""
# Instead of QEMU, which emulated twice needs longer to answer than a start waits for it: it says
# what it can, answers its monitor, and ends when its power button is pressed.
QEMU = """\
#!/bin/sh
case "$*" in
*stdio*) exec cat /usr/local/share/qemu-answers ;;
*) exec python3 -I -S /usr/local/share/qemu-monitor.py "$@" ;;
esac
"""
MONITOR = """\
import contextlib, json, re, socket, sys
listening = socket.socket(fileno=int(re.search(r"id=monitor,fd=(\\d+)", " ".join(sys.argv))[1]))
while True:
    connection, _ = listening.accept()
    with connection, contextlib.suppress(ConnectionError):  # who asks is not patient
        connection.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\\n')
        while told := connection.recv(65536):
            told = json.loads(told)
            answer = {"return": {}, **{key: told[key] for key in told if key == "id"}}
            connection.sendall(json.dumps(answer).encode() + b"\\n")
            if told["execute"] == "system_powerdown":
                sys.exit()
"""
DROP_IN = """\
[Service]
Environment=PYTHONPATH=/mnt/code:/mnt/libs PYTHONDONTWRITEBYTECODE=1
"""
# All that the journal gets is on the console, too, which outlives a shutdown.
JOURNAL = "[Journal]\nForwardToConsole=yes\n"
SETUP = f"""\
set -e
cp -r /mnt/work/root/. /
chmod 755 /usr/local/bin/*
systemctl daemon-reload
systemctl restart systemd-journald
systemctl enable {NAME}
"""


def prepare(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill the folder 'work': `sh /mnt/work/setup` then makes the guest a host."""
    assert sys.version_info[:2] == (3, 11), "our modules are for another Python than the guest's"
    files = {
        "var/lib/drivebay/vms/inner/vm.toml": write_spec(INNER),
        "var/lib/drivebay/vms/broken/vm.toml": "memory = ",
        "usr/local/bin/qemu-system-x86_64": QEMU,
        "usr/local/share/qemu-monitor.py": MONITOR,
        "usr/local/share/qemu-answers": answers(),
        "usr/local/bin/virtiofsd": VIRTIOFSD,
        f"etc/systemd/system/{NAME}.d/test.conf": DROP_IN,
        "run/systemd/journald.conf.d/console.conf": JOURNAL,
    }
    with monkeypatch.context() as other:
        other.setattr(sys, "executable", PYTHON)
        other.setattr("drivebay.vm.unit._is_system", lambda: True)
        other.delenv("XDG_DATA_HOME", raising=False)
        other.delenv("DRIVEBAY_QEMU", raising=False)
        files[f"etc/systemd/system/{NAME}"] = unit_text()
    for name, text in files.items():
        path = work / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (work / "setup").write_text(SETUP)
