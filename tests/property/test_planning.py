"""However a manifest changes from start to start, what was bought is known again and never bought twice."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.store.migrations import migrate
from batchrun.store.reading import read_counts
from batchrun.store.staged import Staged
from tests.support.rows import merge, staged

PROMPTS = st.sampled_from(["cat", "dog", "fox"])
#: Rows of a manifest without ids: many are identical.
LISTS = st.lists(PROMPTS, min_size=1, max_size=8)


@contextmanager
def state() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        migrate(connection)
        yield connection
    finally:
        connection.close()


def buy(connection: sqlite3.Connection, rng: Random) -> None:
    """Some of the manifest's planned rows are bought."""
    for (seq,) in connection.execute(
        "SELECT seq FROM rows WHERE state = 'planned' AND present = 1 ORDER BY seq"
    ).fetchall():
        if rng.random() < 0.6:
            connection.execute("UPDATE rows SET state = 'done' WHERE seq = ?", (seq,))


def present(connection: sqlite3.Connection) -> list[tuple[int, str, str, int, str]]:
    """(line, key, state, generation, given) of the manifest's rows, by line."""
    return connection.execute(
        "SELECT line, key, state, generation, given FROM rows WHERE present = 1 ORDER BY line"
    ).fetchall()


@settings(deadline=None)
@given(manifests=st.lists(LISTS, min_size=1, max_size=6), seed=st.integers(0, 999))
def test_of_identical_rows_as_many_are_done_as_were_bought(manifests: list[list[str]], seed: int) -> None:
    rng = Random(seed)
    bought: Counter[tuple[str, int]] = Counter()
    known: set[tuple[str, int]] = set()
    with state() as connection:
        for manifest in manifests:
            merged = merge(connection, [staged(line, prompt) for line, prompt in enumerate(manifest, 2)])
            asked = {(prompt, n) for prompt, many in Counter(manifest).items() for n in range(1, many + 1)}
            rows = present(connection)
            assert merged.rows == len(rows) == len(manifest)
            assert merged.new == len(asked - known)
            assert (merged.changed, merged.replaced, merged.rerun) == (0, 0, 0)
            assert merged.identical == len(manifest) - len(set(manifest))
            known |= asked
            # each line stands for a row that asks for its prompt
            assert [given for *_, given in rows] == [f'{{"prompt":"{prompt}"}}' for prompt in manifest]
            done = sum(state == "done" for _, _, state, _, _ in rows)
            assert done == sum(1 for one in asked if bought[one])
            buy(connection, rng)
            for key, given_ in connection.execute("SELECT key, given FROM rows WHERE state = 'done'"):
                bought[given_.split('"')[3], int(key.rpartition(".")[2])] = 1
            # nothing bought is ever lost or bought again
            generations = connection.execute("SELECT max(generation) FROM rows").fetchone()[0]
            assert generations == 0
            done_rows = connection.execute("SELECT count(*) FROM rows WHERE state = 'done'").fetchone()[0]
            assert done_rows == sum(bought.values())


@settings(deadline=None)
@given(
    prompts=LISTS,
    starts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 999)), min_size=2, max_size=6),
)
def test_whatever_set_says_the_rows_are_the_same_and_bought_ones_stay(
    prompts: list[str], starts: list[tuple[int, int]]
) -> None:
    with state() as connection:
        bought: dict[int, str] = {}
        for number, (value, seed) in enumerate(starts):
            rng = Random(seed)
            manifest = rng.sample(prompts, len(prompts))  # sorted otherwise every time
            rows = [staged(line, f"{prompt} {value}", own=prompt) for line, prompt in enumerate(manifest, 2)]
            merged = merge(connection, rows)
            assert merged.new == (len(prompts) if number == 0 else 0)
            assert merged.gone == 0
            after = dict(connection.execute("SELECT seq, given FROM rows WHERE state = 'done'").fetchall())
            assert after == bought
            wanted = f" {value}"
            told = sum(not given_.endswith(f'{wanted}"}}') for given_ in bought.values())
            assert merged.changed == told
            # what is not bought asks for the present value
            for (given_,) in connection.execute("SELECT given FROM rows WHERE state = 'planned'"):
                assert given_.endswith(f'{wanted}"}}')
            buy(connection, rng)
            bought = dict(connection.execute("SELECT seq, given FROM rows WHERE state = 'done'").fetchall())


@settings(deadline=None)
@given(
    prompts=LISTS,
    starts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 999)), min_size=2, max_size=5),
)
def test_with_rerun_changed_every_row_asks_for_what_the_manifest_says(
    prompts: list[str], starts: list[tuple[int, int]]
) -> None:
    with state() as connection:
        for value, seed in starts:
            rng = Random(seed)
            manifest = rng.sample(prompts, len(prompts))
            rows = [staged(line, f"{prompt} {value}", own=prompt) for line, prompt in enumerate(manifest, 2)]
            merged = merge(connection, rows, rerun_changed=True)
            assert merged.changed == 0
            assert [given_ for *_, given_ in present(connection)] == [row.given for row in rows]
            # and once bought it is not bought again
            buy(connection, rng)
            done = connection.execute("SELECT count(*) FROM rows WHERE state = 'done'").fetchone()[0]
            assert merge(connection, rows, rerun_changed=True).rerun == 0
            assert connection.execute("SELECT count(*) FROM rows WHERE state = 'done'").fetchone()[0] == done


#: Whatever an id may hold: JSON's texts without halves of pairs and NUL, stripped.
ID_TEXTS = (
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
    | st.sampled_from(["a", "A", "á", "CON", "con", "a/b", "a:b", "..", "x" * 300, "X" * 300])
    | st.from_regex(r"[aA]-[0-9a-f]{12}", fullmatch=True)
).map(str.strip)


@settings(deadline=None, max_examples=60)
@given(
    manifests=st.lists(st.lists(ID_TEXTS.map(lambda id_: id_ or None), min_size=1, max_size=12), max_size=3)
)
def test_file_names_differ_on_every_file_system_and_stay(manifests: list[Sequence[str | None]]) -> None:
    names: dict[int, str] = {}
    with state() as connection:
        for manifest in manifests:
            seen: set[str] = set()
            rows: list[Staged] = []
            for line, id_ in enumerate(manifest, 2):
                if id_ not in seen:
                    rows.append(staged(line, id=id_))
                seen |= {id_} if id_ else set()
            merge(connection, rows)
            stored = dict(connection.execute("SELECT seq, name FROM rows").fetchall())
            assert len({name.casefold() for name in stored.values()}) == len(stored)
            assert stored.items() >= names.items()
            names = stored
            keys = [key for _, key, *_ in present(connection)]
            assert [key for row, key in zip(rows, keys) if row.id] == [
                f"id:{row.id}" for row in rows if row.id
            ]


@settings(deadline=None, max_examples=60)
@given(
    manifests=st.lists(
        st.lists(st.tuples(PROMPTS, st.booleans()), min_size=1, max_size=6), min_size=1, max_size=5
    ),
    ids=st.booleans(),
)
def test_counts_and_settled_numbers_are_right_after_any_readings(
    manifests: list[list[tuple[str, bool]]], ids: bool
) -> None:
    with state() as connection:
        for manifest in manifests:
            merge(
                connection,
                [
                    staged(
                        line, prompt, id=f"row {line}" if ids else None, message="wrong" if wrong else None
                    )
                    for line, (prompt, wrong) in enumerate(manifest, 2)
                ],
            )
            counts = read_counts(connection).by_state
            assert counts == Counter(state for _, _, state, _, _ in present(connection))
            assert counts.get("invalid", 0) == sum(wrong for _, wrong in manifest)  # type: ignore[call-overload]
            settled = connection.execute("SELECT settled FROM rows WHERE state = 'invalid'").fetchall()
            assert len(set(settled)) == len(settled)
            assert all(number is not None for (number,) in settled)
            unsettled = connection.execute("SELECT settled FROM rows WHERE state = 'planned'").fetchall()
            assert all(number is None for (number,) in unsettled)
