"""The cost cap while a run goes on: who may submit now, who waits, and when the cap ends the run.

The sums and the decision are `rules.budget`; without a cap nothing here waits or asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NoReturn

import anyio

from batchrun.dispatch.change import Change
from batchrun.dispatch.limits import Slot
from batchrun.dispatch.stopping import StopSign
from batchrun.model import ACTIVE, LocalImage, Row, Value
from batchrun.rules.budget import Budget, PriceEntry, Reached, Send, published_price
from batchrun.store.store import Store


@dataclass(frozen=True, slots=True)
class Published:
    """What is published of a tool's price."""

    prices: Sequence[PriceEntry] = ()
    #: USD for a run, the average of past ones; None when not told.
    average_usd: Decimal | None = None


class Cap:
    """Keeps what is spent and reserved within the run's cap."""

    def __init__(self, budget: Budget | None, published: Mapping[int, Published], store: Store) -> None:
        """`budget` None: no cap. `published` by the tool's number in the run; a missing one is not known."""
        self._budget = budget
        self._published = published
        self._store = store
        self._changed = Change()

    async def take_slot(self, row: Row, slot: Slot, body: Mapping[str, Value], sign: StopSign) -> Decimal:
        """Wait for a slot, and until the cap allows the row's task; returns what is reserved for it, in USD.

        Stops the run when the cap is reached; the caller's wait then ends.
        """
        while True:
            await slot.take()
            budget = self._budget
            if budget is None:
                return Decimal(0)
            price = self._price(row, body)
            step = budget.ask(row.tool, images=row.images, published_usd=price)
            if isinstance(step, Send):
                budget.reserve(row.seq, row.tool, images=row.images, published_usd=price)
                return step.reserved_usd
            slot.give()
            if isinstance(step, Reached):
                await self._stop(budget, sign)
            await self._changed.wait()

    def bill(self, row: Row, cost_usd: Decimal | None) -> None:
        """The row's task has ended and was billed; None: the bill is not told."""
        if self._budget is not None:
            self._budget.bill(row.seq, cost_usd)
            self._changed.tell()

    def moved(self, row: Row) -> None:
        """The row stands somewhere else now."""
        if self._budget is not None and row.state not in ACTIVE:
            self._budget.free(row.seq)
            self._changed.tell()

    def left(self, row: Row) -> None:
        """Nothing more is learned of the row in this start."""
        if self._budget is not None:
            self._budget.hold(row.seq) if row.state in ACTIVE else self._budget.free(row.seq)
            self._changed.tell()

    def _price(self, row: Row, body: Mapping[str, Value]) -> Decimal | None:
        known = self._published.get(row.tool, Published())
        inputs = sum(isinstance(value, LocalImage) for value in row.given.values())
        price = published_price(known.prices, body, images=row.images, inputs=inputs)
        return price if price is not None else known.average_usd

    async def _stop(self, budget: Budget, sign: StopSign) -> NoReturn:
        left = await self._store.unbought()
        rows = sum(rows for _, rows, _ in left)
        cost = budget.cost_of(left)
        told = (
            f"about {cost:.4f} USD more by the bills so far" if cost is not None else "at a price not known"
        )
        reserved = budget.reserved_usd
        sign.stop(
            f"the cap of {_usd(budget.cap_usd)} USD is reached: {_usd(budget.spent_usd)} USD spent"
            + (f", {_usd(reserved)} USD reserved for tasks that may be billed" if reserved else "")
            + f"; {rows:,} rows left, {told}. Run again with a higher --max-cost"
        )
        await anyio.sleep_forever()
        raise AssertionError("a stop ends this wait")


def _usd(amount: Decimal) -> str:
    """An exact amount without idle zeros."""
    return f"{amount.normalize():f}"
