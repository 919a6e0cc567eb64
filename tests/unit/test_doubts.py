"""Doubtful submits are settled by the service's list of tasks, read again until it is certain."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import pytest

from batchrun import errors
from batchrun.dispatch.doubts import BETWEEN_S, Doubts
from batchrun.model import Task
from batchrun.rules.recovery import GRACE_S, LISTING_PATIENCE_S, SECOND_LOOK_S, Absent, Adopt, Doubt, Hold
from tests.support.clock import virtual_time


class Account:
    """The tasks of an account as Task/List would page them, and what this run knows of them."""

    def __init__(self, *ids: int, known: Collection[int] = ()) -> None:
        self.tasks = {str(number): Task(str(number), parameters={"prompt": "old"}) for number in ids}
        self.known = {str(number) for number in known}
        self.readings: list[float] = []
        self.pages = 0
        #: Raised instead of an answer.
        self.trouble: Callable[[], Exception] | None = None
        #: Tasks are listed so long after they were made (`made_at`, else long ago).
        self.lag_s = 0.0
        self.made_at: dict[str, float] = {}
        #: Whether known tasks show something else than was sent.
        self.garbles = False

    def add(self, number: int, **parameters: str) -> Task:
        task = Task(str(number), parameters={"steps": 20, **parameters})
        self.tasks[task.id] = task
        return task

    async def list_tasks(self, *, start: int = 0, limit: int = 100) -> list[Task]:
        self.pages += 1
        if start == 0:
            self.readings.append(anyio.current_time())
        await anyio.sleep(0.05)
        if self.trouble is not None:
            raise self.trouble()
        since = anyio.current_time() - self.lag_s
        listed = [task for task in self.tasks.values() if self.made_at.get(task.id, since) <= since]
        newest_first = sorted(listed, key=lambda task: -int(task.id))
        return newest_first[start : start + min(limit, 100)]

    async def known_tasks(self, task_ids: Collection[str]) -> dict[str, int | None]:
        return dict.fromkeys(self.known & set(task_ids), 1)

    async def known_task(self) -> str | None:
        return max(self.known, default=None)

    def newest_known(self) -> int | None:
        return max(map(int, self.known), default=None)

    async def is_true_echo(self, task: Task) -> bool:
        return not self.garbles


def doubts_of(account: Account) -> Doubts:
    return Doubts(
        account, account.known_tasks, account.known_task, account.is_true_echo, account.newest_known
    )


@asynccontextmanager
async def settling(account: Account) -> AsyncIterator[Doubts]:
    doubts = doubts_of(account)
    async with anyio.create_task_group() as group:
        group.start_soon(doubts.run)
        yield doubts
        group.cancel_scope.cancel()


def lost(prompt: str = "a cat", *, after: int | None = 10) -> Doubt:
    return Doubt({"prompt": prompt, "steps": 20}, ["prompt"], after, None)


def never() -> bool:
    return False


@virtual_time
async def test_a_task_that_is_listed_is_adopted_at_once() -> None:
    account = Account(9, 10)
    task = account.add(11, prompt="a cat")
    async with settling(account) as doubts:
        begun_at = anyio.current_time()
        answer = await doubts.settle(lost(), lost_at=begun_at, busy=never)
        assert answer == Adopt(task)
        assert anyio.current_time() - begun_at < 1


@virtual_time
async def test_a_task_that_shows_late_is_adopted_when_it_shows() -> None:
    account = Account(9, 10)
    async with settling(account) as doubts, anyio.create_task_group() as group:

        async def show() -> None:
            await anyio.sleep(15)
            account.add(11, prompt="a cat")

        group.start_soon(show)
        begun_at = anyio.current_time()
        answer = await doubts.settle(lost(), lost_at=begun_at, busy=never)
        assert isinstance(answer, Adopt)
        assert 15 <= anyio.current_time() - begun_at <= 15 + BETWEEN_S + 1


@virtual_time
async def test_with_a_known_task_in_the_list_absence_is_certain_after_the_grace() -> None:
    account = Account(9, 10, known=[9])
    async with settling(account) as doubts:
        begun_at = anyio.current_time()
        assert await doubts.settle(lost(), lost_at=begun_at, busy=never) == Absent()
        assert GRACE_S <= anyio.current_time() - begun_at <= GRACE_S + BETWEEN_S + 1


@pytest.mark.parametrize("before_s", [0.5, 3.0, 6.0, 12.0, 40.0])
@virtual_time
async def test_a_list_that_lags_behind_by_more_than_the_grace_proves_no_absence(before_s: float) -> None:
    account = Account(90, 91, known=[90])
    account.lag_s = 1.5 * GRACE_S
    async with settling(account) as doubts, anyio.create_task_group() as group:
        account.add(92, prompt="a dog")
        account.known.add("92")
        account.made_at["92"] = anyio.current_time() - before_s
        task = account.add(93, prompt="a cat")
        account.made_at["93"] = anyio.current_time()

        async def go_on() -> None:  # the run does, and knows what it makes
            for number in range(94, 200):
                await anyio.sleep(4)
                account.add(number, prompt=f"{number} dogs")
                account.known.add(str(number))
                account.made_at[str(number)] = anyio.current_time()

        group.start_soon(go_on)
        assert await doubts.settle(lost(after=92), lost_at=anyio.current_time(), busy=never) == Adopt(task)
        group.cancel_scope.cancel()


@virtual_time
async def test_a_known_task_that_never_shows_again_leaves_the_doubt_to_the_user() -> None:
    account = Account(90, 91, known=[90, 93])
    async with settling(account) as doubts:
        answer = await doubts.settle(lost(after=91), lost_at=anyio.current_time(), busy=never)
        assert answer == Hold("the listing does not show this run's newest tasks")


@virtual_time
async def test_a_task_of_another_tool_that_was_asked_for_the_same_is_not_adopted() -> None:
    account = Account(9, 10, known=[9])
    account.tasks["9"] = replace(account.tasks["9"], model_id="7")  # which tells the tool's number there
    account.tasks["11"] = replace(account.add(11, prompt="a cat"), model_id="8")
    async with settling(account) as doubts:
        doubt = replace(lost(), tool=1)
        assert await doubts.settle(doubt, lost_at=anyio.current_time(), busy=never) == Absent()


@virtual_time
async def test_a_list_that_shows_known_tasks_other_than_they_were_sent_proves_no_absence() -> None:
    account = Account(9, 10, known=[9])
    account.garbles = True
    async with settling(account) as doubts:
        answer = await doubts.settle(lost(), lost_at=anyio.current_time(), busy=never)
        assert answer == Hold("the service does not echo the parameters of tasks as they were sent")


@virtual_time
async def test_a_new_doubt_does_not_wait_until_the_list_is_read_back_to_before_an_old_one() -> None:
    account = Account(*range(10, 5000), known=[4990])
    task = account.add(5001, prompt="a cat")
    answers: dict[str, tuple[object, int]] = {}

    async def settle(name: str, doubt: Doubt) -> None:
        answer = await doubts.settle(doubt, lost_at=anyio.current_time() - GRACE_S, busy=never)
        answers[name] = answer, account.pages

    async with settling(account) as doubts, anyio.create_task_group() as group:
        group.start_soon(settle, "old", lost("a fox", after=10))
        group.start_soon(settle, "new", lost(after=4999))
        group.start_soon(settle, "absent", lost("a dog", after=4950))
    assert [answer for answer, _ in answers.values()] == [Adopt(task), Absent(), Absent()]
    assert {name: pages for name, (_, pages) in answers.items()} == {"new": 2, "absent": 2, "old": 51}


@virtual_time
async def test_a_reading_that_breaks_off_takes_back_no_answer_that_it_gave_on_the_way() -> None:
    class Shallow(Account):
        async def list_tasks(self, *, start: int = 0, limit: int = 100) -> list[Task]:
            if start:
                raise errors.CredentialsRefused("the key was withdrawn")
            return await super().list_tasks(start=start, limit=limit)

    account = Shallow(*range(10, 5000), known=[4990])
    task = account.add(5001, prompt="a cat")
    answers: dict[str, object] = {}

    async def settle(name: str, doubt: Doubt) -> None:
        try:
            answers[name] = await doubts.settle(doubt, lost_at=anyio.current_time(), busy=never)
        except errors.CredentialsRefused as error:
            answers[name] = error

    async with settling(account) as doubts, anyio.create_task_group() as group:
        group.start_soon(settle, "old", lost("a fox"))
        group.start_soon(settle, "new", lost(after=4999))
    assert answers["new"] == Adopt(task)
    assert isinstance(answers["old"], errors.CredentialsRefused)


@virtual_time
async def test_a_list_in_short_pages_is_read_on_where_it_broke_off() -> None:
    class Short(Account):
        async def list_tasks(self, *, start: int = 0, limit: int = 100) -> list[Task]:
            return (await super().list_tasks(start=start, limit=limit))[:2]

    account = Short(9, 10, *range(12, 20), known=[9])
    task = account.add(11, prompt="a cat")
    async with settling(account) as doubts:
        assert await doubts.settle(lost(), lost_at=anyio.current_time(), busy=never) == Adopt(task)


@pytest.mark.parametrize("hidden", [60, 150, 400])
@pytest.mark.parametrize("every", [2, 3])
@virtual_time
async def test_a_list_that_now_and_then_leaves_the_newest_out_is_read_without_a_gap(
    hidden: int, every: int
) -> None:
    class Lagging(Account):
        asked = 0

        async def list_tasks(self, *, start: int = 0, limit: int = 100) -> list[Task]:
            self.asked += 1
            skipped = hidden if self.asked % every == 0 else 0  # answered by a copy that is behind
            return await super().list_tasks(start=start + skipped, limit=limit)

    for number in (880, 850, 801, 750, 640, 501):
        account = Lagging(*range(10, 1001), known=[15, 990])
        task = account.add(number, prompt="a cat")
        async with settling(account) as doubts:
            lost_at = anyio.current_time() - GRACE_S
            assert await doubts.settle(lost(after=12), lost_at=lost_at, busy=never) == Adopt(task)
        absent = Lagging(*range(10, 1001), known=[15, 990])
        async with settling(absent) as doubts:
            lost_at = anyio.current_time() - GRACE_S
            assert await doubts.settle(lost(after=12), lost_at=lost_at, busy=never) == Absent()


@pytest.mark.parametrize("growth", [1, 30, 70])
@virtual_time
async def test_a_list_that_grows_while_it_is_read_is_read_to_its_end(growth: int) -> None:
    class Growing(Account):
        async def list_tasks(self, *, start: int = 0, limit: int = 100) -> list[Task]:
            for _ in range(growth):
                self.add(max(map(int, self.tasks)) + 1, prompt="another")
            return await super().list_tasks(start=start, limit=limit)

    account = Growing(*range(10, 500), known=[15, 490])
    task = account.add(9, prompt="a cat")
    async with settling(account) as doubts:
        lost_at = anyio.current_time() - GRACE_S
        assert await doubts.settle(lost(after=0), lost_at=lost_at, busy=never) == Adopt(task)


@virtual_time
async def test_a_deep_reading_does_not_break_off_over_a_page_that_fails() -> None:
    class Stumbling(Account):
        asked = 0

        async def list_tasks(self, *, start: int = 0, limit: int = 100) -> list[Task]:
            self.asked += 1
            if start and self.asked % 2:  # every other page
                raise errors.ServerFault("502")
            return await super().list_tasks(start=start, limit=limit)

    account = Stumbling(9, 10, *range(100, 2100), known=[9])
    task = account.add(11, prompt="a cat")
    async with settling(account) as doubts:
        begun_at = anyio.current_time()
        assert await doubts.settle(lost(), lost_at=begun_at, busy=never) == Adopt(task)
        assert anyio.current_time() - begun_at < GRACE_S


@virtual_time
async def test_without_a_known_task_two_answers_after_the_grace_are_needed() -> None:
    account = Account(9, 10)
    async with settling(account) as doubts:
        begun_at = anyio.current_time()
        assert await doubts.settle(lost(), lost_at=begun_at, busy=never) == Absent()
        assert anyio.current_time() - begun_at >= GRACE_S + SECOND_LOOK_S


@virtual_time
async def test_an_answer_from_before_an_outage_is_not_the_first_of_the_two() -> None:
    account = Account(9, 10)
    async with settling(account) as doubts:
        await doubts.settle(lost(), lost_at=anyio.current_time(), busy=never)  # the list was read before
        begun_at = anyio.current_time()
        account.trouble = lambda: errors.ServerFault("502")

        async def mend() -> None:
            await anyio.sleep(GRACE_S + SECOND_LOOK_S + 5)
            account.trouble = None
            account.readings.clear()

        async with anyio.create_task_group() as group:
            group.start_soon(mend)
            assert await doubts.settle(lost(), lost_at=begun_at, busy=never) == Absent()
        correct = account.readings
        assert correct[-1] - correct[0] >= SECOND_LOOK_S


@virtual_time
async def test_one_reading_serves_all_doubts() -> None:
    account = Account(9, 10, known=[10])
    answers: list[object] = []
    async with settling(account) as doubts:

        async def settle(number: int) -> None:
            lost_at = anyio.current_time()
            answers.append(await doubts.settle(lost(f"prompt {number}"), lost_at=lost_at, busy=never))

        async with anyio.create_task_group() as group:
            for number in range(200):
                group.start_soon(settle, number)
    assert answers == [Absent()] * 200
    assert len(account.readings) < 20


@virtual_time
async def test_of_identical_doubts_each_takes_a_task_of_its_own() -> None:
    account = Account(9, 10, known=[9])
    account.add(11, prompt="a cat")
    account.add(13, prompt="a cat")
    answers: list[object] = []
    async with settling(account) as doubts:

        async def settle() -> None:
            answer = await doubts.settle(lost(), lost_at=anyio.current_time(), busy=never)
            if isinstance(answer, Adopt):
                account.known.add(answer.task.id)  # recorded
            answers.append(answer)

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(settle)
    assert sorted(answer.task.id for answer in answers if isinstance(answer, Adopt)) == ["11", "13"]
    assert answers.count(Absent()) == 1


@virtual_time
async def test_nothing_is_concluded_while_a_submit_of_the_same_request_is_under_way() -> None:
    account = Account(9, 10, known=[9])
    account.add(11, prompt="a cat")
    ended_at = anyio.current_time() + 60
    async with settling(account) as doubts:
        answer = await doubts.settle(
            lost(), lost_at=anyio.current_time(), busy=lambda: anyio.current_time() < ended_at
        )
        assert isinstance(answer, Adopt)
        assert anyio.current_time() >= ended_at


@virtual_time
async def test_the_list_is_read_back_to_before_the_submit() -> None:
    account = Account(*range(1, 11), known=[200])
    mine = account.add(11, prompt="a cat")
    for number in range(12, 400):
        account.add(number, prompt="others")
    async with settling(account) as doubts:
        answer = await doubts.settle(lost(), lost_at=anyio.current_time(), busy=never)
    assert answer == Adopt(mine)
    assert account.pages == 4


@virtual_time
async def test_a_list_too_long_to_be_read_back_to_before_the_submit_proves_no_absence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("batchrun.dispatch.doubts.MAX_PAGES", 3)
    account = Account(*range(1, 500), known=[450])
    async with settling(account) as doubts:
        answer = await doubts.settle(lost(), lost_at=anyio.current_time(), busy=never)
    assert answer == Hold("the listing does not reach back to before the submit")


@virtual_time
async def test_a_young_account_is_read_to_its_end() -> None:
    account = Account(known=[])
    for number in range(1, 151):
        account.add(number, prompt="others")
    async with settling(account) as doubts:
        answer = await doubts.settle(lost(after=0), lost_at=anyio.current_time(), busy=never)
    assert answer == Absent()


@virtual_time
async def test_a_list_that_breaks_off_after_a_full_page_is_not_taken_as_whole() -> None:
    account = Account(known=[150])
    for number in range(1, 151):
        account.add(number, prompt="others")
    mine = account.add(0, prompt="a cat")  # on the second page, and younger than the newest known: -1

    class BreakingOff(Account):
        async def list_tasks(self, *, start: int = 0, limit: int = 100) -> list[Task]:
            found = await Account.list_tasks(self, start=start, limit=limit)
            return found if start == 0 or len(self.readings) > 20 else []

    account.__class__ = BreakingOff
    async with settling(account) as doubts:
        answer = await doubts.settle(lost(after=-1), lost_at=anyio.current_time(), busy=never)
    assert answer == Adopt(mine)


@virtual_time
async def test_a_list_that_does_not_echo_parameters_leaves_the_row_to_the_user() -> None:
    account = Account(9, 10, known=[9])
    account.tasks["11"] = Task("11", parameters=None)
    async with settling(account) as doubts:
        begun_at = anyio.current_time()
        answer = await doubts.settle(lost(), lost_at=begun_at, busy=never)
        assert isinstance(answer, Hold)
        assert "does not echo" in answer.reason
        assert anyio.current_time() - begun_at >= LISTING_PATIENCE_S


@virtual_time
async def test_a_list_that_fails_for_two_minutes_leaves_the_row_to_the_user() -> None:
    account = Account(9, 10, known=[9])
    account.trouble = lambda: errors.ServerFault("502 Bad Gateway")
    async with settling(account) as doubts:
        begun_at = anyio.current_time()
        answer = await doubts.settle(lost(), lost_at=begun_at, busy=never)
        assert answer == Hold("the service's task list cannot be read: 502 Bad Gateway")
        assert LISTING_PATIENCE_S <= anyio.current_time() - begun_at <= LISTING_PATIENCE_S + 10


@virtual_time
async def test_a_list_that_fails_now_and_then_still_settles() -> None:
    account = Account(9, 10, known=[9])
    calls = 0

    def sometimes() -> Exception:
        return errors.ReplyLost("reset")

    async def flicker() -> None:
        nonlocal calls
        while True:
            calls += 1
            account.trouble = sometimes if calls % 3 else None
            await anyio.sleep(1)

    async with settling(account) as doubts, anyio.create_task_group() as group:
        group.start_soon(flicker)
        assert await doubts.settle(lost(), lost_at=anyio.current_time(), busy=never) == Absent()
        group.cancel_scope.cancel()


@virtual_time
async def test_a_list_that_fails_for_a_moment_leaves_no_old_doubt_to_the_user() -> None:
    account = Account(9, 10)
    task = account.add(11, prompt="a cat")
    account.trouble = lambda: errors.ServerFault("502")
    async with settling(account) as doubts, anyio.create_task_group() as group:

        async def mend() -> None:
            await anyio.sleep(10)
            account.trouble = None

        group.start_soon(mend)
        long_ago = anyio.current_time() - 10 * LISTING_PATIENCE_S
        assert await doubts.settle(lost(), lost_at=long_ago, busy=never) == Adopt(task)


@virtual_time
async def test_a_service_without_a_list_is_not_waited_for() -> None:
    account = Account()
    account.trouble = lambda: errors.NotFound("no such endpoint")
    async with settling(account) as doubts:
        begun_at = anyio.current_time()
        assert isinstance(await doubts.settle(lost(), lost_at=begun_at, busy=never), Hold)
        assert anyio.current_time() - begun_at < 10


@virtual_time
async def test_a_service_that_asks_to_wait_is_not_asked_meanwhile() -> None:
    account = Account(9, 10, known=[9])
    account.trouble = lambda: errors.RateLimited("slow", retry_after_s=60.0)
    async with settling(account) as doubts:
        with anyio.move_on_after(59):
            await doubts.settle(lost(), lost_at=anyio.current_time(), busy=never)
    assert len(account.readings) == 1


@virtual_time
async def test_refused_credentials_reach_every_row_in_doubt_and_leave_the_rest_alive() -> None:
    account = Account(9, 10, known=[9])
    account.trouble = lambda: errors.CredentialsRefused("bad key")
    refused = 0
    async with settling(account) as doubts:

        async def settle() -> None:
            nonlocal refused
            with pytest.raises(errors.CredentialsRefused):
                await doubts.settle(lost(), lost_at=anyio.current_time(), busy=never)
            refused += 1

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(settle)
        assert refused == 3
        account.trouble = None
        assert await doubts.settle(lost(), lost_at=anyio.current_time(), busy=never) == Absent()


@virtual_time
async def test_a_doubt_that_nobody_waits_for_any_more_is_not_read_for() -> None:
    account = Account(9, 10)
    async with settling(account) as doubts:
        with anyio.move_on_after(5):
            await doubts.settle(lost(), lost_at=anyio.current_time(), busy=never)
        await anyio.sleep(BETWEEN_S + 1)
        readings = len(account.readings)
        await anyio.sleep(1000)
        assert len(account.readings) == readings


@virtual_time
async def test_the_newest_task_is_the_highest_number_the_list_shows() -> None:
    account = Account(9, 10)
    doubts = doubts_of(account)
    assert await doubts.newest_task() == 10
    assert await doubts_of(Account()).newest_task() == 0
    account.trouble = lambda: errors.ServerFault("502")
    assert await doubts.newest_task() is None
    account.trouble = lambda: errors.CredentialsRefused("bad key")
    with pytest.raises(errors.CredentialsRefused):
        await doubts.newest_task()


@virtual_time
async def test_ids_that_are_no_numbers_of_ours_do_not_count_as_newest() -> None:
    class Forged(Account):
        async def list_tasks(self, *, start: int = 0, limit: int = 100) -> list[Task]:
            return [Task("9" * 5000), Task("x"), Task("12")]

    account = Forged()
    assert await doubts_of(account).newest_task() == 12
