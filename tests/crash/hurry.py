"""Shorter waits: on loopback a killed process's last bytes arrive at once, and tasks are over soon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batchrun.dispatch import doubts
from batchrun.rules import pace, recovery


def hurry(put: Callable[[Any, str, float], None]) -> None:
    """Shorten them with `put`, which sets an attribute (`monkeypatch.setattr`, or plain `setattr`)."""
    for module in (recovery, doubts):
        put(module, "GRACE_S", 1.0)
    put(recovery, "SECOND_LOOK_S", 0.3)
    put(doubts, "BETWEEN_S", 0.2)
    put(pace, "PRICE_S", 0.0005)  # looks are nearly free at first
