"""The simulator speaks as wiro-api.md says the service does."""

from __future__ import annotations

import json
from decimal import Decimal

import aiohttp
import pytest

from batchrun.simulator.server import Simulator
from tests.simulator.wire import CARTOON, FOREVER_S, LORA, OUTPAINT, PORTRAIT, STORY, Caller, simulated

# Fields of a task and of an output in the seeds (Kill Task - Response).
# fmt: off
TASK_FIELDS = {
    "id", "uuid", "name", "socketaccesstoken", "parameters", "debugoutput", "debugerror", "starttime",
    "endtime", "elapsedseconds", "status", "cps", "totalcost", "guestid", "projectid", "modelid",
    "description", "basemodelid", "runtype", "modelfolderid", "modelfileid", "callbackurl", "marketplaceid",
    "createtime", "canceltime", "assigntime", "accepttime", "preprocessstarttime", "preprocessendtime",
    "postprocessstarttime", "postprocessendtime", "pexit", "categories", "outputs", "size",
}
# fmt: on
# fmt: off
OUTPUT_FIELDS = {
    "id", "name", "contenttype", "parentid", "uuid", "size", "addedtime", "modifiedtime", "accesskey",
    "foldercount", "filecount", "ispublic", "expiretime", "url",
}
# fmt: on

# --- keys ----------------------------------------------------------------------------------------


async def test_a_request_without_or_with_a_wrong_key_or_signature_gets_401() -> None:
    async with simulated() as wire:
        url = wire.sim.base_url + "/Task/List"
        wrong = (
            {"User-Agent": "x/1"},
            wire.headers(key="other"),
            wire.headers(secret="other"),
            wire.headers(nonce="soon"),
            {**wire.headers(), "x-signature": wire.headers()["x-signature"].upper()},
        )
        for headers in wrong:
            async with wire.session.post(url, json={}, headers=headers) as response:
                assert response.status == 401
                assert (await response.json())["result"] is False


async def test_a_project_of_key_only_takes_unsigned_requests() -> None:
    async with simulated(secret=None) as wire:
        assert wire.sim.secret is None
        assert (await wire.call("/Task/List"))["result"] is True


async def test_the_firewall_turns_away_library_user_agents_with_an_html_page() -> None:
    async with simulated() as wire:
        headers = {**wire.headers(), "User-Agent": "Python-urllib/3.11"}
        async with wire.session.post(wire.sim.base_url + "/Task/List", json={}, headers=headers) as response:
            assert response.status == 403
            assert response.content_type == "text/html"


# --- submitting ----------------------------------------------------------------------------------


async def test_run_answers_with_a_task_id_and_a_token() -> None:
    async with simulated() as wire:
        envelope = await wire.call(LORA.run_path, prompt="a cat", samples=1)
        assert envelope["result"] is True
        assert envelope["errors"] == []
        assert envelope["taskid"].isdecimal()
        assert len(envelope["socketaccesstoken"]) == 30


async def test_task_ids_rise_from_one_simulator_to_the_next() -> None:
    async with simulated() as wire:
        first = await wire.run()
    async with simulated() as wire:
        assert int(await wire.run()) > int(first)


@pytest.mark.parametrize(
    ("tool", "body", "words"),
    [
        (LORA, {}, "Request parameter [prompt] required"),
        (LORA, {"prompt": " "}, "Request parameter [prompt] required"),
        (STORY, {"prompt": "img"}, "Request parameter [generalPrompt] required"),
        (PORTRAIT, {"prompt": "x"}, "Request files [inputImage] required"),
        (OUTPAINT, {"inputImageUrl": ""}, "Request files [inputImage] required"),
        (LORA, {"prompt": "x", "steps": "many"}, "Request parameter [steps] must be integer or float"),
        (LORA, {"prompt": "x", "scale": True}, "Request parameter [scale] must be integer or float"),
        (LORA, {"prompt": "x", "samples": 0}, "Request parameter [samples] must be between 1 and 32"),
        (LORA, {"prompt": "x", "selectedModel": "851"}, "Request parameters are invalid."),
        (LORA, {"prompt": "x", "selectedLoraModel": ["63"]}, "Request parameters are invalid."),
        (LORA, {"prompt": ["x"]}, "Request parameters are invalid."),
        (
            LORA,
            {"prompt": "x", "Happy-v1.0": "glad"},
            "Request parameter [Happy-v1.0] must be integer or float",
        ),
    ],
)
async def test_wrong_parameters_are_refused_in_the_documented_words(tool, body, words) -> None:
    async with simulated() as wire:
        code, message = await wire.refusal(tool.run_path, **body)
        assert code == 0
        assert message.startswith(words)
        assert not wire.sim.tasks


@pytest.mark.parametrize(
    "body",
    [
        {"selectedModel": "1"},  # a default outside its options
        {"selectedModel": "850"},
        {"selectedModel": ""},
        {"selectedModelPrivate": "anything"},  # an empty list of options: any id goes
        {"selectedLoraModel": []},
        {"selectedLoraModel": ["62"], "Happy-v1.0": "3"},
        {"scale": "7.5", "steps": 30, "seed": "9", "unknown": "kept"},
        {"steps": ""},  # an empty text means the default
    ],
)
async def test_what_the_service_takes_is_taken(body) -> None:
    async with simulated() as wire:
        await wire.run(LORA, **body)


async def test_unknown_tools_and_tasks_are_code_1() -> None:
    async with simulated() as wire:
        assert (await wire.refusal("/Run/wiro/no-such-tool"))[0] == 1
        assert await wire.refusal("/Task/Detail", taskid="12") == (1, "There is no task yet.")
        assert (await wire.refusal("/Task/Detail", tasktoken="x"))[0] == 1
        assert (await wire.refusal("/Tool/Detail", slugowner="wiro", slugproject="x"))[0] == 1


async def test_json_under_a_multipart_header_is_read_as_the_seeds_samples_send_it() -> None:
    async with simulated() as wire:
        headers = {**wire.headers(), "Content-Type": "multipart/form-data"}
        body = json.dumps({"prompt": "a cat"})
        async with wire.session.post(
            wire.sim.base_url + LORA.run_path, data=body, headers=headers
        ) as response:
            assert (await response.json())["result"] is True


async def test_a_body_that_is_no_json_object_is_refused() -> None:
    async with simulated() as wire:
        for body in (b"{", b"[]", b"\xff"):
            url = wire.sim.base_url + LORA.run_path
            async with wire.session.post(url, data=body, headers=wire.headers()) as response:
                assert (await response.json())["errors"][0]["code"] == 0


# --- limits and money ----------------------------------------------------------------------------


async def test_beyond_the_slots_code_96_names_balance_and_limit() -> None:
    async with simulated(slots=2, seconds=FOREVER_S, balance_usd=Decimal(50)) as wire:
        await wire.run(seed="1")
        await wire.run(seed="2")
        code, message = await wire.refusal(LORA.run_path, prompt="a cat")
        assert code == 96
        assert "With your current balance of $50.00, you can run up to 2 tasks at the same time." in message
        assert wire.sim.refusals[96] == 1
        assert wire.sim.max_active == wire.sim.active == 2
        wire.sim.slots = 3
        await wire.run(seed="3")


@pytest.mark.parametrize(
    ("balance_usd", "limit"),
    [("0.50", 1), ("19.99", 1), ("39", 3), ("250", 25)],  # max(1, floor(a tenth)), up to 250 USD
)
async def test_without_slots_the_balance_sets_the_limit(balance_usd, limit) -> None:
    async with simulated(seconds=FOREVER_S, balance_usd=Decimal(balance_usd)) as wire:
        for number in range(limit):
            await wire.run(seed=str(number))
        assert (await wire.refusal(LORA.run_path, prompt="a cat"))[0] == 96


async def test_a_queueing_service_keeps_the_rest_waiting() -> None:
    async with simulated(slots=1, queue=True, seconds=FOREVER_S) as wire:
        running, waiting = await wire.run(seed="1"), await wire.run(seed="2")
        assert (await wire.detail(waiting))["status"] == "task_queue"
        assert wire.sim.max_active == 1
        await wire.call("/Task/Cancel", taskid=running)
        first, second = wire.sim.tasks
        assert second.started_at == first.ended_at


async def test_below_half_a_dollar_code_97_refuses_until_money_is_back() -> None:
    async with simulated(balance_usd=Decimal("0.49")) as wire:
        assert (await wire.refusal(LORA.run_path, prompt="a cat"))[0] == 97
        wire.sim.balance_usd = Decimal("0.50")
        await wire.run()


@pytest.mark.parametrize(
    ("tool", "body", "cost_usd"),
    [
        (LORA, {"samples": 3}, "0.010500000000"),  # per output
        (PORTRAIT, {"inputImageUrl": "http://x/a.png"}, "0.020000000000"),  # per run
        (STORY, {"generalPrompt": "a|b"}, "0.016000000000"),
        (
            STORY,
            {"generalPrompt": "a|b", "styleName": "Comic book"},
            "0.021000000000",
        ),  # the more special entry
        (CARTOON, {}, "0.000000058500"),  # the shortest time at the tool's price for a second
    ],
)
async def test_a_finished_task_is_charged_to_the_last_digit(tool, body, cost_usd) -> None:
    async with simulated(balance_usd=Decimal(100)) as wire:
        shown = await wire.detail(await wire.run(tool, **body))
        assert shown["totalcost"] == cost_usd
        assert wire.sim.billed_usd == Decimal(cost_usd)
        assert wire.sim.balance_usd == Decimal(100) - Decimal(cost_usd)


async def test_a_tool_tells_its_parameters_and_prices() -> None:
    async with simulated() as wire:
        await wire.run(samples=2)
        (tool,) = (await wire.call("/Tool/Detail", slugowner="wiro", slugproject=LORA.slug))["tool"]
        items = {item["id"]: item for group in tool["parameters"] for item in group["items"]}
        assert items["prompt"]["required"] is True
        assert items["selectedModel"]["options"] == [{"label": "Lykon/DreamShaper-XL", "value": "850"}]
        assert json.loads(tool["dynamicprice"]) == [{"inputs": {}, "price": "0.0035", "priceMethod": "cpo"}]
        assert Decimal(tool["approximatelycost"]) == Decimal("0.007")
        assert tool["taskstat"] == {"runcount": "1", "successcount": "1", "errorcount": "0"}


async def test_tools_are_searched_by_words() -> None:
    async with simulated() as wire:
        found = await wire.call("/Tool/List", search="cartoons")
        assert [tool["slugproject"] for tool in found["tool"]] == ["Retro-Cartoons"]


# --- tracking ------------------------------------------------------------------------------------


async def test_detail_shows_a_task_by_id_and_by_token_with_all_fields_of_the_seeds() -> None:
    async with simulated() as wire:
        run = await wire.call(LORA.run_path, prompt="a cat", samples=2, scale="7.5", selectedLoraModel=["62"])
        envelope = await wire.call("/Task/Detail", tasktoken=run["socketaccesstoken"])
        assert envelope["total"] == "1"
        (shown,) = envelope["tasklist"]
        assert {**shown, "outputs": None} == {**await wire.detail(run["taskid"]), "outputs": None}
        assert set(shown) >= TASK_FIELDS
        assert shown["status"] == "task_postprocess_end"
        assert shown["pexit"] == "0"
        assert shown["parameters"] == {
            "prompt": "a cat",
            "samples": "2",
            "scale": "7.5",
            "selectedLoraModel": ["62"],
        }
        assert [output["name"] for output in shown["outputs"]] == ["0.png", "1.png"]
        assert set(shown["outputs"][0]) == OUTPUT_FIELDS


async def test_a_running_task_shows_no_outputs_no_cost_and_unset_times_as_0() -> None:
    async with simulated(seconds=FOREVER_S) as wire:
        shown = await wire.detail(await wire.run(callbackUrl="http://nowhere"))
        assert shown["status"] == "task_queue"
        assert shown["outputs"] == []
        assert shown["pexit"] is None
        assert shown["endtime"] == shown["starttime"] == shown["canceltime"] == "0"
        assert shown["totalcost"] == "0.000000000000"
        assert shown["callbackurl"] == "http://nowhere"
        assert "callbackUrl" not in shown["parameters"]


async def test_list_shows_the_newest_first_in_pages_of_at_most_100() -> None:
    async with simulated() as wire:
        made = [await wire.run(seed=str(number)) for number in range(103)]
        page = await wire.call("/Task/List", type="model", sort="id", order="DESC", start="0", limit="100")
        assert page["total"] == "103"
        assert [task["id"] for task in page["tasklist"]] == made[:2:-1]
        rest = await wire.call("/Task/List", start="100", limit="1000")
        assert [task["id"] for task in rest["tasklist"]] == made[2::-1]
        oldest = await wire.call("/Task/List", order="ASC", limit="2")
        assert [task["id"] for task in oldest["tasklist"]] == made[:2]


async def test_list_can_show_one_tool_only() -> None:
    async with simulated() as wire:
        await wire.run(LORA)
        cartoon = await wire.run(CARTOON)
        for name in ("retroAIx/Retro-Cartoons", "Retro-Cartoons"):
            page = await wire.call("/Task/List", modelName=name)
            assert [task["id"] for task in page["tasklist"]] == [cartoon]
        assert (await wire.call("/Task/List", modelName="nobody"))["total"] == "0"


async def test_the_services_clock_may_be_off_by_hours() -> None:
    async with simulated() as right, simulated(clock_offset_s=7200) as wrong:
        ours = await right.detail(await right.run())
        theirs = await wrong.detail(await wrong.run())
        assert 7190 < int(theirs["createtime"]) - int(ours["createtime"]) < 7260
        async with right.post("/Task/List") as one, wrong.post("/Task/List") as other:
            assert one.headers["Date"] != other.headers["Date"]


# --- stopping ------------------------------------------------------------------------------------


async def test_a_queued_task_can_be_cancelled_but_not_killed_and_costs_nothing() -> None:
    async with simulated(seconds=FOREVER_S) as wire:
        task = await wire.run()
        assert (await wire.refusal("/Task/Kill", taskid=task))[0] == 0
        (shown,) = (await wire.call("/Task/Cancel", taskid=task))["tasklist"]
        assert shown["status"] == "task_cancel"
        assert shown["canceltime"] != "0"
        assert Decimal(shown["totalcost"]) == 0
        assert wire.sim.active == 0
        assert (await wire.refusal("/Task/Cancel", taskid=task))[0] == 0


async def test_an_assigned_task_can_be_killed_by_token_but_not_cancelled() -> None:
    # Started so long ago that it is assigned, though far from its end.
    async with simulated(seconds=FOREVER_S) as wire:
        run = await wire.call(LORA.run_path, prompt="a cat")
        wire.sim.tasks[0].started_at -= FOREVER_S / 2  # type: ignore[operator]
        assert (await wire.refusal("/Task/Cancel", taskid=run["taskid"]))[0] == 0
        (shown,) = (await wire.call("/Task/Kill", socketaccesstoken=run["socketaccesstoken"]))["tasklist"]
        assert shown["status"] == "task_cancel"
        assert wire.sim.billed_usd == 0


# --- files ---------------------------------------------------------------------------------------


async def test_an_uploaded_file_is_listed_with_a_url_that_gives_it_back() -> None:
    async with simulated() as wire:
        form = aiohttp.FormData()
        form.add_field("file", b"\x89PNG picture", filename="me.png", content_type="image/png")
        url = wire.sim.base_url + "/File/Upload"
        async with wire.session.post(url, data=form, headers=wire.headers()) as response:
            (entry,) = (await response.json())["list"]
        assert (entry["name"], entry["size"]) == ("me.png", "12")
        status, headers, body = await wire.get(entry["url"])
        assert (status, headers["Content-Type"], body) == (200, "image/png", b"\x89PNG picture")
        assert len(wire.sim.uploads) == wire.sim.requests["upload"] == 1


async def test_an_upload_without_a_file_is_refused() -> None:
    async with simulated() as wire:
        assert await wire.refusal("/File/Upload") == (0, "Request files [file] required")


async def test_a_form_with_a_file_part_runs_a_tool_that_wants_an_input_image() -> None:
    async with simulated() as wire:
        form = aiohttp.FormData()
        form.add_field("prompt", "a portrait")
        form.add_field("inputImageUrl", "")
        form.add_field("inputImage", b"GIF89a", filename="me.gif", content_type="image/gif")
        url = wire.sim.base_url + PORTRAIT.run_path
        async with wire.session.post(url, data=form, headers=wire.headers()) as response:
            task = (await response.json())["taskid"]
        shown = await wire.detail(task)
        assert shown["parameters"]["inputImage"].startswith(f"{wire.sim.base_url}/File/")
        assert shown["parameters"]["inputImage"].endswith("/inputImage-1.gif")


# --- the harness's own window --------------------------------------------------------------------


async def test_harnesses_see_tasks_and_counters_and_change_the_weather_without_a_key() -> None:
    async with simulated(seconds=FOREVER_S) as wire:
        await wire.run()
        await wire.run()
        async with wire.session.get(wire.sim.control_url + "/stats") as response:
            stats = await response.json()
        assert (stats["tasks"], stats["needless"], stats["active"]) == (2, 1, 2)
        weather = {
            "slots": 2,
            "balance_usd": "20.5",
            "faults": ["run-500"],
            "seconds": "1-2",
            "clock_offset_s": 5,
        }
        async with wire.session.post(wire.sim.control_url + "/weather", json=weather) as response:
            assert response.status == 200
        assert wire.sim.slots == 2
        assert wire.sim.balance_usd == Decimal("20.5")
        assert wire.sim.faults == ("run-500",)
        async with wire.session.post(wire.sim.control_url + "/weather", json={"faults": ["no"]}) as response:
            assert response.status == 400
        async with wire.session.get(wire.sim.control_url + "/tasks") as response:
            first, second = await response.json()
        assert second["duplicates"] == first["id"]
        assert first["parameters"] == {"prompt": "a cat"}


async def test_an_outage_refuses_connections_and_ends_at_the_same_address() -> None:
    async with simulated() as wire:
        task = await wire.run()
        await wire.sim.go_dark()
        async with aiohttp.ClientSession() as fresh:  # a kept connection would be cut rather than refused
            with pytest.raises(aiohttp.ClientConnectorError):
                await fresh.get(wire.sim.control_url + "/stats")
        await wire.sim.come_back()
        async with aiohttp.ClientSession() as fresh:
            assert (await Caller(wire.sim, fresh).detail(task))["pexit"] == "0"


async def test_an_outage_by_order_begins_and_ends_by_itself() -> None:
    async with simulated() as wire:
        async with wire.session.post(wire.sim.control_url + "/weather", json={"outage_s": 0.1}) as response:
            assert response.status == 200
        while True:
            try:
                await wire.call("/Task/List")
            except aiohttp.ClientError:
                break
        while True:
            try:
                await wire.call("/Task/List")
            except aiohttp.ClientError:
                continue
            break


async def test_the_catalogs_tools_are_served_by_default() -> None:
    async with Simulator(seconds=0) as sim, aiohttp.ClientSession() as session:
        wire = Caller(sim, session)
        found = await wire.call("/Tool/List")
        assert {tool["slugproject"] for tool in found["tool"]} >= {"instant-id", "Retro-Cartoons"}
