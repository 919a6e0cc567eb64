"""Bytes of a manifest → its text, by blocks and lines, in constant memory.

The bytes are unpacked if they are gzip, cut into blocks where lines (or characters) end, checked for UTF-8,
NUL and overlong lines, and decoded a block at a time. Lines are then split on "\\n" alone: text mode,
str.splitlines and their like also break at U+2028, U+0085 or a lone CR, which real prompts hold.
"""

from __future__ import annotations

import io
import zlib
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import BinaryIO

#: What is read and decoded at once; larger blocks were not faster.
BLOCK_BYTES = 256 * 1024
#: gzip data that unpacks to more than this, and to more than _MAX_RATIO times its size, is no manifest's:
#: those come to 5 to 50 times. A few megabytes could otherwise keep a run reading for days.
_SUSPECT_BYTES = 4 * 1024 * 1024
_MAX_RATIO = 200

_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


class Fault(Exception):
    """Reading cannot go on at `line` (from 1; 0: the file as a whole); the text says why, and what to do."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


def too_long(max_row_bytes: int, line: int) -> Fault:
    """The fault of a row beyond the limit."""
    return Fault(
        f"the row is longer than {max_row_bytes:,} bytes; shorten it, or allow it with --max-row-bytes N",
        line,
    )


class Text:
    """The text of a byte stream; read it once, with lines() or characters()."""

    def __init__(self, stream: BinaryIO, max_row_bytes: int, *, must_be_gzip: bool) -> None:
        #: The line on which the row now being read begins; who reads rows from lines() keeps it.
        self.row_line = 1
        self._stream = stream
        self._max_row_bytes = max_row_bytes
        self._must_be_gzip = must_be_gzip
        self._lines_before = 0
        #: Whether a byte order mark was met, as Excel writes and wants one.
        self.has_bom = False
        #: How many pieces of text lines() or characters() has come to.
        self.pieces = 0
        self._bytes_before = 0
        #: (its first line, text) of each block that holds a part of the present row.
        self._held: deque[tuple[int, str]] = deque()

    def lines(self) -> Iterator[str]:
        """The lines with their line feeds; no Python runs per line. Raises Fault, also for a row too long."""
        return chain.from_iterable(io.StringIO(block, newline="\n") for block in self._holding_rows())

    def characters(self) -> Iterator[str]:
        """The text in pieces of about BLOCK_BYTES that end anywhere. Raises Fault."""
        for block in self._blocks(whole_lines=False):
            self.pieces += 1
            yield block

    def since(self, line: int) -> str:
        """What was read from `line` of the present row on, up to the end of its last block."""
        text = "".join(block for _, block in self._held)
        at = 0
        for _ in range(line - self._held[0][0] if self._held else 0):
            at = text.find("\n", at) + 1
        return text[at:]

    def _holding_rows(self) -> Iterator[str]:
        """The blocks of whole lines; Fault when the row at row_line spans more of them than it may."""
        line, inside = 1, 0  # `inside`: characters of the held blocks but the first
        for block in self._blocks(whole_lines=True):
            while len(self._held) > 1 and self._held[1][0] <= self.row_line:
                self._held.popleft()
                inside -= len(self._held[0][1])
            if inside > self._max_row_bytes:
                raise too_long(self._max_row_bytes, self.row_line)
            if self._held:
                inside += len(block)
            self._held.append((line, block))
            self.pieces += 1
            yield block
            line += block.count("\n")

    def _blocks(self, *, whole_lines: bool) -> Iterator[str]:
        pieces: list[bytes] = []
        held = 0
        for chunk in self._bytes():
            if whole_lines:
                cut = chunk.rfind(b"\n") + 1
            else:  # at most three bytes are held: the beginning of a character
                chunk, pieces, held = b"".join((*pieces, chunk)), [], 0
                cut = _characters_end(chunk)
            if cut:
                yield from self._decoded(b"".join((*pieces, chunk[:cut])), whole_lines)
                pieces, held = [], 0
            pieces.append(chunk[cut:])
            held += len(chunk) - cut
            if held > self._max_row_bytes:
                raise too_long(self._max_row_bytes, self._lines_before + 1)
        if held:
            yield from self._decoded(b"".join(pieces), whole_lines)

    def _decoded(self, block: bytes, whole_lines: bool) -> Iterator[str]:
        """The block as text; where something in it is bad, the lines before that, then a Fault."""
        begin = 0
        if not self._bytes_before:
            if block.startswith(_UTF16_BOMS):
                raise Fault("the file is UTF-16; save it as UTF-8", 1)
            while block.startswith(_BOM, begin):  # some files were marked twice
                begin += len(_BOM)
                self.has_bom = True
        bad = block.find(b"\0")
        fault = (
            f"a NUL byte (byte {self._bytes_before + bad}); save the file as UTF-8 text" if bad >= 0 else ""
        )
        try:
            text = block[begin : bad if bad >= 0 else None].decode()
        except UnicodeDecodeError as error:
            bad = begin + error.start
            fault = (
                f"not UTF-8 (byte {self._bytes_before + bad} is 0x{block[bad]:02x}); save the file as UTF-8"
            )
        if whole_lines and len(block) > self._max_row_bytes:
            long = _long_line(block, self._max_row_bytes)
            if long >= 0 and not 0 <= bad < long:
                yield block[begin:long].decode()
                raise too_long(self._max_row_bytes, self._lines_before + block.count(b"\n", 0, long) + 1)
        if bad >= 0:
            good = block.rfind(b"\n", 0, bad) + 1
            yield block[min(begin, good) : good].decode()
            raise Fault(fault, self._lines_before + block.count(b"\n", 0, good) + 1)
        yield text
        self._bytes_before += len(block)
        self._lines_before += block.count(b"\n")

    def _bytes(self) -> Iterator[bytes]:
        chunks = self._chunks()
        head = b""
        for chunk in chunks:
            head += chunk
            if len(head) >= len(_BOM):  # enough to know gzip and every mark
                break
        if head.startswith(_GZIP):
            return _inflated(chain((head,), chunks))
        if self._must_be_gzip:
            raise Fault("the name ends in .gz but the file is not gzip; compress it, or rename it")
        return chain((head,), chunks)

    def _chunks(self) -> Iterator[bytes]:
        read = getattr(self._stream, "read1", self._stream.read)  # read1 takes what a pipe has by now
        while chunk := read(BLOCK_BYTES):
            yield chunk
        if chunk is None:
            raise Fault(
                "standard input is non-blocking and had nothing to read; write the manifest to a file"
            )


def _inflated(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """gzip data of one or more members, unpacked by BLOCK_BYTES at most; zlib.error when it is bad."""
    inflater = zlib.decompressobj(wbits=31)
    packed = unpacked = 0
    for data in chunks:
        packed += len(data)
        while data:
            if inflater.eof:
                data = data.lstrip(b"\0")  # some writers pad with zeros
                if not data:
                    break
                inflater = zlib.decompressobj(wbits=31)
            piece = inflater.decompress(data, BLOCK_BYTES)
            while piece and not inflater.eof:  # output may be left although all input was taken
                unpacked += len(piece)
                taken = packed - len(inflater.unconsumed_tail)
                if unpacked > max(_SUSPECT_BYTES, _MAX_RATIO * taken):
                    raise Fault(
                        f"the gzip data unpacks to more than {_MAX_RATIO} times its size, as no manifest "
                        "does; if it is meant, unpack it and name the unpacked file"
                    )
                yield piece
                piece = inflater.decompress(inflater.unconsumed_tail, BLOCK_BYTES)
            if piece:
                unpacked += len(piece)
                yield piece
            data = inflater.unused_data if inflater.eof else b""
    if not inflater.eof:
        raise Fault("the gzip data is cut short; fetch or compress the file again")


def _characters_end(chunk: bytes) -> int:
    """Where the chunk can be cut without cutting a character; its length when it is no UTF-8 anyway."""
    for cut in range(len(chunk), max(len(chunk) - 4, 0), -1):
        if chunk[cut - 1] < 0x80:
            return cut
        if chunk[cut - 1] >= 0xC0:
            return cut - 1
    return len(chunk)


def _long_line(block: bytes, limit: int) -> int:
    """Where the first line of more than `limit` bytes begins; -1 when there is none."""
    at = 0
    while len(block) - at > limit:
        end = block.find(b"\n", at)
        if (end if end >= 0 else len(block)) - at > limit:
            return at
        at = end + 1
    return -1
