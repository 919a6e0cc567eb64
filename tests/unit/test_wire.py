"""Answers of every form the service is known for are read; what is not understood says so."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from batchrun.errors import (
    BalanceExhausted,
    CredentialsRefused,
    LimitReached,
    NotFound,
    ProtocolError,
    RateLimited,
    RequestRejected,
    ServerFault,
    ServiceError,
)
from batchrun.model import Accepted, RemoteOutput
from batchrun.wiro import wire

LIMIT_MESSAGE = (
    "You have reached the concurrent task limit. With your current balance of $50.00, you can run up to 5 "
    "tasks at the same time. Add balance to run more."
)


def encoded(data: object) -> bytes:
    return json.dumps(data).encode()


def refusal(data: object, status: int = 200) -> ServiceError:
    """The error a Run answered so ends in; reads (Detail and the like) must agree with it."""
    with pytest.raises(ServiceError) as submit:
        wire.read_accepted(status, encoded(data), retry_after_s=7.0)
    with pytest.raises(ServiceError) as read:
        wire.read_answer(status, encoded(data), retry_after_s=7.0)
    assert type(read.value) is type(submit.value)
    return submit.value


# --- Run ---


@pytest.mark.parametrize("task_id", ["2221", 2221, 2221.0, " 2221 ", "002221"])
@pytest.mark.parametrize("said", [{"result": True}, {"result": "true"}, {"result": 1}, {}])
def test_an_accepted_run_gives_its_task_whatever_the_types(task_id: object, said: dict[str, Any]) -> None:
    body = encoded({**said, "errors": [], "taskid": task_id, "socketaccesstoken": "tok"})
    assert wire.read_accepted(200, body) == Accepted("2221", "tok")


def test_a_task_id_counts_even_under_an_error_status() -> None:
    """A proxy may turn the status into 502; the id is proof enough, and losing it would lose money."""
    assert wire.read_accepted(502, encoded({"result": True, "taskid": "5"})) == Accepted("5", "")


@pytest.mark.parametrize(
    "task_id", [None, "", "0", 0, True, "abc", -3, 1.5, [], {"id": "5"}, "9" * 40, "\uff15"]
)
def test_yes_without_a_usable_task_id_leaves_the_row_in_doubt(task_id: object) -> None:
    with pytest.raises(ProtocolError):
        wire.read_accepted(200, encoded({"result": True, "errors": [], "taskid": task_id}))


@pytest.mark.parametrize(
    "data", [{"result": False}, {"result": False, "errors": [{"code": 96, "message": "x"}]}]
)
def test_no_with_a_task_id_leaves_the_row_in_doubt(data: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        wire.read_accepted(200, encoded({**data, "taskid": "5"}))


def test_no_result_with_a_task_id_and_errors_leaves_the_row_in_doubt() -> None:
    with pytest.raises(ProtocolError):
        wire.read_accepted(200, encoded({"errors": ["odd"], "taskid": "5"}))


# --- refusals, in every form of `errors` ---


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (1, NotFound),
        (96, LimitReached),
        (97, BalanceExhausted),
        (98, CredentialsRefused),
        (99, CredentialsRefused),
    ],
)
@pytest.mark.parametrize("said", [{"result": False}, {}])
def test_each_code_has_its_error_as_number_and_as_text(
    code: int, expected: type[ServiceError], said: dict[str, Any]
) -> None:
    for written in (code, str(code), float(code), f" {code} "):
        for field in ("message", "msg"):
            error = refusal({**said, "errors": [{"code": written, field: "the words"}]})
            assert type(error) is expected
            assert "the words" in str(error)
    assert type(refusal({**said, "errors": {"code": code}})) is expected
    assert type(refusal({**said, "errors": [{"code": code, "message": None}]})) is expected


def test_an_envelope_with_a_known_code_counts_under_any_http_status() -> None:
    for status in (200, 400, 403, 404, 429, 500, 503):
        assert (
            type(refusal({"result": False, "errors": [{"code": 97, "message": "no money"}]}, status))
            is BalanceExhausted
        )


def test_the_worst_of_several_codes_counts() -> None:
    errors = [{"code": 0, "message": "x"}, {"code": 1, "message": "y"}, {"code": 98, "message": "z"}]
    assert type(refusal({"result": False, "errors": errors})) is CredentialsRefused


@pytest.mark.parametrize(
    "message",
    [
        "Request parameter [prompt] required",
        "Request parameter [steps] must be integer or float",
        "Request parameter [steps] must be between 1 and 100",
        "Request files [inputImage] required",
        "Request parameters are invalid.",
        "steps must be between 1 and 100",
    ],
)
def test_code_0_that_blames_the_parameters_rejects_the_request(message: str) -> None:
    for errors in ([{"code": 0, "message": message}], [{"code": "0", "msg": message}], [message], message):
        error = refusal({"result": False, "errors": errors})
        assert type(error) is RequestRejected
        assert str(error) == message


@pytest.mark.parametrize(
    "message",
    [
        "Internal trouble, please try again",
        "Could not reach the database",
        "Something went wrong while your request was handled.",
        "You must be patient",
        "",
    ],
)
def test_code_0_of_any_other_kind_is_a_fault_that_certainly_made_no_task(message: str) -> None:
    error = refusal({"result": False, "errors": [{"code": 0, "message": message}]})
    assert isinstance(error, ServerFault)
    assert not error.acted


def test_a_bare_no_is_a_fault_that_certainly_made_no_task() -> None:
    error = refusal({"result": False, "errors": []})
    assert isinstance(error, ServerFault)
    assert not error.acted


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (500, {"result": False, "errors": [{"code": 0, "message": "Request parameter [x] required"}]}),
        (524, {"result": False, "errors": []}),
        (408, {"result": False}),
        (502, {}),
        (404, {"result": True}),
        (200, {"message": "Endpoint request timed out"}),
    ],
)
def test_a_fault_that_something_in_between_may_have_made_leaves_open_whether_there_is_a_task(
    status: int, data: object
) -> None:
    error = refusal(data, status)
    assert isinstance(error, ServerFault)
    assert error.acted


def test_an_empty_object_neither_accepts_nor_refuses() -> None:
    with pytest.raises(ProtocolError):
        wire.read_accepted(200, b"{}")


def test_a_redirect_is_not_understood() -> None:
    assert type(refusal({"result": False}, 302)) is ProtocolError
    with pytest.raises(ProtocolError):
        wire.read_accepted(307, b"")


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b'{"result": false}', b"[]"])
def test_401_refuses_the_credentials_and_429_asks_to_wait_whatever_the_body(body: bytes) -> None:
    with pytest.raises(CredentialsRefused):
        wire.read_accepted(401, body)
    with pytest.raises(RateLimited) as caught:
        wire.read_accepted(429, body, retry_after_s=3.0)
    assert caught.value.retry_after_s == 3.0


@pytest.mark.parametrize("status", [200, 403, 404, 500, 502, 520, 524])
def test_a_web_page_is_a_server_fault(status: int) -> None:
    page = b"\n <!DOCTYPE html><html>" + b"Just a moment... " * 1000
    with pytest.raises(ServerFault, match="web page") as caught:
        wire.read_accepted(status, page, retry_after_s=5.0)
    assert caught.value.acted
    assert caught.value.retry_after_s == 5.0
    assert len(caught.value.detail) <= wire.SNIPPET_CHARS


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"result": true, "task',
        b"[]",
        b"null",
        b"5",
        b'"x"',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"9" * 5000,
    ],
)
def test_what_is_not_an_object_is_a_protocol_error_with_its_beginning_kept(body: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        wire.read_answer(200, body)
    assert len(caught.value.detail) <= wire.SNIPPET_CHARS


def test_deep_nesting_inside_an_object_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        wire.read_answer(200, b'{"result": true, "x": ' + b'{"y":' * 100_000 + b"1" + b"}" * 100_001)


# --- the limit in a code-96 message ---


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (LIMIT_MESSAGE, 5),
        ("x" * 1000 + LIMIT_MESSAGE, 5),  # the number counts even where nobody would read that far
        ("you can run up to 1 task at the same time", 1),
        ("you can run up to 12 concurrent tasks", 12),
        ("only 3 tasks at once, please", 3),
        ("Concurrent task limit reached. Your balance is $50.00.", None),
        ("you can run up to 0 tasks at the same time", None),
        ("", None),
    ],
)
def test_the_limit_is_the_number_of_tasks_in_the_message(message: str, expected: int | None) -> None:
    error = refusal({"result": False, "errors": [{"code": 96, "message": message}]})
    assert isinstance(error, LimitReached)
    assert error.limit == expected
    assert len(str(error)) < 400


def test_a_limit_message_without_any_code_is_known_by_its_words() -> None:
    assert isinstance(refusal({"errors": [LIMIT_MESSAGE]}), LimitReached)
    assert isinstance(refusal({"result": False, "errors": LIMIT_MESSAGE}), LimitReached)


# --- tasks ---

SEED_TASK = {
    "id": "2221",
    "socketaccesstoken": "eDcCm5yyUfIvMFspTwww49OUfgXkQt",
    "parameters": {"prompt": "a", "scale": "7.5"},
    "debugerror": "",
    "starttime": "1734513809",
    "endtime": "1734513813",
    "elapsedseconds": "6.0000",
    "status": "task_postprocess_end",
    "totalcost": "0.003510000000",
    "modelid": "598",
    "createtime": "1734513807",
    "canceltime": "0",
    "pexit": "0",
    "outputs": [
        {
            "name": "0.png",
            "contenttype": "image/png",
            "size": "202472",
            "url": "https://cdn1.wiro.ai/6a6a/0.png",
        }
    ],
}


def test_the_task_of_the_tools_pages_is_read_whole() -> None:
    [task] = wire.read_tasks(
        wire.read_answer(200, encoded({"result": True, "tasklist": [SEED_TASK]})), whole=True
    )
    assert task.id == "2221"
    assert task.token == "eDcCm5yyUfIvMFspTwww49OUfgXkQt"
    assert (task.status, task.pexit, task.model_id) == ("task_postprocess_end", "0", "598")
    assert task.cost_usd == Decimal("0.00351")
    assert str(task.cost_usd) == "0.003510000000"
    assert (task.created_at, task.started_at, task.ended_at) == (1734513807, 1734513809, 1734513813)
    assert task.elapsed_s == Decimal(6)
    assert task.parameters == {"prompt": "a", "scale": "7.5"}
    assert task.outputs == (RemoteOutput("0.png", "https://cdn1.wiro.ai/6a6a/0.png", "image/png", 202472),)


def test_neighbouring_types_read_the_same() -> None:
    odd = {
        **SEED_TASK,
        "id": 2221,
        "parameters": '{"prompt": "a", "scale": "7.5"}',
        "starttime": 1734513809,
        "endtime": 1734513813.0,
        "elapsedseconds": 6.0,
        "totalcost": 0.00351,
        "modelid": 598,
        "createtime": 1734513807,
        "pexit": 0,
        "outputs": json.dumps(SEED_TASK["outputs"]),
    }
    [task] = wire.read_tasks(wire.read_answer(200, encoded({"result": True, "tasklist": [odd]})), whole=True)
    assert task == wire.read_task(odd) == wire.read_task(SEED_TASK)


@pytest.mark.parametrize(
    ("pexit", "expected"),
    [("0", "0"), (0, "0"), ("", None), (None, None), ("1", "1"), (137, "137"), ([], None)],
)
def test_pexit_is_text_or_nothing(pexit: object, expected: str | None) -> None:
    assert wire.read_task({"id": 1, "pexit": pexit}).pexit == expected


@pytest.mark.parametrize("parameters", [None, {}, [], "", "{}", "[]", "{broken", 5, "[" * 100_000])
def test_parameters_that_are_not_echoed_are_none(parameters: object) -> None:
    assert wire.read_task({"id": 1, "parameters": parameters}).parameters is None


def test_times_of_zero_are_unset_and_costs_unknown_are_none() -> None:
    task = wire.read_task(
        {"id": 1, "starttime": "0", "endtime": 0, "totalcost": "NaN", "elapsedseconds": "-1"}
    )
    assert (task.started_at, task.ended_at, task.cost_usd, task.elapsed_s) == (None, None, None, None)


def test_a_raw_output_has_no_address_and_keeps_its_place() -> None:
    outputs = wire.read_outputs(
        [
            {"contenttype": "raw", "url": "x"},
            None,
            5,
            {},
            {"name": "1.png", "url": "https://c/1.png", "size": "big"},
        ]
    )
    assert [(output.name, output.url, output.size_bytes) for output in outputs] == [
        ("", None, None),
        ("1.png", "https://c/1.png", None),
    ]


def test_an_output_may_be_a_bare_address_or_the_only_object() -> None:
    assert wire.read_outputs(["https://c/0.png"])[0].url == "https://c/0.png"
    assert wire.read_outputs({"url": "https://c/0.png"})[0].url == "https://c/0.png"


def test_half_a_surrogate_pair_never_reaches_the_database() -> None:
    body = b'{"result": true, "tasklist": [{"id": "1", "debugerror": "\\ud800 x", "status": "\\udfff"}]}'
    [task] = wire.read_tasks(wire.read_answer(200, body), whole=True)
    assert task.debug_error.encode() == b"? x"


def test_megabytes_in_a_field_are_cut() -> None:
    task = wire.read_task({"id": 1, "status": "x" * 10**7, "debugerror": "y" * 10**7 + "ValueError: the end"})
    assert len(task.status) <= wire.MAX_TEXT_CHARS
    assert len(task.debug_error) == wire.MAX_DEBUG_CHARS
    assert task.debug_error.endswith("ValueError: the end")


@pytest.mark.parametrize("tasklist", [None, "", 5, True, "x{"])
def test_a_listing_without_a_list_never_passes_for_an_empty_account(tasklist: object) -> None:
    with pytest.raises(ProtocolError):
        wire.read_tasks({"result": True, "tasklist": tasklist}, whole=True)


@pytest.mark.parametrize("entry", [None, 5, "x", [], {}, {"id": "0"}, {"id": "abc"}, {"status": "task_end"}])
def test_an_entry_that_is_no_task_spoils_the_listing(entry: object) -> None:
    """It could be the task looked for: leaving it out would be taken for proof that the task is absent."""
    with pytest.raises(ProtocolError):
        wire.read_tasks({"tasklist": [SEED_TASK, entry]}, whole=True)


def test_an_empty_list_is_an_empty_list() -> None:
    assert wire.read_tasks({"tasklist": []}, whole=True) == []
    assert wire.read_tasks({}, whole=False) == []


# --- uploads, tools, headers ---


@pytest.mark.parametrize(
    "data",
    [
        {"list": [{"url": "https://a/f.png"}]},
        {"list": {"url": "https://a/f.png"}},
        {"files": [{"url": "https://a/f.png"}]},
        {"files": ["https://a/f.png"]},
        {"file": {"url": "https://a/f.png"}},
        {"data": '[{"url": "https://a/f.png"}]'},
        {"url": "https://a/f.png"},
        {"list": [], "url": "https://a/f.png"},
    ],
)
def test_the_address_of_an_upload_is_found_wherever_it_is(data: dict[str, Any]) -> None:
    assert wire.read_upload(data) == "https://a/f.png"


@pytest.mark.parametrize("data", [{}, {"list": []}, {"list": [{"url": "javascript:x"}]}, {"url": 5}])
def test_an_upload_without_an_address_is_a_protocol_error(data: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        wire.read_upload(data)


def test_prices_come_out_of_json_text_exact() -> None:
    prices = [
        {"inputs": {}, "price": 0.1, "priceMethod": "cpo"},
        {
            "inputs": {"samples": 4, "n": "QUANTITY:3"},
            "price": "0.35",
            "priceMethod": "cp-pixel",
            "priceExtra": 0.01,
        },
    ]
    facts = wire.read_tool(
        {"tool": [{"dynamicprice": json.dumps(prices), "approximatelycost": "0.0035", "cps": ""}]}
    )
    assert facts.prices == (
        wire.Price({}, Decimal("0.1"), "cpo"),
        wire.Price({"samples": "4", "n": "QUANTITY:3"}, Decimal("0.35"), "cp-pixel", Decimal("0.01")),
    )
    assert (facts.approximate_cost_usd, facts.cps_usd) == (Decimal("0.0035"), None)


@pytest.mark.parametrize(
    "prices", ["", None, "[{]", 5, [{"inputs": {}, "price": "?"}, {"inputs": {}, "price": "1"}]]
)
def test_a_price_list_that_cannot_be_read_whole_is_unknown(prices: object) -> None:
    assert wire.read_tool({"tool": {"dynamicprice": prices}}).prices == ()


def test_a_tool_that_is_missing_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        wire.read_tool({"tool": []})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("120", 120.0),
        (" 1.5 ", 1.5),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2015 07:00:00 GMT", 0.0),  # already over
        ("soon", None),
        ("-5", None),
        ("9" * 50, None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, expected: float | None) -> None:
    now = wire.http_date("Wed, 21 Oct 2015 07:28:00 GMT")
    assert now == 1445412480.0
    assert wire.retry_after_s(value, now=now) == expected


@pytest.mark.parametrize(
    "text", ["", "soon", "Wed, 32 Oct 2015 07:28:00 GMT", "Thu, 01 Jan 99999999999 00:00:00 GMT"]
)
def test_what_is_no_date_is_none(text: str) -> None:
    assert wire.http_date(text) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("bytes 5-9/10", (5, 9, 10)),
        ("bytes 5-9/*", (5, 9, None)),
        ("bytes 9-9/10", (9, 9, 10)),  # the last byte
        ("bytes 5-10/10", None),
        ("bytes 9-5/10", None),
        ("bytes */10", None),
        (None, None),
    ],
)
def test_content_range_is_read_or_refused(
    value: str | None, expected: tuple[int, int, int | None] | None
) -> None:
    assert wire.content_range(value) == expected


def test_a_snippet_is_one_short_line_without_control_sequences() -> None:
    assert wire.snippet("a\x1b[31mb\n\n c\u202e\ud800d\0") == "a [31mb c d"
    assert len(wire.snippet("x" * 10**6)) == wire.SNIPPET_CHARS
    assert wire.snippet(b"\xffabc") == "\ufffdabc"


# --- answers out of all proportion ---


@pytest.mark.parametrize(
    "fields",
    [
        {"parameters": json.loads("[" * 65 + "]" * 65)},
        {"parameters": json.loads('{"a":' * 900 + "1" + "}" * 900)},
        {"x": [0] * 600_000},
        {"x": [{}] * 600_000},
        {"tasklist": [{"id": 1}] * 1001},
    ],
    ids=["deep list", "deep object", "values", "objects", "tasks"],
)
def test_an_answer_out_of_all_proportion_is_refused_as_a_whole(fields: dict[str, Any]) -> None:
    """What walks a value later (a comparison, an encoder) ends at Python's depth of calls, the machine at its
    memory."""
    with pytest.raises(ProtocolError):
        wire.read_tasks(
            wire.read_answer(200, encoded({"result": True, "tasklist": [], **fields})), whole=True
        )


def test_what_is_deep_inside_a_text_is_no_parameter_list() -> None:
    task = wire.read_task({"id": 1, "parameters": '{"a":' * 900 + "1" + "}" * 900})
    assert task.parameters is None


def test_sixty_levels_and_a_thousand_tasks_are_read() -> None:
    deep = json.loads("[" * 60 + "]" * 60)
    answer = {"result": True, "tasklist": [{"id": n, "parameters": {"a": deep}} for n in range(1, 1001)]}
    assert len(wire.read_tasks(wire.read_answer(200, encoded(answer)), whole=True)) == 1000


def test_a_tasks_token_is_in_no_words_about_it() -> None:
    token = "eDcCm5yyUfIvMFspTwww49OUfgXkQt"
    task = wire.read_task(
        {"id": 1, "socketaccesstoken": token, "debugerror": f"{token}: no such file {token}"}
    )
    assert task.debug_error == "***: no such file ***"
    assert token not in wire.snippet(
        encoded({"result": True, "socketaccesstoken": token, "tasktoken": token})
    )
    assert token not in wire.snippet(f"bad tasktoken={token} socketAccessToken: {token}")
    assert wire.snippet("the token is wrong; 77 tokens used") == "the token is wrong; 77 tokens used"
