"""The command that goes on with a run, to be copied from the screen: as typed, or as the run was told."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from batchrun.manifest.job import Job
    from batchrun.report.summary import Commands

#: Settings that a Job holds and a command line cannot say.
_UNSAID = ("max_image_bytes",)
_TABLES = ("set", "map", "expand")


def as_typed(context: click.Context) -> Commands | None:
    """What was typed; None where the rows came from standard input, which has been read."""
    from batchrun.report.summary import Commands

    if context.params.get("job") == "-":
        return None
    return Commands(again=_typed(context), rest=_typed(context, without={"limit"}))


def _typed(context: click.Context, *, without: Collection[str] = ()) -> str:
    words = ["batchrun", *context.command_path.split()[1:]]
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE or name in without:
            continue
        value = context.params[name]
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(parameter, click.Argument):
                words.append(str(each))
            elif isinstance(parameter, click.Option) and parameter.is_flag:
                words.append(parameter.opts[0])
            else:
                words += [parameter.opts[0], str(each)]
    return shlex.join(words)


def as_told(job: Job, *, rehearsal: bool) -> Commands | None:
    """What says the same as a run's stored job; None where no command line can."""
    from batchrun.report.summary import Commands

    words = _told(job)
    if words is None:
        return None
    words += ["--simulate"] if rehearsal else []
    limit = [] if job.limit is None else ["--limit", str(job.limit)]
    return Commands(again=shlex.join([*words, *limit]), rest=shlex.join(words))


def _told(job: Job) -> list[str] | None:
    from batchrun.report.words import near

    if not isinstance(job.manifest, Path):
        return None
    words = ["batchrun", "run", near(job.manifest)]
    for name, field in type(job).model_fields.items():
        value = getattr(job, name)
        if name in ("manifest", "limit") or value == field.get_default(call_default_factory=True):
            continue
        option = f"--{name.replace('_', '-')}"
        if name in _UNSAID:
            return None
        if name in _TABLES:
            for key, each in value.items():
                text = _text(each, name)
                if text is None:
                    return None
                words += [option, f"{key}={text}"]
        elif name == "repeat":
            words += ["--expand", f"repeat={value}"]
        elif value is True:
            words.append(option)
        elif isinstance(value, Path):
            words += [option, near(value)]
        elif isinstance(value, float) and value == int(value):  # seconds
            words += [option, f"{int(value)}s"]
        else:
            words += [option, str(value)]
    return words


def _text(value: Any, table: str) -> str | None:
    """A value as `--set`, `--map` or `--expand` take it; None for what they would take for something else."""
    if (
        table == "expand"
        and isinstance(value, (list, tuple))
        and all(type(each) in (str, int) for each in value)
    ):
        return json.dumps(value)
    if isinstance(value, (str, int, Decimal)) and not isinstance(value, bool):
        return str(value)
    return None
