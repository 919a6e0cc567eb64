"""Whatever the service sends, reading it ends in a record or in one of our service errors."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchrun.errors import ServiceError
from batchrun.model import Task
from batchrun.wiro import wire
from tests.support.hostile import ANSWERS, TASK, VALUES, changed, encoded, places

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("task_end") | st.just("0"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
#: Objects with the service's own field names, so that every reader meets every type.
FIELDS = [
    "result", "errors", "error", "code", "message", "msg", "taskid", "id",
    "tasklist", "status", "pexit", "outputs", "url", "name", "contenttype", "size",
    "totalcost", "createtime", "starttime", "endtime", "elapsedseconds", "parameters", "debugerror",
    "modelid",
    "socketaccesstoken", "tool", "dynamicprice", "inputs", "price", "priceExtra", "list",
]  # fmt: skip
objects = st.recursive(
    st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6),
    lambda inner: st.dictionaries(
        st.sampled_from(FIELDS),
        json_values | inner | st.lists(inner, max_size=3) | inner.map(json.dumps),
        max_size=6,
    ),
    max_leaves=5,
)
statuses = st.sampled_from([200, 201, 302, 400, 401, 403, 404, 408, 429, 500, 502, 524])


def storable(task: Task) -> None:
    """Every text of a task fits in a UTF-8 database, every number is finite, the id compares by size."""
    for text in (task.id, task.token, task.status, task.pexit or "", task.debug_error, task.model_id):
        text.encode()
    assert str(int(task.id)) == task.id
    assert task.cost_usd is None or (task.cost_usd.is_finite() and task.cost_usd >= 0)
    assert task.elapsed_s is None or task.elapsed_s.is_finite()
    for output in task.outputs:
        (output.name + (output.url or "") + output.content_type).encode()
        assert output.url != ""


@given(statuses, st.binary())
@example(200, b"[" * 50_000)
@example(200, b'{"a":' * 50_000)
@example(200, b"1" * 10_000)
@example(200, b'{"result": 1e999999999999}')
@example(200, b'{"result": true, "tasklist": [{"id": 1e30}]}')
def test_bytes_are_read_or_refused(status: int, body: bytes) -> None:
    with suppress(ServiceError):
        wire.read_answer(status, body)
    with suppress(ServiceError):
        wire.read_accepted(status, body)


@given(statuses, objects)
def test_an_answer_of_any_shape_is_read_or_refused(status: int, data: dict[str, Any]) -> None:
    body = json.dumps(data).encode()
    with suppress(ServiceError):
        accepted = wire.read_accepted(status, body)
        assert int(accepted.task_id) > 0
        accepted.token.encode()
    with suppress(ServiceError):
        answer = wire.read_answer(status, body)
        with suppress(ServiceError):
            for task in wire.read_tasks(answer, whole=True):
                storable(task)
        with suppress(ServiceError):
            assert wire.read_upload(answer).startswith("http")
        with suppress(ServiceError):
            for price in wire.read_tool(answer).prices:
                assert price.price_usd.is_finite()


@given(objects)
def test_a_task_of_any_shape_is_read_or_refused(fields: dict[str, Any]) -> None:
    with suppress(ServiceError):
        storable(wire.read_task({**fields, "id": 5}))


@given(statuses, objects)
def test_no_error_floods_a_terminal_or_carries_control_characters(status: int, data: dict[str, Any]) -> None:
    try:
        wire.read_accepted(status, json.dumps(data).encode())
    except ServiceError as error:
        for text in (str(error), error.detail):
            assert len(text) <= 400
            assert text.isprintable()


@given(st.text())
def test_header_readers_take_any_text(text: str) -> None:
    wait_s = wire.retry_after_s(text, now=0.0)
    assert wait_s is None or wait_s >= 0
    wire.content_range(text)
    assert wire.limit_of(text) != 0
    assert wire.snippet(text).isprintable()


@given(st.integers(min_value=1, max_value=10**6))
def test_the_documented_limit_message_gives_its_number(limit: int) -> None:
    if limit < 10**6:
        assert wire.limit_of(f"balance of $50.00, you can run up to {limit} tasks at the same time.") == limit


# --- real answers, changed field by field ---


@st.composite
def changed_answers(draw: st.DrawFn) -> bytes:
    """An answer of the service with one to three places changed."""
    answer = draw(st.sampled_from(list(ANSWERS.values())))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(places(answer))))
        answer = changed(answer, place, draw(st.sampled_from(VALUES) | json_values))
    return encoded(answer)


@given(statuses, changed_answers())
@settings(max_examples=200, deadline=None)
def test_a_real_answer_with_any_field_changed_is_read_or_refused(status: int, body: bytes) -> None:
    with suppress(ServiceError):
        accepted = wire.read_accepted(status, body)
        assert str(int(accepted.task_id)) == accepted.task_id
        accepted.token.encode()
    with suppress(ServiceError):
        answer = wire.read_answer(status, body)
        with suppress(ServiceError):
            for task in wire.read_tasks(answer, whole=True):
                storable(task)
        with suppress(ServiceError):
            assert wire.read_upload(answer).startswith("http")
        with suppress(ServiceError):
            for price in wire.read_tool(answer).prices:
                assert price.price_usd.is_finite()
                assert price.price_usd >= 0


#: Task field → the attribute that is read from it.
READ_FROM = {
    "parameters": "parameters", "debugerror": "debug_error", "starttime": "started_at", "endtime": "ended_at",
    "elapsedseconds": "elapsed_s", "status": "status", "totalcost": "cost_usd", "modelid": "model_id",
    "createtime": "created_at", "pexit": "pexit", "outputs": "outputs", "socketaccesstoken": "token",
}  # fmt: skip


@given(st.sampled_from(sorted(set(TASK) - {"id"})), st.sampled_from(VALUES) | json_values)
@settings(deadline=None)
def test_nonsense_in_one_field_of_a_task_costs_that_field_alone(name: str, value: Any) -> None:
    whole = wire.read_task(TASK)
    read = wire.read_task({**TASK, name: value})
    storable(read)
    differing = {each for each in Task.__dataclass_fields__ if getattr(read, each) != getattr(whole, each)}
    assert differing <= {READ_FROM.get(name)}


@given(st.sampled_from(VALUES) | json_values)
@settings(deadline=None)
def test_a_task_id_is_a_number_of_the_service_or_none(value: Any) -> None:
    """A forged one never comes near a path, an address or a database as anything but digits."""
    with suppress(ServiceError):
        assert wire.read_task({**TASK, "id": value}).id.isdecimal()
