"""Draws docs/states.md from the table in `batchrun.rules.states`: python -m docs.states > docs/states.md."""

from __future__ import annotations

from collections import defaultdict

from batchrun.model import TERMINAL, State
from batchrun.rules.states import TRANSITIONS


def diagram() -> str:
    """The page: a Mermaid state diagram, one arrow per pair of states."""
    arrows: defaultdict[tuple[State, State], list[str]] = defaultdict(list)
    for (before, event), after in TRANSITIONS.items():
        arrows[before, after].append(event.value)
    lines = [f"    {before} --> {after}: {', '.join(events)}" for (before, after), events in arrows.items()]
    rests = [f"    {state} --> [*]" for state in State if state in TERMINAL]
    return "\n".join(
        [
            "# The state machine of a row",
            "",
            "Drawn from the table in `batchrun/rules/states.py` by `make docs`.",
            "",
            "```mermaid",
            "stateDiagram-v2",
            f"    [*] --> {State.PLANNED}",
            *lines,
            *rests,
            "```",
        ]
    )


if __name__ == "__main__":
    print(diagram())  # noqa: T201
