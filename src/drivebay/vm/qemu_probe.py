"""What a QEMU binary can do, asked of itself.

Context: a process of its own that ends within PROBE_SECONDS. One session over the monitor of a
machine without hardware answers everything, in about 0.1 s: no guest runs, nothing is opened.

What is asked is behaviour rather than a version: distributions leave out parts of QEMU, and
put others into packages of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from drivebay.errors import NotFound

__all__ = ["Probe", "probe"]

PROBE_SECONDS: Final = 10.0
ANSWER_LIMIT: Final = 4 << 20

# `qom-list-properties` knows a type, also when it lies in a module that is loaded on demand.
_TYPES: Final = {
    "vhost-user-blk": "vhost-user-blk-pci",
    "vhost-user-fs": "vhost-user-fs-pci",
    "e1000": "e1000",
    "nvme": "nvme",
    "ahci": "ich9-ahci",
    "scsi": "virtio-scsi-pci",
    "memfd": "memory-backend-memfd",
    "tcg": "tcg-accel",
    "kvm": "kvm-accel",
}

# The block driver is there when it gets as far as to miss this socket, in libblkio's words.
_NO_SOCKET: Final = "/nonexistent/drivebay"
_MISSED_SOCKET: Final = "blkio_connect failed"


@dataclass(frozen=True)
class Probe:
    """The answers."""

    version: tuple[int, int]
    features: frozenset[str]
    machines: tuple[str, ...]  # the versioned kinds of pc-q35
    machine: str  # the newest of them


def probe(path: Path) -> Probe:
    """Ask a binary. Raises: NotFound when it is no QEMU that works."""
    answers = _answers(path, _converse(path, _words()))
    version = answers["version"].get("return", {}).get("qemu", {})
    try:
        numbers = int(version["major"]), int(version["minor"])
        machines = [
            (str(machine["name"]), machine.get("alias") == "q35")
            for machine in answers["machines"]["return"]
            if str(machine["name"]).startswith("pc-q35-")
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NotFound(
            f"'{path}' does not say its version and its machines as QEMU does"
        ) from error
    newest = [name for name, newest in machines if newest]
    processor = answers["target"].get("return", {}).get("arch")
    if processor != "x86_64" or not newest:
        kind = "no machine 'q35'" if processor == "x86_64" else f"machines for {processor} only"
        raise NotFound(
            f"'{path}' is a QEMU with {kind}",
            hint="name the QEMU for x86_64: --qemu PATH, such as qemu-system-x86_64",
        )
    names = tuple(sorted(name for name, _ in machines))
    return Probe(numbers, _features(answers), names, newest[0])


def _features(answers: Mapping[str, dict[str, Any]]) -> frozenset[str]:
    found = {name for name in (*_TYPES, "user-net", "seccomp") if "return" in answers[name]}
    if _MISSED_SOCKET in str(answers["block-driver"].get("error", {}).get("desc", "")):
        found.add("vhost-user-block-driver")
    return frozenset(found)


def _words() -> list[dict[str, Any]]:
    """The questions; an answer carries its question's id."""
    words: list[dict[str, Any]] = [
        {"execute": "qmp_capabilities", "id": "capabilities"},
        {"execute": "query-version", "id": "version"},
        {"execute": "query-target", "id": "target"},
        {"execute": "query-machines", "id": "machines"},
        {"execute": "netdev_add", "id": "user-net", "arguments": {"type": "user", "id": "net"}},
        {
            "execute": "query-command-line-options",
            "id": "seccomp",
            "arguments": {"option": "sandbox"},
        },
        {
            "execute": "blockdev-add",
            "id": "block-driver",
            "arguments": {
                "driver": "virtio-blk-vhost-user",
                "node-name": "disk",
                "path": _NO_SOCKET,
                "cache": {"direct": True},
            },
        },
    ]
    words += [
        {"execute": "qom-list-properties", "id": name, "arguments": {"typename": kind}}
        for name, kind in _TYPES.items()
    ]
    return [*words, {"execute": "quit", "id": "quit"}]


def _converse(path: Path, words: list[dict[str, Any]]) -> list[bytes]:
    """Start the binary, tell it all the words, and return the lines of its answers."""
    command = [str(path), "-M", "none,accel=tcg:kvm", "-nodefaults", "-no-user-config"]
    command += ["-display", "none", "-S", "-qmp", "stdio"]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError as error:
        raise NotFound(f"'{path}' does not run: {error.strerror or error}") from error
    with process:
        try:
            said, complaint = _read_all(process, b"".join(_line(word) for word in words))
        except TimeoutError:
            raise NotFound(f"'{path}' did not answer as QEMU within {PROBE_SECONDS:g} s") from None
        except ValueError:
            raise NotFound(f"'{path}' is no QEMU: it talks without end") from None
        finally:
            process.kill()
    lines = said.splitlines()
    if not lines or not lines[0].startswith(b'{"QMP"'):
        told = (complaint.strip() or said.strip()).decode(errors="replace").splitlines()
        last = f": {told[-1][:200]}" if told else ""
        raise NotFound(f"'{path}' is no QEMU that starts{last}")
    return lines


def _line(word: dict[str, Any]) -> bytes:
    return json.dumps(word).encode() + b"\n"


def _read_all(process: subprocess.Popen[bytes], told: bytes) -> tuple[bytes, bytes]:
    """What it says to both streams until it ends. Raises: TimeoutError, ValueError (too much)."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with contextlib.suppress(BrokenPipeError):  # less than a pipe holds, so this can't block
        process.stdin.write(told)
        process.stdin.close()
    deadline = time.monotonic() + PROBE_SECONDS
    heard = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    with selectors.DefaultSelector() as waiting:
        for descriptor in heard:
            waiting.register(descriptor, selectors.EVENT_READ)
        while waiting.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            for key, _ in waiting.select(left):
                data = os.read(key.fd, 1 << 16)
                heard[key.fd] += data
                if not data:
                    waiting.unregister(key.fd)
                if len(heard[key.fd]) > ANSWER_LIMIT:
                    raise ValueError
    out, complaint = heard.values()
    return bytes(out), bytes(complaint)


def _answers(path: Path, lines: list[bytes]) -> dict[str, dict[str, Any]]:
    """The answers by their question's id; each question has one."""
    answers: dict[str, dict[str, Any]] = {}
    try:
        for line in lines:
            answer = json.loads(line)
            if "id" in answer:
                answers[str(answer["id"])] = answer
    except (ValueError, TypeError) as error:
        raise NotFound(f"'{path}' answers its monitor with no JSON: {line[:80]!r}") from error
    missing = [word["id"] for word in _words() if word["id"] not in answers]
    if missing:
        raise NotFound(f"'{path}' ended before it had answered what it can do ({missing[0]})")
    return answers
