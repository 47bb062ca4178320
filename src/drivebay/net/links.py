"""The host's bridges and addresses, over netlink: each step does what is missing, and no more.

Context: a short-lived process; what changes something needs root. The process' own network
namespace is meant. pyroute2 is imported late, since it takes a third of a second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from drivebay.errors import HostError

if TYPE_CHECKING:
    from pyroute2 import IPRoute

__all__ = ["netlink"]


@contextlib.contextmanager
def netlink(what: str) -> Iterator[IPRoute]:
    """Speak to the kernel. Raises: HostError, which begins "can't ``what``"."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as ipr:
            yield ipr
    except NetlinkError as error:
        raise HostError(f"can't {what}", error.code) from error
    except OSError as error:
        raise HostError(f"can't {what}", error.errno or 0) from error
