"""Keeping a run within its cost cap: what may still be sent, from what was spent, reserved and billed so far.

A price is known only once a task has ended, so each task that may be billed has money reserved: the larger of
the published price and the highest bill of its tool. Pure bookkeeping; who waits for it is in `dispatch`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Protocol

#: Values that count the input files of a parameter, as in `QUANTITY:3`.
_QUANTITY = "QUANTITY:"
#: What one step of a price per pixels covers.
_PIXELS = 1024 * 1024


class PriceEntry(Protocol):
    """An entry of a tool's published price list."""

    @property
    def inputs(self) -> Mapping[str, str]:
        """Parameter values, as text, that a request must have; empty: it holds for all."""
        ...

    @property
    def price_usd(self) -> Decimal: ...
    @property
    def method(self) -> str: ...
    @property
    def extra_usd(self) -> Decimal | None: ...
    @property
    def per_input_usd(self) -> Decimal | None: ...


def published_price(
    entries: Iterable[PriceEntry], body: Mapping[str, object], *, images: int, inputs: int = 0
) -> Decimal | None:
    """The price in USD of a request that makes `images` from `inputs` images; None when it is not published.

    The most specific entry that holds counts, the dearest of equals. Prices per second or token are known
    only afterwards. Source: the service's documentation of `dynamicprice`.
    """
    holding = [entry for entry in entries if _holds(entry, body)]
    most = max((len(entry.inputs) for entry in holding), default=0)
    prices = [
        _price(entry, body, images=images, inputs=inputs) for entry in holding if len(entry.inputs) == most
    ]
    known = [price for price in prices if price is not None]
    return max(known) if known and len(known) == len(prices) else None


def _holds(entry: PriceEntry, body: Mapping[str, object]) -> bool:
    for name, wanted in entry.inputs.items():
        value = body.get(name, "")
        if wanted.startswith(_QUANTITY):
            files = len(value) if isinstance(value, list) else int(bool(value))
            if wanted != f"{_QUANTITY}{files}":
                return False
        elif str(value) != wanted:
            return False
    return True


def _price(entry: PriceEntry, body: Mapping[str, object], *, images: int, inputs: int) -> Decimal | None:
    match entry.method:
        case "cpr":
            return entry.price_usd
        case "cpo":
            return entry.price_usd * images
        case "cp-pixel":
            width, height = (str(body.get(side, "")) for side in ("width", "height"))
            if not (width.isdecimal() and height.isdecimal()):
                return None
            further = max(0, -(-int(width) * int(height) // _PIXELS) - 1)
            price = entry.price_usd + further * (entry.extra_usd or entry.price_usd)
            return price * images + (entry.per_input_usd or 0) * inputs
    return None


@dataclass(slots=True)
class Bills:
    """What one tool's tasks of this run were billed."""

    tasks: int = 0
    images: int = 0
    total_usd: Decimal = Decimal(0)
    #: The highest bill of one task, and the highest for each image asked for.
    highest_usd: Decimal = Decimal(0)
    highest_per_image_usd: Decimal = Decimal(0)

    def add(self, cost_usd: Decimal, *, images: int, tasks: int = 1) -> None:
        """Take in `tasks` bills of `cost_usd` each, for tasks that were asked for `images` each."""
        images = max(1, images)
        self.tasks += tasks
        self.images += images * tasks
        self.total_usd += cost_usd * tasks
        self.highest_usd = max(self.highest_usd, cost_usd)
        self.highest_per_image_usd = max(self.highest_per_image_usd, cost_usd / images)

    def highest_for(self, images: int) -> Decimal:
        """What a task of so many images may be billed, by the bills so far: never less than any of them."""
        return max(self.highest_usd, self.highest_per_image_usd * images)


@dataclass(frozen=True, slots=True)
class Reservation:
    """Money set aside for a task that was, or may have been, made."""

    tool: int
    images: int
    #: The published price, or what was set aside for it before; 0: not known.
    floor_usd: Decimal = Decimal(0)
    #: Nothing will be learned of it in this start: a doubt that is held, a task that is left.
    is_held: bool = False


@dataclass(frozen=True, slots=True)
class Send:
    """The task may be submitted, with so much reserved."""

    reserved_usd: Decimal


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now: a task that is under way will tell more."""


@dataclass(frozen=True, slots=True)
class Reached:
    """Not within the cap, whatever the tasks under way will tell."""


@dataclass(slots=True)
class Budget:
    """What a run has spent and reserved under its cap, in USD."""

    cap_usd: Decimal
    spent_usd: Decimal = Decimal(0)
    bills: dict[int, Bills] = field(default_factory=dict)
    #: By row number.
    reservations: dict[int, Reservation] = field(default_factory=dict)

    @property
    def reserved_usd(self) -> Decimal:
        """The sum of all reservations, each valued by the newest bills."""
        return sum((self._value(each) for each in self.reservations.values()), Decimal(0))

    def ask(self, tool: int, *, images: int, published_usd: Decimal | None) -> Send | Wait | Reached:
        """Whether a task may be submitted now."""
        wanted = self._value(Reservation(tool, images, published_usd or Decimal(0)))
        under_way = [each for each in self.reservations.values() if not each.is_held]
        if self.spent_usd + self.reserved_usd + wanted > self.cap_usd or self._is_used_up():
            return Wait() if under_way else Reached()
        if tool not in self.bills and any(each.tool == tool for each in under_way):
            return Wait()  # its first bill says what the others may cost
        return Send(wanted)

    def reserve(self, row: int, tool: int, *, images: int, published_usd: Decimal | None) -> None:
        """Set money aside for a task of this row."""
        self.reservations[row] = Reservation(tool, images, published_usd or Decimal(0))

    def hold(self, row: int) -> None:
        """What became of the row's task is not learned in this start: its money stays reserved."""
        if (known := self.reservations.get(row)) is not None:
            self.reservations[row] = Reservation(known.tool, known.images, known.floor_usd, is_held=True)

    def free(self, row: int) -> None:
        """The row has no task that may be billed."""
        self.reservations.pop(row, None)

    def bill(self, row: int, cost_usd: Decimal | None) -> None:
        """The row's task has ended and was billed; a cost that is not told counts as what was reserved."""
        known = self.reservations.pop(row, None)
        if cost_usd is None:
            self.spent_usd += self._value(known) if known is not None else 0
            return
        self.spent_usd += cost_usd
        if known is not None and cost_usd > 0:
            self.bills.setdefault(known.tool, Bills()).add(cost_usd, images=known.images)

    def cost_of(self, left: Sequence[tuple[int, int, int]]) -> Decimal | None:
        """About what `left` (tool, rows, images) would cost by the bills so far; None: not known."""
        total = Decimal(0)
        for tool, _, images in left:
            bills = self.bills.get(tool)
            if bills is None:
                return None
            total += bills.total_usd / bills.images * images
        return total

    def _is_used_up(self) -> bool:
        return self.spent_usd + self.reserved_usd >= self.cap_usd

    def _value(self, reservation: Reservation) -> Decimal:
        bills = self.bills.get(reservation.tool)
        seen = bills.highest_for(reservation.images) if bills is not None else Decimal(0)
        return max(reservation.floor_usd, seen)
