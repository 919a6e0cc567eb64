"""`batchrun tools`: the tools that can be asked for, and adding others from their pages."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from batchrun.model import Option, Parameter

#: Options of a parameter shown; a LoRA picker has hundreds.
OPTIONS_SHOWN = 10
#: Characters of a default shown; some are whole prompts.
DEFAULT_SHOWN = 80


@click.group(short_help="Show the tools that can be asked for; add others.")
def tools() -> None:
    """Show the tools that can be asked for, or add another from its page."""


@tools.command(name="list", short_help="All tools, shipped and added.")
@click.option("--json", "as_json", is_flag=True, help="Tell it as JSON.")
def list_(as_json: bool) -> None:
    """List all tools, shipped and added."""
    from batchrun.tools.catalog import load, to_json

    known = load().tools
    if as_json:
        click.echo(json.dumps([to_json(tool) for tool in known], ensure_ascii=False, indent=1))
        return
    _table(
        ("tool", "required", "title"),
        [
            (
                tool.slug,
                ", ".join(each.name for each in tool.parameters if each.required),
                tool.title,
            )
            for tool in known
        ],
    )


@tools.command(short_help="A tool's parameters.")
@click.argument("tool", metavar="TOOL")
@click.option(
    "--all",
    "show_all",
    is_flag=True,
    help=f"All options, not only the first {OPTIONS_SHOWN}, and whole defaults.",
)
@click.option("--json", "as_json", is_flag=True, help="Tell it as JSON.")
def show(tool: str, show_all: bool, as_json: bool) -> None:
    """Show the parameters of TOOL (`instant-id`, or `wiro/instant-id`): type, default, options.

    Options can be written in a manifest by value or by label.
    """
    from batchrun.report.talk import Talk
    from batchrun.report.words import plain
    from batchrun.tools.catalog import load, to_json

    found = load().find(tool)
    if as_json:
        click.echo(json.dumps(to_json(found), ensure_ascii=False, indent=1))
        return
    talk = Talk(sys.stdout)
    talk.say(plain(f"{found.slug}: {found.title}"), "bold")
    talk.say(plain(found.run_path), "dim")
    talk.say(plain(found.description))
    talk.say()
    most = None if show_all else OPTIONS_SHOWN
    _table(
        ("parameter", "type", "default", "options"),
        [
            (
                each.name + (" (required)" if each.required else ""),
                each.type,
                plain(_default(each), limit=None if show_all else DEFAULT_SHOWN),
                _options(each.options, most=most),
            )
            for each in found.parameters
        ],
    )


@tools.command(short_help="Make another tool usable, from its page.")
@click.argument("page", metavar="PAGE")
def add(page: str) -> None:
    """Read a tool's page (its `llms-full.txt`, or "-" for standard input) and keep the tool for all later
    runs.

    A tool that is there already is replaced: the page is the newer word.
    """
    from batchrun.errors import PageError, UsageError
    from batchrun.report.words import plain
    from batchrun.tools.catalog import load

    if page.startswith(("http://", "https://")):
        raise UsageError(f"{page}: nothing is fetched here; write: curl {page} | batchrun tools add -")
    try:
        content = sys.stdin.buffer.read() if page == "-" else Path(page).read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{page}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{page}: is not UTF-8 text (at byte {error.start})") from error
    try:
        tool = load().add(text)
    except PageError as error:
        raise UsageError(f"{page}: {error}") from error
    click.echo(plain(f"{tool.slug} ({tool.run_path}) can be asked for: {len(tool.parameters)} parameters"))
    click.echo(f"see: batchrun tools show {plain(tool.slug)}")


def _default(parameter: Parameter) -> str:
    """The default; where an option stands for it, with its label."""
    for option in parameter.options or ():
        if option.value == parameter.default and option.label not in ("", option.value):
            return f"{option.value} ({option.label})"
    return parameter.default


def _options(options: Sequence[Option] | None, *, most: int | None) -> str:
    if not options:
        return ""
    shown = [
        f"{option.value} ({option.label})" if option.label not in ("", option.value) else option.value
        for option in options[:most]
    ]
    more = len(options) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more (--all)" if more else "")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; elsewhere lines whose cells are separated by tabs."""
    from batchrun.report.talk import Talk
    from batchrun.report.words import plain

    talk = Talk(sys.stdout)
    if not talk.is_terminal:
        for row in (heads, *rows):
            talk.say("\t".join(plain(cell) for cell in row))
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, style="cyan" if number == 0 else None, overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    talk.console.print(table)
