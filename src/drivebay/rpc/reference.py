"""Writes docs/rpc.md from the declarations: ``python -m drivebay.rpc.reference > docs/rpc.md``.

Context: a developer's shell, and the test that compares the page with the declarations.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Final

from drivebay.rpc.methods import all_methods
from drivebay.rpc.schema import RUNTIME, STARTUP, Method

__all__ = ["reference"]

_INTRODUCTION: Final = """\
# RPC methods

The target answers JSON-RPC 2.0 on a Unix socket (`-r`, by default `/var/tmp/spdk.sock`),
with SPDK's methods, parameters and error codes: SPDK's own client drives it unmodified.
Where an answer differs from SPDK's, [coming-from-spdk.md](coming-from-spdk.md) says why.

Requests may follow each other without anything between them; answers end with a newline.
An array of requests is a batch. An error has SPDK's `code` and `message`; `data` names the
`field` at fault, the `value` seen, the `reason` and a `hint` where there is one.

This page is made from the methods' declarations: `python -m drivebay.rpc.reference`.
"""

_WHEN: Final = {
    frozenset({STARTUP}): "before `framework_start_init` only",
    frozenset({RUNTIME}): "after `framework_start_init`",
    frozenset({STARTUP, RUNTIME}): "at any time",
}


def reference() -> str:
    """The whole page."""
    methods = all_methods()
    lines = [_INTRODUCTION]
    for title, beginnings in (
        ("Process", ("spdk_", "rpc_", "framework_", "notify_", "log_", "thread_")),
        ("Bdevs", ("bdev_",)),
        ("vhost", ("vhost_", "virtio_")),
        ("Drivebay's own", ("drivebay_",)),
        ("Settings that are only kept", ("iobuf_", "accel_", "fsdev_", "sock_")),
    ):
        lines.append(f"## {title}\n")
        for name in sorted(methods):
            if name.startswith(beginnings):
                lines += _method(methods[name])
    return "\n".join(lines)


def _method(method: Method) -> Iterator[str]:
    yield f"### {method.name}\n"
    yield f"{method.doc} Callable {_WHEN[method.states]}.\n"
    if not method.params:
        yield "No parameters.\n"
        return
    yield "| parameter | type | | meaning |"
    yield "|---|---|---|---|"
    for param in method.params:
        if param.required:
            default = "required"
        elif param.default is None:
            default = ""
        else:
            default = f"default {str(param.default).lower()}"
        yield f"| {param.name} | {param.kind.name} | {default} | {param.doc} |"
    yield ""


if __name__ == "__main__":
    sys.stdout.write(reference())
