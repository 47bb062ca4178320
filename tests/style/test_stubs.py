"""The .pyi pages promise nothing that the built modules lack: mypy's stubtest compares them."""

from __future__ import annotations

import subprocess
import sys

from tests.style.tree import PACKAGE, ROOT, files

# What a page names for annotations only, or leaves to subclasses.
ALLOWED = {
    "drivebay.bdev.base.Listener",
    "drivebay.bdev.base.Bdev.open_channel",
    "drivebay.engines.vhost_user_load.Counters",
    "drivebay.engines.vhost_user_load.Mismatch",
}


def modules() -> list[str]:
    """Each extension module that has a page."""
    return [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in files(".pyx", below=PACKAGE)
        if path.with_suffix(".pyi").is_file()
    ]


def broken_promises(said: str) -> list[str]:
    """Lines of stubtest that count: Cython's constructors do not show their parameters."""
    return [
        line
        for line in said.splitlines()
        if line.startswith("drivebay.")
        and "__init__ is inconsistent" not in line
        and line.split()[0] not in ALLOWED
    ]


def test_pages_and_built_modules_agree() -> None:
    command = [sys.executable, "-m", "mypy.stubtest", "--concise", "--ignore-missing-stub"]
    done = subprocess.run(
        [*command, "--ignore-disjoint-bases", *modules()],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert "error:" not in done.stderr + done.stdout, done.stderr + done.stdout
    assert not broken_promises(done.stdout), "\n".join(broken_promises(done.stdout))


def test_a_broken_promise_is_seen() -> None:
    said = (
        "drivebay.a.b.Queue.__init__ is inconsistent, stub does not have *args\n"
        "drivebay.bdev.base.Listener is not present at runtime\n"
        "drivebay.reactor.reactor.tick_rate is not present at runtime\n"
    )
    assert [line.split()[0] for line in broken_promises(said)] == [
        "drivebay.reactor.reactor.tick_rate"
    ]
