"""The command line: arguments in, exit code out. Commands are imported when called, to start quickly."""

from __future__ import annotations

import errno
import gc
import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress

import click

from batchrun import __version__
from batchrun.cli import streams
from batchrun.errors import BatchrunError, FolderTaken, StoreDamaged, StoreTooNew, UsageError

#: Command → the module that holds it under its own name.
COMMANDS = {
    "run": "batchrun.cli.run",
    "check": "batchrun.cli.check",
    "status": "batchrun.cli.status",
    "retry": "batchrun.cli.retry",
    "cancel": "batchrun.cli.cancel",
    "repair": "batchrun.cli.repair",
    "tools": "batchrun.cli.tools",
    "simulate": "batchrun.simulator.command",
}

#: Nothing was sent: arguments, settings or manifest are wrong.
EXIT_USAGE = 2
#: Stopped early; run again to go on.
EXIT_STOPPED = 3
#: Garbage is looked for when there are so many objects more. Modules leave hardly any behind, and are a
#: hundred thousand: at Python's own 700 the search was a fifth of a start, at 20,000 still a tenth.
GARBAGE_AT_START = 200_000
#: Errors after which running again is of no use before someone has seen to it.
_TO_BE_MENDED = (UsageError, FolderTaken, StoreTooNew, StoreDamaged)
#: What may run out at any line, be it the import of a module.
_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOSPC})


class Commands(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name."""
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        command: click.Command = getattr(importlib.import_module(module), cmd_name)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="batchrun")
def cli() -> None:
    """Turn a manifest of prompts into finished image files with Wiro's hosted tools, unattended.

    A run can be stopped or killed at any moment: the same command goes on where it was.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code. What we raise on purpose is said without a traceback."""
    gc.set_threshold(GARBAGE_AT_START)
    streams.mend()
    try:
        code = cli.main(args=arguments, prog_name="batchrun", standalone_mode=False)
    except click.ClickException as error:
        with suppress(OSError):
            error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = EXIT_STOPPED
    except BrokenPipeError:  # whoever read our output has seen enough
        code = EXIT_STOPPED
    except BatchrunError as error:
        _say_error(str(error))
        code = EXIT_USAGE if isinstance(error, _TO_BE_MENDED) else EXIT_STOPPED
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _SCARCE:  # met outside of all that expects it
            from batchrun.outputs.disk import cure_of

            _say_error(f"{error.filename or 'stopped'}: {cure_of(error)}")
        else:
            import traceback

            from batchrun.cli.options import redacted

            with suppress(OSError):
                sys.stderr.write(redacted(traceback.format_exc()))
        code = EXIT_STOPPED
    streams.flush()
    sys.exit(code or 0)


def _say_error(text: str) -> None:
    from batchrun.report.talk import Talk
    from batchrun.report.words import plain

    talk = Talk(sys.stderr)
    first, *more = text.splitlines() or [""]
    talk.say(f"Error: {plain(first)}", "red")
    for line in more:
        talk.say(plain(line), "red")
