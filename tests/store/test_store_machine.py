"""Whatever happens to the rows of a run, in whatever order and with whatever crashes between, the state says
what a plain dict says, and what must never be is not."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batchrun.errors import LeaseLost
from batchrun.model import Accepted, Failure, RemoteOutput, Row, State, Task
from batchrun.rules.states import Event, ImpossibleMove
from batchrun.store.connection import connect
from batchrun.store.row_verbs import Intent, Requeued
from batchrun.store.store import Store
from tests.support.rows import IMAGE_BYTES, begin, merge, recount, saved, staged

T = TypeVar("T")

S = State
IDS = ["a", "A", "b", "c/d", "e"]
CLAIMABLE = (S.PLANNED, S.SUBMITTING, S.IN_FLIGHT, S.IN_DOUBT, S.FINISHED)
RESTING = {S.PLANNED, S.FAILED, S.CANCELLED, S.INVALID}
TERMINAL = {S.DONE, S.FAILED, S.CANCELLED, S.INVALID}
#: Causes after which images are fetched, not bought; after which nothing is done unasked.
FETCH, GONE, PLAIN = "download failed", "paid but empty", "task failed"
COST = Decimal("0.003510000001")
RESERVE = Decimal("0.0125")


@dataclass
class Known:
    """What the test knows of a row."""

    id: str
    prompt: str
    state: State
    present: bool = True
    claimed: bool = False
    attempts: int = 0
    generation: int = 0
    cause: str | None = None
    #: Of the present task; None before it is known.
    task: str | None = None
    #: Outputs of this generation: whether each is saved.
    outputs: list[bool] = field(default_factory=list)
    reserved: Decimal = Decimal(0)
    held: bool = False
    #: What it was while it was done, before it was asked for anew: taken back, it is done again.
    kept: Known | None = None
    #: It was: generations after that one may be used up.
    was_restored: bool = False

    def is_settled(self) -> bool:
        return self.state in TERMINAL or self.held

    def is_paid(self) -> bool:
        return self.state is S.DONE or (self.state is S.FAILED and self.cause in (FETCH, GONE))

    def rest(self, state: State, cause: str | None = None) -> None:
        self.state, self.cause, self.claimed = state, cause, False

    def back_to_planned(self) -> None:
        self.state, self.cause, self.task, self.reserved, self.held = S.PLANNED, None, None, Decimal(0), False
        self.claimed = self.claimed and self.present

    def is_taken_back(self, prompt: str) -> bool:
        return (
            self.kept is not None
            and self.prompt != prompt == self.kept.prompt
            and not self.is_paid()
            and self.state in RESTING
        )

    def restore(self) -> None:
        assert self.kept is not None
        was = self.kept
        self.prompt, self.task, self.outputs = was.prompt, was.task, list(was.outputs)
        self.generation, self.attempts = was.generation, was.attempts
        self.rest(S.DONE)
        self.kept, self.was_restored = None, True

    def anew(self) -> None:
        self.attempts, self.outputs, self.generation = 0, [], self.generation + 1


Way = Callable[[int, Known], None]


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.path = Path(self.folder.name) / "state.sqlite3"
        self.runner = asyncio.Runner()
        self.rows: dict[int, Known] = {}
        self.tasks = 0
        self.spent = Decimal(0)
        self.store = self.do(begin(Store.open(self.path)))
        self.old_store: Store | None = None

    def teardown(self) -> None:
        self.store.close()
        if self.old_store is not None:
            self.old_store.close()
        self.runner.close()
        self.folder.cleanup()

    def do(self, verb: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(verb)

    def new_task(self) -> str:
        self.tasks += 1
        return str(self.tasks)

    def check(self, seq: int, row: Row) -> None:
        known = self.rows[seq]
        assert (row.state, row.attempts, row.generation) == (known.state, known.attempts, known.generation)
        assert (row.failure.cause if row.failure else None) == known.cause
        assert [output.path is not None for output in row.outputs] == known.outputs
        if known.state in (S.IN_FLIGHT, S.FINISHED, S.DONE):
            assert row.attempt is not None
            assert row.attempt.task_id == known.task

    # --- planning -------------------------------------------------------------------------------------

    @initialize(ids=st.lists(st.sampled_from(IDS), min_size=1, unique=True))
    def first_plan(self, ids: list[str]) -> None:
        self.plan_rows(dict.fromkeys(ids, ("one", False)), rerun=False)

    @precondition(lambda self: not any(known.claimed for known in self.rows.values()))
    @rule(
        manifest=st.dictionaries(
            st.sampled_from(IDS), st.tuples(st.sampled_from(["one", "two"]), st.integers(0, 5)), min_size=1
        ),
        rerun=st.booleans(),
    )
    def plan(self, manifest: dict[str, tuple[str, int]], rerun: bool) -> None:
        self.plan_rows({id_: (prompt, dice == 0) for id_, (prompt, dice) in manifest.items()}, rerun=rerun)

    def plan_rows(self, manifest: dict[str, tuple[str, bool]], *, rerun: bool) -> None:
        reading = [
            staged(line, f"{prompt} {id_}", id=id_, message="wrong" if invalid else None)
            for line, (id_, (prompt, invalid)) in enumerate(manifest.items(), 2)
        ]
        merged = self.do(
            self.store.planning(lambda connection: merge(connection, reading, rerun_changed=rerun))
        )
        told = Counter[str]()
        by_id = {known.id: known for known in self.rows.values()}
        for id_, known in by_id.items():
            if known.present and id_ not in manifest:
                known.present = False
                told["gone"] += 1
        anew: list[Known] = []
        for id_, (prompt, invalid) in manifest.items():
            beginning = S.INVALID if invalid else S.PLANNED
            cause = "invalid row" if invalid else None
            row = by_id.get(id_)
            if row is None:
                self.rows[len(self.rows) + 1] = Known(id_, prompt, beginning, cause=cause)
                told["new"] += 1
                continue
            row.present = True
            if row.is_taken_back(prompt) and not invalid:
                row.restore()
                continue
            if row.prompt == prompt and (row.state is S.INVALID) == invalid:
                continue
            if row.is_paid():
                asked_anew = rerun and not invalid
                told["rerun" if asked_anew else "changed"] += 1
            else:
                asked_anew = row.state in RESTING
                told["replaced" if asked_anew else "changed"] += 1
            if asked_anew:
                row.kept = replace(row) if row.state is S.DONE else row.kept
                row.prompt, row.state, row.cause = prompt, beginning, cause
                row.task = None
                row.anew()
                anew.append(row)
        for row in anew:
            self.number_anew(row)
        assert (merged.new, merged.gone, merged.rerun) == (told["new"], told["gone"], told["rerun"])
        assert (merged.changed, merged.replaced) == (told["changed"], told["replaced"])
        assert merged.rows == len(manifest)

    def number_anew(self, known: Known) -> None:
        """After a row was taken back its later generations may be used up: the next one is any newer one."""
        if known.was_restored:
            [seq] = [seq for seq, other in self.rows.items() if other is known]
            generation = self.do(self.store.row(seq)).generation
            assert generation >= known.generation
            known.generation = generation

    # --- a process's life -----------------------------------------------------------------------------

    @rule(state=st.sampled_from(list(CLAIMABLE)), limit=st.integers(1, 3))
    def claim(self, state: State, limit: int) -> None:
        expected = [
            seq
            for seq, known in self.rows.items()
            if known.state is state and not known.claimed and (known.present or state is not S.PLANNED)
        ][:limit]
        for seq in expected:
            self.rows[seq].claimed = True
        claimed = self.do(self.store.claim(state, limit=limit))
        assert [row.seq for row in claimed] == expected
        for row in claimed:
            self.check(row.seq, row)

    @rule(orderly=st.booleans())
    def end_and_start_again(self, orderly: bool) -> None:
        if orderly:
            self.do(self.store.end_lease(2.0))
        if self.old_store is not None:
            self.old_store.close()
        self.old_store = self.store  # a process that hangs, and does not know that it was replaced
        self.store = self.do(begin(Store.open(self.path)))
        for known in self.rows.values():
            known.claimed = False

    @precondition(lambda self: self.old_store is not None)
    @rule(choice=st.integers(0, 99))
    def a_replaced_process_wakes(self, choice: int) -> None:
        assert self.old_store is not None
        seq = 1 + choice % len(self.rows)
        with pytest.raises(LeaseLost):
            self.do(self.old_store.record_intent(Intent(seq, 1.0, None, None)))
        with pytest.raises(LeaseLost):
            self.do(self.old_store.claim(S.PLANNED, limit=1))
        with pytest.raises(LeaseLost):
            self.do(self.old_store.record_saved(seq))

    # --- rows on their way ----------------------------------------------------------------------------

    @rule(moves=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=8))
    def move(self, moves: list[tuple[int, int]]) -> None:
        """Whatever may happen to claimed rows, one thing after the other."""
        for choice, way in moves:
            seq = 1 + choice % len(self.rows)
            known = self.rows[seq]
            if not known.claimed and known.state in CLAIMABLE:
                self.claim(known.state, 9)
            if not known.claimed:
                continue  # it rests, or has left the manifest
            if known.state is not S.PLANNED:
                with pytest.raises(ImpossibleMove):  # what is under way is never submitted
                    self.do(self.store.record_intent(Intent(seq, 1.0, None, None)))
            ways = self.ways[known.state]
            ways[way % len(ways)](seq, known)

    @property
    def ways(self) -> dict[State, list[Way]]:
        """What may happen to a claimed row."""
        return {
            S.PLANNED: [self.intend],
            S.SUBMITTING: [
                *[self.accept] * 4,
                self.lose_the_answer,
                self.refuse,
                self.reject,
                self.answer_twice,
            ],
            S.IN_DOUBT: [
                self.adopt,
                self.adopt_a_taken_one,
                self.prove_absent,
                self.hold,
                self.give_up_doubt,
            ],
            S.IN_FLIGHT: [
                *[self.finish] * 4,
                self.fail_once,
                self.fail_for_good,
                self.end_empty,
                self.cancel,
            ],
            S.FINISHED: [self.save_one, self.save_all, self.lose_images, self.lose_images_for_good],
        }

    def intend(self, seq: int, known: Known) -> None:
        row = self.do(self.store.record_intent(Intent(seq, 1.0, None, self.tasks, RESERVE)))
        known.state, known.reserved = S.SUBMITTING, RESERVE
        self.check(seq, row)
        assert row.attempt is not None
        assert row.attempt.number == known.attempts + 1

    def accept(self, seq: int, known: Known, *, adopted: bool = False) -> None:
        known.task, known.state, known.cause, known.held = self.new_task(), S.IN_FLIGHT, None, False
        accepted = Accepted(known.task, "t")
        self.check(seq, self.do(self.store.record_accepted(seq, accepted, at=1.0, adopted=adopted)))

    def answer_twice(self, seq: int, known: Known, *, adopted: bool = False) -> None:
        """The service names a task that another row holds, or held."""
        if self.tasks == 0:
            return
        known.state = S.IN_DOUBT
        taken = Accepted(str(1 + seq % self.tasks), "t")
        self.check(seq, self.do(self.store.record_accepted(seq, taken, at=1.0, adopted=adopted)))

    def lose_the_answer(self, seq: int, known: Known) -> None:
        known.state = S.IN_DOUBT
        self.check(seq, self.do(self.store.record_doubt(seq, "reset")))

    def refuse(self, seq: int, known: Known) -> None:
        known.back_to_planned()
        self.check(seq, self.do(self.store.withdraw(seq)))

    def reject(self, seq: int, known: Known) -> None:
        known.back_to_planned()
        known.rest(S.FAILED, "rejected")
        self.check(seq, self.do(self.store.record_rejected(seq, Failure("rejected", ""))))

    def adopt(self, seq: int, known: Known) -> None:
        self.accept(seq, known, adopted=True)

    def adopt_a_taken_one(self, seq: int, known: Known) -> None:
        self.answer_twice(seq, known, adopted=True)

    def prove_absent(self, seq: int, known: Known) -> None:
        known.back_to_planned()
        self.check(seq, self.do(self.store.record_absent(seq)))

    def hold(self, seq: int, known: Known) -> None:
        known.claimed, known.held, known.cause = False, True, "in doubt"
        self.do(self.store.hold(seq, Failure("in doubt", "")))

    def give_up_doubt(self, seq: int, known: Known) -> None:
        known.back_to_planned()
        known.anew()
        row = self.do(self.store.give_up_doubt(seq))
        self.number_anew(known)
        self.check(seq, row)

    def finish(self, seq: int, known: Known) -> None:
        images = 1 + self.tasks % 3
        outputs = tuple(RemoteOutput(f"{n}.png", f"https://cdn/{n}") for n in range(images))
        known.state, known.outputs, known.reserved = S.FINISHED, [False] * images, Decimal(0)
        known.attempts += 1
        self.spent += COST
        task = replace(self.ended(known, "0"), outputs=outputs)
        self.check(seq, self.do(self.store.record_finished(seq, task, at=1.0)))

    def fail_once(self, seq: int, known: Known) -> None:
        self.fail(seq, known, Event.ATTEMPT_FAILED, "1", PLAIN)

    def fail_for_good(self, seq: int, known: Known) -> None:
        self.fail(seq, known, Event.GAVE_UP, "1", PLAIN)

    def end_empty(self, seq: int, known: Known) -> None:
        self.spent += COST
        self.fail(seq, known, Event.GAVE_UP, "0", GONE)

    def cancel(self, seq: int, known: Known) -> None:
        self.fail(seq, known, Event.CANCELLED, "1", "cancelled")

    def fail(self, seq: int, known: Known, event: Event, pexit: str, cause: str) -> None:
        task = self.ended(known, pexit)
        known.attempts += 1
        known.back_to_planned()
        if event is not Event.ATTEMPT_FAILED:
            known.rest(S.FAILED if event is Event.GAVE_UP else S.CANCELLED, cause)
        verb = self.store.record_attempt_failed(seq, task, Failure(cause, "words"), at=1.0, event=event)
        self.check(seq, self.do(verb))

    @staticmethod
    def ended(known: Known, pexit: str) -> Task:
        return Task(known.task or "", status="task_postprocess_end", pexit=pexit, cost_usd=COST)

    def save_one(self, seq: int, known: Known) -> None:
        place = known.outputs.index(False) if False in known.outputs else 0
        output = self.do(self.store.row(seq)).outputs[place]
        known.outputs[place] = True
        record = saved(output, f"images/{seq}-{known.generation}-{place}.png")
        self.check(seq, self.do(self.store.record_output(seq, record)))

    def save_all(self, seq: int, known: Known) -> None:
        while False in known.outputs:
            self.save_one(seq, known)
        known.rest(S.DONE)
        known.kept = None
        self.check(seq, self.do(self.store.record_saved(seq)))

    def lose_images(self, seq: int, known: Known) -> None:
        known.rest(S.FAILED, FETCH)
        self.check(seq, self.do(self.store.record_lost(seq, Failure(FETCH, "words"))))

    def lose_images_for_good(self, seq: int, known: Known) -> None:
        known.rest(S.FAILED, GONE)
        self.check(seq, self.do(self.store.record_lost(seq, Failure(GONE, "words"))))

    # --- asking again ---------------------------------------------------------------------------------

    @rule(
        states=st.sets(st.sampled_from([S.FAILED, S.CANCELLED])),
        ids=st.sets(st.sampled_from(IDS)),
        regenerate=st.booleans(),
    )
    def retry(self, states: set[State], ids: set[str], regenerate: bool) -> None:
        submit = save = lost = 0
        anew: list[Known] = []
        for known in self.rows.values():
            if known.state not in states or not known.present or (ids and known.id not in ids):
                continue
            if known.cause == FETCH:
                known.state, known.cause = S.FINISHED, None
                save += 1
            elif known.cause == GONE and not regenerate:
                lost += 1
            else:
                known.back_to_planned()
                known.anew()
                anew.append(known)
                submit += 1
        told = self.do(self.store.requeue(states=states, ids=ids, regenerate_lost=regenerate))
        for known in anew:
            self.number_anew(known)
        assert told == Requeued(submit, save, lost)

    # --- always ---------------------------------------------------------------------------------------

    @invariant()
    def counts_are_right(self) -> None:
        counts = self.do(self.store.counts())
        present = [known for known in self.rows.values() if known.present]
        images = sum(len(known.outputs) for known in present if known.state is S.DONE)
        assert counts.by_state == Counter(known.state for known in present)
        assert (counts.images, counts.bytes) == (images, images * IMAGE_BYTES)
        assert counts.cost_usd == self.spent
        assert counts == recount(self.path)

    @invariant()
    def what_is_stored_is_what_is_known(self) -> None:
        connection = connect(self.path, read_only=True)
        try:
            self.check_stored(connection)
        finally:
            connection.close()

    def check_stored(self, connection: sqlite3.Connection) -> None:
        def ask(query: str) -> list[tuple[Any, ...]]:
            return connection.execute(query).fetchall()

        stored = {
            seq: (State(state), bool(present), lease is not None, settled)
            for seq, state, present, lease, settled in ask(
                "SELECT seq, state, present, lease, settled FROM rows"
            )
        }
        for seq, known in self.rows.items():
            state, present, claimed, settled = stored[seq]
            assert (state, present, claimed) == (known.state, known.present, known.claimed)
            # a row is told of exactly while it rests
            assert (settled is not None) == known.is_settled()
        numbers = [settled for *_, settled in stored.values() if settled is not None]
        assert len(set(numbers)) == len(numbers)
        # at most one open attempt, and only where a task may live
        open_rows = Counter(seq for (seq,) in ask("SELECT row FROM attempts WHERE open = 1"))
        assert open_rows == Counter(
            seq for seq, known in self.rows.items() if known.state in (S.SUBMITTING, S.IN_DOUBT, S.IN_FLIGHT)
        )
        # a task belongs to one row
        tasks = Counter(task for (task,) in ask("SELECT task_id FROM attempts WHERE task_id IS NOT NULL"))
        assert set(tasks.values()) <= {1}
        (told,) = ask("SELECT reserved_usd FROM run")[0]
        assert Decimal(told) == sum(known.reserved for known in self.rows.values())


StoreMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("BATCHRUN_MACHINE_EXAMPLES", "25")),
    stateful_step_count=30,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
TestStore = StoreMachine.TestCase
