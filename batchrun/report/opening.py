"""What is said before anything is sent: what there is to do, what it may cost, what looks unmeant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

from batchrun.model import Problem, State
from batchrun.report.words import Line, count, exact_usd, plain, rough_usd

if TYPE_CHECKING:
    from batchrun.model import Counts
    from batchrun.plan.findings import Findings
    from batchrun.plan.prices import Estimate
    from batchrun.store.planning import Merged

#: Warnings, and errors, said one by one.
WARNINGS_SAID = 20
ERRORS_SAID = 50
#: Further lines named of a problem that several rows share.
LINES_NAMED = 5


def planned(
    merged: Merged,
    estimates: Sequence[Estimate],
    counts: Counts,
    *,
    to_buy: Mapping[str, tuple[int, int]],
    limit: int | None,
) -> Iterator[Line]:
    """What reading the manifest came to; `to_buy`: rows and images of this start by the tool's run path."""
    yield f"{count(merged.rows, 'row')}, {count(merged.images, 'image')} to expect", "bold"
    yield from so_far(counts)
    yield from _changes(merged)
    if limit is not None:
        yield f"only the first {count(limit, 'row')} (--limit)", ""
    yield from _prices(to_buy, estimates)


def unchanged(counts: Counts, *, limit: int | None) -> Iterator[Line]:
    """The same, when the manifest and its settings are as they were and it was not read again."""
    yield f"{count(counts.total, 'row')}; the manifest is unchanged", "bold"
    yield from so_far(counts)
    if limit is not None:
        yield f"only the first {count(limit, 'row')} (--limit)", ""


def so_far(counts: Counts) -> Iterator[Line]:
    """How far earlier starts came; nothing for a new run."""
    of = counts.by_state
    words = (
        ("done", (State.DONE,)),
        ("in flight", (State.SUBMITTING, State.IN_FLIGHT, State.FINISHED)),
        ("in doubt", (State.IN_DOUBT,)),
        ("failed", (State.FAILED,)),
        ("cancelled", (State.CANCELLED,)),
        ("invalid", (State.INVALID,)),
    )
    parts = [
        f"{rows:,} {word}" for word, states in words if (rows := sum(of.get(state, 0) for state in states))
    ]
    if not parts:
        return
    if to_do := of.get(State.PLANNED, 0):
        parts.append(f"{to_do:,} to do")
    yield f"so far: {', '.join(parts)}", ""


def _changes(merged: Merged) -> Iterator[Line]:
    parts = []
    if merged.new and merged.new != merged.rows:
        parts.append(f"{merged.new:,} new")
    parts += [f"{merged.replaced:,} corrected or changed"] if merged.replaced else []
    parts += [f"{count(merged.rerun, 'finished row')} bought again (--rerun-changed)"] if merged.rerun else []
    parts += [f"{merged.gone:,} no longer in it and left alone"] if merged.gone else []
    if parts:
        yield f"in the manifest: {', '.join(parts)}", ""
    if merged.changed:
        ask, are = ("asks", "is") if merged.changed == 1 else ("ask", "are")
        yield (
            f"{count(merged.changed, 'row')} bought already {ask} for something else now and {are} left "
            "alone; to buy again add --rerun-changed",
            "yellow",
        )


def _prices(to_buy: Mapping[str, tuple[int, int]], estimates: Sequence[Estimate]) -> Iterator[Line]:
    known = {_slug(each.tool): each for each in estimates}
    for run_path, (rows, images) in to_buy.items():
        slug = _slug(run_path)
        asked = f"{count(rows, 'row')}, {count(images, 'image')}"
        yield f"  {plain(slug)}: {asked}, {_price(known.get(slug))}", ""
    costs = [each.cost_usd for each in estimates]
    if len(to_buy) > 1 and len(costs) == len(to_buy) and None not in costs:
        total = sum((cost for cost in costs if cost is not None), Decimal(0))
        yield f"  together up to about {rough_usd(total)}", ""


def _slug(run_path: str) -> str:
    return run_path.rpartition("/")[2]


def _price(estimate: Estimate | None) -> str:
    """In words; a price that is not published is said to be unknown, never to be nothing."""
    if estimate is None or estimate.cost_usd is None or not (estimate.cost_usd or estimate.is_price):
        return "price unknown"
    if estimate.range_usd is not None:
        low, high = estimate.range_usd
        return f"{exact_usd(low).removesuffix(' USD')} to {exact_usd(high)} by the price list"
    if estimate.is_price:
        return f"{exact_usd(estimate.cost_usd)} by the price list"
    return f"about {rough_usd(estimate.cost_usd)} (the average of past runs; no price is published)"


# --- problems ------------------------------------------------------------------------------------------


def remarks(findings: Findings) -> Iterator[Line]:
    """Warnings and hints, the first of them one by one."""
    said, left = _said(findings.warnings, findings.warning_count, most=WARNINGS_SAID)
    for warning in said:
        yield f"warning: {warning}", "yellow"
    if left:
        yield f"and {count(left, 'more warning')}", "yellow"
    for hint in findings.hints[:WARNINGS_SAID]:
        yield f"hint: {plain(str(hint))}", "cyan"


def errors(problems: Sequence[Problem], *, total: int | None = None) -> Iterator[Line]:
    """Errors as `file:line: column: what is wrong, what to write`; `total` is how many there are in all."""
    said, left = _said(problems, max(total or 0, len(problems)), most=ERRORS_SAID)
    for error in said:
        yield error, "red"
    if left:
        yield f"and {left:,} more", "red"


def _said(problems: Iterable[Problem], total: int, *, most: int) -> tuple[list[str], int]:
    """The first `most` different problems, and how many of `total` remain unsaid.

    What is wrong with the whole manifest comes first, since other problems may only follow from it. A fault
    that many rows share (a column that is no parameter) is said once, lest it hide the others.
    """
    alike: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in sorted(problems, key=lambda each: each.line > 0):
        alike.setdefault((problem.file, problem.column, problem.message), []).append(problem)
    groups = list(alike.values())[:most]
    return [_shared(group) for group in groups], total - sum(map(len, groups))


def _shared(group: Sequence[Problem]) -> str:
    """A problem at its first place, and the other lines that have it."""
    lines = list(dict.fromkeys(problem.line for problem in group))[1:]
    text = plain(str(group[0]))
    if not lines:
        return text
    named = ", ".join(map(str, lines[:LINES_NAMED]))
    more = f" and {len(lines) - LINES_NAMED:,} more" if len(lines) > LINES_NAMED else ""
    return f"{text} [the same in {'lines' if len(lines) > 1 else 'line'} {named}{more}]"


def to_json(problems: Iterable[Problem]) -> list[dict[str, object]]:
    """Problems as JSON objects."""
    return [
        {"file": each.file, "line": each.line, "column": each.column, "message": each.message}
        for each in problems
    ]
