"""Expansion: what the axis notations mean, and in which order their combinations come."""

from __future__ import annotations

from decimal import Decimal
from itertools import islice
from typing import Any

import pytest

from batchrun.errors import UsageError
from batchrun.manifest.expand import Axis, Expansion, parse_axis, parse_values


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ("1..4", [1, 2, 3, 4]),  # both ends
        ("4..1", [4, 3, 2, 1]),
        (" 5 .. 5 ", [5]),
        ("5..5..-3", [5]),
        ("0..100..50", [0, 50, 100]),
        ("0..99..50", [0, 50]),  # the last only when it is hit
        ("9..1..4", [9, 5, 1]),  # a step needs no sign
        ("9..1..-4", [9, 5, 1]),
        ("-1..+1", [-1, 0, 1]),
        ("random", ["random"]),
        ("a|b | c", ["a", "b", "c"]),
        ('["a", 1, 2.50, null]', ["a", 1, Decimal("2.50"), None]),
        ('[["a", "b"], []]', [["a", "b"], []]),  # a multiselect's values are lists
        (["1..2", "x"], ["1..2", "x"]),  # in a list every value is meant as it is
        (7, [7]),
        (True, [True]),
        (Decimal("7.5"), [Decimal("7.5")]),
        ("a cat ... or so", ["a cat ... or so"]),
        ("a cat, a dog", ["a cat, a dog"]),  # a sentence; words and numbers with commas are refused
        ('["1,2"]', ["1,2"]),
        ("007", ["007"]),  # leading zeros survive
    ],
)
def test_a_notation_stands_for_these_values(spec: Any, values: list[Any]) -> None:
    axis = parse_axis("x", spec)
    assert list(axis.values) == values
    assert axis.size == len(values)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("1..", "not a range"),
        ("..4", "not a range"),
        ("1.5..3", "or a list of values"),
        ("1..4..0", "step of 0"),
        ("1..4..-1", "write 1..4..1"),
        (f"1..{'9' * 30}", "not a range"),
        ("", "no values"),
        ("  ", "no values"),
        ("10,20, 30", 'write 10|20|30, for this one ["10,20, 30"]'),
        ("DDIM,PNDM", "write DDIM|PNDM"),
        ([], "list is empty"),
        ("[]", "list is empty"),
        ("a||b", "empty value"),
        ("[1, 2", None),  # no list, so a text
        ("[NC]", "not a JSON list"),
        ("[1] [2]", "text follows"),
        ("[NaN]", "NaN"),
        (f"{'[' * 70}{']' * 70}", "64 deep"),
        ({"a": 1}, "is an object"),
        (None, "is null"),
    ],
)
def test_a_wrong_notation_says_what_to_write(spec: Any, told: str | None) -> None:
    if told is None:
        assert parse_values(spec) == (spec,)
        return
    with pytest.raises(UsageError, match=r"^expand: x: ") as caught:
        parse_axis("x", spec)
    assert told in str(caught.value)


def test_the_id_of_a_row_is_not_an_axis() -> None:
    with pytest.raises(UsageError, match=r"id: cannot be expanded"):
        parse_axis("id", "1..2")


def test_the_first_axis_is_slowest_and_repeats_come_around_all() -> None:
    expansion = Expansion((parse_axis("seed", "1..2"), parse_axis("scheduler", "a|b")), repeat=2)
    once = [
        {"seed": 1, "scheduler": "a"},
        {"seed": 1, "scheduler": "b"},
        {"seed": 2, "scheduler": "a"},
        {"seed": 2, "scheduler": "b"},
    ]
    assert list(expansion) == list(enumerate(once * 2, 1))
    assert expansion.size == 8


def test_what_is_added_at_the_end_leaves_the_numbers_of_the_others() -> None:
    def made(seeds: str, repeat: int) -> list[tuple[int, dict[str, Any]]]:
        return list(Expansion((parse_axis("seed", seeds), parse_axis("s", "a|b")), repeat))

    assert made("1..2", 3)[: len(made("1..2", 2))] == made("1..2", 2)
    assert made("1..3", 1)[: len(made("1..2", 1))] == made("1..2", 1)


def test_a_row_without_axes_stands_for_itself() -> None:
    assert list(Expansion()) == [(1, {})]
    assert Expansion().size == 1


def test_a_huge_expansion_has_its_exact_size_and_is_never_made() -> None:
    huge = Expansion((Axis("a", range(1, 10**30 + 1)), Axis("b", range(10**30, 0, -3))), repeat=10**9)
    assert huge.size == 10**9 * 10**30 * ((10**30 + 2) // 3)
    assert [n for n, _ in islice(huge, 3)] == [1, 2, 3]


def test_two_axes_of_one_name_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="same name"):
        Expansion((Axis("a", (1,)), Axis("a", (2,))))
