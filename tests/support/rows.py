"""Rows in a state file, made as a reading of a manifest makes them, and moved along their way."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterable
from dataclasses import replace
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path

from batchrun.model import Accepted, Counts, Failure, Output, RemoteOutput, Row, State, Task
from batchrun.rules.states import Event
from batchrun.store.connection import connect
from batchrun.store.planning import Merged, Planning
from batchrun.store.row_verbs import Intent
from batchrun.store.staged import Staged
from batchrun.store.store import Store

TOOL = '{"slug": "any", "run_path": "/Run/wiro/any"}'
IMAGE_BYTES = 1000


def staged(
    line: int,
    prompt: str = "",
    *,
    id: str | None = None,
    own: str | None = None,
    images: int = 1,
    message: str | None = None,
    extra: str = "{}",
) -> Staged:
    """A staged row that asks for `prompt`; `own`: what it gives without --set, the same if not told."""
    prompt = prompt or f"picture {line}"
    return Staged(
        line=line,
        id=id,
        content=_hash(prompt),
        own=_hash(own if own is not None else prompt),
        tool=None if message else 1,
        given="{}" if message else f'{{"prompt":"{prompt}"}}',
        extra=extra,
        images=0 if message else images,
        cells=f'{{"prompt": "{prompt}"}}',
        message=message,
    )


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=12).digest()


def merge(
    connection: sqlite3.Connection, rows: Iterable[Staged], *, rerun_changed: bool = False, stamp: str = "s"
) -> Merged:
    """Read these rows into the state."""
    planning = Planning(connection)
    number = planning.tool(TOOL)
    for row in rows:
        planning.stage(row._replace(tool=number) if row.tool else row)
    assert not list(planning.duplicates())
    return planning.merge(
        manifest="/list.csv", job="{}", at=1.0, stamp=stamp, form="{}", rerun_changed=rerun_changed
    )


async def begin(store: Store) -> Store:
    """Take the run for this process."""
    await store.begin_lease(token=secrets.token_hex(8), host="here", pid=1, at=1.0)
    return store


async def planned(path: Path, rows: int | Iterable[Staged]) -> Store:
    """A store with these planned rows, or so many, and a lease."""
    store = await begin(Store.open(path))
    chosen = [staged(line) for line in range(1, rows + 1)] if isinstance(rows, int) else rows
    await store.planning(lambda connection: merge(connection, chosen))
    return store


async def claimed(store: Store, state: State = State.PLANNED, limit: int = 1000) -> list[Row]:
    return await store.claim(state, limit=limit)


async def to_submitting(store: Store, seq: int, *, reserved: str = "0") -> Row:
    return await store.record_intent(Intent(seq, 10.0, 9.0, 5, Decimal(reserved)))


async def to_in_flight(store: Store, seq: int, task: str | None = None, *, reserved: str = "0") -> Row:
    row = await to_submitting(store, seq, reserved=reserved)
    task = task or f"{1000 + seq}" + f"{row.generation:03}" * (row.generation > 0)
    return await store.record_accepted(seq, Accepted(task, "secret"), at=11.0)


def _task_of(row: Row) -> str:
    assert row.attempt is not None
    return row.attempt.task_id or ""


def ended(row: Row, *, cost: str | None = "0.01", images: int = 1) -> Task:
    """The row's task as a success."""
    return Task(
        _task_of(row),
        status="task_postprocess_end",
        pexit="0",
        cost_usd=None if cost is None else Decimal(cost),
        elapsed_s=Decimal("1.5"),
        outputs=tuple(
            RemoteOutput(f"{n}.png", f"https://cdn/{row.seq}/{n}.png", "image/png", IMAGE_BYTES)
            for n in range(images)
        ),
    )


async def to_cancelled(store: Store, seq: int) -> Row:
    row = await to_in_flight(store, seq)
    task = Task(_task_of(row), status="task_cancel")
    failure = Failure("cancelled", "cancelled by the user")
    return await store.record_attempt_failed(seq, task, failure, at=12.0, event=Event.CANCELLED)


async def to_finished(store: Store, seq: int, *, cost: str | None = "0.01", images: int = 1) -> Row:
    row = await to_in_flight(store, seq)
    return await store.record_finished(seq, ended(row, cost=cost, images=images), at=12.0)


def saved(output: Output, path: str) -> Output:
    """The output as it lies on disk."""
    return replace(
        output,
        path=path,
        sha256="ab" * 32,
        size_bytes=IMAGE_BYTES,
        media_type="image/png",
        width_px=8,
        height_px=8,
    )


async def to_done(store: Store, seq: int, *, cost: str | None = "0.01", images: int = 1) -> Row:
    row = await to_finished(store, seq, cost=cost, images=images)
    return await save_all(store, row)


async def save_all(store: Store, row: Row) -> Row:
    for output in row.outputs:
        if output.path is None:
            path = f"images/000/{row.name}_{output.index}-g{row.generation}.png"
            await store.record_output(row.seq, saved(output, path))
    return await store.record_saved(row.seq)


def recount(path: Path) -> Counts:
    """What the running counts ought to be, counted from the rows."""
    connection = connect(path, read_only=True)
    try:
        by_state = dict(
            connection.execute("SELECT state, count(*) FROM rows WHERE present = 1 GROUP BY state").fetchall()
        )
        images, size_bytes = connection.execute(
            "SELECT count(*), coalesce(sum(size_bytes), 0) FROM outputs JOIN rows ON rows.seq = outputs.row "
            "WHERE outputs.generation = rows.generation AND rows.state = 'done' AND present = 1"
        ).fetchone()
        costs = connection.execute("SELECT cost_usd FROM attempts WHERE cost_usd IS NOT NULL").fetchall()
        spent = sum((Decimal(cost) for (cost,) in costs), Decimal(0))
        return Counts({State(state): rows for state, rows in by_state.items()}, images, size_bytes, spent)
    finally:
        connection.close()


def reserved_usd(path: Path) -> tuple[Decimal, Decimal]:
    """What the run's record says is reserved, and what the open attempts reserve."""
    connection = connect(path, read_only=True)
    try:
        told = connection.execute("SELECT reserved_usd FROM run").fetchone()[0]
        open_ones = connection.execute("SELECT reserved_usd FROM attempts WHERE open = 1").fetchall()
        return Decimal(told), sum((Decimal(amount) for (amount,) in open_ones), Decimal(0))
    finally:
        connection.close()
