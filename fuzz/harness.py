"""atheris at work on one parser: `python -m fuzz.harness NAME [libFuzzer's own arguments]`."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["batchrun"]):
    from fuzz.parsers import PARSERS


def main() -> None:
    """Fuzz until told to stop; a finding ends the process and leaves its input behind."""
    program, name, *arguments = sys.argv
    atheris.Setup([program, *arguments], PARSERS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
