"""Every command has help and is documented, and asking for help is quick because little is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

import batchrun
from batchrun.cli import COMMANDS, cli
from tests.support.command import Here

README = Path(__file__).parents[2] / "README.md"
#: What only a run, a check or a display needs.
HEAVY = ("aiohttp", "pydantic", "rich", "anyio", "sqlite3", "asyncio", "PIL")


def commands() -> dict[str, click.Command]:
    """Every command and subcommand by the words that call it."""
    found: dict[str, click.Command] = {}
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        found[name] = command
        if isinstance(command, click.Group):
            found.update({f"{name} {sub}": each for sub, each in command.commands.items()})
    return found


@pytest.mark.parametrize("name", list(commands()))
def test_every_command_and_option_has_a_help_text(name: str) -> None:
    command = commands()[name]
    assert command.help
    assert command.short_help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts[0]}"


def test_every_command_is_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    if "## Commands" not in text:
        pytest.skip("the README has no section on commands yet")
    missing = [name for name in COMMANDS if f"batchrun {name}" not in text]
    assert not missing


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["run", "--help"], ["tools", "show", "--help"]]
)
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom batchrun.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\nassert not found, found\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_the_package_gives_its_public_names_and_imports_them_late() -> None:
    assert len(set(batchrun.__all__)) == len(batchrun.__all__)
    for name in batchrun.__all__:
        assert getattr(batchrun, name) is not None, name
        assert name in dir(batchrun)
    with pytest.raises(AttributeError):
        _ = batchrun.nothing_of_the_kind
    program = (
        "import sys, batchrun\n"
        f"found = [name for name in {HEAVY!r} + ('batchrun.model', 'click') if name in sys.modules]\n"
        "assert not found, found\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_python_m_batchrun_is_the_command_and_tells_its_version(alone: Here) -> None:
    assert alone.batchrun("--version").stdout == f"batchrun, version {batchrun.__version__}\n"
    assert alone.batchrun("nonsense").returncode == 2
