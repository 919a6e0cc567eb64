"""Finding the tasks of rows whose submits a repaired state does not know: one reading of the service's list.

An ordinary doubt is looked up by itself, a few pages back. After a repair there may be tens of thousands of
rows and tasks, so the list is read once, back to before the run, and held against all rows by an index. The
comparison itself is the one of ordinary doubts (`rules.recovery.compare`). A row without a task in the list
is submitted only when the list has proved itself; what cannot be known is held, and told.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio

from batchrun import errors
from batchrun.dispatch.backwards import Backwards
from batchrun.dispatch.doubts import BETWEEN_S, Listings
from batchrun.model import Accepted, Failure, LocalImage, Row, State, Task, Value
from batchrun.progress import Fact, Progress
from batchrun.rules.pages import PAGE
from batchrun.rules.policy import Running, Succeeded, judge
from batchrun.rules.recovery import (
    CLOCK_TOLERANCE_S,
    GRACE_S,
    LISTING_PATIENCE_S,
    SECOND_LOOK_S,
    Doubt,
    Match,
    compare,
    print_of_value,
)
from batchrun.store.rebuilding import Settlement, Wanted
from batchrun.store.store import Store
from batchrun.tools.bind import Binder

#: Rows taken from the state, and settled in it, at once.
GROUP = 500
#: A word is given every so many pages.
TELL_PAGES = 50

_Print = tuple[tuple[str, ...], ...]


@dataclass(slots=True)
class _Case:
    """A row that is searched for."""

    seq: int
    state: State
    doubt: Doubt
    #: The address of its input image is lost: a task that is like it otherwise may be its own.
    is_vague: bool = False
    #: The task that is known of it already, if it runs.
    task_id: str | None = None


@dataclass(slots=True)
class _Read:
    """What the list showed of tasks that no row claims."""

    #: Tasks that live or were paid, by the print of what was asked for: best first once sorted.
    by_print: defaultdict[tuple[tuple[str, ...], _Print], list[Task]] = field(
        default_factory=lambda: defaultdict(list)
    )
    #: Tasks that do not tell enough to know whose they are.
    mute: list[Task] = field(default_factory=list)
    tasks: int = 0
    #: Tasks of ours that it showed.
    ours: int = 0
    #: The service's ids of the run's tools.
    models: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    #: Tasks of ours that failed or were cancelled.
    dead: set[str] = field(default_factory=set)


class Search:
    """Searches for the tasks of a run's lost rows, once per start."""

    def __init__(
        self,
        store: Store,
        service: Listings,
        progress: Progress,
        binder_of: Callable[[str], Binder],
        *,
        give_up: Callable[[Row], bool] = lambda row: False,
    ) -> None:
        """`give_up` tells of a row that cannot be settled whether the user wants it submitted."""
        self._store = store
        self._service = service
        self._progress = progress
        self._binder_of = binder_of
        self._give_up = give_up
        self._names: set[tuple[str, ...]] = set()

    async def run(self) -> bool:
        """Settle what can be settled; False when there was nothing to do. Raises CredentialsRefused."""
        wanted = await self._store.wanted()
        if wanted is None:
            return False
        cases, rows = await self._cases(wanted)
        if not cases:
            await self._store.end_first_search()
            return False
        self._note("looking through the service's list for tasks of rows that the repair could not know")
        await anyio.sleep(min(max(0.0, wanted.until + GRACE_S - time.time()), GRACE_S))
        try:
            read = await self._read(wanted)
            known = await self._store.count_tasks()
            if known - read.ours > 1 + known // 100:
                raise errors.ProtocolError(f"it shows {read.ours:,} of the {known:,} tasks known of this run")
            if not read.ours:  # nothing proves the list yet: it must say the same twice
                await anyio.sleep(SECOND_LOOK_S)
                read = await self._read(wanted)
        except errors.CredentialsRefused:
            raise
        except errors.ServiceError as error:
            await self._hold_all(cases, rows, f"the service's task list cannot be read: {error}")
            return True
        settlements = self._decide(cases, read)
        for start in range(0, len(settlements), GROUP):
            await self._store.settle_search(settlements[start : start + GROUP], at=time.time())
        found = sum(one.found is not None for one in settlements)
        held = [one.seq for one in settlements if one.held is not None]
        await self._store.give_up_search([seq for seq in held if self._give_up(rows[seq])])
        if wanted.is_first:
            await self._store.end_first_search()
        self._note(
            f"{read.tasks:,} tasks listed: {found:,} found to be of rows of this run, {len(held):,} in doubt"
        )
        return True

    def _note(self, message: str) -> None:
        self._progress.announce(Fact.NOTE, message=message)

    async def _hold_all(self, cases: Sequence[_Case], rows: Mapping[int, Row], reason: str) -> None:
        doubtful = [case.seq for case in cases if case.state is State.IN_DOUBT]
        settlements = [Settlement(seq, held=_failure(reason)) for seq in doubtful]
        for start in range(0, len(settlements), GROUP):
            await self._store.settle_search(settlements[start : start + GROUP], at=time.time())
        await self._store.give_up_search([seq for seq in doubtful if self._give_up(rows[seq])])
        self._note(f"{len(doubtful):,} rows stay in doubt: {reason}")

    # --- what is searched for ---------------------------------------------------------------------------

    async def _cases(self, wanted: Wanted) -> tuple[list[_Case], dict[int, Row]]:
        """The rows to be searched for; those that may be held also as they stand."""
        addresses = await self._store.addresses_until(wanted.until)
        binders: dict[int, Binder] = {}
        cases: list[_Case] = []
        rows: dict[int, Row] = {}
        last = 0
        while page := await self._store.wanted_rows(is_first=wanted.is_first, after_seq=last, limit=GROUP):
            last = page[-1].seq
            for row in page:
                if row.tool not in binders:
                    binders[row.tool] = self._binder_of(await self._store.tool(row.tool))
                cases.append(self._case(row, binders[row.tool], addresses))
                if row.state is State.IN_DOUBT:
                    rows[row.seq] = row
        return cases, rows

    def _case(self, row: Row, binder: Binder, addresses: Mapping[str, str]) -> _Case:
        images = {name: value for name, value in row.given.items() if isinstance(value, LocalImage)}
        lost = {name for name, image in images.items() if image.sha256 not in addresses}
        uploads = {image.sha256: addresses.get(image.sha256, "") for image in images.values()}
        body: dict[str, Value] = {
            name: value
            for name, value in binder.body(row.given, uploads=uploads, seed_key=row.key).items()
            if name not in lost
        }
        given = tuple(sorted(name for name in row.given if name in body))
        self._names.add(given)
        # since when a task counts is decided for the whole list: any number of it is new to this row
        known = row.attempt.task_id if row.attempt and row.state is State.IN_FLIGHT else None
        return _Case(
            row.seq, row.state, Doubt(body, given, 0, 0.0, row.tool), is_vague=bool(lost), task_id=known
        )

    # --- the list ---------------------------------------------------------------------------------------

    async def _read(self, wanted: Wanted) -> _Read:
        """Read the list back to before the run, or to its end. Raises ServiceError."""
        read, pages = _Read(), 0
        listed = Backwards(self._page)
        while (fresh := await listed.more()) is not None:
            if fresh:
                self._take(read, fresh, await self._store.known_tasks([task.id for task in fresh]))
            pages += 1
            if pages % TELL_PAGES == 0:
                self._note(f"{read.tasks:,} tasks listed so far")
            # newest first, so that all that follow are older still; one odd time ends nothing
            times = [task.created_at for task in fresh]
            if len(times) > 1 and all(
                at is not None and at < wanted.since - CLOCK_TOLERANCE_S for at in times
            ):
                return read
        if not listed.is_at_end:
            raise errors.ServerFault("the service's task list shifts its places while it is read")
        return read

    async def _page(self, start: int) -> list[Task]:
        """One page of the list; a fault is waited out for a while."""
        until = anyio.current_time() + LISTING_PATIENCE_S
        while True:
            try:
                return await self._service.list_tasks(start=start, limit=PAGE)
            except (errors.CredentialsRefused, errors.NotFound):
                raise
            except errors.ServiceError as error:
                wait_s = max(BETWEEN_S, getattr(error, "retry_after_s", None) or 0.0)
                if anyio.current_time() + wait_s > until:
                    raise
                await anyio.sleep(wait_s)

    def _take(self, read: _Read, tasks: Sequence[Task], known: Mapping[str, int | None]) -> None:
        read.tasks += len(tasks)
        for task in tasks:
            tool = known.get(task.id)
            if task.id in known:
                read.ours += 1
                if tool is not None and task.model_id:
                    read.models[tool].add(task.model_id)
                if _rank(task) is None:
                    read.dead.add(task.id)
            elif _rank(task) is not None:
                echoed = task.parameters or {}
                for names in self._names:
                    if all(name in echoed for name in names):
                        read.by_print[names, _print(names, echoed)].append(task)
                if any(name not in echoed for names in self._names for name in names) or not echoed:
                    read.mute.append(task)

    # --- what it says ------------------------------------------------------------------------------------

    def _decide(self, cases: Collection[_Case], read: _Read) -> list[Settlement]:
        """What becomes of every row; one that stays as it is is left out."""
        for tasks in read.by_print.values():
            tasks.sort(key=lambda task: _rank(task) or 0)
        taken: set[str] = set()
        mute = {tool: _mute_for(tool, read) for tool in {case.doubt.tool for case in cases}}
        settlements = []
        # doubtful rows first: a failed row that asks for the same may wait
        for case in sorted(cases, key=lambda case: (case.state is not State.IN_DOUBT, case.seq)):
            settlement = self._decide_one(case, read, mute[case.doubt.tool], taken)
            if settlement is not None:
                settlements.append(settlement)
        return settlements

    def _decide_one(
        self, case: _Case, read: _Read, mute: Sequence[Task], taken: set[str]
    ) -> Settlement | None:
        if case.task_id is not None and case.task_id not in read.dead:
            return None
        doubt = _with_model(case.doubt, read)
        names = tuple(doubt.given)
        task = next(
            (
                task
                for task in read.by_print.get((names, _print(names, doubt.body)), ())
                if task.id not in taken and compare(doubt, task) is Match.SAME
            ),
            None,
        )
        if task is not None and case.is_vague:
            if case.state is not State.IN_DOUBT:
                return None
            return Settlement(
                case.seq, held=_failure("the address of its input image is lost, and a task like it is there")
            )
        if task is not None:
            taken.add(task.id)
            return Settlement(case.seq, found=Accepted(task.id, task.token))
        if case.state is not State.IN_DOUBT:
            return None
        if any(compare(doubt, task) is Match.UNKNOWABLE for task in mute if task.id not in taken):
            reason = "the service does not echo the parameters of all tasks"
            return Settlement(case.seq, held=_failure(reason))
        return Settlement(case.seq)


def _failure(reason: str) -> Failure:
    return Failure("in doubt", f"a submit may have reached the service before the repair: {reason}")


def _with_model(doubt: Doubt, read: _Read) -> Doubt:
    return replace(doubt, model_id=_model_of(doubt.tool, read))


def _model_of(tool: int, read: _Read) -> str:
    """The service's id of a tool; "" where it is not known for certain."""
    models = read.models.get(tool, set())
    return next(iter(models)) if len(models) == 1 else ""


def _mute_for(tool: int, read: _Read) -> list[Task]:
    """Tasks that do not tell whose they are and may be of that tool."""
    model = _model_of(tool, read)
    return [task for task in read.mute if not (model and task.model_id and task.model_id != model)]


def _rank(task: Task) -> int | None:
    """How good a task is to adopt, 0 best; None: it failed or was cancelled, and nothing was paid."""
    verdict = judge(task, in_status_for_s=0.0)
    if isinstance(verdict, Succeeded):
        return 0
    if isinstance(verdict, Running):
        return 2 if task.status == "task_postprocess_end" else 1
    return None


def _print(names: Sequence[str], values: Mapping[str, Any]) -> _Print:
    return tuple(print_of_value(values[name]) for name in names)
