"""The tests' own clock: virtual time passes in order, at once, and never while something real goes on."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import aiofiles
import anyio
import anyio.abc
import anyio.to_thread
import pytest

from tests.support.clock import Standstill, run_with_virtual_time, virtual_time


@virtual_time
async def test_sleeps_end_in_the_order_of_their_lengths() -> None:
    ended: list[float] = []
    begun_at = anyio.current_time()

    async def sleep(seconds: float) -> None:
        await anyio.sleep(seconds)
        ended.append(seconds)
        assert anyio.current_time() == pytest.approx(begun_at + seconds)

    async with anyio.create_task_group() as group:
        for seconds in (86_400.0, 0.5, 600.0, 3.0):
            group.start_soon(sleep, seconds)
    assert ended == [0.5, 3.0, 600.0, 86_400.0]


@virtual_time
async def test_deadlines_follow_the_virtual_clock() -> None:
    with anyio.move_on_after(3600) as scope:
        await anyio.Event().wait()
    assert scope.cancelled_caught


@virtual_time
async def test_the_clock_stands_while_a_worker_thread_is_busy() -> None:
    with anyio.fail_after(1e-3):
        await anyio.to_thread.run_sync(time.sleep, 0.02)
        await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.02)


@virtual_time
async def test_the_clock_stands_while_a_file_is_written(tmp_path: Path) -> None:
    with anyio.fail_after(1e-3):
        async with aiofiles.open(tmp_path / "file", "wb") as file:
            for _ in range(20):
                await file.write(b"x" * 100_000)
    assert (tmp_path / "file").stat().st_size == 2_000_000


@virtual_time
async def test_bytes_between_sockets_arrive_before_time_passes() -> None:
    async def echo(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.send(await stream.receive())

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with anyio.create_task_group() as group:
            group.start_soon(listener.serve, echo)
            with anyio.fail_after(0.01):
                async with await anyio.connect_tcp("127.0.0.1", port) as stream:
                    await stream.send(b"hello")
                    assert await stream.receive() == b"hello"
            group.cancel_scope.cancel()


def test_waiting_for_nothing_is_told_instead_of_hanging() -> None:
    with pytest.raises(Standstill, match="every task waits"):
        run_with_virtual_time(lambda: anyio.Event().wait())


def test_a_test_that_never_ends_is_told_after_its_virtual_time() -> None:
    async def tick() -> None:
        for _ in range(10**6):
            await anyio.sleep(1)

    with pytest.raises(Standstill, match="60 s"):
        run_with_virtual_time(tick, limit_s=60)


def test_the_result_comes_back() -> None:
    async def add(left: int, right: int) -> int:
        await anyio.sleep(1000)
        return left + right

    assert run_with_virtual_time(add, 1, 2) == 3


def test_what_cleans_up_after_a_standstill_may_take_its_virtual_time() -> None:
    cleaned = []

    async def wait() -> None:
        try:
            await anyio.Event().wait()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(1000)
                cleaned.append(True)

    with pytest.raises(Standstill):
        run_with_virtual_time(wait)
    assert cleaned
