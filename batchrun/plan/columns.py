"""Rows of a table, bound by the column: what a million rows have in common is worked out once.

A column's cells repeat, and what a cell makes of a row's texts does not depend on the other cells. So each
different cell is bound and written as JSON once (`_Column`), cells that are all different are looked at a
block at a time, and rows are put together of such pieces by C code: `map` over a dict, `zip`, `join`. A row
that is not that simple (a wrong cell, a blank that `--set` fills, a local image, a value that other cells
decide on) is left to the reading of single rows: that one has the last word, and what comes out here is the
same to the byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any

from batchrun.errors import ManifestError
from batchrun.model import Block, Cell, LocalImage, Value
from batchrun.plan.identity import HASH_BYTES
from batchrun.store.records import dumps
from batchrun.store.staged import StagedBlock
from batchrun.tools.bind import Binder, ReadImage, Refused

#: Different cells that a column remembers; texts that are all different are not worth more.
_REMEMBERED = 2000
#: Digits that are a whole number of any kind as they stand.
_PLAIN_DIGITS = 18
#: Cells that are not ASCII as it stands in JSON: in hashes they are escaped.
_ESCAPED = re.compile(r"[^\x00-\x7e]+")


class _Column(dict[str, str]):
    """Cell → `"name":value,` as JSON, "" for one that gives nothing; made when first met."""

    def __init__(
        self, name: str, binder: Binder, read_image: ReadImage, *, blank_is_plain: bool, max_images: int
    ) -> None:
        super().__init__()
        self.name = name
        self._lead = f"{dumps(name)}:"
        self._binder = binder
        self.value = binder.reader(name, read_image)
        self._stands_alone = binder.always_alone(name)
        self._blank_is_plain = blank_is_plain
        self._max_images = max_images
        self._counts_images = binder.counts_images == name
        #: What encloses a cell that is taken as it stands; None: none is, or what it says decides on more.
        self._around: tuple[str, str] | None = None
        self._is_number = name in binder.numbers
        if (self._is_number or name in binder.texts) and self._stands_alone and not self._counts_images:
            quote = '"' if type(self.value("1")) is str else ""
            self._around = f"{self._lead}{quote}", f"{quote},"
        #: Whether its cells were too many to be remembered: then those of a block are taken together.
        self._is_varied = False
        #: Cells whose rows are left to the reading of single rows.
        self.hard: set[str] = set()
        #: Cells that the value does not give back letter by letter.
        self.respelt: set[str] = set()
        #: How many images a row makes, by the cell of the column that tells it.
        self.images: dict[str, int] = {}

    def pieces(self, cells: Sequence[str]) -> list[str]:
        """What each of a block's cells makes of its row."""
        if len(self) > _REMEMBERED:  # what is remembered stays within bounds
            self._is_varied = True
            self.clear()
            self.hard.clear()
            self.respelt.clear()
            self.images.clear()
        if self._around is not None and self._is_varied and self._are_plain(cells):
            before, after = self._around
            return [f"{before}{cell}{after}" for cell in cells]
        return list(map(self.__getitem__, cells))

    def _are_plain(self, cells: Sequence[str]) -> bool:
        """Whether all stand in JSON, and are sent, as they are."""
        text = "".join(cells)
        if self._is_number:  # without zeros in front
            is_whole = text.isascii() and text.isdecimal() and min(cells) >= "1"
            return is_whole and max(map(len, cells)) <= _PLAIN_DIGITS
        if not text.isprintable() or '"' in text or "\\" in text:
            return False
        return all(cells) and not any(map(str.isspace, cells))

    def __missing__(self, cell: str) -> str:
        if not cell or cell.isspace():
            if not self._blank_is_plain:
                self.hard.add(cell)
            value = None
            text = ""
        else:
            try:
                value = self.value(cell)
            except (Refused, ManifestError):
                value = None
            if type(value) is str:
                text = f"{self._lead}{encode_basestring(value)},"
            elif type(value) is int:
                text = f"{self._lead}{value},"
            elif type(value) is list:
                text = f"{self._lead}{dumps(value)},"
            else:  # refused, or a local image
                self.hard.add(cell)
                text = ""
            if (
                not self._stands_alone
                and value is not None
                and not self._binder.stands_alone(self.name, value)
            ):
                self.hard.add(cell)
            if value != cell and str(value) != cell:
                self.respelt.add(cell)
        if self._counts_images:
            given = {} if value is None else {self.name: value}
            images = self.images[cell] = self._binder.images_of(given)
            if not 1 <= images <= self._max_images:
                self.hard.add(cell)
        self[cell] = text
        return text


class Columns:
    """Binds blocks of one header for one tool."""

    def __init__(
        self,
        columns: Sequence[str],
        parameters: Sequence[str],
        *,
        id_at: int | None,
        run_path: str,
        tool: int,
        binder: Binder,
        set_values: Mapping[str, Cell],
        read_image: ReadImage,
        max_images: int,
        text_of: Callable[[Mapping[str, Cell]], str],
    ) -> None:
        """`parameters`: what each column holds, "" for none. `text_of`: a row's cells as JSON.

        Raises Refused or ManifestError when no row of this header is simple.
        """
        self._id_at = id_at
        self._tool = tool
        self._text_of = text_of
        #: Whether columns have the names of what they hold, so that a row can be told from what it gives.
        self._is_plain = all(
            name in ("", column) if at != id_at else column == "id"
            for at, (column, name) in enumerate(zip(columns, parameters, strict=True))
        )
        self._columns = [
            _Column(
                name,
                binder,
                read_image,
                blank_is_plain=name not in set_values and name not in binder.required,
                max_images=max_images,
            )
            for name in parameters
            if name
        ]
        self._at = [at for at, name in enumerate(parameters) if name]
        held = {column.name for column in self._columns}
        fixed = {
            name: cell
            for name, cell in set_values.items()
            if name not in held and cell is not None and not (isinstance(cell, str) and not cell.strip())
        }
        if any(binder.expandable(name, cell) for name, cell in fixed.items()):
            raise Refused("rows of this header stand for several requests each")
        self._fixed = {name: binder.reader(name, read_image)(cell) for name, cell in fixed.items()}
        alone = all(
            not isinstance(value, LocalImage) and binder.stands_alone(name, value)
            for name, value in self._fixed.items()
        )
        if not alone or not binder.required <= held | self._fixed.keys():
            raise Refused("rows of this header are looked at one by one")
        self._tail = "".join(f"{dumps(name)}:{dumps(value)}," for name, value in self._fixed.items())
        self._counting = next((c for c in self._columns if c.name == binder.counts_images), None)
        self._images = binder.images_of(self._fixed)
        if self._counting is None and not 1 <= self._images <= max_images:
            raise Refused("the number of images is looked at in every row")
        #: The pieces in the order of their names, in which they are hashed: columns by number, fixed ones.
        order = sorted(
            [*((c.name, at) for at, c in enumerate(self._columns)), *((n, -1) for n in self._fixed)]
        )
        self._hashed = [at if at >= 0 else f"{dumps(name)}:{dumps(self._fixed[name])}," for name, at in order]
        self._own = [at for _, at in order if at >= 0]
        self._begin = f"[{dumps(run_path)},{{"

    def given(self, block: Block, name: str, rows: Iterable[int]) -> Iterator[Value | LocalImage | None]:
        """What rows of a block give for a parameter; None where they give none."""
        for at, column in zip(self._at, self._columns, strict=True):
            if column.name == name:
                cells = block.cells
                return (
                    column.value(c) if (c := cells[row][at]) and not c.isspace() else None for row in rows
                )
        return (self._fixed.get(name) for _ in rows)

    def bind(self, block: Block) -> tuple[StagedBlock, set[int]]:
        """A block's rows to be staged, and which of them (by place in the block) must be read singly."""
        cells = list(zip(*block.cells, strict=True))
        mine = [cells[at] for at in self._at]
        pieces = [column.pieces(each) for column, each in zip(self._columns, mine, strict=True)]
        hard = self._where(mine, [column.hard for column in self._columns])
        respelt = self._where(mine, [column.respelt for column in self._columns])
        count = len(block.lines)
        ids: Sequence[str | None] = [None] * count
        if self._id_at is not None:
            ids = [id_.strip() or None for id_ in cells[self._id_at]]
            if ids != list(cells[self._id_at]):  # blanks around an id are not part of it
                respelt.update(at for at, id_ in enumerate(ids) if id_ and id_ != cells[self._id_at][at])
        if not self._is_plain:
            respelt.update(range(count))
        given = [f"{{{text[:-1]}}}" for text in map("".join, zip(*pieces, [self._tail] * count))]
        contents = self._hashes(pieces, self._hashed, count)
        own = self._hashes(pieces, self._own, count) if self._fixed else contents
        images: Sequence[int] = [self._images] * count
        if self._counting is not None:
            counted = self._counting.images
            images = [counted.get(cell, 0) for cell in mine[self._columns.index(self._counting)]]
        sources = {at: self._text_of(block.row(at).cells) for at in sorted(respelt - hard)}
        return StagedBlock(block.lines, ids, contents, own, self._tool, given, images, sources), hard

    def _where(self, cells: Sequence[Sequence[str]], wanted: Sequence[set[str]]) -> set[int]:
        found: set[int] = set()
        for column, some in zip(cells, wanted, strict=True):
            if some:
                found.update(at for at, cell in enumerate(column) if cell in some)
        return found

    def _hashes(self, pieces: Sequence[Sequence[str]], order: Sequence[Any], count: int) -> list[bytes]:
        """What identity.content_hash makes of the rows."""
        parts = [pieces[each] if isinstance(each, int) else [each] * count for each in order]
        begin = self._begin
        hashes = []
        for joined in map("".join, zip(*parts)):
            text = f"{begin}{joined[:-1]}}}]"
            if not text.isascii() or "\x7f" in text:
                text = _ESCAPED.sub(lambda found: encode_basestring_ascii(found[0])[1:-1], text)
            hashes.append(blake2b(text.encode(), digest_size=HASH_BYTES).digest())
        return hashes
