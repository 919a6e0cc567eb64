"""Tells a whole image from anything else, while its bytes arrive in pieces of any size."""

from __future__ import annotations

import re

from batchrun.outputs.formats import HEAD_BYTES, MAGIC, ImageFacts, Parser, Want, identify, png, refuse

#: In scan data FF 00 is a data byte, FF D0..D7 restarts and FF FF is filling; any other FF xx ends the scan.
_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


class Verifier:
    """Verifies one image fed to it in pieces of any size.

    `feed` and `finish` raise OutputCorrupt as soon as the bytes cannot become a whole image. Its `reason` is
    `empty`, `html`, `not-an-image`, `truncated`, `structure` or `crc`.
    """

    __slots__ = ("_facts", "_parser", "_rest", "_want", "has_checksums")

    def __init__(self) -> None:
        #: The format carries checksums of all its bytes (PNG); false until its head has come.
        self.has_checksums = False
        self._parser: Parser | None = None
        self._want: Want = (HEAD_BYTES, HEAD_BYTES)
        #: Bytes arrived that the parser cannot use yet.
        self._rest = b""
        self._facts: ImageFacts | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the end of the image has been seen."""
        return self._facts is not None

    def feed(self, chunk: bytes | memoryview) -> None:
        """Takes the next bytes of the file; nothing is kept of the memory they are in."""
        if self._facts is not None:
            return
        data = memoryview(self._rest + chunk if self._rest else chunk)
        if self._parser is None:
            if len(data) < HEAD_BYTES:
                self._rest = bytes(data)
                return
            format_ = identify(bytes(data[:HEAD_BYTES]))
            self.has_checksums = format_ is png
            self._parser = format_()
            self._want = next(self._parser)
        at = self._run(self._parser, data)
        self._rest = bytes(data[at:])

    def finish(self) -> ImageFacts:
        """Says that the file has ended; returns what it is."""
        if self._facts is not None:
            return self._facts
        if self._parser is not None:
            refuse("truncated", "the image ends before its end marker")
        if not self._rest:
            refuse("empty", "the file is empty")
        if not any(magic.startswith(self._rest) for magic in MAGIC):
            identify(self._rest)
        refuse("truncated", f"the file ends after {len(self._rest)} bytes")

    def _run(self, parser: Parser, data: memoryview) -> int:
        """Lets the parser go through the data as far as it comes; returns how much it used."""
        at = 0
        try:
            while True:
                if self._want is None:
                    found = _SCAN_END.search(data, at)
                    if found is None:
                        # The marker's FF may have come and its second byte not yet.
                        ends_in_ff = at < len(data) and data[-1] == 0xFF
                        return len(data) - ends_in_ff
                    at = found.end()
                    piece = data[at - 2 : at]
                else:
                    least, most = self._want
                    if len(data) - at < least:
                        return at
                    piece = data[at : at + most]
                    at += len(piece)
                self._want = parser.send(piece)
        except StopIteration as end:
            self._facts = end.value
            return len(data)
