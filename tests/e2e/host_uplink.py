"""A host with one uplink, `eno1`, on a LAN: two network namespaces and all that an uplink has.

Its own folders of /etc are what the tests put there: no command in it sees this machine's.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.e2e.net_bay import NetBay
from tests.fakes.process import wait_until

ADDRESS = "10.9.0.2"
PORT = 7000
# A client that says something every 50 ms, and writes down what came back, and when.
TALK = """
import socket, sys, time
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)
s.settimeout(20)
number = 0
while True:
    s.sendall(b"%08d" % number)
    got = b""
    while len(got) < 8:
        part = s.recv(8 - len(got))
        if not part:
            sys.exit("the connection ended")
        got += part
    print(int(got), time.monotonic(), flush=True)
    number += 1
    time.sleep(0.05)
"""
ECHO = """
import socket, sys, threading
def serve(connection):
    while part := connection.recv(100):
        connection.sendall(part)
with socket.create_server((sys.argv[1], int(sys.argv[2]))) as server:
    while True:
        threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""


class HostUplink:
    """The host `eno1` belongs to, and the namespace that plays its LAN."""

    def __init__(self, bay: NetBay) -> None:
        self.bay = bay
        self.lan = bay.namespace("lan")
        bay.link(bay.host, "eno1", self.lan, "eth0")
        bay.ip(self.lan, "address add 10.9.0.1/24 dev eth0")
        bay.ip(self.lan, "address add fd00::1/64 dev eth0 nodad")

    def give_addresses(self) -> None:
        """What a busy server's uplink may have."""
        for words in (
            f"address add {ADDRESS}/24 dev eno1 valid_lft 3600 preferred_lft 1800",
            "address add 10.9.0.3/24 dev eno1 label eno1:x",
            "-6 address add fd00::2/64 dev eno1 nodad",
            "route add default via 10.9.0.1 metric 100 mtu 1400 proto dhcp src 10.9.0.3",
            (
                "route add 10.77.0.0/16 table 77 nexthop via 10.9.0.1 dev eno1 weight 2 "
                "nexthop via 10.9.0.9 dev eno1 onlink"
            ),
            "-6 route add default via fd00::1 metric 5",
            "-6 route add fd07::/64 via fd00::1 proto ra expires 1800",
            "rule add iif eno1 lookup 77 priority 1000",
        ):
            self.bay.ip(self.bay.host, words)
        wait_until(lambda: "tentative" not in self.bay.ip(self.bay.host, "address show eno1"),
                   "addresses that nobody else has")  # fmt: skip

    def state(self) -> str:
        """All of the host's network, as iproute2 shows it; lifetimes are not compared."""
        shown = [self.bay.ip(self.bay.host, words) for words in (
            "-details link show eno1", "address show", "-4 route show table all",
            "-6 route show table all", "-4 rule", "-6 rule",
        )]  # fmt: skip
        return re.sub(r"\d+sec|gc_timer +\S+", "", "\n".join(shown))

    def addresses(self, device: str) -> list[str]:
        """IPv4 and global IPv6 addresses of a device."""
        shown = self.bay.run_in(self.bay.host, "ip", "-json", "address", "show", device)
        if shown.returncode != 0:
            return []
        found: list[dict[str, Any]] = json.loads(shown.stdout)[0]["addr_info"]
        return [f"{each['local']}/{each['prefixlen']}" for each in found
                if each["scope"] == "global"]  # fmt: skip

    def talk(self) -> Talk:
        """An open connection from the LAN to the host."""
        host = self.bay.host
        self.bay.start_in(host, sys.executable, "-c", ECHO, "0.0.0.0", str(PORT))
        wait_until(
            lambda: bool(self.bay.ok_in(host, "ss", "-Hltn", f"sport = :{PORT}")), "a server"
        )
        with (self.bay.folder / "heard").open("wb") as heard:
            program = subprocess.Popen(
                ["ip", "netns", "exec", self.lan, sys.executable, "-c", TALK, ADDRESS, str(PORT)],
                stdout=heard, stderr=heard,
            )  # fmt: skip
        return Talk(program, self.bay.folder / "heard")

    # ---- our command ----------------------------------------------------------------------------

    def run(self, *words: str, patch: str = "") -> subprocess.CompletedProcess[str]:
        """A command, in a process that a few lines of Python may change before."""
        return self.bay.run_in(self.bay.host, *host_bridge(*words, patch=patch))

    def command(self, *words: str) -> str:
        done = self.run(*words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def refused(self, *words: str, code: int = 1) -> str:
        done = self.run(*words)
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done.stderr

    @property
    def folder(self) -> Path:
        return self.bay.folder / "data/drivebay/host-bridge"

    def guardian(self) -> int:
        pid = json.loads((self.folder / "guardian.json").read_text())["pid"]
        assert isinstance(pid, int)
        return pid

    def nothing_waits(self) -> bool:
        return not (self.folder / "before.json").exists()


def host_bridge(*words: str, patch: str = "") -> list[str]:
    """Our command as a program of its own."""
    code = f"import os, sys\n{patch}\nfrom drivebay.cli.main import main\nsys.exit(main())"
    return [sys.executable, "-c", code, "net", "host-bridge", *words]


class Talk:
    """A connection that says something all the time."""

    def __init__(self, program: subprocess.Popen[bytes], heard: Path) -> None:
        self._program = program
        self._heard = heard

    def times(self) -> list[float]:
        lines = self._heard.read_text().splitlines()
        assert self._program.poll() is None, lines[-3:]
        numbers = [int(line.split()[0]) for line in lines]
        assert numbers == list(range(len(numbers)))
        return [float(line.split()[1]) for line in lines]

    def goes_on(self) -> None:
        """It answers to something that was said from now on."""
        now = time.monotonic()
        wait_until(lambda: bool(times := self.times()) and times[-2:][0] > now, "an answer")

    def end(self) -> None:
        self._program.kill()
        self._program.wait()
