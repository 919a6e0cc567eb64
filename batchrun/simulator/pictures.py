"""The simulator's images: real files that show what was asked, the same bytes for the same request and index.

`tiny` ones are 64 x 64 pixels and cost some tens of microseconds: PNGs are put together by hand, JPEG and
WebP files are a few prepared ones with a comment added. Prompt, tool and seed stand in them as text. `real`
ones, of the size asked for, are painted in `painting`, which alone needs PIL.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from batchrun.model import Tool
from batchrun.simulator.tasks import SimTask
from batchrun.simulator.validate import frames, integer

Format = Literal["png", "jpeg", "webp"]

#: Tools whose images are not PNG, so that a client meets all three formats.
FORMATS: dict[str, Format] = {"outpainting-sdxl-advanced": "jpeg", "instant-id": "webp"}
MEDIA_TYPES: dict[Format, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
EXTENSIONS: dict[Format, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}
TINY_PX = 64
#: Sides of real images are kept within these, whatever is asked for.
_SIDES_PX = (16, 4096)
#: Tiny JPEG and WebP files come in so many colours.
_COLOURS = 12


@dataclass(frozen=True, slots=True)
class Picture:
    """What one image shows; two equal ones have the same bytes."""

    tool: str
    prompt: str
    seed: str
    #: From 0.
    index: int
    width_px: int
    height_px: int
    format: Format
    #: Stands for the whole request, so that any other parameter changes the picture too.
    request: str

    @property
    def digest(self) -> bytes:
        """32 bytes from which colours and shapes are taken."""
        return hashlib.sha256(f"{self.request}:{self.index}".encode()).digest()

    @property
    def words(self) -> dict[str, str]:
        """The texts that stand in the file, fit for UTF-8 and without NUL."""
        texts = {"Title": self.tool, "Description": self.prompt, "Seed": self.seed, "Index": str(self.index)}
        return {
            key: text.encode("utf-8", "replace").decode().replace("\0", " ") for key, text in texts.items()
        }


def format_of(tool: Tool) -> Format:
    """The file format of the tool's images."""
    return FORMATS.get(tool.slug, "png")


def size_px(tool: Tool, parameters: Mapping[str, Any], *, real: bool) -> tuple[int, int]:
    """(width, height) of the images that a request gets, in pixels."""
    if not real:
        return TINY_PX, TINY_PX
    low, high = _SIDES_PX
    width, height = (integer(parameters, tool, name, 1024) for name in ("width", "height"))
    return min(max(width, low), high), min(max(height, low), high)


def picture(task: SimTask, index: int) -> Picture:
    """What image number `index` of a task shows."""
    lines = frames(task.parameters) if task.tool.parameter("generalPrompt") else []
    prompt = str(task.parameters.get("prompt", ""))
    return Picture(
        tool=task.tool.slug,
        prompt=f"{prompt}, {lines[index]}" if index < len(lines) else prompt,
        seed=str(task.parameters.get("seed", "")),
        index=index,
        width_px=task.width_px,
        height_px=task.height_px,
        format=format_of(task.tool),
        request=task.fingerprint,
    )


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
            _png_chunk(b"IHDR", header),
            *(png_text(key, text) for key, text in picture.words.items()),
            _png_chunk(b"PLTE", palette),
            _png_chunk(b"IDAT", zlib.compress(pixels, 1)),
            _png_chunk(b"IEND", b""),
        )
    )


def png_text(key: str, text: str) -> bytes:
    """A text chunk: tEXt where Latin-1 can say it, iTXt otherwise."""
    try:
        return _png_chunk(b"tEXt", key.encode() + b"\0" + text.encode("latin-1"))
    except UnicodeEncodeError:
        return _png_chunk(b"iTXt", key.encode() + b"\0\0\0\0\0" + text.encode())


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_jpeg_comment(image: bytes, words: dict[str, str]) -> bytes:
    """The JPEG with a comment segment after its start marker."""
    comment = _lines(words)[:60_000]  # a segment holds 65,533 bytes
    return image[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + image[2:]


def with_webp_comment(image: bytes, words: dict[str, str], size_px: tuple[int, int]) -> bytes:
    """The simple-format WebP as an extended one that holds the words in its XMP chunk."""
    width, height = ((side - 1).to_bytes(3, "little") for side in size_px)
    has_xmp = b"\x04\0\0\0"
    body = _riff_chunk(b"VP8X", has_xmp + width + height) + image[12:] + _riff_chunk(b"XMP ", _lines(words))
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _riff_chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _lines(words: dict[str, str]) -> bytes:
    return "\n".join(f"{key}: {text}" for key, text in words.items()).encode()


@lru_cache(maxsize=2 * _COLOURS)
def _blank(colour: int, format: Format) -> bytes:
    from batchrun.simulator.painting import blank

    return blank(colour / _COLOURS, TINY_PX, format)
