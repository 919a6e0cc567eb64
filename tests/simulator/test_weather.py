"""Every fault of the API and of tasks does on the wire what its name says, and acts or not as it says."""

from __future__ import annotations

import asyncio
import json
from email.utils import parsedate_to_datetime

import aiohttp
import pytest

from batchrun.simulator.faults import FAULTS
from tests.simulator.wire import FOREVER_S, LORA, simulated

TRANSPORT = ("reset", "500", "html", "429", "broken-json")
POINTS = {
    "detail": "/Task/Detail",
    "list": "/Task/List",
    "stop": "/Task/Cancel",
    "tool": "/Tool/List",
}


@pytest.mark.parametrize(
    ("name", "made"),
    [("run-refused", 0), ("run-reset-before", 0), ("run-reset", 1), ("run-half", 1)],
)
async def test_a_submit_without_a_whole_answer_made_a_task_or_not_as_the_fault_says(name, made) -> None:
    async with simulated(f"{name}@1") as wire:
        with pytest.raises(aiohttp.ClientError):
            await wire.call(LORA.run_path, prompt="a cat")
        assert len(wire.sim.tasks) == made
        await wire.run()
        assert wire.sim.struck == {name: 1}
        assert len(wire.sim.needless) == made


@pytest.mark.parametrize(
    ("name", "status", "made"),
    [
        ("run-500", 500, 1),
        ("run-500-before", 500, 0),
        ("run-524", 524, 1),
        ("run-html", 502, 0),
        ("run-429", 429, 0),
        ("run-429-date", 429, 0),
        ("run-broken-json", 200, 1),
        ("run-no-id", 200, 1),
        ("run-401", 401, 0),
    ],
)
async def test_a_submit_answered_oddly_made_a_task_or_not_as_the_fault_says(name, status, made) -> None:
    async with simulated(name) as wire, wire.post(LORA.run_path, prompt="a cat") as response:
        assert response.status == status
        assert b"taskid" not in await response.read() or name == "run-broken-json"
        assert len(wire.sim.tasks) == made


async def test_half_a_json_is_no_json() -> None:
    async with simulated("run-broken-json") as wire, wire.post(LORA.run_path, prompt="a cat") as response:
        with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
            json.loads(await response.read())


async def test_a_stalled_submit_made_its_task_and_ends_when_the_client_leaves() -> None:
    async with simulated("run-stall") as wire:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wire.call(LORA.run_path, prompt="a cat"), 0.2)
        assert len(wire.sim.tasks) == 1


async def test_a_simulator_ends_though_answers_stall() -> None:
    async with simulated("run-stall", "detail-stall") as wire:
        stalled = asyncio.create_task(wire.call(LORA.run_path, prompt="a cat"))
        while not wire.sim.tasks:
            await asyncio.sleep(0)
    with pytest.raises((aiohttp.ClientError, asyncio.CancelledError)):
        await stalled


async def test_retry_after_comes_in_seconds_or_as_a_date() -> None:
    async with simulated("run-429@1", "run-429-date@2", retry_after_s=7) as wire:
        async with wire.post(LORA.run_path) as response:
            assert response.headers["Retry-After"] == "7"
        async with wire.post(LORA.run_path) as response:
            date = parsedate_to_datetime(response.headers["Date"])
            wait = parsedate_to_datetime(response.headers["Retry-After"]) - date
            assert 6 <= wait.total_seconds() <= 8


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("run-code0", 0, "An unexpected error"),
        ("run-validation", 0, "Request parameters are invalid."),
        ("run-notfound", 1, "There is no tool"),
        ("run-limit", 96, "up to 4 tasks"),
        ("run-limit-nonumber", 96, "You have reached the limit"),
        ("run-balance", 97, "Your balance is not sufficient"),
        ("run-98", 98, "key"),
        ("run-99", 99, "signature"),
    ],
)
async def test_refusals_by_fault_make_no_task(name, code, words) -> None:
    async with simulated(name, slots=4) as wire:
        given, message = await wire.refusal(LORA.run_path, prompt="a cat")
        assert given == code
        assert words in message
        assert not wire.sim.tasks


async def test_an_odd_envelope_has_no_result_a_code_as_text_and_msg() -> None:
    async with simulated("run-limit-odd", slots=4) as wire:
        envelope = await wire.call(LORA.run_path, prompt="a cat")
        (error,) = envelope["errors"]
        assert (error["code"], "result" in envelope, "message" in error) == ("96", False, False)
        assert "up to 4 tasks" in error["msg"]


@pytest.mark.parametrize("kind", TRANSPORT)
@pytest.mark.parametrize("point", POINTS)
async def test_every_other_endpoint_knows_the_same_weather(point, kind) -> None:
    async with simulated(f"{point}-{kind}@1", seconds=FOREVER_S) as wire:
        task = await wire.run()
        if kind == "reset":
            with pytest.raises(aiohttp.ClientError):
                await wire.call(POINTS[point], taskid=task)
        else:
            async with wire.post(POINTS[point], taskid=task) as response:
                expected = {"500": 500, "html": 502, "429": 429, "broken-json": 200}[kind]
                assert response.status == expected
                await response.read()
        acted = point == "stop" and kind in ("reset", "broken-json")
        assert wire.sim.active == (0 if acted else 1)
        if not acted:
            assert (await wire.call(POINTS[point], taskid=task))["result"] is True


async def test_a_lost_answer_to_an_upload_leaves_the_file_there() -> None:
    async with simulated("upload-reset@1", "upload-500@2") as wire:
        url = wire.sim.base_url + "/File/Upload"
        for kept in (1, 1, 2):
            form = aiohttp.FormData()
            form.add_field("file", b"x", filename="x.png")
            try:
                async with wire.session.post(url, data=form, headers=wire.headers()) as response:
                    await response.read()
            except aiohttp.ClientError:
                pass
            assert len(wire.sim.uploads) == kept


async def test_detail_may_pass_through_emptiness_and_ignorance() -> None:
    async with simulated("detail-empty@1", "detail-unknown@2") as wire:
        task = await wire.run()
        assert (await wire.call("/Task/Detail", taskid=task))["tasklist"] == []
        assert (await wire.refusal("/Task/Detail", taskid=task))[0] == 1
        assert (await wire.detail(task))["id"] == task


async def test_list_may_be_off_empty_late_or_without_parameters() -> None:
    async with simulated("list-off@1", "list-empty@2", "list-late@3", "list-no-parameters@4") as wire:
        await wire.run()
        async with wire.post("/Task/List") as response:
            assert response.status == 404
            assert (await response.json())["errors"][0]["code"] == 1
        for _ in ("empty", "late"):
            page = await wire.call("/Task/List")
            assert (page["result"], page["total"], page["tasklist"]) == (True, "0", [])
        (shown,) = (await wire.call("/Task/List"))["tasklist"]
        assert shown["parameters"] == {}
        (shown,) = (await wire.call("/Task/List"))["tasklist"]
        assert shown["parameters"] == {"prompt": "a cat"}


async def test_a_stop_order_may_be_ignored() -> None:
    async with simulated("stop-ignored", seconds=FOREVER_S) as wire:
        (shown,) = (await wire.call("/Task/Cancel", taskid=await wire.run()))["tasklist"]
        assert shown["status"] == "task_queue"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("task-fails", {"status": "task_postprocess_end", "pexit": "1", "outputs": []}),
        ("task-cancelled", {"status": "task_cancel", "pexit": "1", "outputs": []}),
        ("task-error-end", {"status": "task_error", "pexit": "1", "outputs": []}),
        ("task-empty", {"status": "task_postprocess_end", "pexit": "0", "outputs": []}),
        ("task-pexit-null", {"status": "task_postprocess_end", "pexit": None}),
        ("task-pexit-empty", {"pexit": ""}),
        ("task-pexit-number", {"pexit": 0}),
    ],
)
async def test_a_task_ends_as_its_fault_says(name, fields) -> None:
    async with simulated(name) as wire:
        shown = await wire.detail(await wire.run())
        assert {field: shown[field] for field in fields} == fields
        charged = float(shown["totalcost"]) > 0
        assert charged is (shown["pexit"] != "1")
        assert (shown["endtime"] != "0") is (name != "task-cancelled")


async def test_pexit_may_be_absent() -> None:
    async with simulated("task-pexit-absent") as wire:
        shown = await wire.detail(await wire.run())
        assert "pexit" not in shown
        assert len(shown["outputs"]) == 4


async def test_outputs_may_come_one_look_late() -> None:
    async with simulated("task-late-outputs") as wire:
        task = await wire.run(samples=2)
        assert [len((await wire.detail(task))["outputs"]) for _ in range(3)] == [0, 2, 2]


async def test_fields_may_come_in_neighbouring_types() -> None:
    async with simulated("task-odd-types") as wire:
        shown = await wire.detail(await wire.run())
        assert isinstance(shown["id"], int)
        assert isinstance(shown["createtime"], int)
        assert isinstance(shown["categories"], list)
        assert json.loads(shown["parameters"]) == {"prompt": "a cat"}


async def test_an_output_may_be_raw_text_without_a_url() -> None:
    async with simulated("task-raw") as wire:
        outputs = (await wire.detail(await wire.run(samples=1)))["outputs"]
        assert [output["contenttype"] for output in outputs] == ["image/png", "raw"]
        assert "url" not in outputs[1]


async def test_hostile_names_are_served_under_their_addresses_all_the_same() -> None:
    async with simulated("task-names") as wire:
        names = set()
        for number in range(2):
            for output in (await wire.detail(await wire.run(seed=str(number), samples=8)))["outputs"]:
                names.add(output["name"])
                status, _, body = await wire.get(output["url"])
                assert (status, len(body)) == (200, int(output["size"]))
        assert {"../../../escape.png", "nul\0.png", "CON", ""} <= names


def test_every_fault_of_a_task_is_known_to_the_code_that_plays_it() -> None:
    """Guards against a name in the table that nothing acts upon."""
    from pathlib import Path

    import batchrun.simulator

    folder = Path(batchrun.simulator.__file__).parent
    code = "".join(file.read_text() for file in folder.glob("*.py") if file.name != "faults.py")
    for fault in FAULTS.values():
        kind = fault.kind.removesuffix("-before")
        assert f'"{fault.name}"' in code or f'"{kind}"' in code, fault.name
