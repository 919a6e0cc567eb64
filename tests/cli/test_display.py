"""On a terminal: a live picture, gone at the end, and colours unless they are not wanted."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Mapping

from tests.support.command import COMMAND, TIMEOUT_S, TOOL, Here, simulator, until

ROWS, COLUMNS = 30, 100


def _take_terminal() -> None:
    """Make standard input the terminal that Ctrl-C and hanging up come from."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def on_a_terminal(
    here: Here, *arguments: str, env: Mapping[str, str] | None = None, keys: bytes = b""
) -> tuple[int, str]:
    """The exit code and all that was written to the terminal; `keys` are typed once a picture is drawn."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    with subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=here.folder,
        env={**here.env, "TERM": "xterm-256color", **(env or {})},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=_take_terminal,  # noqa: PLW1509  a process without threads
    ) as process:
        os.close(theirs)
        written = b""
        try:
            while chunk := os.read(ours, 65536):
                written += chunk
                if keys and b"active" in written:
                    os.write(ours, keys)
                    keys = b""
        except OSError:  # the other end is closed: EIO
            pass
        code = process.wait(TIMEOUT_S)
    os.close(ours)
    return code, written.decode()


def words(text: str) -> str:
    """The text without the sequences that place and colour it."""
    return re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text).replace("\r", "")


def test_a_run_is_drawn_while_it_goes_on_and_summed_up_in_the_end(here: Here) -> None:
    with simulator("--seconds", "0.8") as wiro:
        here = Here(here.folder, wiro)
        code, text = on_a_terminal(here, "run", here.rows(4), "--tool", TOOL, "--set", "samples=1")
    assert code == 0
    said = words(text)
    assert "0 of 4 rows done" in said
    assert "tasks active" in said
    assert said.endswith("\n")
    last = said[said.rindex("all 4 rows done") :]
    assert "images  4, " in last
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor comes back"


def test_ctrl_c_at_the_terminal_stops_in_good_order(here: Here) -> None:
    with simulator("--seconds", "600") as wiro:
        here = Here(here.folder, wiro)
        code, text = on_a_terminal(here, "run", here.rows(2), "--tool", TOOL, keys=b"\x03")
    assert code == 3
    assert "stopping: finishing downloads; again to leave at once" in words(text)
    assert "stopped (by Ctrl-C)" in words(text)


def test_no_color_means_no_colour(here: Here) -> None:
    here.rows(1)
    arguments = ("check", "p.csv", "--tool", TOOL)
    coloured = re.compile(r"\x1b\[[0-9;]*3[0-9]")
    assert coloured.search(on_a_terminal(here, *arguments)[1])
    assert not coloured.search(on_a_terminal(here, *arguments, env={"NO_COLOR": "1"})[1])


def test_without_the_display_a_terminal_gets_lines(here: Here) -> None:
    _, text = on_a_terminal(here, "run", here.rows(1), "--tool", TOOL, "--no-display")
    assert "\x1b[?25l" not in text
    assert "the 1 row is done" in words(text)


def test_tools_are_shown_as_a_table(here: Here) -> None:
    code, text = on_a_terminal(here, "tools", "show", "text-to-image-sd-lora")
    assert code == 0
    assert "─" in text
    assert "prompt (required)" in words(text)


def test_a_terminal_that_goes_away_stops_the_run_in_good_order(here: Here) -> None:
    with simulator("--seconds", "600") as wiro:
        here = Here(here.folder, wiro)
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            [*COMMAND, "run", here.rows(1), "--tool", TOOL, "--json"],
            cwd=here.folder,
            env={**here.env, "TERM": "xterm"},
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_take_terminal,  # noqa: PLW1509  a process without threads
        ) as process:
            os.close(theirs)
            os.set_blocking(ours, False)
            until(lambda: wiro.stats()["active"] == 1, "the task runs")
            os.close(ours)
            assert process.wait(TIMEOUT_S) == 3
