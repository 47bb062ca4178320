"""Imports go only towards the disk: this table is the rule, for Python and for Cython."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.style.tree import PACKAGE, files, named

VOCABULARY = {"wire", "memory"}
PATH = VOCABULARY | {"reactor", "engines", "bdev", "dataplane"}

# folder: what it may import, beside itself and drivebay.errors.
ALLOWED: dict[str, set[str]] = {
    "system": set(),
    "wire": set(),
    "memory": {"wire"},
    "reactor": VOCABULARY,
    "engines": VOCABULARY | {"reactor"},
    "bdev": VOCABULARY | {"reactor", "engines"},
    "dataplane": VOCABULARY | {"reactor", "bdev"},
    "vhost": PATH,
    "target": PATH | {"vhost", "system"},
    "rpc": PATH | {"vhost", "target"},
    # These reach a running target only through its RPC socket.
    "disks": {"rpc.client", "system"},
    "net": {"disks", "system"},
    "vm": {"rpc.client", "system", "disks", "net"},
    "host": {"rpc.client", "system", "disks", "net", "vm"},
    "web": {"rpc.client", "system", "disks", "vm"},
    "cli": {"rpc.client", "system", "disks", "net", "vm", "host", "web"},
}

# file: what it may import beyond its folder's rule, because the exception is its purpose.
EXCEPTIONS: dict[str, set[str]] = {
    # This command does not reach a running target, it is one.
    "cli/vhost": {"target"},
    # They find the process of a background target, and check its options before it starts.
    "cli/target": {"target.daemon", "target.options"},
    "disks/connection": {"target.daemon", "target.options"},
    "disks/starting": {"target.daemon"},
    "cli/bundle": {"target.daemon"},
    # They say whether that process answers, and whether its folder is of use.
    "host/storage": {"target.daemon"},
    "host/folders": {"target.daemon"},
    # It makes partitions: a partition table's layout is vocabulary, which has no other home.
    "disks/partition": {"wire.gpt"},
    # The load generator is the other side of a vhost-user socket, not part of a target.
    "cli/bench": {"engines"},
    # The process of a target: it starts the RPC server last and stops it first.
    "target/app": {"rpc"},
}

_IMPORT = re.compile(
    r"^\s*(?:from\s+drivebay(?:\.(?P<from>[\w.]+))?\s+c?import\s+(?P<names>\([^)]*\)|[^\n#]+)"
    r"|c?import\s+drivebay\.(?P<plain>[\w.]+))",
    re.MULTILINE,
)


def imported(source: str) -> Iterator[str]:
    """Each module of drivebay that a source imports, without the leading 'drivebay.'."""
    for match in _IMPORT.finditer(source):
        if match["plain"]:
            yield match["plain"]
            continue
        for name in re.findall(r"(\w+)(?:\s+as\s+\w+)?", match["names"]):
            # The name may be a module (from drivebay.rpc import client) or a thing in one.
            yield f"{match['from']}.{name}" if match["from"] else name


def breaches(folder: str, source: str, extra: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    allowed = ALLOWED[folder] | extra | {folder, "errors", "__version__"}
    return [
        module
        for module in imported(source)
        if not any(module == rule or module.startswith(rule + ".") for rule in allowed)
    ]


def sources() -> list[Path]:
    return [
        path
        for path in files(".py", ".pyi", ".pyx", ".pxd", below=PACKAGE)
        if path.parent != PACKAGE
    ]


@pytest.mark.parametrize("path", sources(), ids=named)
def test_imports_go_only_towards_the_disk(path: Path) -> None:
    folder = path.relative_to(PACKAGE).parts[0]
    assert folder in ALLOWED, f"'{folder}' has no rule: add its line to the table above"
    place = path.relative_to(PACKAGE).with_suffix("").as_posix()
    found = breaches(folder, path.read_text(), EXCEPTIONS.get(place, set()))
    assert not found, f"{named(path)} imports {found}; '{folder}' may not"


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("bdev", "from drivebay.vhost.session import Session\n"),
        ("engines", "from drivebay.bdev.base cimport io_t\n"),
        ("memory", "cimport drivebay.reactor.clock\n"),
        ("cli", "import os\nfrom drivebay.rpc import client, server\n"),
        ("vm", "def f():\n    from drivebay.target.app import App\n"),
        ("wire", "from drivebay import (\n    memory,\n)\n"),
    ],
)
def test_the_rule_can_fail(folder: str, source: str) -> None:
    assert breaches(folder, source)


def test_the_rule_allows_what_it_should() -> None:
    source = (
        "from drivebay.errors import HostError\n"
        "from drivebay.rpc import client\n"
        "from drivebay.rpc.client import Client as C, call\n"
        "from drivebay.cli.printing import table\n"
    )
    assert not breaches("cli", source)
