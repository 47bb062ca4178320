"""The CD drive of a running VM, over its monitor.

Context: a short-lived process.
"""

from __future__ import annotations

import contextlib
import time
from typing import Final

from drivebay.errors import DrivebayError, StateError
from drivebay.vm.command import CD, CD_MEDIUM
from drivebay.vm.qmp import QmpRefused
from drivebay.vm.run import monitor, note_eject
from drivebay.vm.store import Vm

__all__ = ["eject", "start_last"]

LETTING_GO_SECONDS: Final = 10.0
_TRY_EVERY_S: Final = 0.5
_AFTER_THE_DISK: Final = 2


def eject(vm: Vm) -> None:
    """Take the CD out, and let QEMU close its file.

    A guest that has it mounted keeps the tray shut, and is asked to open it. Raises: StateError,
    HostError, PeerError, QmpRefused.
    """
    deadline = time.monotonic() + LETTING_GO_SECONDS
    with monitor(vm) as qmp:
        while True:
            try:
                qmp.call("eject", id=CD)
                break
            except QmpRefused as error:
                if time.monotonic() > deadline:
                    raise StateError(
                        f"the guest of VM '{vm.name}' did not let go of its CD within "
                        f"{LETTING_GO_SECONDS:.0f} s ({error})",
                        hint=f"unmount it there; or drivebay vm stop {vm.name}, then eject it",
                    ) from error
            time.sleep(_TRY_EVERY_S)
        qmp.call("blockdev-del", {"node-name": CD_MEDIUM})
    note_eject(vm)


def start_last(vm: Vm) -> None:
    """What the firmware starts when the guest reboots: the disk again, before the CD.

    It reads the order anew at a reset only. If this fails, the machine starts from its CD once
    more, which is better than no machine.
    """
    with contextlib.suppress(DrivebayError), monitor(vm) as qmp:
        where = {"path": f"/machine/peripheral/{CD}", "property": "bootindex"}
        qmp.call("qom-set", {**where, "value": _AFTER_THE_DISK})
