"""What an image of the simulator is to show, and how the three file formats carry words.

They are made in `drawing` (tiny ones, by hand) and `painting` (real ones, with PIL).
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
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


def png_text(key: str, text: str) -> bytes:
    """A text chunk: tEXt where Latin-1 can say it, iTXt otherwise."""
    try:
        return png_chunk(b"tEXt", key.encode() + b"\0" + text.encode("latin-1"))
    except UnicodeEncodeError:
        return png_chunk(b"iTXt", key.encode() + b"\0\0\0\0\0" + text.encode())


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file with its length and CRC."""
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
