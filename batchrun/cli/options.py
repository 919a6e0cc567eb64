"""What several commands are told, and how it becomes a Job. Only click is imported here, so help is quick."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from batchrun.manifest.job import Job
    from batchrun.settings import Credentials

Command = TypeVar("Command", bound=Callable[..., Any])

#: Keys that must not show, whatever goes wrong; see `redacted`.
_secrets: set[str] = set()


class _Concurrency(click.ParamType[int | str]):
    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto" or isinstance(value, int):
            return value
        if not str(value).isascii() or not str(value).isdigit():
            self.fail(f'{value!r} is neither a whole number nor "auto"', param, ctx)
        return int(value)


_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)


def _flag(name: str, text: str) -> Callable[[Command], Command]:
    """A switch that is None when it is not given: a job file's own word then stands."""
    return click.option(name, is_flag=True, flag_value=True, default=None, type=bool, help=text)


concurrency_option = click.option(
    "--concurrency",
    type=_Concurrency(),
    metavar="N|auto",
    help="Tasks active at the service at once. Default: auto, found by trying.",
)
_cost_option = click.option(
    "--max-cost", metavar="USD", help="What the run may cost in all its starts. Default: no cap."
)
_halt_option = click.option(
    "--halt",
    metavar="WHEN",
    help="Stop when failures come to fail=N rows or fail=N% of the settled ones; or never. Default: after 50 "
    "in a row for one cause.",
)
_stuck_option = click.option(
    "--on-stuck",
    type=click.Choice(["leave", "kill"]),
    help="Tasks that do not move on: left to the next start (the default), or killed and asked for anew.",
)
_pause_option = click.option(
    "--max-pause", metavar="TIME", help="How long to wait for an exhausted balance, as in 30m. Default: 1h."
)
_track_option = click.option(
    "--track",
    type=click.Choice(["auto", "detail", "list", "websocket"]),
    help="How tasks are followed: one by one, by pages of the task list, or as the service tells over a "
    "WebSocket. Default: auto, by pages from about 20 on, and over a WebSocket while rows wait for a slot.",
)
_looks_option = click.option(
    "--looks-per-s", type=float, metavar="N", help="Requests per second for following tasks. Default: 50."
)
lost_option = _flag("--regenerate-lost", "Buy rows again that were paid for and left no image.")

_READING = (
    click.option("--tool", metavar="TOOL", help="The tool of every row that names none itself."),
    click.option(
        "--set",
        "set_",
        multiple=True,
        metavar="P=VALUE",
        help="A parameter's value for every row that does not give it. Repeatable.",
    ),
    click.option(
        "--map",
        "map_",
        multiple=True,
        metavar="P=COLUMN",
        help="The column that holds a parameter, where the names differ. Repeatable.",
    ),
    click.option(
        "--expand",
        multiple=True,
        metavar="P=VALUES",
        help="A row stands for all these values, as in seed=1..4, seed=random, repeat=3 or "
        'scheduler=["A","B"]. Repeatable.',
    ),
    click.option(
        "--extra",
        type=click.Choice(["keep", "drop", "error"]),
        help="Columns that are no parameters: carried to the results, left out, or an error (the default).",
    ),
    click.option(
        "--format",
        "format_",
        type=click.Choice(["csv", "tsv", "jsonl", "json"]),
        help="The manifest's form, where its name does not tell (standard input).",
    ),
    click.option("--delimiter", metavar="CHAR", help='What separates cells, or "tab".'),
    click.option(
        "--lora-scale",
        type=click.Choice(["prompt", "parameter"]),
        help="How a LoRA's scale is sent: in the prompt (the default), or by its own name.",
    ),
    _flag("--skip-invalid", "Run the valid rows although others are invalid."),
    _flag("--allow-outside", "Let rows name local images outside the manifest's folder."),
    click.option(
        "--max-requests",
        type=_COUNT,
        metavar="N",
        help="What expansion may make of the manifest. Default: 100000.",
    ),
    click.option(
        "--max-row-bytes",
        type=_COUNT,
        metavar="N",
        help="A manifest row's size at most, which bounds memory. Default: 16777216.",
    ),
)
_BOUNDS = (_cost_option, _halt_option, _stuck_option, _pause_option, _track_option, _looks_option)
_WORKING = (
    click.option("--out", type=_PATH, metavar="DIR", help="The run's folder. Default: runs/<manifest name>."),
    click.option("--limit", type=_COUNT, metavar="N", help="Only the first N rows, for a try."),
    concurrency_option,
    click.option("--max-concurrency", type=_COUNT, metavar="N", help="What auto may come to. Default: 64."),
    click.option("--downloads", type=_COUNT, metavar="N", help="Images fetched at once. Default: 16."),
    click.option(
        "--attempts",
        type=_COUNT,
        metavar="N",
        help="Submissions of a row while its tasks fail, which is not billed. Default: 3.",
    ),
    *_BOUNDS,
    _flag("--rerun-changed", "Buy finished rows again that ask for something else now."),
    lost_option,
)
_SERVICE = (
    click.option(
        "--env-file", type=_PATH, metavar="FILE", help="A file that sets WIRO_API_KEY and the like."
    ),
    click.option(
        "--simulate",
        is_flag=True,
        help="Rehearse: a simulator is started for the occasion and asked; nothing is paid.",
    ),
    click.option(
        "--log", "log_file", type=_PATH, metavar="FILE", help="Add every event to FILE, a line of JSON each."
    ),
    click.option("--no-display", is_flag=True, help="Say a line every half minute, as without a terminal."),
)


def _all(options: tuple[Callable[[Any], Any], ...]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


#: What reads a manifest, what works on it, how the service is asked and shown.
reading_options = _all(_READING)
working_options = _all(_WORKING)
bounds_options = _all((concurrency_option, *_BOUNDS, lost_option))
service_options = _all(_SERVICE)
#: What `service_options` are called as arguments.
SERVICE_NAMES = frozenset({"env_file", "simulate", "log_file", "no_display"})


def job_of(path: str, values: Mapping[str, Any]) -> Job:
    """The job that a command line names, its options laid over the file's own words; raises UsageError."""
    from batchrun.manifest.job import job_for, parse_assignments

    overrides = dict(values)
    for name in ("set", "map", "expand"):
        texts = overrides.pop("expand" if name == "expand" else f"{name}_")
        overrides[name] = parse_assignments(texts, f"--{name}") if texts else None
    overrides["format"] = overrides.pop("format_")
    return job_for(path, **overrides)


def credentials_of(env_file: Path | None) -> Credentials:
    """Who asks, from the environment and the file named; raises UsageError."""
    from batchrun.settings import credentials

    found = credentials(os.environ, env_file)
    _secrets.update(secret for secret in (found.key, found.secret) if secret)
    return found


def redacted(text: str) -> str:
    """A text of unknown making (a traceback) without the keys that this process knows."""
    from batchrun.settings import KEY, SECRET

    known = _secrets | {os.environ.get(name, "").strip() for name in (KEY, SECRET)}
    for secret in sorted(known - {""}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text
