"""The client and the simulator, which share no code, understand each other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import pytest

from batchrun.errors import (
    BalanceExhausted,
    CredentialsRefused,
    LimitReached,
    NotFound,
    ProtocolError,
    RateLimited,
    ReplyLost,
    RequestRejected,
    ServerFault,
    ServiceError,
)
from batchrun.model import Task, Value
from batchrun.settings import Credentials
from batchrun.simulator.server import Simulator
from batchrun.wiro.client import Wiro
from batchrun.wiro.manners import Deadlines
from tests.client.raw import answering, serving, silence

RUN = "/Run/retroAIx/Retro-Cartoons"
BODY: dict[str, Value] = {
    "prompt": "a fox",
    "negativePrompt": "",
    "samples": 1,
    "steps": 20,
    "scale": "4",
    "highNoiseFrac": "0.8",
    "stepsRefiner": 20,
    "seed": "1",
    "width": 64,
    "height": 64,
    "refiner": "--only_base_model",
    "scheduler": "EulerDiscreteScheduler",
}
HASTY = Deadlines(submit_s=0.5, call_s=0.5, silence_s=0.3)


@asynccontextmanager
async def simulated(*faults: str, **options: Any) -> AsyncIterator[tuple[Wiro, Simulator]]:
    settings = {"seconds": 0.05, "faults": faults, **options}
    async with Simulator(**settings) as sim:
        credentials = Credentials(sim.key, sim.secret, sim.base_url, sim.socket_url)
        async with Wiro(credentials, deadlines=HASTY) as wiro:
            yield wiro, sim


async def finished(wiro: Wiro, task_id: str) -> Task:
    with anyio.fail_after(10):
        while True:
            task = await wiro.detail(task_id)
            assert task is not None
            if task.status == "task_postprocess_end" and task.outputs:
                return task
            await asyncio.sleep(0.02)


async def test_a_task_goes_from_submit_to_file() -> None:
    async with simulated() as (wiro, _):
        accepted = await wiro.submit(RUN, BODY)
        task = await finished(wiro, accepted.task_id)
        assert (task.id, task.token, task.pexit) == (accepted.task_id, accepted.token, "0")
        assert task.cost_usd is not None
        assert task.cost_usd > 0
        assert task.parameters is not None
        assert task.parameters["prompt"] == "a fox"
        [output] = task.outputs
        assert output.url is not None
        async with wiro.fetch(output.url) as download:
            content = b"".join([chunk async for chunk in download.chunks])
        assert len(content) == output.size_bytes == download.total_bytes
        async with wiro.fetch(output.url, start=100, etag=download.etag) as rest:
            assert rest.start == 100
            assert b"".join([chunk async for chunk in rest.chunks]) == content[100:]
        by_token = await wiro.detail("", accepted.token)
        assert by_token is not None
        assert by_token.id == accepted.task_id


async def test_a_listing_shows_the_newest_tasks_first_in_pages() -> None:
    async with simulated(seconds=60) as (wiro, _):
        made = [(await wiro.submit(RUN, {**BODY, "seed": str(seed)})).task_id for seed in range(5)]
        assert [task.id for task in await wiro.list_tasks()] == made[::-1]
        assert [task.id for task in await wiro.list_tasks(start=1, limit=2)] == [made[3], made[2]]
        assert await wiro.list_tasks(start=100) == []


async def test_tasks_can_be_cancelled_in_the_queue_and_killed_at_work() -> None:
    async with simulated(seconds=5, slots=1, queue=True) as (wiro, _):
        first, second = [await wiro.submit(RUN, {**BODY, "seed": str(seed)}) for seed in range(2)]
        await wiro.cancel(second.task_id)
        with anyio.fail_after(5):
            while (task := await wiro.detail(first.task_id)) is not None and task.status != "task_cancel":
                try:
                    await wiro.kill(first.task_id, first.token)
                except ServiceError:
                    await asyncio.sleep(0.05)  # not assigned yet
        queued = await wiro.detail(second.task_id)
        assert queued is not None
        assert queued.status == "task_cancel"


async def test_a_file_is_uploaded_under_its_name(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(b"\x89PNG" + bytes(300_000))
    async with simulated() as (wiro, sim):
        url = await wiro.upload(file, 'Zürich "1".png', file.stat().st_size)
        assert url.startswith(sim.base_url.removesuffix("/v1"))
        [upload] = sim.uploads
        assert (upload.size_bytes, upload.media_type) == (300_004, "image/png")
        async with wiro.fetch(url) as download:
            assert b"".join([chunk async for chunk in download.chunks]) == file.read_bytes()


async def test_a_file_that_changed_or_vanished_is_not_uploaded(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(b"1234")
    async with simulated() as (wiro, sim):
        with pytest.raises(RequestRejected, match="changed"):
            await wiro.upload(file, "x.png", 5)
        with pytest.raises(RequestRejected, match="cannot be read"):
            await wiro.upload(tmp_path / "missing.png", "x.png", 5)
        assert sim.requests["upload"] == 0


async def test_an_upload_that_gets_no_answer_is_a_lost_answer(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(bytes(10**6))
    async with serving(silence) as server, Wiro(server.credentials, deadlines=HASTY) as wiro:
        with pytest.raises(ReplyLost, match="in time"):
            await wiro.upload(file, "x.png", 10**6)


async def test_an_upload_that_is_cancelled_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(bytes(20 * 2**20))

    async def stop_reading(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        reached.set()
        await gone.wait()
        writer.close()

    reached, gone = asyncio.Event(), asyncio.Event()
    async with await asyncio.start_server(stop_reading, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        credentials = Credentials("k", None, f"http://127.0.0.1:{port}/v1")
        async with Wiro(credentials) as wiro, anyio.create_task_group() as group:
            group.start_soon(wiro.upload, file, "x.png", file.stat().st_size)
            await reached.wait()
            group.cancel_scope.cancel()
        gone.set()


async def test_prices_are_read_exact() -> None:
    async with simulated() as (wiro, _):
        facts = await wiro.tool_price("retroAIx", "Retro-Cartoons")
        assert facts.raw["slugowner"] == "retroAIx"
        assert all(isinstance(price.price_usd, Decimal) for price in facts.prices)
        with pytest.raises(NotFound):
            await wiro.tool_price("nobody", "nothing")


@pytest.mark.parametrize("offset_s", [0.0, -7200.0, 86400.0])
async def test_the_services_time_is_known_after_the_first_answer_however_wrong_it_is(offset_s: float) -> None:
    async with simulated(clock_offset_s=offset_s) as (wiro, _):
        assert wiro.server_now() is None
        await wiro.list_tasks()
        now = wiro.server_now()
        assert now is not None
        assert abs(now - time.time() - offset_s) < 3


async def test_the_services_time_is_unknown_after_our_clock_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    async with simulated() as (wiro, _):
        await wiro.list_tasks()
        true_time = time.time
        monkeypatch.setattr(time, "time", lambda: true_time() + 3600)
        assert wiro.server_now() is None
        await wiro.list_tasks()
        assert wiro.server_now() is not None


@pytest.mark.parametrize(
    ("fault", "expected", "facts"),
    [
        ("run-refused", ReplyLost, {}),
        ("run-reset", ReplyLost, {}),
        ("run-reset-before", ReplyLost, {}),
        ("run-stall", ReplyLost, {}),
        ("run-half", ReplyLost, {}),
        ("run-500", ServerFault, {"acted": True}),
        ("run-500-before", ServerFault, {"acted": True}),
        ("run-524", ServerFault, {"acted": True}),
        ("run-html", ServerFault, {"acted": True}),
        ("run-broken-json", ProtocolError, {}),
        ("run-no-id", ProtocolError, {}),
        ("run-429", RateLimited, {"retry_after_s": 1.0}),
        ("run-429-date", RateLimited, {}),
        ("run-code0", ServerFault, {"acted": False}),
        ("run-validation", RequestRejected, {}),
        ("run-notfound", NotFound, {}),
        ("run-limit-nonumber", LimitReached, {"limit": None}),
        ("run-limit-odd", LimitReached, {}),
        ("run-balance", BalanceExhausted, {}),
        ("run-401", CredentialsRefused, {}),
        ("run-98", CredentialsRefused, {}),
        ("run-99", CredentialsRefused, {}),
    ],
)
async def test_every_fault_of_a_submit_has_its_own_error(
    fault: str, expected: type[ServiceError], facts: Mapping[str, object]
) -> None:
    async with simulated(fault) as (wiro, sim):
        with pytest.raises(ServiceError) as caught:
            await wiro.submit(RUN, BODY)
        assert type(caught.value) is expected
        assert {name: getattr(caught.value, name) for name in facts} == facts
        assert sim.requests["run"] == 1


async def test_the_limit_of_the_account_is_told() -> None:
    async with simulated(seconds=60, slots=3) as (wiro, _):
        for seed in range(3):
            await wiro.submit(RUN, {**BODY, "seed": str(seed)})
        with pytest.raises(LimitReached) as caught:
            await wiro.submit(RUN, {**BODY, "seed": "9"})
        assert caught.value.limit == 3


@pytest.mark.parametrize(
    "fault", ["task-odd-types", "task-pexit-null", "task-pexit-number", "task-raw", "task-names"]
)
async def test_odd_tasks_are_read(fault: str) -> None:
    async with simulated(fault) as (wiro, _):
        accepted = await wiro.submit(RUN, BODY)
        task = await finished(wiro, accepted.task_id)
        assert task.pexit in ("0", None)
        assert task.parameters is not None
        assert task.parameters["prompt"] == "a fox"
        assert task.outputs[0].size_bytes


async def test_a_wrong_key_or_secret_is_refused() -> None:
    async with simulated() as (wiro, sim):
        for wrong in (
            Credentials("bad", sim.secret, sim.base_url),
            Credentials(sim.key, "bad", sim.base_url),
        ):
            async with Wiro(wrong) as stranger:
                with pytest.raises(CredentialsRefused):
                    await stranger.list_tasks()
        assert await wiro.list_tasks() == []


async def test_a_listing_that_is_off_or_hides_parameters_says_so() -> None:
    async with simulated("list-off") as (wiro, _):
        with pytest.raises(NotFound):
            await wiro.list_tasks()
    async with simulated("list-no-parameters", seconds=60) as (wiro, _):
        await wiro.submit(RUN, BODY)
        assert [task.parameters for task in await wiro.list_tasks()] == [None]


async def test_an_empty_answer_and_an_unknown_task_are_two_things() -> None:
    async with simulated("detail-empty*1") as (wiro, _):
        accepted = await wiro.submit(RUN, BODY)
        assert await wiro.detail(accepted.task_id) is None
        assert await wiro.detail(accepted.task_id) is not None
        with pytest.raises(NotFound):
            await wiro.detail("1")


async def test_the_details_of_another_task_are_not_taken_for_ours() -> None:
    task = {"id": "8", "status": "task_postprocess_end", "pexit": "0"}
    async with (
        serving(answering({"result": True, "tasklist": [task]})) as server,
        Wiro(server.credentials) as wiro,
    ):
        with pytest.raises(ProtocolError, match="another"):
            await wiro.detail("7")
        found = await wiro.detail("8")
        assert found is not None
        assert found.id == "8"


async def test_what_was_not_understood_shows_its_beginning() -> None:
    async with serving(answering({"result": True, "odd": 1})) as server, Wiro(server.credentials) as wiro:
        with pytest.raises(ProtocolError) as caught:
            await wiro.list_tasks()
    assert '"odd": 1' in caught.value.detail


async def test_a_client_leaves_nothing_behind_when_its_run_is_cancelled() -> None:
    async with simulated("list-stall") as (wiro, _):
        with anyio.move_on_after(0.05):
            await wiro.list_tasks()
