"""The long run of `make soak`, made short."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.soak import Plan, Soak

SHORT = Plan(
    rows=80,
    kills=3,
    kill_after_s=(0.8, 2.0),
    outages=1,
    outage_s=2.0,
    long_every=1000,
    limits=(4, 16),
    slots=16,
    stall_s=2.0,
    late_s=0.5,
    disk_bytes=None,
    module="tests.soak.hasty",
)


@pytest.mark.timeout(300)
async def test_under_every_trouble_at_once_nothing_is_paid_twice_lost_or_torn(tmp_path: Path) -> None:
    result = await Soak(tmp_path, SHORT, tmp_path).run()
    assert result.is_clean, (result.table, result.stops)
    assert result.table["images whole"] == result.table["images expected"]
    assert result.starts > 3
