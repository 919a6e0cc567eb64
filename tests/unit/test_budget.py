"""The cost cap's bookkeeping: published prices, what a task may cost, and who may still be sent."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal as D

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.rules.budget import Bills, Budget, Reached, Send, Wait, published_price

CAP = D("0.10")


@dataclass(frozen=True)
class Entry:
    """An entry of a price list."""

    method: str
    price_usd: D
    inputs: dict[str, str] | None = None  # type: ignore[assignment]
    extra_usd: D | None = None
    per_input_usd: D | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", self.inputs or {})


# --- published prices -----------------------------------------------------------------------------------

RUN, OUTPUT = Entry("cpr", D("0.02")), Entry("cpo", D("0.005"))
PIXEL = Entry("cp-pixel", D("0.008"), extra_usd=D("0.004"), per_input_usd=D("0.001"))


@pytest.mark.parametrize(
    ("entries", "body", "price"),
    [
        ([RUN], {}, "0.02"),
        ([OUTPUT], {}, "0.015"),  # three images
        ([PIXEL], {"width": 1024, "height": 1024}, "0.026"),  # and two input images
        ([PIXEL], {"width": 1025, "height": 1024}, "0.038"),  # a further million is begun
        ([PIXEL], {"width": "4096", "height": "1024"}, "0.062"),
        ([PIXEL], {"width": ""}, None),
        ([PIXEL], {"width": 1024}, None),
        ([PIXEL], {"width": "auto", "height": 1024}, None),
        ([Entry("cps", D(1))], {}, None),
        ([Entry("cpt", D(1))], {}, None),
        ([], {}, None),
        # the most specific entry that holds counts, the dearest of equals
        ([RUN, Entry("cpr", D("0.01"), {"style": "Comic"})], {"style": "Comic"}, "0.01"),
        ([RUN, Entry("cpr", D("0.01"), {"style": "Comic"})], {"style": "Noir"}, "0.02"),
        ([Entry("cpr", D("0.01"), {"steps": "20"})], {"steps": 20}, "0.01"),
        ([Entry("cpr", D("0.01"), {"style": "Comic"})], {"style": "Noir"}, None),
        ([RUN, Entry("cpr", D("0.03"))], {}, "0.03"),
        ([RUN, Entry("cps", D("0.03"))], {}, None),
        # how many files were given
        ([RUN, Entry("cpr", D(1), {"image": "QUANTITY:2"})], {"image": ["a", "b"]}, "1"),
        ([RUN, Entry("cpr", D(1), {"image": "QUANTITY:1"})], {"image": "a"}, "1"),
        ([RUN, Entry("cpr", D(1), {"image": "QUANTITY:1"})], {"image": ""}, "0.02"),
        ([RUN, Entry("cpr", D(1), {"image": "QUANTITY:0"})], {}, "1"),
    ],
)
def test_the_published_price_of_a_request(
    entries: list[Entry], body: dict[str, object], price: str | None
) -> None:
    told = published_price(entries, body, images=3, inputs=2)
    assert told == (None if price is None else D(price))


# --- what may be sent -----------------------------------------------------------------------------------


def budget(*, spent: str = "0", billed: str | None = "0.01") -> Budget:
    bills = {} if billed is None else {1: Bills()}
    if billed is not None:
        bills[1].add(D(billed), images=1)
    return Budget(CAP, D(spent), bills)


def fill(of: Budget, tasks: int, *, published: str | None = None) -> None:
    for row in range(tasks):
        assert isinstance(of.ask(1, images=1, published_usd=published and D(published)), Send)
        of.reserve(row, 1, images=1, published_usd=D(published) if published else None)


def test_tasks_are_sent_until_spent_and_reserved_come_to_the_cap() -> None:
    of = budget(spent="0.05")
    fill(of, 5)
    assert of.reserved_usd == D("0.05")
    assert isinstance(of.ask(1, images=1, published_usd=None), Wait)


def test_with_nothing_under_way_the_cap_is_reached() -> None:
    assert isinstance(budget(spent="0.095").ask(1, images=1, published_usd=None), Reached)
    assert isinstance(budget(spent="0.09").ask(1, images=1, published_usd=None), Send)
    assert isinstance(budget(spent="0.10", billed=None).ask(1, images=1, published_usd=None), Reached)


def test_the_larger_of_the_published_price_and_the_highest_bill_is_reserved() -> None:
    assert budget().ask(1, images=1, published_usd=D("0.03")) == Send(D("0.03"))
    assert budget().ask(1, images=1, published_usd=D("0.003")) == Send(D("0.01"))
    assert budget().ask(1, images=4, published_usd=None) == Send(D("0.04"))


def test_a_task_of_few_images_is_not_taken_for_cheaper_than_one_that_was_billed() -> None:
    of = budget()
    of.bills[1].add(D("0.05"), images=5)  # a start may cost more than the images
    assert of.ask(1, images=1, published_usd=None) == Send(D("0.05"))
    assert of.ask(1, images=8, published_usd=None) == Send(D("0.08"))


def test_a_higher_bill_values_what_is_reserved_anew() -> None:
    of = budget()
    fill(of, 4)
    of.bill(0, D("0.03"))
    assert of.spent_usd == D("0.03")
    assert of.reserved_usd == D("0.09")
    assert isinstance(of.ask(1, images=1, published_usd=None), Wait)


def test_a_tool_without_a_bill_yet_is_sent_one_at_a_time() -> None:
    of = budget()
    assert isinstance(of.ask(2, images=1, published_usd=D("0.001")), Send)
    of.reserve(7, 2, images=1, published_usd=D("0.001"))
    assert isinstance(of.ask(2, images=1, published_usd=D("0.001")), Wait)
    assert isinstance(of.ask(1, images=1, published_usd=None), Send)  # other tools go on
    of.bill(7, D("0.002"))
    assert of.ask(2, images=1, published_usd=D("0.001")) == Send(D("0.002"))


def test_a_task_that_was_not_billed_gives_its_money_back() -> None:
    of = budget(spent="0.05")
    fill(of, 5)
    of.free(0)
    assert isinstance(of.ask(1, images=1, published_usd=None), Send)
    of.free(99)  # a row without a reservation


def test_the_money_of_a_doubt_that_is_held_stays_reserved_and_nobody_waits_for_it() -> None:
    of = budget(spent="0.09")
    fill(of, 1)
    of.hold(0)
    assert of.reserved_usd == D("0.01")
    assert isinstance(of.ask(1, images=1, published_usd=None), Reached)


def test_a_bill_that_is_not_told_counts_as_what_was_reserved() -> None:
    of = budget()
    fill(of, 1)
    of.bill(0, None)
    assert of.spent_usd == D("0.01")
    assert of.bills[1].tasks == 1  # nothing was learned


def test_what_is_left_is_valued_by_the_bills_so_far_or_not_at_all() -> None:
    of = budget(billed="0.01")
    of.bills[1].add(D("0.05"), images=4)
    assert of.cost_of([(1, 5, 10)]) == D("0.12")
    assert of.cost_of([(1, 5, 10), (2, 1, 1)]) is None
    assert of.cost_of([]) == 0


PRICES = st.decimals("0.0001", "0.02", places=4)


@given(
    st.lists(
        st.tuples(st.sampled_from(["send", "send", "bill", "fail", "hold"]), st.integers(1, 3), PRICES),
        max_size=80,
    ),
    st.dictionaries(st.integers(1, 3), PRICES, min_size=3),
)
def test_while_bills_keep_to_the_published_prices_the_cap_is_never_passed(
    steps: list[tuple[str, int, D]], published: dict[int, D]
) -> None:
    of = Budget(CAP)
    under_way: list[int] = []
    spent = D(0)
    for row, (step, tool, price) in enumerate(steps):
        if step == "send":
            if isinstance(of.ask(tool, images=1, published_usd=published[tool]), Send):
                of.reserve(row, tool, images=1, published_usd=published[tool])
                under_way.append(row)
        elif under_way:
            ended = under_way.pop(0)
            match step:
                case "bill":
                    cost = min(price, published[of.reservations[ended].tool])
                    spent += cost
                    of.bill(ended, cost)
                case "fail":
                    of.free(ended)
                case "hold":
                    of.hold(ended)
        assert of.spent_usd == spent
        assert spent + of.reserved_usd <= CAP
