"""What is known of a price is told, and nothing else."""

from __future__ import annotations

from decimal import Decimal

import pytest

from batchrun.plan.prices import estimate
from batchrun.wiro.wire import Price


def price(method: str, usd: str, **inputs: str) -> Price:
    """An entry of a price list."""
    return Price(inputs=inputs, price_usd=Decimal(usd), method=method)


@pytest.mark.parametrize(
    ("prices", "average", "cost", "is_price", "range_usd"),
    [
        ((price("cpr", "0.02"),), None, "0.20", True, None),  # by run: ten rows
        ((price("cpo", "0.003"),), None, "0.060", True, None),  # by output: twenty images
        # prices that differ by the request's values are a range, and the highest counts
        (
            (price("cpo", "0.003"), price("cpo", "0.004", quality="high")),
            None,
            "0.080",
            True,
            ("0.060", "0.080"),
        ),
        ((price("cps", "0.0005"),), "0.01", "0.10", False, None),  # by second: only the average is known
        ((), "0.01", "0.10", False, None),
    ],
)
def test_an_estimate_is_a_price_or_an_average(prices, average, cost, is_price, range_usd):
    told = estimate("tool", 10, 20, prices, Decimal(average) if average else None)
    assert told.cost_usd == Decimal(cost)
    assert told.is_price is is_price
    assert told.range_usd == (tuple(map(Decimal, range_usd)) if range_usd else None)


@pytest.mark.parametrize("average", [None, Decimal(0)])
@pytest.mark.parametrize("prices", [(), (price("cps", "0.0005"),), (price("cpr", "1"), price("cps", "1"))])
def test_what_is_not_known_is_not_zero(prices, average):
    assert estimate("tool", 10, 20, prices, average).cost_usd is None
