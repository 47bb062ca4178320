"""cloud-init told to leave the host's network alone, which it may write anew at each start.

Context: any; reads, and returns what should be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from drivebay.net.hostbridge.writers.files import NewFile

__all__ = ["cloud_init_files"]

_SWITCH: Final = "etc/cloud/cloud.cfg.d/99-drivebay-network.cfg"


def cloud_init_files(root: Path) -> list[NewFile]:
    """None where there is no cloud-init, or where it is off."""
    folder = root / "etc/cloud"
    if not (folder / "cloud.cfg").exists() or (folder / "cloud-init.disabled").exists():
        return []
    text = "# The host's uplink is in a bridge: drivebay net host-bridge\n"
    return [NewFile(root / _SWITCH, f"{text}network: {{config: disabled}}\n")]
