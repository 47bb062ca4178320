"""Settings that SPDK has and a saved configuration carries. Context: control.

A few have a meaning here (the scheduler is always the static one). The others tune parts
that this target does not need: pools of a fixed size, sockets, accelerators, drivers that
are not here. Those are checked, kept and saved again, so that a file written by SPDK loads
here and goes back unchanged; nothing else follows from them, and the log says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["Settings"]

_SOCK: Final = {
    "recv_buf_size": 2097152,
    "send_buf_size": 2097152,
    "enable_recv_pipe": True,
    "enable_quickack": False,
    "enable_placement_id": 0,
    "enable_zerocopy_send_server": True,
    "enable_zerocopy_send_client": False,
    "zerocopy_threshold": 0,
    "tls_version": 0,
    "enable_ktls": False,
}
_SSL: Final = {**_SOCK, "recv_buf_size": 4096, "send_buf_size": 4096}
_URING: Final = {**_SOCK, "enable_zerocopy_send_server": False}

# subsystem -> method -> what SPDK starts with, in the order of its saved files.
# None: saved only when somebody set it.
_DEFAULTS: Final[dict[str, dict[str, dict[str, Any] | None]]] = {
    "scheduler": {"framework_set_scheduler": {"name": "static"}},
    "sock": {
        "sock_set_default_impl": {"impl_name": "posix"},
        "sock_impl_set_options uring": {"impl_name": "uring", **_URING},
        "sock_impl_set_options ssl": {"impl_name": "ssl", **_SSL},
        "sock_impl_set_options posix": {"impl_name": "posix", **_SOCK},
    },
    "iobuf": {
        "iobuf_set_options": {
            "small_pool_count": 8192,
            "large_pool_count": 1024,
            "small_bufsize": 8192,
            "large_bufsize": 135168,
            "enable_numa": False,
        }
    },
    "fsdev": {"fsdev_set_opts": {"fsdev_io_pool_size": 65535, "fsdev_io_cache_size": 256}},
    "accel": {
        "accel_set_options": {
            "small_cache_size": 128,
            "large_cache_size": 16,
            "task_count": 2048,
            "sequence_count": 2048,
            "buf_count": 2048,
        }
    },
    "bdev": {
        "bdev_set_options": {
            "bdev_io_pool_size": 65535,
            "bdev_io_cache_size": 256,
            "bdev_auto_examine": True,
            "iobuf_small_cache_size": 128,
            "iobuf_large_cache_size": 16,
        },
        "bdev_raid_set_options": {
            "process_window_size_kb": 1024,
            "process_max_bandwidth_mb_sec": 0,
        },
        "bdev_nvme_set_options": None,
        "bdev_nvme_set_hotplug": None,
    },
}


class Settings:
    """What each set_options method was given last, over SPDK's defaults.

    >>> Settings().calls("scheduler")
    [{'method': 'framework_set_scheduler', 'params': {'name': 'static'}}]
    """

    def __init__(self) -> None:
        self._values: dict[str, dict[str, Any] | None] = {
            name: None if values is None else dict(values)
            for methods in _DEFAULTS.values()
            for name, values in methods.items()
        }
        self.examined: list[str] = []  # by bdev_examine

    def get(self, name: str) -> Mapping[str, Any]:
        """The present values of one method; ``sock_impl_set_options IMPL`` by socket kind."""
        return self._values[name] or {}

    def merge(self, name: str, given: Mapping[str, Any]) -> None:
        """Take over what was given; what was not stays."""
        values = dict(self._values[name] or {})
        values.update((key, value) for key, value in given.items() if value is not None)
        self._values[name] = values

    def calls(self, subsystem: str) -> list[dict[str, Any]]:
        """The calls that set the present values, in SPDK's order."""
        calls = [
            {"method": name.partition(" ")[0], "params": dict(values)}
            for name in _DEFAULTS.get(subsystem, {})
            if (values := self._values[name]) is not None
        ]
        if subsystem == "bdev":
            by_hand = [{"method": "bdev_examine", "params": {"name": n}} for n in self.examined]
            calls[1:1] = by_hand  # behind bdev_set_options
        return calls
