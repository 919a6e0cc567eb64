"""Whole image files of every kind the service could send, drawn by Pillow."""

from __future__ import annotations

import random
from functools import cache
from io import BytesIO
from typing import Any

from PIL import Image

#: Pillow's name, media type, extension.
KINDS = {
    "PNG": ("image/png", "png"),
    "JPEG": ("image/jpeg", "jpg"),
    "WEBP": ("image/webp", "webp"),
    "GIF": ("image/gif", "gif"),
    "AVIF": ("image/avif", "avif"),
    "TIFF": ("image/tiff", "tiff"),
    "BMP": ("image/bmp", "bmp"),
}

_VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *(("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "RGB", {"quality": 98, "subsampling": 0, "restart_marker_blocks": 2}),
    ("JPEG", "RGB", {"comment": b"\xff\xd9 not the end"}),
    *(("WEBP", mode, options) for mode in ("RGB", "RGBA") for options in ({}, {"lossless": True})),
    ("WEBP", "RGB", {"exif": b"Exif\0\0odd"}),
    *(("GIF", mode, {}) for mode in ("1", "L", "P", "RGB")),
    *(("AVIF", mode, {}) for mode in ("RGB", "RGBA")),
    *(("TIFF", mode, {}) for mode in ("1", "L", "RGB", "RGBA", "CMYK")),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "RGB", {"compression": "jpeg"}),
    *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
]
_SIZES = ((1, 1), (3, 2), (61, 47))


def draw(kind: str, mode: str = "RGB", size: tuple[int, int] = (61, 47), **options: Any) -> bytes:
    """A file of that kind: noise on a gradient, always the same."""
    width, height = size
    noise = random.Random(f"{width}x{height}").randbytes(width * height * 3)
    picture = Image.frombytes("RGB", size, noise)
    shown = picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)
    buffer = BytesIO()
    shown.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def every_kind() -> dict[str, bytes]:
    """One file per kind, mode, size and way of saving, by a name that tells them apart."""
    files = {}
    for kind, mode, options in _VARIANTS:
        for size in _SIZES:
            name = "-".join([kind, mode, "x".join(map(str, size)), *options])
            files[name] = draw(kind, mode, size, **options)
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "green", "blue")]
    for kind in ("PNG", "GIF", "WEBP", "TIFF", "AVIF"):
        buffer = BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        files[f"{kind}-animated"] = buffer.getvalue()
    return files
