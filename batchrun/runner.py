"""One start of a run, from a job to its outcome: folder, lock, state, manifest, service, dispatcher, files.

Everything a start opens is closed when `Runner.run` returns, in the reverse order. Starting again with the
same job is the resume: there is no other.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import anyio
import anyio.from_thread
import anyio.to_thread

from batchrun import errors
from batchrun.dispatch.cap import Cap, Published
from batchrun.dispatch.dispatcher import Dispatcher, Limits
from batchrun.dispatch.listing import Listing
from batchrun.dispatch.saving import Saver
from batchrun.dispatch.search import Search
from batchrun.dispatch.stopping import StopSign
from batchrun.manifest.job import Job
from batchrun.manifest.json_text import shown
from batchrun.model import TERMINAL, Counts, Failure, Row, State
from batchrun.outputs.missing import Missing, missing
from batchrun.plan.findings import Findings
from batchrun.plan.inputs import LocalImages
from batchrun.plan.plan import is_same, plan, stamp_of
from batchrun.plan.prices import Estimate, estimate
from batchrun.progress import Fact, Progress
from batchrun.rules.halt import Halt, parse_halt
from batchrun.settings import Credentials
from batchrun.store.damage import check_further, check_sound
from batchrun.store.folder import Folder
from batchrun.store.orders import order_cancel
from batchrun.store.planning import Merged, Planning
from batchrun.store.row_verbs import Requeued
from batchrun.store.store import Store
from batchrun.tools.bind import Binder
from batchrun.tools.catalog import from_json, load
from batchrun.wiro.client import Wiro

#: Prices are asked for this long; a run does not wait for them.
_PRICES_S = 10.0
#: The state is looked at further once the first requests are out.
_CHECK_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a start of a run ended."""

    folder: Path
    counts: Counts
    #: Why it stopped early; None when every row rests that can.
    stopped: str | None = None
    #: Groups of rows that did not make it: state, a sample failure, how many rows, the first line.
    failures: tuple[tuple[State, Failure, int, int], ...] = ()
    #: Rows left in flight, with the reason, by row number.
    left: dict[int, str] = field(default_factory=dict)
    #: Rows in failed.csv or failed.jsonl.
    rejected: int = 0
    #: Rows beyond --limit.
    beyond_limit: int = 0
    #: Images of done rows that are not in their place any more; None: all are.
    missing: Missing | None = None
    #: What failed.csv was renamed to, since it had been edited and its rows are others now; None: it was not.
    kept: str | None = None

    @property
    def exit_code(self) -> int:
        """0 all rows done, 1 some failed or in doubt, 3 stopped early."""
        by_state = self.counts.by_state
        unfinished = (
            sum(rows for state, rows in by_state.items() if state not in TERMINAL) - self.beyond_limit
        )
        if self.stopped is not None and (unfinished or not self.counts.total):
            return 3
        return 0 if by_state.get(State.DONE, 0) + self.beyond_limit == self.counts.total else 1


@dataclass(slots=True)
class Again:
    """What `retry` asks for beside a plain start."""

    states: Collection[State] = (State.FAILED, State.CANCELLED)
    ids: Collection[str] = ()
    #: Only to cancel what runs at the service: nothing is submitted.
    cancel: bool = False
    #: How the rows of those ids stood before.
    standing: dict[str, State] = field(default_factory=dict)
    #: Doubtful rows that are looked up once more by the user's word.
    doubtful: int = 0
    requeued: Requeued = field(default_factory=Requeued)


class Runner:
    """One start of a run; `stop` and `abort` may be called while `run` is awaited."""

    def __init__(
        self,
        job: Job,
        credentials: Credentials,
        *,
        progress: Progress | None = None,
        again: Again | None = None,
        planned: Callable[[Runner], None] = lambda runner: None,
        rehearsal: bool = False,
    ) -> None:
        """`rehearsal`: the credentials are those of a simulator started for the occasion."""
        self.job = job
        self.progress = progress or Progress()
        self.folder = Folder(job.folder)
        #: What reading the manifest found; None until read, or when it was not read again.
        self.findings: Findings | None = None
        self.merged: Merged | None = None
        self.estimates: list[Estimate] = []
        #: Rows and images that this start is to buy, by the tool's run path.
        self.to_buy: dict[str, tuple[int, int]] = {}
        #: Planned rows that this start leaves alone, by --limit.
        self.beyond_limit = 0
        self.again = again
        self.rehearsal = rehearsal
        self._credentials = credentials
        self._planned = planned
        self._dispatcher: Dispatcher | None = None
        #: Covers what comes before the dispatcher; made in `run`, since it needs the event loop.
        self._early: anyio.CancelScope | None = None
        self._stopped: str | None = None

    def stop(self, reason: str) -> None:
        """Submit nothing more, finish downloads, leave running tasks to the next start."""
        self._stopped = self._stopped or reason
        if self._dispatcher is not None:
            self._dispatcher.stop(reason)
        elif self._early is not None:
            self._early.cancel()

    def cancel_all(self) -> None:
        """Stop, and cancel what runs at the service."""
        if self._dispatcher is not None:
            self._dispatcher.cancel_all()
        else:
            self.stop("cancelled by order")

    def abort(self) -> None:
        """Leave at once; the state is intact."""
        self._stopped = self._stopped or "stopped at once"
        if self._dispatcher is not None:
            self._dispatcher.abort()
        if self._early is not None:
            self._early.cancel()

    async def run(self) -> Outcome:
        """Take the folder, plan the manifest, work until every row rests or the run is stopped.

        Raises ManifestError (nothing was sent), UsageError, StoreError or DiskError.
        """
        self.folder.expect_kind(rehearsal=self.rehearsal)
        self.folder.create()
        try:
            with self.folder.locked():
                is_new = not self.folder.is_run
                await anyio.to_thread.run_sync(check_sound, self.folder)
                store = Store.open(self.folder.state)
                try:
                    return await self._with_store(store)
                finally:
                    store.close()
                    if is_new and self.merged is None:
                        self._forget_folder()
        except BaseExceptionGroup as group:
            raise _root(group) from None

    async def _with_store(self, store: Store) -> Outcome:
        with anyio.CancelScope() as self._early:
            if self._stopped is not None:
                self._early.cancel()
            await self._check_owner(store)
            await store.begin_lease(
                token=secrets.token_hex(8), host=socket.gethostname(), pid=os.getpid(), at=time.time()
            )
            if self.again is not None and await store.is_unread():
                raise errors.UsageError(
                    f"{self.folder.path} was repaired: run its manifest first, which finds what was lost"
                )
            if self.again is None:
                await self._plan(store)
            else:
                await self._look_at_ids(store, self.again)
                self.again.requeued = await store.requeue(
                    states=[state for state in self.again.states if state is not State.IN_DOUBT],
                    ids=self.again.ids,
                    regenerate_lost=self.job.regenerate_lost,
                )
                if self.again.cancel:  # the dispatcher takes up what runs, then obeys as it does any order
                    await anyio.to_thread.run_sync(order_cancel, self.folder.state)
            self.progress.begin(await store.counts())
            return await self._work(store)
        return Outcome(self.folder.path, Counts(), stopped=self._stopped)

    async def _look_at_ids(self, store: Store, again: Again) -> None:
        """Raises UsageError for ids that no row of the manifest has."""
        again.standing = await store.states_of(again.ids)
        missing = [id_ for id_ in dict.fromkeys(again.ids) if id_ not in again.standing]
        if missing:
            raise errors.UsageError(
                f"--id: no row of the run has the id {', '.join(map(shown, missing[:10]))}"
                + (f" (and {len(missing) - 10:,} more have none)" if len(missing) > 10 else "")
                + "; the ids are in results.jsonl"
            )
        if State.IN_DOUBT in again.states:
            counts = (await store.counts()).by_state
            named = sum(state is State.IN_DOUBT for state in again.standing.values())
            again.doubtful = named if again.ids else counts.get(State.IN_DOUBT, 0)

    # --- planning --------------------------------------------------------------------------------------

    async def _check_owner(self, store: Store) -> None:
        known = await store.manifest()
        if known is None or self.again is not None:
            return
        mine = str(self.job.manifest)
        moved = Path(known).name == Path(mine).name and not await anyio.Path(known).exists()
        if known != mine and not moved:
            raise errors.FolderTaken(
                f"{self.folder.path} belongs to another manifest, {known}; choose another folder with --out"
            )

    async def _plan(self, store: Store) -> None:
        known = await store.stamp()
        stamp = await anyio.to_thread.run_sync(stamp_of, self.job, known)
        if stamp is not None and is_same(stamp, known) and not self.job.rerun_changed:
            await store.remember_job(manifest=str(self.job.manifest), job=self.job.to_json(), stamp=stamp)
            return
        reading, merged = await store.planning(
            lambda connection: plan(
                self.job,
                load(),
                Planning(connection),
                stamp=stamp or "",
                checkpoint=anyio.from_thread.check_cancelled,
            )
        )
        self.findings = reading.findings
        if merged is None:
            raise reading.findings.as_error()
        self.merged = merged
        self.progress.announce(Fact.PLANNED, rows=merged.rows, images=merged.images, new=merged.new)

    def _forget_folder(self) -> None:
        """Nothing came of a new run: leave no folder that would belong to its manifest."""
        for path in (*self.folder.path.glob(f"{self.folder.state.name}*"), self.folder.path / "run.lock"):
            path.unlink(missing_ok=True)
        for path in (self.folder.images, self.folder.path):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    # --- working ------------------------------------------------------------------------------------------

    async def _work(self, store: Store) -> Outcome:
        binder_of = cache(binder_from)
        with closing(Listing(self.folder, store, self.progress, binder_of)) as listing:
            await listing.begin()
            return await self._work_listed(store, listing, binder_of)

    async def _work_listed(
        self, store: Store, listing: Listing, binder_of: Callable[[str], Binder]
    ) -> Outcome:
        # who asks again for rows means all of them, whatever a try was limited to
        limit = self.job.limit if self.again is None else None
        last_seq = await store.last_seq_of(limit) if limit else None
        if self.again is not None and self.again.cancel:
            last_seq = 0
        if last_seq is not None:
            self.beyond_limit = await store.planned_beyond(last_seq)
        if self.merged is not None and last_seq is None:
            self.to_buy = dict(self.merged.by_tool)
            unbought = []
        else:
            unbought = await store.unbought(last_seq=last_seq)
        for number, rows, images in unbought:
            run_path = binder_of(await store.tool(number)).tool.run_path
            before = self.to_buy.get(run_path, (0, 0))  # a tool may be known by several descriptions
            self.to_buy[run_path] = before[0] + rows, before[1] + images
        dispatcher = None
        if await store.has_work() or await store.wanted() is not None:
            async with Wiro(self._credentials) as wiro, anyio.create_task_group() as group:
                await self._ask_prices(wiro)
                self._planned(self)
                if await Search(store, wiro, self.progress, binder_of, give_up=self._give_up_doubt).run():
                    self.progress.begin(await store.counts())
                dispatcher = await self._dispatch(store, wiro, listing, group, last_seq, binder_of)
        else:
            self._planned(self)
        return await self._finish(store, listing, dispatcher)

    async def _dispatch(
        self,
        store: Store,
        wiro: Wiro,
        listing: Listing,
        group: anyio.abc.TaskGroup,
        last_seq: int | None,
        binder_of: Callable[[str], Binder],
    ) -> Dispatcher:
        job = self.job
        sign = StopSign()
        saver = Saver(
            self.folder.path,
            store,
            wiro,
            self.progress,
            sign,
            downloads=job.downloads,
            max_image_bytes=job.max_image_bytes,
        )
        await saver.begin()
        manifest_folder = job.manifest.parent if isinstance(job.manifest, Path) else Path.cwd()
        dispatcher = Dispatcher(
            store=store,
            service=wiro,
            saver=saver,
            sign=sign,
            progress=self.progress,
            limits=Limits(
                concurrency=None if job.concurrency == "auto" else int(job.concurrency),
                max_concurrency=max(
                    job.max_concurrency, 0 if job.concurrency == "auto" else int(job.concurrency)
                ),
                attempts=job.attempts,
                last_seq=last_seq,
                regenerate_lost=job.regenerate_lost,
                max_pause_s=job.max_pause,
                halt=parse_halt(job.halt) if job.halt else Halt(),
                kill_stuck=job.on_stuck == "kill",
                track=job.track,
                has_events=self._credentials.has_own_socket,
                looks_per_s=job.looks_per_s,
                submit=self.again is None or not self.again.cancel,
                address=self._credentials.base_url,
            ),
            cap=await self._cap(store, wiro, binder_of),
            binders=binder_of,
            image_path=LocalImages(manifest_folder, allow_outside=True).path,
            give_up_doubt=self._give_up_doubt,
            known_limit=await store.account_limit(),
        )
        self._dispatcher = dispatcher
        if self._stopped is not None:
            dispatcher.stop(self._stopped)
        group.start_soon(listing.run)
        group.start_soon(self._check_further, dispatcher)
        await dispatcher.run()
        group.cancel_scope.cancel()
        return dispatcher

    async def _check_further(self, dispatcher: Dispatcher) -> None:
        """Look at more of the state than there was time for before the first request."""
        await anyio.sleep(_CHECK_AFTER_S)
        try:
            await anyio.to_thread.run_sync(check_further, self.folder, abandon_on_cancel=True)
        except (errors.StoreError, errors.DiskError) as error:
            if isinstance(error, errors.StoreDamaged):  # of all else says who needs the state
                dispatcher.stop(str(error))

    def _give_up_doubt(self, row: Row) -> bool:
        again = self.again
        if again is None or State.IN_DOUBT not in again.states:
            return False
        return not again.ids or row.id in again.ids or row.name in again.ids

    async def _ask_prices(self, wiro: Wiro) -> None:
        """What is known of the price of what was newly planned; who does not tell is not waited for."""
        if self.findings is None or self.merged is None:
            return
        with anyio.move_on_after(_PRICES_S):
            for run_path, (rows, images) in self.to_buy.items():
                owner, slug = run_path.split("/")[-2:]
                try:
                    facts = await wiro.tool_price(owner, slug)
                except errors.ServiceError:
                    self.estimates.append(Estimate(slug, rows, images, None))
                else:
                    self.estimates.append(
                        estimate(slug, rows, images, facts.prices, facts.approximate_cost_usd)
                    )

    async def _cap(self, store: Store, wiro: Wiro, binder_of: Callable[[str], Binder]) -> Cap:
        """The run's cost cap with what is published of its tools' prices; without a cap nothing is asked."""
        if self.job.max_cost is None:
            return Cap(None, {}, store)
        published = {}
        with anyio.move_on_after(_PRICES_S):
            for number in await store.tool_numbers():
                tool = binder_of(await store.tool(number)).tool
                with suppress(errors.ServiceError):  # not published: its first bill is waited for
                    facts = await wiro.tool_price(tool.owner, tool.slug)
                    published[number] = Published(facts.prices, facts.approximate_cost_usd)
        return Cap(await store.budget(self.job.max_cost), published, store)

    async def _finish(self, store: Store, listing: Listing, dispatcher: Dispatcher | None) -> Outcome:
        with anyio.CancelScope(shield=True):
            rejected = await listing.finish()
            outcome = Outcome(
                self.folder.path,
                await store.counts(),
                stopped=dispatcher.stopped if dispatcher is not None else self._stopped,
                failures=tuple(await store.failures()),
                left=dict(dispatcher.left) if dispatcher is not None else {},
                rejected=rejected,
                beyond_limit=self.beyond_limit,
                missing=await store.of_saved(partial(missing, self.folder.path)),
                kept=listing.kept,
            )
            await store.end_lease(time.time())
        return outcome


def binder_from(description: str) -> Binder:
    """The binder of a tool as the run's record describes it: it makes requests just as they were sent."""
    data = json.loads(description)
    return Binder(from_json(data), lora_scale=data.get("lora_scale", "prompt"))


async def bring_up_to_date(folder: Folder) -> None:
    """Write what a killed runner still owed to the sidecar files. The caller holds the folder's lock."""
    check_sound(folder)
    store = Store.open(folder.state)
    try:
        await store.begin_lease(
            token=secrets.token_hex(8), host=socket.gethostname(), pid=os.getpid(), at=time.time()
        )
        binder_of = cache(binder_from)
        with closing(Listing(folder, store, Progress(), binder_of)) as listing:
            await listing.begin()
            await listing.finish()
        await store.end_lease(time.time())
    finally:
        store.close()


def _root(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error that matters of a group: one of ours where there is one."""
    for error in group.exceptions:
        inner = _root(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(inner, errors.BatchrunError):
            return inner
    first = group.exceptions[0]
    return _root(first) if isinstance(first, BaseExceptionGroup) else first
