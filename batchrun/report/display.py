"""The live picture of a run on a terminal: drawn four times a second, gone when the run ends."""

from __future__ import annotations

import time
from collections import deque

import anyio
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batchrun.progress import Event, Fact
from batchrun.report.talk import Talk
from batchrun.report.watch import Notes, Sight, Watch, active_of, rate_of
from batchrun.report.words import about, count, duration, plain, rough_usd, size

#: Between two drawings.
EVERY_S = 0.25
#: Newest notes shown.
NOTES = 5


class Display:
    """Draws a run on a terminal."""

    def __init__(self, talk: Talk, watch: Watch) -> None:
        self._talk = talk
        self._watch = watch
        self._notes = Notes()
        self._newest: deque[Text] = deque(maxlen=NOTES)
        self._stopping: str | None = None

    def listen(self, event: Event) -> None:
        """Take in an event."""
        if event.fact is Fact.STOPPING:
            self._stopping = plain(str(event.details.get("reason", "")), limit=300)
        if note := self._notes.note(event):
            text, style = note
            self._newest.append(Text(f"{time.strftime('%H:%M:%S')}  {text}", style=style))

    async def run(self) -> None:
        """Draw until cancelled, then leave the terminal as it was."""
        try:
            with Live(console=self._talk.console, auto_refresh=False, transient=True) as live:
                while True:
                    live.update(self._picture(), refresh=True)
                    await anyio.sleep(EVERY_S)
        except OSError:  # the terminal is gone; the run goes on
            self._talk.is_over = True

    def _picture(self) -> RenderableType:
        sight = self._watch.look()
        if self._watch.began_at is None:
            dots = "." * (1 + int(sight.elapsed_s * 2) % 3)
            return _line((f"reading the manifest{dots}", "dim"))
        return Group(
            "",
            _bar(sight),
            _rows(sight),
            _gain(sight, is_stopping=self._stopping is not None),
            *self._state(sight),
            *(_cut(note) for note in self._newest),
        )

    def _state(self, sight: Sight) -> list[Text]:
        if self._stopping is not None:
            text = f"stopping ({self._stopping}): finishing downloads; again to leave at once"
            awaited = [(f"{count(sight.awaited, 'answer')} awaited", "")] if sight.awaited else []
            return [_line((text, "bold yellow"), *awaited)]
        return [_line((f"waiting: {sight.waiting_for}", "bold yellow"))] if sight.waiting_for else []


def _bar(sight: Sight) -> Table:
    grid = Table.grid(expand=True, padding=(0, 1, 0, 0))
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    share = sight.settled / sight.total if sight.total else 1.0
    bar = ProgressBar(total=max(1, sight.total), completed=sight.settled, finished_style="green")
    # rounded down: 100% is said when it is true
    grid.add_row(bar, Text(f"{int(100 * share)}%"), Text(duration(int(sight.elapsed_s)), style="dim"))
    return grid


def _rows(sight: Sight) -> Text:
    parts = [(f"{sight.done:,} of {count(sight.total, 'row')} done", "green")]
    parts += [(text, "red") for text in sight.unmade]
    parts += [(f"{sight.in_doubt:,} in doubt", "yellow")] if sight.in_doubt else []
    parts.append((active_of(sight), "cyan"))
    parts += [(f"{sight.saving:,} being saved", "cyan")] if sight.saving else []
    return _line(*parts)


def _gain(sight: Sight, *, is_stopping: bool) -> Text:
    parts = [(count(sight.images, "image"), ""), (size(sight.bytes), "")]
    parts += [(rough_usd(sight.cost_usd), "")] if sight.cost_usd else []
    parts += [(rate_of(sight), "")] if sight.rows_per_min else []
    is_moving = sight.waiting_for is None and not is_stopping
    if sight.left_s is not None and sight.settled < sight.total and is_moving:
        parts.append((f"about {about(sight.left_s)} left", "bold"))
    return _line(*parts)


def _line(*parts: tuple[str, str]) -> Text:
    line = Text("  ").join(Text(text, style=style) for text, style in parts)
    return _cut(line)


def _cut(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text
