"""What a simulator remembers survives it, however it ends; time goes on while none runs."""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import tempfile
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.errors import UsageError
from batchrun.simulator.envelope import Refusal
from batchrun.simulator.memory import Memory
from batchrun.simulator.server import Simulator
from batchrun.simulator.tasks import Ledger, SimTask, fingerprint
from batchrun.simulator.world import Options, World
from tests.simulator.test_command import started
from tests.simulator.wire import FOREVER_S, LORA, PORTRAIT, STORY, TOOLS, Caller, simulated


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "memory.jsonl"


def let_pass(memory: Path, seconds: float) -> None:
    """Set the memory back in time: to the next simulator so many seconds have gone by since."""
    first, _, rest = memory.read_bytes().partition(b"\n")
    head = json.loads(first)
    memory.write_bytes(json.dumps({**head, "epoch": head["epoch"] - seconds}).encode() + b"\n" + rest)


async def outputs(wire: Caller, task: str) -> list[bytes]:
    """The files of a task that has ended."""
    shown = (await wire.detail(task))["outputs"]
    got = [await wire.get(output["url"]) for output in shown]
    assert [status for status, _, _ in got] == [200] * len(shown)
    assert [str(len(body)) for _, _, body in got] == [output["size"] for output in shown]
    return [body for _, _, body in got]


# --- tasks ---------------------------------------------------------------------------------------


async def test_a_running_task_goes_on_as_if_the_simulator_had_never_been_away(memory) -> None:
    async with simulated(memory=memory, seconds=FOREVER_S) as wire:
        run = await wire.call(STORY.run_path, prompt="img", generalPrompt="a|b", callbackUrl="http://x")
        before = await wire.detail(run["taskid"])
        (task,) = wire.sim.tasks
        schedule = task.stages()
    async with simulated(memory=memory) as wire:
        assert await wire.detail(run["taskid"]) == before
        assert wire.sim.tasks[0].stages() == schedule
        (shown,) = (await wire.call("/Task/Detail", tasktoken=run["socketaccesstoken"]))["tasklist"]
        assert shown["id"] == run["taskid"]
        assert (await wire.call("/Task/List"))["total"] == "1"
        assert (wire.sim.active, wire.sim.max_active, wire.sim.billed_usd) == (1, 1, 0)


async def test_a_task_has_ended_and_is_billed_while_no_simulator_ran(memory) -> None:
    async with simulated(memory=memory, seconds=FOREVER_S) as wire:
        task = await wire.run(samples=2)
        made = await wire.detail(task)
    let_pass(memory, FOREVER_S + 1)
    async with simulated(memory=memory, balance_usd=Decimal(10)) as wire:
        shown = await wire.detail(task)
        assert (shown["status"], shown["pexit"]) == ("task_postprocess_end", "0")
        assert shown["totalcost"] == "0.007000000000"
        assert int(shown["endtime"]) - int(shown["createtime"]) == pytest.approx(0.92 * FOREVER_S, abs=1)
        assert int(made["createtime"]) - int(shown["createtime"]) == pytest.approx(FOREVER_S + 1, abs=1)
        assert wire.sim.balance_usd == Decimal("9.993")
        assert len(await outputs(wire, task)) == 2


async def test_a_finished_task_gives_the_same_images_at_new_addresses(memory) -> None:
    async with simulated(memory=memory) as wire:
        task = await wire.run(PORTRAIT, inputImageUrl="http://x/a.png", samples=3)
        before = await outputs(wire, task)
        billed_usd = wire.sim.billed_usd
    async with simulated(memory=memory) as wire:
        assert await outputs(wire, task) == before
        assert wire.sim.billed_usd == billed_usd > 0
        assert wire.sim.stats()["images"] == 3


async def test_stopped_tasks_stay_stopped_and_uncharged(memory) -> None:
    async with simulated(memory=memory, seconds=FOREVER_S) as wire:
        cancelled, killed = await wire.run(seed="1"), await wire.run(seed="2")
        await wire.call("/Task/Cancel", taskid=cancelled)
    let_pass(memory, FOREVER_S / 2)
    async with simulated(memory=memory) as wire:
        (before,) = (await wire.call("/Task/Kill", taskid=killed))["tasklist"]
    let_pass(memory, FOREVER_S)
    async with simulated(memory=memory) as wire:
        assert (await wire.detail(cancelled))["status"] == "task_cancel"
        shown = await wire.detail(killed)
        assert (shown["status"], shown["pexit"]) == ("task_cancel", "1")
        lived_s = int(before["canceltime"]) - int(before["createtime"])
        assert int(shown["canceltime"]) - int(shown["createtime"]) == pytest.approx(lived_s, abs=1)
        assert (wire.sim.active, wire.sim.billed_usd) == (0, 0)
        assert (await wire.refusal("/Task/Kill", taskid=killed))[0] == 0


async def test_new_tasks_get_new_ids_and_are_needless_where_the_old_ones_suffice(memory) -> None:
    async with simulated(memory=memory, first_id=7) as wire:
        first = await wire.run()
    async with simulated(memory=memory, first_id=7) as wire:
        second = await wire.run()
        other = await wire.run(seed="2")
        assert (first, second, other) == ("7", "8", "9")
        assert [task.duplicates for task in wire.sim.tasks] == [None, 7, None]
    async with simulated(memory=memory) as wire:
        assert [str(task.id) for task in wire.sim.needless] == [second]
        assert wire.sim.stats()["tasks"] == 3
        assert len({task.token for task in wire.sim.tasks}) == 3


async def test_faults_of_tasks_and_deleted_files_are_for_good(memory) -> None:
    async with simulated("task-fails@1", "cdn-gone@1", memory=memory) as wire:
        failed, gone = await wire.run(seed="1"), await wire.run(seed="2")
        (url, *_) = [output["url"] for output in (await wire.detail(gone))["outputs"]]
        assert (await wire.get(url))[0] == 410
        billed_usd = wire.sim.billed_usd
    async with simulated(memory=memory) as wire:
        assert (await wire.detail(failed))["pexit"] == "1"
        assert (await wire.detail(gone))["outputs"] == []
        assert wire.sim.billed_usd == billed_usd > 0


def test_everyday_faults_strike_a_request_no_more_than_twice_in_a_row_over_restarts(memory) -> None:
    faults = []
    for _ in range(3):
        world = World(Options(memory=memory, faults=["all=100%"]), TOOLS)
        fault = world.plan.strike("task", key=fingerprint(LORA, {}))
        faults.append(fault.name if fault else None)
        world.ledger.make(LORA, {}, images=1, size_px=(64, 64), fault=faults[-1])
        world.close()
    assert [fault is not None for fault in faults] == [True, True, False]


async def test_sizes_of_real_images_are_remembered_for_real_images_only(memory) -> None:
    sizes = []
    for images in ("tiny", "real", "real", "tiny"):
        async with simulated(memory=memory, images=images) as wire:
            if not sizes:
                await wire.run(samples=1)
            (shown,) = (await wire.call("/Task/List"))["tasklist"]
            await outputs(wire, shown["id"])
            sizes.append(shown["size"])
    assert sizes[0] == sizes[3] != sizes[1] == sizes[2]


async def test_a_clock_set_back_makes_no_task_of_the_future(memory) -> None:
    async with simulated(memory=memory, seconds=FOREVER_S) as wire:
        task = await wire.run()
    let_pass(memory, -FOREVER_S)
    async with simulated(memory=memory) as wire:
        assert (await wire.detail(task))["status"] == "task_queue"


async def test_a_tool_that_was_removed_leaves_its_tasks(memory) -> None:
    async with simulated(memory=memory) as wire:
        task = await wire.run()
        before = await outputs(wire, task)
    async with simulated(memory=memory, tools=TOOLS[1:]) as wire:
        assert await outputs(wire, task) == before


# --- the ledger, in general ----------------------------------------------------------------------


class Account:
    """A ledger on a clock of its own, in a memory from which it can be restored at any time."""

    def __init__(self, path: Path, *, slots: int) -> None:
        self.now = 0.0
        self.path = path
        self.slots = slots
        self._open()

    def close(self) -> None:
        self.memory.close()

    def restart(self) -> None:
        self.close()
        self._open()

    def _open(self) -> None:
        self.memory = Memory(self.path, epoch=0, salt="", tool=lambda path: LORA)
        self.ledger = Ledger(
            clock=lambda: self.now,
            seconds=lambda: 100.0,
            slots=self.slots,
            queue=True,
            balance_usd=Decimal(1000),
            first_id=1,
            salt=self.memory.salt,
        )
        self.ledger.listeners.add(self.memory.note)
        self.ledger.restore(self.memory.tasks)

    def state(self) -> list[Any]:
        ledger = self.ledger
        ledger.advance()
        sums = [ledger.active, ledger.max_active, ledger.billed_usd, ledger.balance_usd, ledger.next_end()]
        return [*sums, *(_plain(task) for task in ledger.tasks)]


def _plain(task: SimTask) -> dict[str, Any]:
    return {name: getattr(task, name) for name in SimTask.__slots__}


_MAKE = st.tuples(
    st.just("make"), st.sampled_from([None, "task-fails", "task-stuck", "task-empty"]), st.sampled_from("ab")
)
_STOP = st.tuples(st.just("stop"), st.integers(0, 20), st.booleans())
_WAIT = st.tuples(st.just("wait"), st.sampled_from([0.0, 5.0, 33.3, 100.0, 250.0]))


@given(
    st.lists(st.tuples(st.one_of(_MAKE, _MAKE, _STOP, _WAIT), st.booleans()), max_size=25), st.integers(1, 3)
)
def test_a_ledger_restored_at_any_time_goes_on_exactly_like_one_that_never_ended(orders, slots) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        steady = stack.enter_context(contextlib.closing(Account(Path(folder) / "steady", slots=slots)))
        restarted = stack.enter_context(contextlib.closing(Account(Path(folder) / "restarted", slots=slots)))
        for order, restart in orders:
            for account in (steady, restarted):
                _obey(account, *order)
            if restart:
                restarted.restart()
            assert restarted.state() == steady.state()


def _obey(account: Account, kind: str, what: Any, how: Any = None) -> None:
    account.now += 0.125  # no two orders come at the very same instant
    match kind:
        case "make":
            account.ledger.make(LORA, {"seed": how}, images=2, size_px=(64, 64), fault=what)
        case "stop" if what < len(account.ledger.tasks):
            with contextlib.suppress(Refusal):
                account.ledger.stop(account.ledger.tasks[what], assigned=how)
        case "wait":
            account.now += what


def test_tasks_that_waited_start_no_sooner_than_the_ledger_fell_silent_though_slots_are_more(memory) -> None:
    account = Account(memory, slots=1)
    account.ledger.make(LORA, {}, images=1, size_px=(64, 64), fault=None)
    account.now = 150.0
    account.ledger.make(LORA, {}, images=1, size_px=(64, 64), fault=None)
    account.now = 160.0
    account.ledger.make(LORA, {}, images=1, size_px=(64, 64), fault=None)
    account.now, account.slots = 300.0, 5
    account.restart()
    account.close()
    assert [task.started_at for task in account.ledger.tasks] == [0, 150, 160]


# --- uploads -------------------------------------------------------------------------------------


async def test_uploads_are_served_again_under_the_new_port(memory) -> None:
    async with simulated(memory=memory) as wire:
        for name in ("me.png", "again.png"):
            form = aiohttp.FormData()
            form.add_field("file", b"\x89PNG picture", filename=name, content_type="image/png")
            url = wire.sim.base_url + "/File/Upload"
            async with wire.session.post(url, data=form, headers=wire.headers()) as response:
                (entry,) = (await response.json())["list"]
        old, before = entry["url"], await wire.get(entry["url"])
        base_url, uploads = wire.sim.base_url, list(wire.sim.uploads)
    async with simulated(memory=memory) as wire:
        status, headers, body = await wire.get(old.replace(base_url, wire.sim.base_url))
        assert (status, body, headers["Etag"]) == (before[0], before[2], before[1]["Etag"])
        assert headers["Content-Type"] == "image/png"
        assert wire.sim.uploads == uploads
    folder = memory.with_name("memory.jsonl.uploads")
    (kept,) = folder.iterdir()  # one content, though uploaded twice
    kept.unlink()
    async with simulated(memory=memory) as wire:
        assert (await wire.get(old.replace(base_url, wire.sim.base_url)))[0] == 404


# --- the file ------------------------------------------------------------------------------------


async def test_without_a_memory_nothing_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with simulated() as wire:
        await wire.call("/Task/Cancel", taskid=await wire.run())
        form = aiohttp.FormData()
        form.add_field("file", b"x", filename="x.png")
        url = wire.sim.base_url + "/File/Upload"
        async with wire.session.post(url, data=form, headers=wire.headers()) as response:
            await response.read()
    assert not list(tmp_path.iterdir())


async def test_a_line_torn_off_anywhere_loses_itself_only(memory) -> None:
    async with simulated(memory=memory) as wire:
        for seed in "12":
            await wire.run(seed=seed)
    text = memory.read_bytes()
    for length in range(len(text) + 1):
        memory.write_bytes(text[:length])
        whole = text[:length].count(b"\n")
        opened(memory, tasks=max(0, whole - 1))
        assert memory.read_bytes().startswith(text[: text.rindex(b"\n", 0, length) + 1 if whole else 0])
        opened(memory, tasks=max(0, whole - 1))


def opened(path: Path, *, tasks: int) -> None:
    """Open the memory and find so many tasks in it."""
    memory = Memory(path, epoch=0, salt="", tool=lambda path: LORA)
    assert len(memory.tasks) == tasks
    memory.close()


async def test_after_a_full_disk_the_file_is_whole(memory) -> None:
    async with simulated(memory=memory) as wire:
        await wire.run(seed="1")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (memory.stat().st_size + 20, hard))
        try:
            async with wire.post(LORA.run_path, prompt="a cat", seed="2") as response:
                assert response.status == 500
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        await wire.run(seed="3")
    async with simulated(memory=memory) as wire:
        assert [task.parameters["seed"] for task in wire.sim.tasks] == ["1", "3"]


async def test_two_simulators_cannot_share_a_memory_at_once(memory) -> None:
    async with simulated(memory=memory) as wire:
        with pytest.raises(UsageError, match="in use"):
            Simulator(memory=memory, tools=TOOLS)
        port = int(wire.sim.base_url.split(":")[2].removesuffix("/v1"))
        other = memory.with_name("other")
        with pytest.raises(OSError):  # noqa: PT011 - the port is taken
            await Simulator(memory=other, tools=TOOLS, port=port).__aenter__()
        async with simulated(memory=other):
            pass


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"my notes", "no memory"),
        (b'{"prompt": "a cat"}\n', "no memory"),
        (b'{"simulator": 1, "epoch": 0, "salt": ""}\n{"task"\n', "damaged"),
        (b'{"simulator": 1, "epoch": 0, "salt": ""}\n{"task": {"id": 1}}\n', "damaged"),
        (b'{"simulator": 1, "epoch": 0, "salt": ""}\n{"other": 1}\n', "damaged"),
    ],
)
def test_a_file_that_is_no_memory_is_refused_and_left_as_it_is(memory, text, words) -> None:
    memory.write_bytes(text)
    for _ in range(2):
        with pytest.raises(UsageError, match=words):
            Simulator(memory=memory, tools=TOOLS)
    assert memory.read_bytes() == text


def test_a_memory_in_no_folder_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match="cannot be opened: No such file"):
        Simulator(memory=tmp_path / "missing" / "memory", tools=TOOLS)


async def test_an_empty_file_is_a_memory_of_nothing(memory) -> None:
    memory.touch()
    async with simulated(memory=memory) as wire:
        assert not wire.sim.tasks


# --- a kill --------------------------------------------------------------------------------------


def _killed(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


async def test_a_killed_process_loses_no_task_that_it_answered_for(memory) -> None:
    arguments = ("--memory", str(memory), "--seconds")
    made: dict[str, str] = {}
    for seconds in (str(FOREVER_S), "0"):
        with started(*arguments, seconds) as (process, address):
            async with aiohttp.ClientSession() as session:
                wire = Caller(cast(Simulator, SimpleNamespace(**address)), session)
                for task, status in made.items():
                    assert (await wire.detail(task))["status"] == status
                new = [await wire.run(seed=f"{seconds}-{number}") for number in range(3)]
                if seconds == "0":
                    made |= dict.fromkeys(new, "task_postprocess_end")
                else:
                    await wire.call("/Task/Cancel", taskid=new[0])
                    made = dict.fromkeys(new, "task_queue") | {new[0]: "task_cancel"}
                _killed(process)
    with started(*arguments, "0") as (process, address):
        async with aiohttp.ClientSession() as session:
            wire = Caller(cast(Simulator, SimpleNamespace(**address)), session)
            listed = (await wire.call("/Task/List", order="ASC"))["tasklist"]
            assert {task["id"]: task["status"] for task in listed} == made
            assert len(await outputs(wire, list(made)[-1])) == 4
        _killed(process)
