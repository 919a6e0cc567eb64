"""What is said when a run ends: what there is now, why rows are not done, and the one command to go on."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from batchrun.model import TERMINAL, Counts, Failure, State
from batchrun.report.words import Line, count, duration, near, plain, size, spent
from batchrun.rules.policy import LOST_CAUSES

#: State, a sample failure, how many rows, the first line.
Group = tuple[State, Failure, int, int]

_WORDS = (
    (State.FAILED, "failed", "red"),
    (State.IN_DOUBT, "in doubt", "yellow"),
    (State.CANCELLED, "cancelled", "yellow"),
    (State.INVALID, "invalid", "red"),
)


def summary(
    folder: Path,
    counts: Counts,
    failures: Sequence[Group],
    *,
    stopped: str | None = None,
    left: Mapping[int, str] | None = None,
    beyond_limit: int = 0,
    elapsed_s: float | None = None,
) -> Iterator[Line]:
    """A run's end in lines."""
    yield _headline(counts, stopped=stopped, beyond_limit=beyond_limit)
    yield from groups(failures)
    for reason, rows in Counter((left or {}).values()).most_common(5):
        yield f"  {count(rows, 'row')} left for the next start: {plain(reason, limit=300)}", "yellow"
    if not counts.total:  # it never came to know its rows
        yield "to go on: run the same command again", "bold"
        return
    yield f"images  {counts.images:,}, {size(counts.bytes)}, in {plain(near(folder / 'images'))}", ""
    yield f"cost    {spent(counts.cost_usd, rows_done=counts.by_state.get(State.DONE, 0))}", ""
    if elapsed_s is not None:
        yield f"time    {duration(elapsed_s)}", ""
    yield from next_steps(folder, counts, failures, is_stopped=stopped is not None, beyond_limit=beyond_limit)


def _headline(counts: Counts, *, stopped: str | None, beyond_limit: int) -> Line:
    done, total = counts.by_state.get(State.DONE, 0), counts.total
    parts = [f"{rows:,} {word}" for state, word, _ in _WORDS if (rows := counts.by_state.get(state, 0))]
    unfinished = total - done - beyond_limit - sum(counts.by_state.get(state, 0) for state, _, _ in _WORDS)
    if stopped is not None:
        parts += [f"{unfinished:,} not finished"] if unfinished > 0 else []
        of = f": {done:,} of {count(total, 'row')} done" if total else ""
        return ", ".join([f"stopped ({plain(stopped, limit=300)}){of}", *parts]), "bold yellow"
    if beyond_limit:
        parts.append(f"{beyond_limit:,} beyond --limit")
    elif done == total:
        return (f"all {count(total, 'row')} done" if total != 1 else "the 1 row is done"), "bold green"
    parts += [f"{unfinished:,} not finished"] if unfinished > 0 else []
    style = "bold green" if done + beyond_limit == total else "bold red"
    return ", ".join([f"{done:,} of {count(total, 'row')} done", *parts]), style


def groups(failures: Sequence[Group]) -> Iterator[Line]:
    """The rows that did not make it, by cause."""
    for state, failure, rows, line in failures:
        word, style = next((word, style) for known, word, style in _WORDS if known is state)
        cause = "" if failure.cause in (word, "invalid row") else f": {plain(failure.cause)}"
        sample = plain(failure.message, limit=300)
        where = f"line {line}" if rows == 1 else f"first in line {line}"
        yield f"  {count(rows, 'row')} {word}{cause} ({where}){f': {sample}' if sample else ''}", style


def next_steps(
    folder: Path,
    counts: Counts,
    failures: Sequence[Group],
    *,
    is_stopped: bool,
    beyond_limit: int = 0,
    command: str = "the same command",
) -> Iterator[Line]:
    """The commands that go on from here; nothing when all is done."""
    of = counts.by_state
    here = shlex.quote(plain(near(folder)))
    lost = sum(rows for _, failure, rows, _ in failures if failure.cause in LOST_CAUSES)
    for name in ("failed.csv", "failed.jsonl"):
        if (folder / name).is_file():
            yield (
                f"rows that did not make it: {plain(near(folder / name))}, ready to be corrected and run",
                "",
            )
    unsettled = any(rows for state, rows in of.items() if state not in TERMINAL)
    if is_stopped and (unsettled or not of):
        yield f"to go on: run {command} again", "bold"
    elif any(of.get(state, 0) for state in (State.SUBMITTING, State.IN_FLIGHT, State.FINISHED)):
        yield f"to look at the unfinished rows again: run {command} again", "bold"
    elif beyond_limit:
        yield "to do the rest: run the same command without --limit", "bold"
    if of.get(State.FAILED, 0) > lost or of.get(State.CANCELLED, 0):
        yield f"to try failed rows again: batchrun retry {here}", "bold"
    if lost:
        yield (
            f"{count(lost, 'row')} paid for without an image to show; to buy again: "
            f"batchrun retry {here} --regenerate-lost",
            "bold",
        )
    if of.get(State.IN_DOUBT, 0) and not is_stopped:
        yield (
            f"to look doubtful rows up once more, then submit them: batchrun retry {here} --in-doubt",
            "bold",
        )


# --- as data --------------------------------------------------------------------------------------------


def to_json(folder: Path, counts: Counts, failures: Sequence[Group]) -> dict[str, Any]:
    """The state of a run as plain JSON data; `cost_usd` is exact decimal text."""
    of = counts.by_state
    return {
        "folder": str(folder),
        "rows": {
            "total": counts.total,
            "planned": of.get(State.PLANNED, 0),
            "in_flight": sum(of.get(s, 0) for s in (State.SUBMITTING, State.IN_FLIGHT, State.FINISHED)),
            "in_doubt": of.get(State.IN_DOUBT, 0),
            "done": of.get(State.DONE, 0),
            "failed": of.get(State.FAILED, 0),
            "cancelled": of.get(State.CANCELLED, 0),
            "invalid": of.get(State.INVALID, 0),
        },
        "images": counts.images,
        "bytes": counts.bytes,
        "cost_usd": f"{counts.cost_usd:f}",
        "failures": [
            {"state": state, "cause": failure.cause, "message": failure.message, "rows": rows, "line": line}
            for state, failure, rows, line in failures
        ],
    }
