"""The programs that networks need beside the kernel: found, or named with the package that brings
them.

Context: any.
"""

from __future__ import annotations

import os
import shutil
from typing import Final

from drivebay.errors import NotFound

__all__ = ["PACKAGES", "find_program"]

PACKAGES: Final = {"nft": "nftables", "dnsmasq": "dnsmasq-base"}
# Where Debian puts them; a root of `su` may have a PATH without.
_ADMINS: Final = "/usr/local/sbin:/usr/sbin:/sbin"


def find_program(name: str) -> str:
    """The path of a program. Raises: NotFound, with the mend."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_ADMINS}")
    if found is None:
        raise NotFound(
            f"'{name}' is not installed, which a network needs",
            hint=f"sudo apt-get install {PACKAGES[name]}",
        )
    return found
