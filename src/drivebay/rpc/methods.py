"""Every method that this target answers: importing the files is what declares them."""

from __future__ import annotations

from collections.abc import Mapping

from drivebay.rpc import (
    methods_bdev,
    methods_crypto,
    methods_diagnostics,
    methods_error,
    methods_file,
    methods_filter,
    methods_framework,
    methods_limits,
    methods_log,
    methods_lvol,
    methods_lvstore,
    methods_memory,
    methods_python,
    methods_raid,
    methods_settings,
    methods_split,
    methods_statistics,
    methods_thread,
    methods_vhost,
)
from drivebay.rpc.schema import METHODS, Method

__all__ = ["all_methods"]

_FILES = (
    methods_framework,
    methods_log,
    methods_thread,
    methods_settings,
    methods_bdev,
    methods_statistics,
    methods_limits,
    methods_memory,
    methods_file,
    methods_filter,
    methods_python,
    methods_crypto,
    methods_split,
    methods_error,
    methods_raid,
    methods_lvstore,
    methods_lvol,
    methods_vhost,
    methods_diagnostics,
)


def all_methods() -> Mapping[str, Method]:
    """Return the declared methods, in the order of declaration."""
    assert all(_FILES)
    return METHODS
