"""A row's way through the state: what each verb makes true, the sums it keeps, what it gives back."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.errors import LeaseLost
from batchrun.model import Accepted, Failure, RemoteOutput, State, Task
from batchrun.rules.states import Event
from batchrun.store.connection import connect
from batchrun.store.reading import read_counts, read_failures
from batchrun.store.row_verbs import Requeued
from batchrun.store.store import Store
from tests.support.rows import (
    IMAGE_BYTES,
    begin,
    claimed,
    ended,
    merge,
    planned,
    recount,
    reserved_usd,
    save_all,
    saved,
    staged,
    to_cancelled,
    to_done,
    to_finished,
    to_in_flight,
    to_submitting,
)

TROUBLE = Failure("task failed", "the task failed (pexit 1)")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.sqlite3"


async def ask(store: Store, query: str) -> object:
    """One value straight from the database."""
    return await store.planning(lambda connection: connection.execute(query).fetchone()[0])


# --- a row's way ----------------------------------------------------------------------------------------


async def test_a_row_s_way_from_planned_to_done(path: Path) -> None:
    store = await planned(path, [staged(7, "a cat", id="cat", images=2)])
    (row,) = await claimed(store)
    assert (row.seq, row.key, row.id, row.line, row.name) == (1, "id:cat", "cat", 7, "cat")
    assert (row.state, row.attempts, row.attempt, row.outputs) == (State.PLANNED, 0, None, ())
    row = await to_submitting(store, 1)
    assert row.state is State.SUBMITTING
    assert row.attempt is not None
    assert (row.attempt.number, row.attempt.task_id) == (1, None)
    assert (row.attempt.intent_at, row.attempt.intent_server_at, row.attempt.after_task) == (10.0, 9.0, 5)
    row = await store.record_accepted(1, Accepted("2221", "secret"), at=11.0)
    assert row.attempt is not None
    assert (row.state, row.attempt.task_id, row.attempt.token) == (State.IN_FLIGHT, "2221", "secret")
    row = await store.record_finished(1, ended(row, cost="0.0070", images=2), at=12.0)
    assert row.attempt is not None
    assert (row.state, row.attempts) == (State.FINISHED, 1)
    assert (row.attempt.cost_usd, row.attempt.seconds) == (Decimal("0.0070"), Decimal("1.5"))
    assert [(output.index, output.path, output.declared_bytes) for output in row.outputs] == [
        (0, None, IMAGE_BYTES),
        (1, None, IMAGE_BYTES),
    ]
    row = await store.record_output(1, saved(row.outputs[1], "images/000/cat_1.png"))
    assert [output.path for output in row.outputs] == [None, "images/000/cat_1.png"]
    row = await save_all(store, row)
    assert (row.state, row.failure) == (State.DONE, None)
    assert all(output.url is None and output.sha256 == "ab" * 32 for output in row.outputs)
    counts = await store.counts()
    assert (counts.by_state, counts.images, counts.bytes) == ({State.DONE: 1}, 2, 2 * IMAGE_BYTES)
    assert counts.cost_usd == Decimal("0.0070")
    assert not await store.has_work()
    store.close()


async def test_the_last_image_is_recorded_with_the_end_of_its_row(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    row = await to_finished(store, 1)
    image = saved(row.outputs[0], "images/000/cat_0.png")
    done = await store.record_saved(1, last=image, warning="declared otherwise")
    assert done == await store.row(1)
    assert done.state is State.DONE
    assert [(output.path, output.sha256, output.url) for output in done.outputs] == [
        ("images/000/cat_0.png", image.sha256, None)
    ]
    counts = await store.counts()
    assert (counts.images, counts.bytes) == (1, IMAGE_BYTES)
    store.close()


async def test_a_submit_that_made_no_task_leaves_no_trace(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    for _ in range(3):
        await to_submitting(store, 1, reserved="0.5")
        row = await store.withdraw(1)
        assert (row.state, row.attempts, row.attempt) == (State.PLANNED, 0, None)
    await to_submitting(store, 1, reserved="0.5")
    await store.record_doubt(1, "reset")
    row = await store.record_absent(1)
    assert (row.state, row.attempts, row.attempt) == (State.PLANNED, 0, None)
    assert reserved_usd(path) == (Decimal(0), Decimal(0))
    store.close()


async def test_failed_tasks_are_numbered_attempts_of_the_row(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    for number in (1, 2, 3):
        row = await to_in_flight(store, 1, f"t{number}")
        assert row.attempt is not None
        assert row.attempt.number == number
        event = Event.ATTEMPT_FAILED if number < 3 else Event.GAVE_UP
        task = Task(f"t{number}", status="task_postprocess_end", pexit="1", cost_usd=Decimal(9))
        row = await store.record_attempt_failed(1, task, TROUBLE, at=12.0, event=event)
        assert row.attempts == number
    assert (row.state, row.failure) == (State.FAILED, TROUBLE)
    (record,) = await store.settled_after(0, limit=9)
    assert [(a.number, a.task_id, a.cost_usd, a.error) for a in record.attempts] == [
        (number, f"t{number}", Decimal(0), TROUBLE.message) for number in (1, 2, 3)
    ]
    assert (await store.counts()).cost_usd == 0
    store.close()


async def test_a_task_belongs_to_one_row_and_the_second_is_in_doubt(path: Path) -> None:
    store = await planned(path, 3)
    await claimed(store)
    await to_in_flight(store, 1, "77")
    row = await to_in_flight(store, 2, "77")
    assert row.state is State.IN_DOUBT
    assert row.attempt is not None
    assert row.attempt.task_id is None
    row = await store.record_accepted(2, Accepted("77", ""), at=1.0, adopted=True)
    assert row.state is State.IN_DOUBT
    row = await store.record_accepted(2, Accepted("78", ""), at=1.0, adopted=True)
    assert (row.state, row.attempt and row.attempt.task_id) == (State.IN_FLIGHT, "78")
    assert await store.known_tasks(["76", "77", "78", "79"]) == {"77": 1, "78": 1}
    assert await store.known_tasks([]) == {}
    store.close()


async def test_recording_a_row_s_own_task_twice_changes_nothing(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    once = await to_in_flight(store, 1, "77")
    assert await store.record_accepted(1, Accepted("77", "secret"), at=99.0) == once
    store.close()


async def test_outputs_without_an_address_are_no_images(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    row = await to_in_flight(store, 1)
    outputs = (RemoteOutput("log", None), RemoteOutput("0.png", "https://cdn/0.png"))
    row = await store.record_finished(1, replace(ended(row), outputs=outputs), at=1.0)
    assert [(output.index, output.url) for output in row.outputs] == [(0, "https://cdn/0.png")]
    store.close()


async def test_fresh_addresses_are_for_images_still_to_be_fetched(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    row = await to_finished(store, 1, images=3)
    await store.record_output(1, saved(row.outputs[0], "images/0.png"))
    await store.record_output(1, saved(row.outputs[1], "pending/1.png"), held=True)
    fresh = [RemoteOutput("x", None), *(RemoteOutput("", f"https://new/{n}") for n in range(3))]
    row = await store.refresh_outputs(1, fresh)
    assert [output.url for output in row.outputs] == [
        "https://cdn/1/0.png",
        "https://cdn/1/1.png",
        "https://new/2",
    ]
    store.close()


async def test_a_doubt_held_for_the_user_is_told_and_looked_up_again_by_the_next_start(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    await to_submitting(store, 1)
    await store.record_doubt(1, "reset")
    await store.hold(1, Failure("in doubt", "the list is off"))
    assert await store.failures() == [(State.IN_DOUBT, Failure("in doubt", "the list is off"), 1, 1)]
    assert [item.row.state for item in await store.settled_after(0, limit=9)] == [State.IN_DOUBT]
    (row,) = await claimed(store, State.IN_DOUBT)
    assert row.attempt is not None
    # it is told as in doubt while it is looked up, and only then not any more
    assert [item.row.state for item in await store.settled_after(0, limit=9)] == [State.IN_DOUBT]
    await store.record_accepted(1, Accepted("7", ""), at=2.0, adopted=True)
    assert await store.settled_after(0, limit=9) == []
    store.close()


async def test_a_doubt_given_up_by_the_user_is_submitted_with_its_history_kept(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    await to_submitting(store, 1, reserved="0.25")
    await store.record_doubt(1, "reset")
    row = await store.give_up_doubt(1)
    assert (row.state, row.generation, row.attempts, row.attempt) == (State.PLANNED, 1, 0, None)
    assert reserved_usd(path) == (Decimal(0), Decimal(0))
    row = await to_in_flight(store, 1)
    assert row.attempt is not None
    assert row.attempt.number == 1
    assert await ask(store, "SELECT count(*) FROM attempts") == 2
    store.close()


async def test_a_row_that_has_left_the_manifest_is_followed_but_not_bought_again(path: Path) -> None:
    store = await planned(path, 3)
    await claimed(store)
    await to_in_flight(store, 1)
    await to_submitting(store, 2)
    await store.planning(lambda connection: merge(connection, [staged(9, "other")]))
    await begin(store)
    assert [row.seq for row in await claimed(store, State.IN_FLIGHT)] == [1]
    assert [row.seq for row in await claimed(store, State.SUBMITTING)] == [2]
    assert [row.seq for row in await claimed(store, State.PLANNED)] == [4]
    failed = Task("1001", status="task_cancel")
    await store.record_attempt_failed(1, failed, TROUBLE, at=1.0, event=Event.ATTEMPT_FAILED)
    await store.record_doubt(2, "killed")
    await store.record_absent(2)
    for seq in (1, 2):
        with pytest.raises(LeaseLost):
            await to_submitting(store, seq)
    await to_done(store, 4)
    assert not await store.has_work()
    assert await store.counts() == recount(path)
    assert (await store.counts()).total == 1
    store.close()


# --- money ----------------------------------------------------------------------------------------------

AMOUNTS = st.decimals(0, 100, allow_nan=False, allow_infinity=False, places=12)


@settings(max_examples=15, deadline=None)
@given(amounts=st.lists(st.tuples(AMOUNTS, AMOUNTS, st.booleans()), min_size=1, max_size=12))
def test_money_is_exact(
    tmp_path_factory: pytest.TempPathFactory, amounts: list[tuple[Decimal, Decimal, bool]]
) -> None:
    path = tmp_path_factory.mktemp("money") / "state.sqlite3"

    async def spend() -> None:
        store = await planned(path, len(amounts))
        await claimed(store)
        for seq, (reserved, cost, finishes) in enumerate(amounts, 1):
            row = await to_in_flight(store, seq, reserved=str(reserved))
            if finishes:
                await store.record_finished(seq, ended(row, cost=str(cost)), at=1.0)
        assert (await store.counts()).cost_usd == sum(cost for _, cost, finishes in amounts if finishes)
        open_ones = sum(reserved for reserved, _, finishes in amounts if not finishes)
        assert reserved_usd(path) == (open_ones, open_ones)
        store.close()

    anyio.run(spend)


async def test_amounts_of_any_length_are_kept_to_the_last_digit(path: Path) -> None:
    store = await planned(path, 2)
    await claimed(store)
    await to_done(store, 1, cost="0." + "0" * 40 + "1")
    await to_done(store, 2, cost="123456789012345678901234567890")
    assert f"{(await store.counts()).cost_usd:f}" == "123456789012345678901234567890." + "0" * 40 + "1"
    store.close()


async def test_a_paid_task_without_images_is_money_spent(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    row = await to_in_flight(store, 1)
    await store.record_attempt_failed(1, ended(row, images=0), TROUBLE, at=1.0, event=Event.GAVE_UP)
    assert (await store.counts()).cost_usd == Decimal("0.01")
    store.close()


# --- settling and asking again --------------------------------------------------------------------------


async def test_settled_numbers_strictly_increase_in_the_order_of_settling(path: Path) -> None:
    store = await planned(path, [*(staged(n) for n in range(1, 6)), staged(6, "?", message="wrong")])
    await claimed(store)
    await to_done(store, 4)
    await store.record_rejected(2, TROUBLE)
    await to_cancelled(store, 1)
    await to_done(store, 3)
    settled = await store.settled_after(0, limit=100)
    assert [item.row.seq for item in settled] == [6, 4, 2, 1, 3]
    numbers = [item.number for item in settled]
    assert numbers == sorted(set(numbers))
    store.close()


async def test_settled_rows_are_read_in_pages(path: Path) -> None:
    store = await planned(path, 25)
    await claimed(store)
    for seq in range(25, 0, -1):
        await to_done(store, seq)
    seen: list[int] = []
    after = 0
    while page := await store.settled_after(after, limit=4):
        assert len(page) <= 4
        seen += [item.row.seq for item in page]
        after = page[-1].number
    assert seen == list(range(25, 0, -1))
    store.close()


async def test_asking_again_takes_a_row_out_of_what_was_listed(path: Path) -> None:
    store = await planned(path, 3)
    await claimed(store)
    await to_done(store, 1)
    await store.record_rejected(2, TROUBLE)
    before = await store.settled_after(0, limit=9)
    assert await store.set_listing_mark({"settled": before[-1].number}, instead_of={})
    assert await store.requeue(states=[State.FAILED]) == Requeued(submit=1)
    assert await store.listing_mark() == {}
    assert [item.row.seq for item in await store.settled_after(0, limit=9)] == [1]
    await claimed(store)
    await store.record_rejected(2, TROUBLE)
    settled = await store.settled_after(0, limit=9)
    assert [item.row.seq for item in settled] == [1, 2]
    assert settled[1].number > before[-1].number
    store.close()


async def test_a_listing_mark_is_set_only_instead_of_the_one_it_builds_on(path: Path) -> None:
    store = await planned(path, 1)
    assert await store.listing_mark() == {}
    assert await store.set_listing_mark({"settled": 1}, instead_of={})
    assert not await store.set_listing_mark({"settled": 2}, instead_of={})
    assert await store.listing_mark() == {"settled": 1}
    store.close()


async def test_retry_buys_fetches_or_leaves_as_the_failure_asks(path: Path) -> None:
    store = await planned(path, 6)
    await claimed(store)
    await store.record_rejected(1, TROUBLE)
    await to_cancelled(store, 2)
    await to_finished(store, 3, images=2)
    await store.record_output(3, saved((await store.row(3)).outputs[0], "images/3_0.png"))
    await store.record_lost(3, Failure("download failed", "404"))
    await to_finished(store, 4)
    await store.record_lost(4, Failure("images gone", "deleted"))
    await to_done(store, 5)
    await to_submitting(store, 6)
    states = [State.FAILED, State.CANCELLED]
    assert await store.requeue(states=states) == Requeued(submit=2, save=1, lost=1)
    found = [(await store.row(seq)).state for seq in range(1, 7)]
    assert found == [
        State.PLANNED,
        State.PLANNED,
        State.FINISHED,
        State.FAILED,
        State.DONE,
        State.SUBMITTING,
    ]
    # what was saved stays saved, and nothing is claimed
    (row,) = await claimed(store, State.FINISHED)
    assert [output.path for output in row.outputs] == ["images/3_0.png", None]
    assert await store.requeue(states=states, regenerate_lost=True) == Requeued(submit=1)
    assert [row.seq for row in await claimed(store, State.PLANNED)] == [1, 2, 4]
    assert await store.counts() == recount(path)
    store.close()


async def test_retry_can_be_told_the_rows_by_id_or_by_file_name(path: Path) -> None:
    rows = [staged(1, id="a"), staged(2, id="b/c"), staged(3)]
    store = await planned(path, rows)
    for row in await claimed(store):
        await store.record_rejected(row.seq, TROUBLE)
    assert await store.requeue(states=[State.FAILED], ids=["b/c"]) == Requeued(submit=1)
    assert (await store.row(2)).state is State.PLANNED
    name = (await store.row(3)).name
    assert await store.requeue(states=[State.FAILED], ids=[name, "nobody"]) == Requeued(submit=1)
    assert await store.requeue(states=[State.FAILED], ids=["nobody"]) == Requeued()
    assert await store.requeue(states=[]) == Requeued()
    store.close()


async def test_a_row_asked_for_anew_has_fresh_attempts_and_keeps_its_history(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    row = await to_in_flight(store, 1, "first")
    await store.record_attempt_failed(1, Task("first"), TROUBLE, at=1.0, event=Event.GAVE_UP)
    await store.requeue(states=[State.FAILED])
    (row,) = await claimed(store)
    assert (row.attempts, row.attempt, row.generation) == (0, None, 1)
    row = await to_in_flight(store, 1, "second")
    assert row.attempt is not None
    assert row.attempt.number == 1
    await save_all(store, await store.record_finished(1, ended(row), at=1.0))
    (record,) = await store.settled_after(0, limit=1)
    assert [attempt.task_id for attempt in record.attempts] == ["first", "second"]
    store.close()


async def test_images_of_a_rerun_replace_the_old_ones_when_all_are_there(path: Path) -> None:
    store = await planned(path, [staged(1, "a cat", id="x", images=2)])
    await claimed(store)
    old = await to_done(store, 1, images=2)
    await store.planning(
        lambda connection: merge(connection, [staged(1, "a dog", id="x", images=2)], rerun_changed=True)
    )
    await claimed(store)
    row = await to_in_flight(store, 1, "new")
    row = await store.record_finished(1, ended(row, images=2), at=1.0)
    older = await store.older_outputs(1)
    assert [(generation, output.path) for generation, output in older] == [
        (0, output.path) for output in old.outputs
    ]
    for output in row.outputs:
        await store.record_output(1, saved(output, f"images/000/x_{output.index}.png"), held=True)
    assert await store.older_outputs(1) == older  # held ones do not count yet
    moved = {output.path or "": f"superseded/0/{output.index}.png" for output in old.outputs}
    row = await store.record_saved(1, superseded=moved)
    assert [output.path for output in row.outputs] == ["images/000/x_0.png", "images/000/x_1.png"]
    assert await store.older_outputs(1) == []
    assert await store.counts() == recount(path)
    assert (await store.counts()).images == 2
    store.close()


# --- what is told ---------------------------------------------------------------------------------------


async def test_failures_are_grouped_by_cause_and_by_message_while_there_are_few_the_largest_first(
    path: Path,
) -> None:
    store = await planned(path, 12)
    await claimed(store)
    for seq, message in ((2, "too wide"), (5, "too dark"), (7, "too wide")):
        await store.record_rejected(seq, Failure("rejected", message))
    await store.record_rejected(9, Failure("task failed", "boom"))
    await to_cancelled(store, 10)
    assert await store.failures() == [
        (State.FAILED, Failure("rejected", "too wide"), 2, 2),
        (State.CANCELLED, Failure("cancelled", "cancelled by the user"), 1, 10),
        (State.FAILED, Failure("rejected", "too dark"), 1, 5),
        (State.FAILED, Failure("task failed", "boom"), 1, 9),
    ]
    for seq in (3, 1):  # with more messages, that of the first row, and a word that there are others
        await store.record_rejected(seq, Failure("rejected", f"row {seq}"))
    told = "row 1; and other errors; see results.jsonl"
    assert (await store.failures())[0] == (State.FAILED, Failure("rejected", told), 5, 1)
    assert len(await store.failures(limit=2)) == 2
    reader = connect(path, read_only=True)
    assert read_failures(reader, 20) == await store.failures()
    assert read_counts(reader) == await store.counts()
    with pytest.raises(sqlite3.OperationalError):
        reader.execute("DELETE FROM rows")
    reader.close()
    store.close()


async def test_rows_that_did_not_make_it_are_given_back_as_the_manifest_had_them(path: Path) -> None:
    store = await planned(path, [*(staged(n) for n in range(1, 5)), staged(5, "?", message="wrong")])
    await claimed(store)
    await store.record_rejected(3, TROUBLE)
    await to_cancelled(store, 1)
    await to_done(store, 2)
    first = await store.rejected_rows(after_seq=0, limit=2)
    assert [(row.seq, row.cells) for row in first] == [
        (1, {"prompt": "picture 1"}),
        (3, {"prompt": "picture 3"}),
    ]
    assert [row.seq for row in await store.rejected_rows(after_seq=3, limit=2)] == [5]
    await to_submitting(store, 4)
    await store.record_accepted(4, Accepted("1004", "t"), at=11.0)
    row = await store.row(4)
    await store.record_finished(4, ended(row), at=12.0)
    await store.record_lost(4, Failure("images gone", "HTTP 410"))
    paid_for = await store.rejected_rows(after_seq=3, limit=2)
    assert [row.seq for row in paid_for] == [5], "to run it from a file would buy it again"
    store.close()


async def test_a_new_state_answers_every_question(path: Path) -> None:
    store = await begin(Store.open(path))
    assert await store.manifest() is None
    assert await store.stamp() is None
    assert await store.job() is None
    assert await store.account_limit() is None
    assert await store.stop_order() is None
    assert await store.form() == {}
    assert await store.listing_mark() == {}
    assert not await store.has_work()
    counts = await store.counts()
    assert (counts.total, counts.images, counts.cost_usd) == (0, 0, Decimal(0))
    assert await claimed(store) == []
    assert await store.failures() == []
    assert await store.last_seq_of(1) is None
    assert await store.tool_numbers() == []
    store.close()


async def test_facts_of_the_run_are_kept(path: Path) -> None:
    store = await planned(path, 1)
    await store.adopt_limit(5)
    await store.remember_job(manifest="/moved.csv", job='{"attempts": 2}', stamp="other")
    await store.record_upload("ab", "https://cdn/ab", at=1.0)
    await store.record_upload("ab", "https://cdn/newer", at=2.0)
    store.close()
    store = Store.open(path)
    assert await store.account_limit() == 5
    assert (await store.manifest(), await store.job()) == ("/moved.csv", '{"attempts": 2}')
    assert await store.upload_url("ab") == "https://cdn/newer"
    assert await store.upload_url("cd") is None
    assert await store.tool_numbers() == [1]
    assert "/Run/wiro/any" in await store.tool(1)
    with pytest.raises(KeyError):
        await store.tool(2)
    store.close()
