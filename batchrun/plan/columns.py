"""Rows of the same columns, bound by the column: what a million rows have in common is worked out once.

A column's cells repeat, and what a cell makes of a row's texts does not depend on the other cells. So each
different cell is bound and written as JSON once (`_Column`), cells that are all different are looked at a
block at a time, and rows are put together of such pieces by C code: `map` over a dict, `zip`, `join`. What an
expansion lays over every row are pieces, too. A row that is not that simple (a wrong cell, a blank that
`--set` fills, a value that other cells decide on) is left to the reading of single rows: that
one has the last word, and what comes out here is the same to the byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any

from batchrun.errors import ManifestError
from batchrun.manifest.json_text import decode, encode
from batchrun.model import Block, Cell, LocalImage, Value
from batchrun.plan.identity import HASH_BYTES
from batchrun.plan.kept import is_same, kept, nulls, piece
from batchrun.store.records import cells_given, dumps, image_to_json
from batchrun.store.staged import StagedBlock
from batchrun.tools.bind import Binder, ReadImage, Refused, gives_nothing

#: Different cells that a column remembers, and characters; texts that are all different are not worth more.
_REMEMBERED = 2000
_REMEMBERED_CHARS = 1_000_000
#: Digits that are a whole number of any kind as they stand.
_PLAIN_DIGITS = 18
#: Cells that are not ASCII as it stands in JSON: in hashes they are escaped.
_ESCAPED = re.compile(r"[^\x00-\x7e]+")
#: Cells of these types are equal only where they are the same; 1, true and 1.0 are equal, and are not.
_TOLD_APART = frozenset({str, int, type(None)})


class _Column(dict[Any, str]):
    """Cell → `"name":value,` as JSON, "" for one that gives nothing; made when first met.

    A cell that equals another one (see _TOLD_APART) goes by its text in JSON, as a tuple.
    """

    def __init__(
        self,
        name: str,
        binder: Binder,
        read_image: ReadImage,
        *,
        is_table: bool,
        blank_is_plain: bool,
        max_images: int,
    ) -> None:
        super().__init__()
        self.name = name
        self._lead = f"{dumps(name)}:"
        self._binder = binder
        self._read = binder.reader(name, read_image)
        self._stands_alone = binder.always_alone(name)
        self._is_table = is_table
        self._blank_is_plain = blank_is_plain
        self._max_images = max_images
        self._counts_images = binder.counts_images == name
        self._is_number = name in binder.numbers
        self._is_plain = (
            (self._is_number or name in binder.texts) and self._stands_alone and not self._counts_images
        )
        self._quote = '"' if self._is_plain and type(self._read("1")) is str else ""
        #: Whether its cells were too many to be remembered: then those of a block are taken together.
        self._is_varied = False
        self._chars = 0
        #: Cells whose rows are left to the reading of single rows.
        self.hard: set[Any] = set()
        #: Cells that are local images: what stands for them where the row is hashed.
        self.hashed: dict[Any, str] = {}
        #: Cells that what the row gives does not tell: their part of a patch.
        self.kept: dict[Any, str] = {}
        #: How many images a row makes, by the cell of the column that tells it.
        self.images: dict[Any, int] = {}

    def known_by(self, cells: Sequence[Cell]) -> Sequence[Any]:
        """What cells go by here; those of a table go by themselves."""
        if _TOLD_APART.issuperset(map(type, cells)):
            return cells
        return [cell if type(cell) in _TOLD_APART else (encode(cell),) for cell in cells]

    def value(self, cell: Cell) -> Value | LocalImage | None:
        """What a cell that can be read is bound to; None: it gives nothing."""
        return None if gives_nothing(cell, blank_is_default=self._is_table) else self._read(cell)

    def pieces(self, cells: Sequence[Any]) -> tuple[list[str], list[str] | None]:
        """What each of a block's cells (as known) makes of its row, and of a patch to it (None: nothing)."""
        if len(self) > _REMEMBERED or self._chars > _REMEMBERED_CHARS:
            self._is_varied = True
            self._chars = 0
            for remembered in (self, self.hard, self.hashed, self.kept, self.images):
                remembered.clear()
        if self._is_plain and self._is_varied and (kind := self._plain_kind(cells)):
            before, after = f"{self._lead}{self._quote}", f"{self._quote},"
            pieces = [f"{before}{cell}{after}" for cell in cells]
            if self._is_table or (kind is str) == bool(self._quote):
                return pieces, None
            quote = '"' if kind is str else ""
            return pieces, [f"{self._lead}{quote}{cell}{quote}," for cell in cells]
        pieces = list(map(self.__getitem__, cells))
        if self.kept and not self.kept.keys().isdisjoint(cells):
            return pieces, [self.kept.get(cell, "") for cell in cells]
        return pieces, None

    def _plain_kind(self, cells: Sequence[Any]) -> type | None:
        """The type of cells that all stand in JSON, and are sent, as they are; None where one may not."""
        kinds = {str} if self._is_table else set(map(type, cells))
        if kinds == {int} and self._is_number:
            return int if min(cells) >= 0 and max(cells) < 10**_PLAIN_DIGITS else None
        if kinds != {str}:
            return None
        text = "".join(cells)
        if self._is_number:  # without zeros in front
            is_whole = text.isascii() and text.isdecimal() and min(cells) >= "1"
            return str if is_whole and max(map(len, cells)) <= _PLAIN_DIGITS else None
        if not text.isprintable() or '"' in text or "\\" in text:
            return None
        return str if all(cells) and not any(map(str.isspace, cells)) else None

    def __missing__(self, known: Any) -> str:
        cell = decode(known[0])[0] if type(known) is tuple else known
        text = self._piece(known, cell)
        self[known] = text
        self._chars += len(text)
        return text

    def _piece(self, known: Any, cell: Cell) -> str:
        is_blank = gives_nothing(cell, blank_is_default=True)
        if (is_blank and not self._blank_is_plain) or self._binder.expandable(self.name, cell):
            self.hard.add(known)
            return ""
        try:
            value = self.value(cell)
        except (Refused, ManifestError):
            self.hard.add(known)
            return ""
        text = ""
        if not (self._stands_alone or value is None or self._binder.stands_alone(self.name, value)):
            self.hard.add(known)
        elif isinstance(value, LocalImage):
            text = f"{self._lead}{dumps(image_to_json(value))},"
            self.hashed[known] = f'{self._lead}{{"sha256":"{value.sha256}"}},'
            if not is_same(value.path, cell):
                self.kept[known] = piece(self.name, cell)
        elif value is not None:
            in_json = encode_basestring(value) if type(value) is str else dumps(value)
            text = f"{self._lead}{in_json},"
            told = in_json if self._is_table and type(value) is not str else value
            if not is_same(told, cell):
                self.kept[known] = piece(self.name, cell)
        if self._counts_images:
            images = self.images[known] = self._binder.images_of({} if value is None else {self.name: value})
            if not 1 <= images <= self._max_images:
                self.hard.add(known)
        return text


def _are_named_alike(
    columns: Sequence[str], parameters: Sequence[str], id_at: int | None, laid_in: Mapping[str, str]
) -> bool:
    """Whether columns have the names of what they hold."""
    alike = (
        name in ("", column) if at != id_at else column == "id"
        for at, (column, name) in enumerate(zip(columns, parameters, strict=True))
    )
    return all(alike) and all(name == column for name, column in laid_in.items())


def _fixed(
    set_values: Mapping[str, Cell],
    held: Collection[str],
    binder: Binder,
    read_image: ReadImage,
    *,
    is_table: bool,
) -> dict[str, Value | LocalImage]:
    """What `--set` gives to every row, since none of the values `held` by its own is that.

    Raises Refused where it decides on other values, or others on it, and where a value is still missing.
    """
    cells = {
        name: cell
        for name, cell in set_values.items()
        if name not in held and not gives_nothing(cell, blank_is_default=is_table)
    }
    if any(binder.expandable(name, cell) for name, cell in cells.items()):
        raise Refused("rows of this header stand for several requests each")
    fixed = {name: binder.reader(name, read_image)(cell) for name, cell in cells.items()}
    alone = all(
        not isinstance(value, LocalImage) and binder.stands_alone(name, value)
        for name, value in fixed.items()
    )
    if not alone or not binder.required <= {*held, *fixed}:
        raise Refused("rows of this header are looked at one by one")
    return fixed


class Columns:
    """Binds blocks of one header for one tool."""

    def __init__(
        self,
        columns: Sequence[str],
        parameters: Sequence[str],
        *,
        header: Collection[str] | None,
        id_at: int | None,
        run_path: str,
        tool: int,
        binder: Binder,
        set_values: Mapping[str, Cell],
        laid: Sequence[Mapping[str, Cell]],
        laid_in: Mapping[str, str],
        read_image: ReadImage,
        max_images: int,
    ) -> None:
        """`parameters`: what each column holds, "" for none. `header`: the columns of a table and of its
        expansion; None: JSON. `laid_in`: the columns in which what is laid over a row would stand, by
        parameter.

        Raises Refused or ManifestError when no row of this header is simple.
        """
        is_table = header is not None

        def column(name: str) -> _Column:
            is_plain = name not in set_values and name not in binder.required
            return _Column(
                name,
                binder,
                read_image,
                is_table=is_table,
                blank_is_plain=is_plain,
                max_images=max_images,
            )

        self._names = columns
        self._header = header
        self._is_table = is_table
        self._id_at = id_at
        self._tool = tool
        #: What an expansion lays over each row, a request each; one that is empty without.
        self.laid = laid
        self._laid_in = laid_in
        #: Whether a row can be told from what it gives; JSON has its columns in any order.
        self._is_plain = _are_named_alike(columns, parameters, id_at, laid_in) and (is_table or not id_at)
        self._columns = [column(name) for name in parameters if name]
        self._at = [at for at, name in enumerate(parameters) if name]
        held = {column.name for column in self._columns} | laid_in.keys()
        if len(held) < len(self._columns) + len(laid_in) or not laid_in.keys().isdisjoint(set_values):
            raise Refused("what is laid over a row is a value of the row's own")
        self._fixed = _fixed(set_values, held, binder, read_image, is_table=is_table)
        self._tail = "".join(f"{dumps(name)}:{dumps(value)}," for name, value in self._fixed.items())
        self._values_laid: dict[str, list[Value | LocalImage | None]] = {}
        #: How many images a row makes, in each of its requests, where no column tells it.
        self._images = [binder.images_of(self._fixed)] * len(laid)
        #: What is laid over, by parameter: a piece for each request of a row, and one of a patch.
        self._over = [self._pieces_laid(column(name), [each[name] for each in laid]) for name in laid_in]
        self._counting = next((c for c in self._columns if c.name == binder.counts_images), None)
        if self._counting is None and not 1 <= min(self._images) <= max(self._images) <= max_images:
            raise Refused("the number of images is looked at in every row")
        #: What a request gives and its row has not; of a table only what it has a column for is told.
        left_out = [*([] if is_table else self._fixed), *(laid_in if len(laid) == 1 else ())]
        self._nulls = nulls(left_out)
        #: The pieces in the order of their names, in which they are hashed: those of columns and of what is
        #: laid over by number, fixed ones.
        own = [(name, at) for at, name in enumerate([*(c.name for c in self._columns), *laid_in])]
        order = sorted([*own, *((name, -1) for name in self._fixed)])
        self._hashed = [at if at >= 0 else f"{dumps(name)}:{dumps(self._fixed[name])}," for name, at in order]
        self._own = [at for _, at in order if at >= 0]
        self._begin = f"[{dumps(run_path)},{{"

    def _pieces_laid(self, column: _Column, cells: Sequence[Cell]) -> tuple[list[str], list[str]]:
        known = column.known_by(cells)
        pieces = [column[cell] for cell in known]
        is_any_blank = any(gives_nothing(cell, blank_is_default=True) for cell in cells)
        if column.hard or column.hashed or is_any_blank:
            raise Refused("what is laid over the rows is looked at in each of them")
        self._values_laid[column.name] = list(map(column.value, cells))
        if column.images:
            self._images = [column.images[cell] for cell in known]
        return pieces, [column.kept.get(cell, "") for cell in known]

    def given(self, block: Block, name: str, rows: Iterable[int]) -> Iterator[Value | LocalImage | None]:
        """What requests of a bound block (none to be read singly) give for a parameter; None: nothing."""
        size = len(self.laid)
        for at, column in zip(self._at, self._columns, strict=True):
            if column.name == name:
                return (column.value(block.cells[row // size][at]) for row in rows)
        if name in self._values_laid:
            return (self._values_laid[name][row % size] for row in rows)
        return (self._fixed.get(name) for _ in rows)

    def bind(self, block: Block) -> tuple[StagedBlock, set[int]]:
        """A block's requests to be staged, and which rows (by place in the block) must be read singly.

        Each row has as many requests as are laid over it, one after the other.
        """
        count, size = len(block.lines), len(self.laid)
        cells: list[Sequence[Any]] = list(zip(*block.cells, strict=True))
        known = [cells[at] for at in self._at]
        if not self._is_table:
            known = [column.known_by(each) for column, each in zip(self._columns, known, strict=True)]
        pieces: list[Sequence[str]] = []
        hashed: list[Sequence[str]] = []
        #: The parts of patches that there are, and the rows whose own is found one by one.
        changed: list[Sequence[str]] = []
        apart: set[int] = set() if self._is_plain else set(range(count))
        hard: set[int] = set()
        ids = self._ids(cells, changed, apart, hard)
        for column, each in zip(self._columns, known, strict=True):
            made, parts = column.pieces(each)
            pieces.append(self._spread(made))
            hashed.append(pieces[-1])
            if column.hashed:
                hashed[-1] = self._spread(list(map(column.hashed.get, each, made)))
            if parts is not None:
                changed.append(self._spread(parts))
            if column.hard:
                hard.update(at for at, cell in enumerate(each) if cell in column.hard)
            if not self._is_table and None in each:  # what is not given is not told
                apart.update(at for at, cell in enumerate(each) if cell is None)
        for laid, parts in self._over:
            pieces.append(laid * count)
            hashed.append(pieces[-1])
            if size > 1 and any(parts):
                changed.append(parts * count)
        own = len(self._columns)
        texts = map("".join, zip(*pieces[:own], [self._tail] * (count * size), *pieces[own:]))
        given = [f"{{{text[:-1]}}}" for text in texts]
        contents = self._hashes(hashed, self._hashed, count * size)
        images: Sequence[int] = self._images * count
        if self._counting is not None:
            counted = self._counting.images
            images = self._spread(
                [counted.get(cell, 0) for cell in known[self._columns.index(self._counting)]]
            )
        return StagedBlock(
            self._spread(block.lines),
            ids,
            contents,
            self._hashes(hashed, self._own, count * size) if self._fixed else contents,
            self._tool,
            given,
            images,
            self._kept(block, ids, given, changed, apart - hard),
        ), hard

    def _spread(self, each: Sequence[Any]) -> Sequence[Any]:
        """What the rows have, for each of their requests."""
        size = len(self.laid)
        return each if size == 1 else [one for one in each for _ in range(size)]

    def _ids(
        self, cells: Sequence[Sequence[Any]], changed: list[Sequence[str]], apart: set[int], hard: set[int]
    ) -> Sequence[str | None]:
        """The ids of requests; adds what is to be kept of those that stand otherwise."""
        size = len(self.laid)
        if self._id_at is None:
            return [None] * (len(cells[0]) * size)
        written = cells[self._id_at]
        if {str}.issuperset(map(type, written)):
            ids = [cell.strip() or None for cell in written]
        else:
            kinds = {str, int, type(None)}
            hard.update(at for at, cell in enumerate(written) if type(cell) not in kinds)
            ids = [None if cell is None else str(cell).strip() or None for cell in written]
        if not self._is_table:  # an id that is none is not told
            apart.update(at for at, id_ in enumerate(ids) if id_ is None)
        if size > 1:
            return [id_ and f"{id_}.{n}" for id_ in ids for n in range(1, size + 1)]
        if ids != list(written):
            pairs = zip(ids, written, strict=True)
            changed.append(["" if id_ in (None, cell) else piece("id", cell) for id_, cell in pairs])
        return ids

    def _kept(
        self,
        block: Block,
        ids: Sequence[str | None],
        given: Sequence[str],
        changed: Sequence[Sequence[str]],
        apart: set[int],
    ) -> dict[int, str]:
        """What is to be kept of requests, by their place; of the rows `apart` it is found one by one."""
        texts: dict[int, str] = {}
        if self._is_plain and (changed or self._nulls):
            parts = map("".join, zip(*changed, [self._nulls] * len(ids)))
            texts = {at: f"[{{{text[:-1]}}}]" for at, text in enumerate(parts) if text}
        size = len(self.laid)
        for row in apart:
            for at, laid in enumerate(self.laid, start=row * size):
                source = dict(block.row(row).cells)
                if size > 1:
                    source |= {self._laid_in[name]: cell for name, cell in laid.items()}
                    if self._id_at is not None and ids[at] is not None:
                        source[self._names[self._id_at]] = ids[at]
                told = cells_given(ids[at], json.loads(given[at]), self._header)
                text = kept(told, source, in_order=self._header is None)
                if text is None:
                    texts.pop(at, None)
                else:
                    texts[at] = text
        return dict(sorted(texts.items())) if apart else texts

    def _hashes(self, pieces: Sequence[Sequence[str]], order: Sequence[Any], count: int) -> list[bytes]:
        """What identity.content_hash makes of the rows."""
        parts = [pieces[each] if isinstance(each, int) else [each] * count for each in order]
        begin = self._begin
        hashes = []
        for joined in map("".join, zip(*parts, [""] * count)):  # there may be no parts
            text = f"{begin}{joined[:-1]}}}]"
            if not text.isascii() or "\x7f" in text:
                text = _ESCAPED.sub(lambda found: encode_basestring_ascii(found[0])[1:-1], text)
            hashes.append(blake2b(text.encode(), digest_size=HASH_BYTES).digest())
        return hashes
