"""What tests of runs share."""

from __future__ import annotations

import pytest


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator delivers nothing late, so short waits in a doubt are as safe there and much quicker."""
    for room in ("batchrun.rules.recovery", "batchrun.dispatch.doubts"):
        monkeypatch.setattr(f"{room}.GRACE_S", 0.5)
    monkeypatch.setattr("batchrun.rules.recovery.SECOND_LOOK_S", 0.5)
    monkeypatch.setattr("batchrun.dispatch.doubts.BETWEEN_S", 0.2)
