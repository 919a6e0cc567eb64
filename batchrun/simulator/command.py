"""`batchrun simulate`: the simulator as a process of its own, for rehearsals and for harnesses elsewhere."""

from __future__ import annotations

import errno
import json
import sys
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchrun.errors import UsageError

if TYPE_CHECKING:
    from batchrun.simulator.world import Options


def serve(options: Options, *, with_parent: bool = False) -> None:
    """Serve until SIGTERM, SIGINT or, `with_parent`, the end of standard input.

    The first and only line on standard output is a JSON object: `base_url`, `socket_url`, `key` and `secret`
    (null for a project of key only), written once the simulator listens. Raises UsageError for options not
    understood and OSError where the port cannot be had.
    """
    import asyncio

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(options, with_parent=with_parent))


async def _serve(options: Options, *, with_parent: bool) -> None:
    import asyncio
    import signal

    from batchrun.simulator.server import Simulator

    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, over.set)
    async with Simulator(options) as simulator:
        if with_parent:
            _watch_input(lambda: loop.call_soon_threadsafe(over.set))
        address = {"base_url": simulator.base_url, "socket_url": simulator.socket_url}
        click.echo(json.dumps({**address, "key": simulator.key, "secret": simulator.secret}))
        sys.stdout.flush()
        await over.wait()


def _watch_input(ended: Any) -> None:
    """Call `ended` when standard input is closed, as it is when the process that holds its other end dies."""
    import contextlib
    import os
    import threading

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            ended()

    # A daemon: a read that blocks can only be left behind.
    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _decimal(_context: click.Context, _parameter: click.Parameter, value: str) -> Decimal:
    try:
        amount = Decimal(value)
    except InvalidOperation:
        raise click.BadParameter(f"{value!r} is not an amount of USD") from None
    if not amount.is_finite():
        raise click.BadParameter(f"{value!r} is not an amount of USD")
    return amount


@click.command(short_help="Serve a free stand-in for Wiro on this machine.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1; 0 takes any free one."
)
@click.option(
    "--slots",
    type=click.IntRange(min=1),
    help="Tasks active at once, at most. Default: by the balance, as at Wiro: a tenth of it up to 250 USD.",
)
@click.option(
    "--seconds",
    default="1",
    show_default=True,
    metavar="S",
    help="How long tasks take: seconds, MIN-MAX, or lognormal:MEDIAN:P95.",
)
@click.option(
    "--images",
    type=click.Choice(["tiny", "real"]),
    default="tiny",
    show_default=True,
    help="tiny: 64 x 64 pixels, at no cost. real: of the size asked for, to be looked at.",
)
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="RULE",
    help="Something that is to go wrong: NAME, NAME=2%, NAME@3,7 (third and seventh time), NAME*5 (first "
    "five times), NAME:TOOL=... (one tool), all=2% (everyday faults). Repeatable. `--fault help` lists them.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="For durations and chances.")
@click.option(
    "--balance",
    callback=_decimal,
    default="1000",
    show_default=True,
    metavar="USD",
    help="What is on the account. Finished tasks are charged to it.",
)
@click.option("--queue", is_flag=True, help="Let tasks beyond the slots wait instead of refusing them.")
@click.option("--key-only", is_flag=True, help="A project without a secret: requests are not signed.")
@click.option(
    "--stall", type=float, default=90.0, show_default=True, help="Seconds that a stalled answer takes."
)
@click.option(
    "--retry-after",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    metavar="SECONDS",
    help="What an answer that asks to slow down (HTTP 429) asks for.",
)
@click.option(
    "--memory",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Keep tasks and uploads in FILE; a later simulator with the same FILE knows them and goes on.",
)
@click.option("--with-parent", is_flag=True, help="End when standard input is closed.")
def simulate(
    port: int,
    slots: int | None,
    seconds: str,
    images: Any,
    faults: tuple[str, ...],
    seed: int,
    balance: Decimal,
    queue: bool,
    key_only: bool,
    stall: float,
    retry_after: int,
    memory: Path | None,
    with_parent: bool,
) -> None:
    """Serve a stand-in for Wiro on this machine: the same API, made-up images, nothing to pay.

    Prints one line of JSON with base_url, socket_url, key and secret; put them into WIRO_API_BASE_URL,
    WIRO_SOCKET_URL, WIRO_API_KEY and WIRO_API_SECRET, and any run goes to the simulator. Ends with Ctrl-C or
    SIGTERM. `batchrun run --simulate` starts one for the occasion.

    Beside the API it tells what it has seen, at the same address without the /v1: GET /simulator/stats and
    /simulator/tasks. POST /simulator/weather changes slots, balance, faults and more while it runs.
    """
    from batchrun.simulator.faults import listing

    if "help" in faults:
        click.echo("Faults (* everyday: part of `all`):\n")
        for name, summary in listing():
            click.echo(f"  {name:<22} {summary}")
        return
    from batchrun.simulator.world import Options

    options = Options(
        port=port,
        slots=slots,
        seconds=seconds,
        images=images,
        faults=faults,
        seed=seed,
        balance_usd=balance,
        queue=queue,
        stall_s=stall,
        retry_after_s=retry_after,
        memory=memory,
    )
    if key_only:
        from dataclasses import replace

        options = replace(options, secret=None)
    try:
        serve(options, with_parent=with_parent)
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = "another program serves there"
        elif error.errno == errno.EACCES:
            why = "this user may not serve there"
        else:
            why = error.strerror or str(error)
        raise click.UsageError(
            f"--port {port} cannot be had: {why}; choose another one, or 0 for any free one"
        ) from error
