"""What is said when a run ends: what there is now, why rows are not done, and the one command to go on."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchrun.model import TERMINAL, Counts, Failure, State
from batchrun.outputs.missing import Missing
from batchrun.report.words import Line, count, duration, near, plain, size, spent
from batchrun.rules.policy import LOST_CAUSES
from batchrun.store.folder import Folder

#: State, a sample failure, how many rows, the first line.
Group = tuple[State, Failure, int, int]


@dataclass(frozen=True, slots=True)
class Commands:
    """The commands that go on with a run, quoted for a shell."""

    #: The next start.
    again: str
    #: The same without --limit.
    rest: str


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
    missing: Missing | None = None,
    kept: str | None = None,
    elapsed_s: float | None = None,
    commands: Commands | None = None,
) -> Iterator[Line]:
    """A run's end in lines; `commands` None: they are not known."""
    yield _headline(counts, stopped=stopped, beyond_limit=beyond_limit)
    yield from groups(failures)
    for reason, rows in Counter((left or {}).values()).most_common(5):
        yield f"  {count(rows, 'row')} left for the next start: {plain(reason, limit=300)}", "yellow"
    if not counts.total:  # it never came to know its rows
        yield f"to go on: {commands.again if commands else 'run the same command again'}", "bold"
        return
    yield f"images  {counts.images:,}, {size(counts.bytes)}, in {plain(near(folder / 'images'))}", ""
    yield from absences(missing)
    yield cost(folder, counts)
    if elapsed_s is not None:
        yield f"time    {duration(elapsed_s)}", ""
    if kept is not None:
        yield (
            f"failed.csv or .jsonl had been edited and its rows are others now: your version is kept as "
            f"{plain(near(folder / kept))}",
            "yellow",
        )
    yield from next_steps(
        folder,
        counts,
        failures,
        is_stopped=stopped is not None,
        beyond_limit=beyond_limit,
        commands=commands,
    )


def cost(folder: Path, counts: Counts) -> Line:
    """What was spent; a rehearsal's costs are nobody's money."""
    told = spent(counts.cost_usd, rows_done=counts.by_state.get(State.DONE, 0))
    return f"cost    {told}{' (made up: a rehearsal)' if Folder(folder).is_rehearsal else ''}", ""


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


def absences(missing: Missing | None) -> Iterator[Line]:
    """Saved images that are not there any more."""
    if missing is not None:
        are = "is" if missing.images == 1 else "are"
        yield (
            f"  {count(missing.images, 'image')} of these {are} not there any more (first: "
            f"{plain(missing.first)}): deleted or moved since; not fetched or bought again by itself",
            "yellow",
        )


def next_steps(
    folder: Path,
    counts: Counts,
    failures: Sequence[Group],
    *,
    is_stopped: bool,
    beyond_limit: int = 0,
    commands: Commands | None = None,
    whose: str = "the same command",
) -> Iterator[Line]:
    """The commands that go on from here; nothing when all is done. `whose`: the words for one not known."""
    of = counts.by_state
    simulate = " --simulate" if Folder(folder).is_rehearsal else ""
    here = shlex.quote(plain(near(folder)))
    lost = sum(rows for _, failure, rows, _ in failures if failure.cause in LOST_CAUSES)
    for name in ("failed.csv", "failed.jsonl"):
        if (folder / name).is_file():
            yield (
                f"rows that did not make it: {plain(near(folder / name))}, ready to be corrected and run",
                "",
            )
    unsettled = any(rows for state, rows in of.items() if state not in TERMINAL)
    if running := of.get(State.SUBMITTING, 0) + of.get(State.IN_FLIGHT, 0):
        go = "goes on" if running == 1 else "go on"
        billed = "" if simulate else " and will be billed"
        yield (
            f"{count(running, 'task')} {go} at the service{billed}: run again to fetch what "
            f"{'it makes' if running == 1 else 'they make'}, or end {'it' if running == 1 else 'them'} with "
            f"batchrun cancel {here}{simulate}",
            "yellow",
        )
    again = commands.again if commands else f"run {whose} again"
    if is_stopped and (unsettled or not of):
        yield f"to go on: {again}", "bold"
    elif running or of.get(State.FINISHED, 0):
        yield f"to look at the unfinished rows again: {again}", "bold"
    elif beyond_limit:
        yield f"to do the rest: {commands.rest if commands else f'run {whose} without --limit'}", "bold"
    if of.get(State.FAILED, 0) > lost or of.get(State.CANCELLED, 0):
        yield f"to try failed rows again: batchrun retry {here}{simulate}", "bold"
    if lost:
        yield (
            f"{count(lost, 'row')} paid for without an image to show; to buy again: "
            f"batchrun retry {here} --regenerate-lost{simulate}",
            "bold",
        )
    if of.get(State.IN_DOUBT, 0) and not is_stopped:
        yield (
            "to look doubtful rows up once more, then submit them: "
            f"batchrun retry {here} --in-doubt{simulate}",
            "bold",
        )


# --- as data --------------------------------------------------------------------------------------------


def to_json(
    folder: Path, counts: Counts, failures: Sequence[Group], missing: Missing | None
) -> dict[str, Any]:
    """The state of a run as plain JSON data; `cost_usd` is exact decimal text.

    `images` and `bytes` are what was saved; `missing` of these images are not in their place any more.
    `rehearsal`: images and cost are made up.
    """
    of = counts.by_state
    return {
        "folder": str(folder),
        "rehearsal": Folder(folder).is_rehearsal,
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
        "missing": missing.images if missing else 0,
        "cost_usd": f"{counts.cost_usd:f}",
        "failures": [
            {"state": state, "cause": failure.cause, "message": failure.message, "rows": rows, "line": line}
            for state, failure, rows, line in failures
        ],
    }
