"""Limits as clients give them: SPDK's names, units and rounding. Context: control."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from drivebay.bdev.base import Bdev

__all__ = ["LIMITS", "limits_of", "rates_with"]

_log = logging.getLogger(__name__)

# In the order of Bdev.limit(): requests, bytes, bytes read, bytes written.
LIMITS: Final = ("rw_ios_per_sec", "rw_mbytes_per_sec", "r_mbytes_per_sec", "w_mbytes_per_sec")
_IOS: Final = "rw_ios_per_sec"
_IOS_STEP: Final = 1000
_MIB: Final = 1 << 20
_MOST: Final = (1 << 64) - 1


def limits_of(bdev: Bdev) -> dict[str, int]:
    """What bdev_get_bdevs shows: 0 where there is no limit."""
    rates = bdev.rates
    if rates is None:
        return dict.fromkeys(LIMITS, 0)
    return {
        name: rate if name == _IOS else rate // _MIB
        for name, rate in zip(LIMITS, rates, strict=True)
    }


def rates_with(bdev: Bdev, given: Mapping[str, int]) -> tuple[int, int, int, int]:
    """The limits of a bdev with those that are given in place of its own.

    As in SPDK requests are rounded up to whole thousands, and bytes are in MiB.
    """
    limits = {**limits_of(bdev), **given}
    ios = limits[_IOS]
    if ios % _IOS_STEP:
        ios = min(ios + _IOS_STEP - ios % _IOS_STEP, _MOST // _IOS_STEP * _IOS_STEP)
        _log.warning(
            "the limit of bdev '%s' is rounded from %d to %d requests a second",
            bdev.name,
            limits[_IOS],
            ios,
        )
    moved, read, written = (min(limits[name], _MOST // _MIB) * _MIB for name in LIMITS[1:])
    return ios, moved, read, written
