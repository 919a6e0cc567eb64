"""What following tasks costs in requests, and how late their ends are seen.

Against the real simulator in a process of its own, which tells when a task ended and which answer showed it
first: the runner's own client and tracker, without the work of saving images, keep a number of tasks active.
The curve of lag against looks is the policy in virtual time, beside the best that any schedule can do when it
knows the durations beforehand.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import anyio

from batchrun.dispatch.hearing import Hearing
from batchrun.dispatch.sweep import Sweeps
from batchrun.dispatch.track import ADAPT_S, Tracker
from batchrun.rules import pace
from batchrun.rules.pace import Durations, Spread
from batchrun.settings import credentials
from batchrun.wiro.client import Wiro as Client
from bench.figures import Figure
from bench.process import Wiro, simulator

RUN = "/Run/retroAIx/Retro-Cartoons"
LOGNORMAL = "lognormal:6:20"
SIGMA = math.log(20 / 6) / 1.6449
PRICES_S = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
#: Tasks followed for each point of the curve.
POINT_TASKS = 3000


def measure(_place: Path) -> list[Figure]:
    """Looks, requests and lags, with their targets."""
    with ThreadPoolExecutor(2) as threads:  # both are idle most of the time
        varied = threads.submit(_followed, LOGNORMAL, "detail", active=32, for_s=105.0, drain=True)
        steady = threads.submit(_followed, "6", "detail", active=16, for_s=105.0, drain=True)
        detail, even = varied.result(), steady.result()
    listed = _followed(LOGNORMAL, "list", active=1000, for_s=45.0)
    told = _followed(LOGNORMAL, "websocket", active=500, for_s=35.0)
    a_look = "Detail only, tasks of median 6 s and p95 20 s, first tasks included"
    return [
        Figure("looks per task, varied durations", detail["looks"], "looks", 4.4, note=a_look),
        Figure("mean lag, varied durations", detail["lag_s"], "s", 1.0, note=a_look),
        Figure("looks per task, steady durations", even["looks"], "looks", 1.25, note="Detail only, 6 s"),
        Figure("mean lag, steady durations", even["lag_s"], "s", 0.12, note="Detail only, 6 s"),
        Figure("requests at 1000 active", listed["per_s"], "requests/s", 60, note=_active(listed)),
        Figure("mean lag at 1000 active", listed["lag_s"], "s", 0.5, note=_active(listed)),
        Figure("mean lag by WebSocket at 500 active", told["lag_s"], "s", 0.05, note=_active(told)),
        Figure("looks per task by WebSocket", told["looks"], "looks", note="the one that confirms included"),
        *_curve(),
    ]


def _active(took: dict[str, float]) -> str:
    return f"{took['active']:.0f} active on average, {took['tasks']:.0f} tasks in {took['window_s']:.0f} s"


# --- against the simulator ----------------------------------------------------------------------------


def _followed(
    seconds: str, track: str, *, active: int, for_s: float, drain: bool = False
) -> dict[str, float]:
    """Keep so many tasks active for a time; `drain`: count every look of every task, from the first one on.

    Else what is counted begins after the first 20 s, when all are active and durations are known.
    """
    with simulator("--seconds", seconds, "--slots", str(2 * active), "--balance", "1000000") as wiro:
        before, after = asyncio.run(_follow(wiro, track, active=active, for_s=for_s, drain=drain))
        tasks = wiro.ask("tasks")
    begun_at, ended_at = before["at"], after["at"]
    ended = [
        task
        for task in tasks
        if task["noticed_at"] is not None and (drain or begun_at <= task["ended_at"] <= ended_at)
    ]
    # one that ended and was not seen by the end of the measurement has waited until then at least
    unseen = [task for task in tasks if task["noticed_at"] is None and task["ended_at"] is not None]
    lags = [task["noticed_at"] - task["ended_at"] for task in ended]
    lags += [max(0.0, ended_at - task["ended_at"]) for task in unseen if task["ended_at"] <= ended_at]
    sent = {name: after.get(name, 0) - (0 if drain else before.get(name, 0)) for name in ("detail", "list")}
    return {
        "looks": sum(sent.values()) / len(ended),
        "per_s": sum(sent.values()) / (ended_at - begun_at),
        "lag_s": mean(lags),
        "tasks": len(ended),
        "active": (before["active"] + after["active"]) / 2,
        "window_s": ended_at - begun_at,
    }


async def _follow(
    wiro: Wiro, track: str, *, active: int, for_s: float, drain: bool
) -> tuple[dict[str, float], dict[str, float]]:
    rng, numbers = Random(1), count()
    async with Client(credentials(wiro.env)) as client, anyio.create_task_group() as group:
        tracker = Tracker(client, rng=rng)
        if track == "list":
            tracker.add(Sweeps(tracker, client, note=print))
        elif track == "websocket":
            tracker.add(Hearing(tracker, client, rng=rng, note=print))
        group.start_soon(tracker.run)
        until = anyio.current_time() + for_s

        async def keep(delay_s: float) -> None:
            await anyio.sleep(delay_s)
            while anyio.current_time() < until:
                body = {"prompt": f"a fox {next(numbers)}", "samples": "1"}
                task = await client.submit(RUN, body)
                await tracker.follow(task_id=task.task_id, token=task.token, tool=1)

        async with anyio.create_task_group() as workers:
            for number in range(active):
                workers.start_soon(keep, 8.0 * number / active)  # as they would come
            await anyio.sleep(20.0)
            before = await _stats(wiro)
            await anyio.sleep_until(until - 1.0)
            after = await _stats(wiro)
            if not drain:
                workers.cancel_scope.cancel()
        if drain:
            after = await _stats(wiro)
        group.cancel_scope.cancel()
    return before, after


async def _stats(wiro: Wiro) -> dict[str, float]:
    """Requests so far, tasks active, and the simulator's own time: that of instants in its tasks."""
    stats = await asyncio.to_thread(wiro.ask, "stats")
    tasks: list[dict[str, Any]] = await asyncio.to_thread(wiro.ask, "tasks")
    newest = max(max(task["made_at"], task["ended_at"] or 0.0) for task in tasks)
    return {**stats["requests"], "active": stats["active"], "at": newest}


# --- in virtual time -----------------------------------------------------------------------------------


def _curve() -> Iterator[Figure]:
    """Points of looks and lag at fixed prices of a look: the policy, and the best with all known before."""
    known = Spread([_known(high) - _known(low) for low, high in pairwise(pace._EDGES)])
    for price_s in PRICES_S:
        schedule = known.schedule(price_s)
        note = "durations known beforehand: no schedule does better"
        yield Figure(f"best at price {price_s:g} s: looks", schedule.looks, "looks", note=note)
        yield Figure(f"best at price {price_s:g} s: lag", schedule.waiting_s, "s", note=note)
    for price_s in PRICES_S:
        looks, lag_s = _point(price_s)
        note = "the policy, durations learned from its own looks"
        yield Figure(f"learned at price {price_s:g} s: looks", looks, "looks", note=note)
        yield Figure(f"learned at price {price_s:g} s: lag", lag_s, "s", note=note)
    for name, every in (("every 3 s", lambda age_s: 3.0), ("Wiro's own client", _theirs)):
        looks, lag_s = _point(None, every)
        yield Figure(f"{name}: looks", looks, "looks", note="in virtual time, same durations")
        yield Figure(f"{name}: lag", lag_s, "s", note="in virtual time, same durations")


def _known(age_s: float) -> float:
    """The chance that a task has ended by an age."""
    return 0.5 * (1 + math.erf(math.log(age_s / 6) / SIGMA / math.sqrt(2))) if age_s else 0.0


def _theirs(age_s: float) -> float:
    return 2.0 if age_s < 15 else 5.0 if age_s < 60 else 10.0


def _point(price_s: float | None, every: Callable[[float], float] | None = None) -> tuple[float, float]:
    """Looks per task and mean lag of tasks followed at one price, or at given distances; 24 at a time."""
    rng, numbers, durations = Random(7), count(), Durations()
    durations.price_s = price_s or durations.price_s
    next_look_s = every or durations.next_look_s
    agenda: list[tuple[float, int, float, float]] = []  # due at, task, begun at, seconds
    seen_s: dict[int, float] = {}  # the age of each task when it was last seen unfinished
    looks, made, ticked_at, lags = 0, 0, 0.0, []

    def begin(at: float) -> None:
        task = next(numbers)
        seen_s[task] = 0.0
        seconds = rng.lognormvariate(math.log(6), SIGMA)
        heapq.heappush(agenda, (at + next_look_s(0.0), task, at, seconds))

    for made in range(1, 25):
        begin(made * 0.1)
    while agenda:
        at, task, begun_at, seconds = heapq.heappop(agenda)
        if at > ticked_at + ADAPT_S:
            ticked_at = at
            durations.running(list(seen_s.values()))
        age_s = at - begun_at
        looks += 1
        if age_s < seconds:
            seen_s[task] = age_s
            heapq.heappush(agenda, (at + next_look_s(age_s), task, begun_at, seconds))
            continue
        lags.append(age_s - seconds)
        durations.add(age_s, over_s=seen_s.pop(task))
        if made < POINT_TASKS:
            made += 1
            begin(at)
    return looks / POINT_TASKS, mean(lags)
