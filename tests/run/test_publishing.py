"""Many images are published by few threads, each to its own caller, whatever becomes of the others."""

from __future__ import annotations

import threading
from pathlib import Path

import anyio
import anyio.to_thread

from batchrun.dispatch.publishing import THREADS, TOGETHER, Publisher
from batchrun.errors import OutputCorrupt
from batchrun.model import Output
from batchrun.outputs.formats import ImageFacts
from batchrun.outputs.save import Partial, Saved
from tests.support.images import draw

MANY = 3 * THREADS * TOGETHER


def received(folder: Path, number: int, data: bytes) -> Partial:
    """An image of which all bytes have come."""
    partial = Partial(folder / "partial" / f"{number}.part")
    partial._take(memoryview(data))
    return partial


async def test_every_caller_gets_its_own_image_or_error_and_no_more_threads_are_at_work_than_may(
    tmp_path: Path,
) -> None:
    publisher, data = Publisher(), draw("PNG")
    saved: dict[int, Saved] = {}
    refused: set[int] = set()
    at_work: set[int] = set()

    async def one(number: int) -> None:
        def place(facts: ImageFacts) -> Path:
            at_work.add(threading.get_ident())
            return tmp_path / "images" / f"{number}.{facts.extension}"

        whole = number % 10 != 3
        partial = received(tmp_path, number, data if whole else data[:-1])
        try:
            saved[number] = await publisher.publish(partial, Output(0, ""), place, None)
        except OutputCorrupt:
            refused.add(number)

    async with anyio.create_task_group() as publishing:
        publishing.start_soon(publisher.run)
        async with anyio.create_task_group() as images:
            for number in range(MANY):
                images.start_soon(one, number)
        publishing.cancel_scope.cancel()
    assert refused == {number for number in range(MANY) if number % 10 == 3}
    assert saved.keys() == set(range(MANY)) - refused
    assert all(image.path.name == f"{number}.png" for number, image in saved.items())
    assert all(image.path.read_bytes() == data for image in saved.values())
    assert 0 < len(at_work) <= THREADS


async def test_one_who_no_longer_waits_takes_nothing_from_the_others(tmp_path: Path) -> None:
    publisher, data = Publisher(), draw("PNG")
    begun, may_end = threading.Event(), threading.Event()
    others: list[Saved] = []

    def slow(facts: ImageFacts) -> Path:
        begun.set()
        assert may_end.wait(10)
        return tmp_path / "slow.png"

    async def leave() -> None:
        with anyio.CancelScope() as scope:
            leaving.append(scope)
            await publisher.publish(received(tmp_path, 0, data), Output(0, ""), slow, None)
        assert scope.cancelled_caught

    async def stay(number: int) -> None:
        partial = received(tmp_path, number, data)
        others.append(
            await publisher.publish(partial, Output(0, ""), lambda facts: tmp_path / f"{number}.png", None)
        )

    leaving: list[anyio.CancelScope] = []
    async with anyio.create_task_group() as publishing:
        publishing.start_soon(publisher.run)
        async with anyio.create_task_group() as images:
            images.start_soon(leave)
            await anyio.to_thread.run_sync(begun.wait, 10)
            for number in range(1, 2 * TOGETHER):
                images.start_soon(stay, number)
            leaving[0].cancel()
            with anyio.fail_after(10):
                while len(others) < 2 * TOGETHER - 1:
                    await anyio.sleep(0.01)
            may_end.set()
        publishing.cancel_scope.cancel()
    # what a thread has begun is brought to its end: the next start adopts it
    assert (tmp_path / "slow.png").read_bytes() == data
