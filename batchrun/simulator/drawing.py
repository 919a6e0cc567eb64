"""The simulator's images: real files that show what was asked, the same bytes for the same request and index.

`tiny` ones are 64 x 64 pixels and cost some tens of microseconds: PNGs are put together by hand, JPEG and
WebP files are a few prepared ones with a comment added. Prompt, tool and seed stand in them as text. `real`
ones, of the size asked for, are painted in `painting`, which alone needs PIL and is loaded when it is needed.
"""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache

from batchrun.simulator.pictures import (
    TINY_PX,
    Format,
    Picture,
    png_chunk,
    png_text,
    with_jpeg_comment,
    with_webp_comment,
)

#: Tiny JPEG and WebP files come in so many colours.
_COLOURS = 12


def draw(picture: Picture, *, real: bool) -> bytes:
    """The image file; tens of milliseconds for a real one, to be drawn in a thread."""
    if real:
        from batchrun.simulator.painting import paint

        return paint(picture)
    match picture.format:
        case "png":
            return _tiny_png(picture)
        case "jpeg":
            return with_jpeg_comment(_blank(picture.digest[0] % _COLOURS, "jpeg"), picture.words)
        case "webp":
            blank = _blank(picture.digest[0] % _COLOURS, "webp")
            return with_webp_comment(blank, picture.words, (TINY_PX, TINY_PX))


def _tiny_png(picture: Picture) -> bytes:
    """A mirrored pattern of 8 x 8 squares in four colours."""
    digest = picture.digest
    palette = b"".join(bytes(64 + byte // 2 for byte in digest[at : at + 3]) for at in (0, 3, 6, 9))
    rows = []
    for number in range(8):
        bits = digest[12 + number]
        half = [bits >> shift & 3 for shift in (0, 2, 4, 6)]
        rows.append(b"\0" + b"".join(bytes([colour]) * 8 for colour in half + half[::-1]))
    pixels = b"".join(row * 8 for row in rows)
    header = struct.pack(">IIBBBBB", TINY_PX, TINY_PX, 8, 3, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            *(png_text(key, text) for key, text in picture.words.items()),
            png_chunk(b"PLTE", palette),
            png_chunk(b"IDAT", zlib.compress(pixels, 1)),
            png_chunk(b"IEND", b""),
        )
    )


@lru_cache(maxsize=2 * _COLOURS)
def _blank(colour: int, format: Format) -> bytes:
    from batchrun.simulator.painting import blank

    return blank(colour / _COLOURS, TINY_PX, format)
