"""What is kept of a manifest's rows so that failed ones can be given back to the letter. Pure.

Most rows are told by what they give (records.cells_given): nothing is kept of them. Of others only what
differs, as a JSON list with one merge patch (RFC 7396) to what they give: a changed cell under its column, a
null where the row has none. Only rows whose columns or order cannot be told so are kept whole, as an object.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from batchrun.manifest.json_text import encode
from batchrun.model import Cell
from batchrun.store.records import dumps


def kept(told: Mapping[str, Any], cells: Mapping[str, Cell], *, in_order: bool) -> str | None:
    """What is kept of a row that is told as `told` and stands as `cells`; None: nothing.

    `in_order`: the order of its columns is its own (JSON), not the header's.
    """
    names = [name for name in told if name in cells]
    is_whole = names == list(cells) if in_order else len(names) == len(cells)
    if not is_whole or any(cells[name] is None for name in names):  # a patch's null takes out
        return encode(dict(cells))
    changed = [piece(name, cells[name]) for name in names if not is_same(told[name], cells[name])]
    pieces = "".join(changed) + nulls(name for name in told if name not in cells)
    return f"[{{{pieces[:-1]}}}]" if pieces else None


def nulls(names: Iterable[str]) -> str:
    """The part of a patch that takes cells out."""
    return "".join(f"{dumps(name)}:null," for name in names)


def piece(name: str, cell: Cell) -> str:
    """A cell's part of a patch."""
    return f"{dumps(name)}:{encode(cell)},"


def is_same(told: Any, cell: Cell) -> bool:
    """Whether two cells are the same text in JSON: each digit of a number counts."""
    if type(told) is type(cell) and type(cell) in (str, int):
        return bool(told == cell)
    return encode(told) == encode(cell)
