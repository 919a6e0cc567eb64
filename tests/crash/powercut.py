"""What a power cut could leave of a recorded run: a model of a disk that keeps only what was synced.

The model is stricter than common file systems. Of a file, what was written since its last sync may be there
or not, piece by piece, torn at any sector of 512 bytes, with zeros where a piece is missing. Of a folder,
each name that was made, moved or removed since the folder's last sync may be so or not, in any order, but for
what concerns the very same name. A sync of a file does not make its name durable. A rename happens wholly or
not at all, and a file whose folder was lost is lost.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from random import Random

_HEAD = struct.Struct("<ciqqII")
_SECTOR = 512


@dataclass(frozen=True, slots=True)
class Deed:
    """One call: O open, C close, W write, T truncate, S sync, U unlink or rmdir, M mkdir, R rename."""

    op: str
    fd: int
    #: Flags of an open, offset of a write, length of a truncate.
    number: int
    #: A path, or the bytes written.
    first: bytes
    second: bytes


def read_log(path: Path) -> Iterator[Deed]:
    """The recorder's log, in order."""
    data = memoryview(path.read_bytes())
    at = 0
    while at < len(data):
        op, fd, number, _, first, second = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        yield Deed(op.decode(), fd, number, bytes(data[at : at + first]), bytes(data[at + first :][:second]))
        at += first + second


@dataclass(slots=True, eq=False)
class _File:
    is_folder: bool = False
    content: bytearray = field(default_factory=bytearray)
    #: Since the last sync: (offset, data), or (length, None) for a truncate.
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Move:
    """A change of names: `removes`, then `makes`."""

    removes: str | None
    makes: tuple[str, _File] | None

    @property
    def names(self) -> set[str]:
        return {name for name in (self.removes, self.makes and self.makes[0]) if name}

    def apply(self, names: dict[str, _File]) -> None:
        if self.removes is not None:
            names.pop(self.removes, None)
        if self.makes is not None:
            names[self.makes[0]] = self.makes[1]


class Kept(StrEnum):
    """How much of what was not synced survives."""

    NOTHING = "nothing"
    ALL = "all"
    NAMES = "names, but no content"
    CONTENT = "content, but no names"
    SOME = "some of it"


class Disk:
    """The files below a folder, as durable and as seen, while deeds are done to them."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._seen: dict[str, _File] = {root: _File(is_folder=True)}
        self._durable = dict(self._seen)
        self._moves: list[_Move] = []
        self._open: dict[int, _File] = {}
        self._paths: dict[int, str] = {}

    # --- deeds -------------------------------------------------------------------------------------------

    def do(self, deed: Deed) -> None:
        """Take in the next deed."""
        match deed.op:
            case "O":
                self._do_open(deed.fd, deed.first.decode(), deed.number)
            case "C":
                self._open.pop(deed.fd, None)
            case "W":
                self._open[deed.fd].pending.append((deed.number, deed.first))
            case "T":
                self._open[deed.fd].pending.append((deed.number, None))
            case "S":
                self._sync(self._open[deed.fd], self._paths[deed.fd])
            case "U":
                self._move(_Move(deed.first.decode(), None))
            case "M":
                self._move(_Move(None, (deed.first.decode(), _File(is_folder=True))))
            case "R":
                old, new = deed.first.decode(), deed.second.decode()
                assert not self._seen[old].is_folder, "moves of folders are not modelled"
                self._move(_Move(old, (new, self._seen[old])))
            case other:
                raise AssertionError(other)

    def path_of(self, fd: int) -> str | None:
        """Where the file of a descriptor was opened."""
        return self._paths.get(fd)

    def _do_open(self, fd: int, path: str, flags: int) -> None:
        path = os.path.normpath(path)
        if path not in self._seen:
            is_folder = bool(flags & os.O_DIRECTORY)
            assert flags & os.O_CREAT, f"{path} was never made"
            self._move(_Move(None, (path, _File(is_folder=is_folder))))
        elif flags & os.O_TRUNC:
            self._seen[path].pending.append((0, None))
        self._open[fd] = self._seen[path]
        self._paths[fd] = path

    def _move(self, move: _Move) -> None:
        move.apply(self._seen)
        self._moves.append(move)

    def _sync(self, file: _File, path: str) -> None:
        for piece in file.pending:
            _put(file.content, *piece)
        file.pending.clear()
        if file.is_folder:
            here = {move for move in self._moves if path in map(_parent, move.names)}
            self._settle(here)

    def _settle(self, moves: set[_Move]) -> None:
        """Make those moves durable, and the earlier ones of the same names."""
        wanted = _with_causes(self._moves, moves)
        for move in self._moves:
            if move in wanted:
                move.apply(self._durable)
        self._moves = [move for move in self._moves if move not in wanted]

    # --- what a power cut leaves -----------------------------------------------------------------------

    def after_cut(self, kept: Kept, rng: Random) -> dict[str, bytes | None]:
        """Files by path below the root, folders with None."""
        if kept in (Kept.NOTHING, Kept.CONTENT):
            names = self._durable
        elif kept is Kept.SOME:
            names = dict(self._durable)
            chosen = _with_causes(self._moves, {move for move in self._moves if rng.random() < 0.5})
            for move in self._moves:
                if move in chosen:
                    move.apply(names)
        else:
            names = self._seen
        left: dict[str, bytes | None] = {}
        for path, file in sorted(names.items()):
            if path != self.root and _parent(path) != self.root and _parent(path) not in left:
                continue  # its folder is gone
            left[path] = None if file.is_folder else _content(file, kept, rng)
        left.pop(self.root, None)
        return {path[len(self.root) + 1 :]: content for path, content in left.items()}


def lay_out(files: dict[str, bytes | None], folder: Path) -> None:
    """Put files, as `after_cut` gives them, into an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        if content is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(content)
            if path.name.startswith("state.sqlite3"):
                path.chmod(0o600)


def _parent(path: str) -> str:
    return str(PurePosixPath(path).parent)


def _with_causes(moves: list[_Move], wanted: set[_Move]) -> set[_Move]:
    """The moves and all earlier ones of the same names."""
    found: set[_Move] = set()
    names: set[str] = set()
    for move in reversed(moves):
        if move in wanted or move.names & names:
            found.add(move)
            names |= move.names
    return found


def _content(file: _File, kept: Kept, rng: Random) -> bytes:
    content = bytearray(file.content)
    for at, data in file.pending:
        if kept in (Kept.ALL, Kept.CONTENT):
            _put(content, at, data)
        elif kept is Kept.SOME and rng.random() < 0.7:
            if data is None or rng.random() < 0.5:
                _put(content, at, data)
            else:  # torn: some sectors came to disk, others did not
                for start in range(0, len(data), _SECTOR):
                    if rng.random() < 0.5:
                        _put(content, at + start, data[start : start + _SECTOR])
    return bytes(content)


def _put(content: bytearray, at: int, data: bytes | None) -> None:
    if data is None:
        del content[at:]
        content.extend(bytes(at - len(content)))
        return
    content.extend(bytes(max(0, at - len(content))))
    content[at : at + len(data)] = data
