"""A simulator for the whole of a test file, and a folder for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import Here, Wiro, simulator


@pytest.fixture(scope="module")
def wiro() -> Iterator[Wiro]:
    """A simulator in fair weather; a test that changes it starts one of its own."""
    with simulator() as found:
        yield found


@pytest.fixture
def here(tmp_path: Path, wiro: Wiro) -> Here:
    """An empty folder, with the simulator's keys in the environment."""
    return Here(tmp_path, wiro)


@pytest.fixture
def alone(tmp_path: Path) -> Here:
    """An empty folder, and no keys."""
    return Here(tmp_path)
