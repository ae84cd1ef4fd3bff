"""Bounds: addresses that come once each leave nothing behind, in the worker or in Redis. A million: `tests/soak`."""

import sys

import pytest

from tests.support.address_flood import MEBIBYTE, flooded

ADDRESSES = 40_000
WINDOW_SECONDS = 2
MOST_GROWTH = 64 * MEBIBYTE
"""Kept are 16,384 claims of some 2.4 KB, 38 MiB. All of the addresses would be 92."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process' memory in /proc")
def test_addresses_that_come_once_leave_nothing_behind() -> None:
    flood = flooded(ADDRESSES, WINDOW_SECONDS, 60.0)
    assert flood.admitted + flood.refused == ADDRESSES
    assert not flood.refused or flood.alone, f"refused although Redis was well: {flood}"
    assert flood.resident_most - flood.resident_before < MOST_GROWTH, flood
    assert flood.keys_most > 5_000, f"there was next to nothing to be forgotten: {flood}"
    assert flood.keys_left == 0, flood
