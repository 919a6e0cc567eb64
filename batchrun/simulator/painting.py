"""Real images for the simulator, painted with PIL: fit to be looked at in a gallery, and quick to make.

A gradient, some soft shapes and a caption with tool, prompt, seed and index, all taken from the picture's
digest. Flat shapes at a low compression level keep a megapixel at some tens of milliseconds; call from a
thread.
"""

from __future__ import annotations

import colorsys
import io
import textwrap
from functools import lru_cache
from random import Random

from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from batchrun.simulator.pictures import Format, Picture, with_jpeg_comment, with_webp_comment

Colour = tuple[int, int, int]


def blank(hue: float, side_px: int, format: Format) -> bytes:
    """A plain square of one hue (0 to 1)."""
    return _encode(Image.new("RGB", (side_px, side_px), _colour(hue, 0.6, 0.8)), format)


def paint(picture: Picture) -> bytes:
    """The picture as an image file of its own format and size."""
    rng = Random(picture.digest)
    hue = rng.random()
    image = _background(picture, hue, steep=rng.random() < 0.5)
    _shapes(image, hue, rng)
    _caption(image, picture)
    match picture.format:
        case "png":
            texts = PngImagePlugin.PngInfo()
            for key, text in picture.words.items():
                texts.add_text(key, text)
            return _encode(image, "png", texts)
        case "jpeg":
            return with_jpeg_comment(_encode(image, "jpeg"), picture.words)
        case "webp":
            return with_webp_comment(_encode(image, "webp"), picture.words, image.size)


def _background(picture: Picture, hue: float, *, steep: bool) -> Image.Image:
    ramp = Image.linear_gradient("L")
    if steep:
        ramp = ramp.rotate(90)
    # Thirty-two shades: enough for the eye, and they compress far better than 256.
    ramp = ImageOps.posterize(ramp, 5).resize((picture.width_px, picture.height_px), Image.Resampling.NEAREST)
    dark, light = _colour(hue, 0.75, 0.35), _colour(hue + 0.12, 0.45, 0.95)
    return ImageOps.colorize(ramp, dark, light)


def _shapes(image: Image.Image, hue: float, rng: Random) -> None:
    pen = ImageDraw.Draw(image)
    width, height = image.size
    for _ in range(rng.randint(5, 9)):
        x, y = rng.uniform(0, width), rng.uniform(0, height * 0.8)
        reach = rng.uniform(0.06, 0.22) * min(width, height)
        fill = _colour(hue + rng.choice((0.0, 0.08, 0.5)), rng.uniform(0.3, 0.8), rng.uniform(0.5, 1.0))
        if rng.random() < 0.6:
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=fill)
        else:
            sides = rng.choice((3, 4, 6))
            pen.regular_polygon((x, y, reach), n_sides=sides, rotation=rng.randint(0, 90), fill=fill)


def _caption(image: Image.Image, picture: Picture) -> None:
    width, height = image.size
    size = max(9, min(width, height) // 26)
    font = _font(size)
    per_line = max(8, int(width * 0.92 / (size * 0.52)))
    lines = textwrap.wrap(picture.words["Description"], per_line, max_lines=4, placeholder=" ...") or [
        "(no prompt)"
    ]
    foot = f"{picture.tool}   seed {picture.words['Seed'] or '-'}   #{picture.index}"
    lines.append(textwrap.shorten(foot, per_line, placeholder="..."))
    line_px = int(size * 1.35)
    top = max(0, height - line_px * len(lines) - size)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, top, width, height), fill=(16, 16, 20))
    for number, line in enumerate(lines):
        fill = (170, 170, 180) if number == len(lines) - 1 else (245, 245, 245)
        pen.text((size * 0.8, top + size // 2 + number * line_px), line, font=font, fill=fill)


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _colour(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _encode(image: Image.Image, format: Format, texts: PngImagePlugin.PngInfo | None = None) -> bytes:
    sink = io.BytesIO()
    match format:
        case "png":
            image.save(sink, "PNG", compress_level=1, pnginfo=texts)
        case "jpeg":
            image.save(sink, "JPEG", quality=85)
        case "webp":
            image.save(sink, "WEBP", quality=80, method=0)
    return sink.getvalue()
