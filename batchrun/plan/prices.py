"""What a manifest will cost, as far as it is published: told before anything is sent, never guessed."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol


class PriceEntry(Protocol):
    """An entry of a tool's price list."""

    @property
    def inputs(self) -> object:
        """What a request must have for the entry to hold; empty: it holds for all."""
        ...

    @property
    def price_usd(self) -> Decimal: ...
    @property
    def method(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is known of the cost of one tool's rows."""

    tool: str
    rows: int
    images: int
    #: None: nothing is published.
    cost_usd: Decimal | None
    #: False: an average of past runs, not a price.
    is_price: bool = True
    #: Published prices differ by the request's values: the lowest and the highest.
    range_usd: tuple[Decimal, Decimal] | None = None


def estimate(
    tool: str, rows: int, images: int, prices: tuple[PriceEntry, ...], approximate_usd: Decimal | None
) -> Estimate:
    """The cost of `rows` requests making `images` images, by price list, else by the average of past runs."""
    totals = [total for entry in prices if (total := _total(entry, rows, images)) is not None]
    if totals and len(totals) == len(prices):
        low, high = min(totals), max(totals)
        return Estimate(tool, rows, images, high, range_usd=None if low == high else (low, high))
    if approximate_usd:  # a tool that never ran has an average of 0, which says nothing
        return Estimate(tool, rows, images, approximate_usd * rows, is_price=False)
    return Estimate(tool, rows, images, None)


def _total(entry: PriceEntry, rows: int, images: int) -> Decimal | None:
    if entry.method == "cpr":
        return entry.price_usd * rows
    if entry.method == "cpo":
        return entry.price_usd * images
    return None
