"""What is written past the page cache is there byte for byte, on file systems that take it and on others."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from batchrun.outputs import pieces
from batchrun.outputs.pieces import BLOCK_BYTES, PIECE_BYTES

FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
SIZES = [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 200_000, PIECE_BYTES - 1, PIECE_BYTES]


def filled(size_bytes: int) -> memoryview:
    """A piece that begins with so many bytes of noise."""
    piece = pieces.take()
    piece[:size_bytes] = os.urandom(size_bytes)
    return piece


def write_all(path: Path, *contents: memoryview) -> bytes:
    """The file after these were written one after the other."""
    file = pieces.opener(path, FLAGS)
    try:
        for content in contents:
            pieces.write(file, content)
    finally:
        os.close(file)
    return path.read_bytes()


@pytest.fixture(params=["as it is", "refuses to open", "refuses to write"])
def refusing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems that take direct writes, and two kinds that do not."""
    direct = getattr(os, "O_DIRECT", 0)
    fcntl = pytest.importorskip("fcntl")
    real_open, real_write = os.open, os.write

    def refuse_open(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, mode)

    def refuse_write(file: int, data: memoryview) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(file, data)

    if request.param == "refuses to open" and direct:
        monkeypatch.setattr(os, "open", refuse_open)
    elif request.param == "refuses to write" and direct:
        monkeypatch.setattr(os, "write", refuse_write)


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize("size_bytes", SIZES)
def test_what_is_written_is_there_byte_for_byte(tmp_path: Path, size_bytes: int) -> None:
    first, last = filled(PIECE_BYTES), filled(size_bytes)
    assert write_all(tmp_path / "a", last[:size_bytes]) == last[:size_bytes]
    assert write_all(tmp_path / "b", first, last[:size_bytes]) == bytes(first) + bytes(last[:size_bytes])


def test_more_can_be_written_after_a_part_that_is_no_whole_block(tmp_path: Path) -> None:
    first, last = filled(5000), filled(9000)
    assert write_all(tmp_path / "a", first[:5000], last[:9000]) == bytes(first[:5000]) + bytes(last[:9000])


def test_other_errors_are_not_mistaken_for_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        pieces.opener(tmp_path / "none" / "a", FLAGS)

    def fail(file: int, data: memoryview) -> int:
        raise OSError(errno.EIO, "Input/output error")

    file = pieces.opener(tmp_path / "a", FLAGS)
    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match="Input/output"):
        pieces.write(file, filled(BLOCK_BYTES)[:BLOCK_BYTES])
    os.close(file)


def test_a_piece_given_back_is_taken_again() -> None:
    piece = pieces.take()
    pieces.give_back(piece)
    assert pieces.take() is piece
    assert pieces.take() is not piece
