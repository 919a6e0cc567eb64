"""Whatever a process is told by its system or its terminal, it ends in order and the next start goes on."""

from __future__ import annotations

import json
import os
import pty
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from tests.cli.test_display import _take_terminal
from tests.crash.starts import result_of, undisturbed
from tests.support.command import COMMAND, TIMEOUT_S, TOOL, Here, simulator, until
from tests.support.runs import job_of

ROWS = 4
RUN = ("run", "p.csv", "--tool", TOOL, "--set", "samples=1")
#: After two tasks the service asks to wait: however slow the machine, a signal finds the run at work.
BUSY = ("--fault", "run-429@3", "--retry-after", "600")


@contextmanager
def service(folder: Path, *arguments: str) -> Iterator[Here]:
    """A folder with a manifest, and a simulator that runs two tasks at once."""
    with simulator("--slots", "2", *arguments) as wiro:
        here = Here(folder, wiro)
        here.rows(ROWS)
        yield here


def facts_of(here: Here) -> list[str]:
    """What has been announced so far."""
    log = here.folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)["fact"] for line in lines]


def ended_in_order(here: Here) -> bool:
    """Whether every start has given the run back."""
    connection = sqlite3.connect(here.folder / "runs/p/state.sqlite3")
    try:
        return not connection.execute("SELECT count(*) FROM leases WHERE ended_at IS NULL").fetchone()[0]
    finally:
        connection.close()


def check_undisturbed(here: Here) -> None:
    """The folder holds exactly what an undisturbed run leaves, and no task was bought needlessly."""
    assert here.wiro is not None
    stats = here.wiro.stats()
    assert (stats["tasks"], stats["needless"]) == (ROWS, 0)
    calm = anyio.run(undisturbed, job_of(here.folder / "p.csv"))
    assert result_of(here.folder / "runs/p") == calm


def goes_on(here: Here) -> None:
    """The same command brings the run to the end of an undisturbed one."""
    assert here.wiro is not None
    here.wiro.weather(slots=None, faults=[])
    again = here.batchrun(*RUN)
    assert again.returncode == 0, again.stdout + again.stderr
    check_undisturbed(here)


@pytest.mark.parametrize(
    ("signals", "fault", "drained"),
    [
        ([signal.SIGINT], "cdn-drip", True),
        # some service managers hang up right after that: it is no hurry
        ([signal.SIGTERM, signal.SIGHUP], "cdn-drip", True),
        ([signal.SIGINT, signal.SIGINT], "cdn-stall", False),
        ([signal.SIGHUP, signal.SIGTERM], "cdn-stall", False),
    ],
    ids=["Ctrl-C", "TERM HUP", "Ctrl-C Ctrl-C", "HUP TERM"],
)
def test_a_signal_ends_a_run_in_order_and_the_next_start_completes_it(
    tmp_path: Path, signals: list[int], fault: str, drained: bool
) -> None:
    with service(tmp_path, "--fault", f"{fault}@1,2", *BUSY) as here:
        with here.start(*RUN, "--log", "log.jsonl") as going:
            until(lambda: "finished" in facts_of(here), "an image is under way")
            said = ""
            for number in signals:
                going.send_signal(number)
                while "stopping: finishing downloads" not in said:
                    assert going.stdout is not None
                    line = going.stdout.readline()
                    assert line, said
                    said += line
            said += going.communicate(timeout=TIMEOUT_S)[0]
        assert going.returncode == 3, said
        assert ended_in_order(here)
        assert ("saved" in facts_of(here)) is drained, "images under way are finished unless there is a hurry"
        goes_on(here)


def test_a_run_that_was_stopped_for_a_while_goes_on_as_if_nothing_were(tmp_path: Path) -> None:
    with service(tmp_path, "--seconds", "0.5") as here:
        with here.start(*RUN, "--log", "log.jsonl") as going:
            until(lambda: "in flight" in facts_of(here), "tasks run")
            going.send_signal(signal.SIGSTOP)
            time.sleep(2.5)  # kept-alive connections are dead by now, and tasks long over
            going.send_signal(signal.SIGCONT)
            said, _ = going.communicate(timeout=TIMEOUT_S)
        assert going.returncode == 0, said
        check_undisturbed(here)


def _closed(here: Here) -> subprocess.Popen[bytes]:
    shell = 'exec "$@" <&- >&- 2>&-'
    return subprocess.Popen(["sh", "-c", shell, "sh", *COMMAND, *RUN], cwd=here.folder, env=here.env)


def _unread(here: Here) -> subprocess.Popen[bytes]:
    reader, writer = os.pipe()
    with open(writer, "wb") as pipe, open("/dev/full", "wb") as full:
        os.close(reader)
        return subprocess.Popen(
            [*COMMAND, *RUN, "--json"],
            cwd=here.folder,
            env=here.env,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=full,
        )


def _nohup(here: Here) -> subprocess.Popen[bytes]:
    """On a terminal that is gone soon, with hang-ups ignored."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *RUN, "--log", "log.jsonl"],
        cwd=here.folder,
        env={**here.env, "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=_ignore_hang_ups,  # noqa: PLW1509  a process without threads
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    until(lambda: "in flight" in facts_of(here), "tasks run")
    os.close(ours)
    return process


def _ignore_hang_ups() -> None:
    _take_terminal()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.mark.parametrize("begin", [_closed, _unread, _nohup])
def test_streams_that_are_gone_change_nothing_about_a_run(
    tmp_path: Path, begin: Callable[[Here], subprocess.Popen[bytes]]
) -> None:
    with service(tmp_path, "--seconds", "0.3") as here:
        with begin(here) as process:
            assert process.wait(TIMEOUT_S) == 0
        assert ended_in_order(here)
        check_undisturbed(here)


def test_a_terminal_that_closes_over_a_download_ends_the_run_in_order(tmp_path: Path) -> None:
    with service(tmp_path, "--fault", "cdn-drip@1,2", *BUSY) as here:
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            [*COMMAND, *RUN, "--log", "log.jsonl"],
            cwd=here.folder,
            env={**here.env, "TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_take_terminal,  # noqa: PLW1509  a process without threads
        ) as process:
            os.close(theirs)
            os.set_blocking(ours, False)
            until(lambda: "finished" in facts_of(here), "an image is under way")
            os.close(ours)
            time.sleep(0.05)
            process.send_signal(signal.SIGHUP)  # the shell's own, after the system's
            assert process.wait(TIMEOUT_S) == 3
        assert ended_in_order(here)
        assert "saved" in facts_of(here)
        goes_on(here)
