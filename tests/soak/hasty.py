"""The command with shorter waits in doubts, for a short soak: `python -m tests.soak.hasty run ...`."""

from __future__ import annotations

from dataclasses import replace

from batchrun.cli import main
from batchrun.wiro import client
from tests.crash.hurry import hurry

if __name__ == "__main__":
    hurry(setattr)
    client.DEADLINES = replace(client.DEADLINES, silence_s=2.0, call_s=4.0)
    main()
