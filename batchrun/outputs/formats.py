"""The image formats: each a generator that reads like its specification.

It yields how many bytes it wants and is sent them, so nothing here knows how the bytes were cut on the way,
and no more than a few kilobytes are ever kept. Payloads are passed over, not decoded: what is checked is the
structure to the end marker, and the CRC of every PNG chunk. Bytes after the end marker are legal in all
formats, and not looked at.

Sources: PNG (W3C, 3rd edition), JPEG (ITU T.81, Annex B), WebP (RFC 9649), GIF89a (W3C), TIFF 6.0, ISO/IEC
14496-12 boxes for AVIF and HEIC, the BITMAPINFO headers of BMP. Where a format has no end marker (TIFF, AVIF,
HEIC, BMP), whole means: every byte that its tables point to and that can be told in one pass is there.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import NoReturn
from zlib import crc32

from batchrun.errors import OutputCorrupt

#: Every extension a verified image can have.
EXTENSIONS = ("png", "jpg", "webp", "gif", "avif", "heic", "tiff", "bmp")


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the bytes say about an image."""

    media_type: str
    #: Without the dot, one of EXTENSIONS.
    extension: str
    #: As stored (a rotation noted beside the picture is not applied); None when not told cheaply.
    width_px: int | None
    height_px: int | None


#: What a parser wants next: at least and at most so many bytes; None: the next marker that ends a JPEG scan.
Want = tuple[int, int] | None
Parser = Generator[Want, memoryview, ImageFacts]

#: So many bytes tell every format from the others.
HEAD_BYTES = 16


def refuse(reason: str, message: str) -> NoReturn:
    """Say that the bytes cannot become a whole image; `reason`: a word of Verifier."""
    raise OutputCorrupt(message, reason=reason)


# --- reading ---------------------------------------------------------------------------------------


def _exactly(count: int) -> Generator[Want, memoryview, bytes]:
    """Reads so many bytes (few: they are gathered in memory)."""
    return bytes((yield count, count))


def _skip(count: int) -> Generator[Want, memoryview, None]:
    """Passes over so many bytes without keeping them."""
    while count:
        count -= len((yield 1, count))


def _gather(count: int) -> Generator[Want, memoryview, bytes]:
    """Reads so many bytes as they come; for tables too large for `_exactly`."""
    gathered = bytearray()
    while len(gathered) < count:
        gathered += yield 1, count - len(gathered)
    return bytes(gathered)


# --- PNG -------------------------------------------------------------------------------------------

#: Bit depths by colour type.
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PNG_CHUNK_MAX_BYTES = 2**31 - 1


def png() -> Parser:
    yield from _exactly(8)
    width = height = colour_type = data_bytes = 0
    has_palette = False
    while True:
        length, kind = struct.unpack(">I4s", (yield from _exactly(8)))
        if length > _PNG_CHUNK_MAX_BYTES or not kind.isalpha():
            refuse("structure", "the PNG holds something that is not a chunk")
        if (kind == b"IHDR") == bool(width) or (kind == b"IHDR" and length != 13):
            refuse("structure", "the PNG does not begin with one header chunk")
        crc = crc32(kind)
        if kind == b"IHDR":
            header = yield from _exactly(13)
            crc = crc32(header, crc)
        else:
            left = length
            while left:
                piece = yield 1, left
                crc = crc32(piece, crc)
                left -= len(piece)
        if crc != int.from_bytes((yield from _exactly(4))):
            refuse("crc", f"a {kind.decode()} chunk of the PNG does not match its checksum")
        if kind == b"IHDR":
            width, height, colour_type = _png_header(header)
        elif kind == b"PLTE":
            has_palette = True
        elif kind == b"IDAT":
            if colour_type == 3 and not has_palette:
                refuse("structure", "the PNG lacks its palette")
            data_bytes += length
        elif kind == b"IEND":
            if not data_bytes or length:
                refuse("structure", "the PNG holds no picture")
            return ImageFacts("image/png", "png", width, height)


def _png_header(header: bytes) -> tuple[int, int, int]:
    """(width, height, colour type) of a sound IHDR chunk."""
    width, height, depth, colour_type, compression, filtering, interlace = struct.unpack(">IIBBBBB", header)
    sizes_are_sane = 0 < width < 2**31 and 0 < height < 2**31
    known = depth in _PNG_DEPTHS.get(colour_type, ()) and (compression, filtering) == (0, 0) and interlace < 2
    if not (sizes_are_sane and known):
        refuse("structure", "the PNG's header makes no sense")
    return width, height, colour_type


# --- JPEG ------------------------------------------------------------------------------------------

_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
#: Markers without a length: TEM and the restarts.
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD8)})
#: Reserved, and a second start of image: none of them can follow in a whole file.
_JPEG_IMPOSSIBLE = frozenset({0x00, *range(0x02, 0xC0), 0xC8, 0xD8, *range(0xF0, 0xFE)})


def _jpeg() -> Parser:
    yield from _exactly(2)
    size: tuple[int, int] | None = None
    scans = 0
    marker = yield from _jpeg_marker()
    while True:
        if marker in _JPEG_IMPOSSIBLE:
            refuse("structure", f"the JPEG holds an impossible marker (FF {marker:02X})")
        if marker == 0xD9:
            if size is None or not scans:
                refuse("structure", "the JPEG ends without a picture")
            return ImageFacts("image/jpeg", "jpg", *size)
        if marker in _JPEG_BARE:
            marker = yield from _jpeg_marker()
            continue
        length = int.from_bytes((yield from _exactly(2))) - 2
        if length < 0:
            refuse("structure", "a segment of the JPEG has no length")
        if marker in _JPEG_FRAMES:
            if size is not None:
                refuse("structure", "the JPEG has two frames")
            size = yield from _jpeg_frame(length)
        elif marker == 0xDA:
            yield from _jpeg_scan_header(length, has_frame=size is not None)
            scans += 1
            marker = (yield None)[1]
            continue
        else:
            yield from _skip(length)
        marker = yield from _jpeg_marker()


def _jpeg_marker() -> Generator[Want, memoryview, int]:
    """The next marker's code; any number of FF may fill the space before it."""
    if (yield 1, 1)[0] != 0xFF:
        refuse("structure", "the JPEG holds data between its segments")
    while (code := (yield 1, 1)[0]) == 0xFF:
        pass
    return code


def _jpeg_frame(length: int) -> Generator[Want, memoryview, tuple[int, int]]:
    """(width, height) from a frame header."""
    if length < 9:
        refuse("structure", "the JPEG's frame header is too short")
    _, height, width, components = struct.unpack(">BHHB", (yield from _exactly(6)))
    # A height of 0, to be told after the first scan, is in the standard and in no decoder.
    if not width or not height or length != 6 + 3 * components:
        refuse("structure", "the JPEG's frame header makes no sense")
    yield from _skip(length - 6)
    return width, height


def _jpeg_scan_header(length: int, *, has_frame: bool) -> Generator[Want, memoryview, None]:
    components = (yield 1, 1)[0]
    if not has_frame or not 1 <= components <= 4 or length != 4 + 2 * components:
        refuse("structure", "a scan header of the JPEG makes no sense")
    yield from _skip(length - 1)


# --- WebP ------------------------------------------------------------------------------------------


def _webp() -> Parser:
    _, riff_bytes, _ = struct.unpack("<4sI4s", (yield from _exactly(12)))
    left = riff_bytes - 4
    canvas: tuple[int, int] | None = None
    picture: tuple[int, int] | None = None
    is_first = True
    frames = 0
    while left > 0:
        if left < 8:
            refuse("structure", "the WebP's size does not match its chunks")
        kind, size = struct.unpack("<4sI", (yield from _exactly(8)))
        left -= 8
        if size > left:
            refuse("structure", "a chunk of the WebP is larger than the file")
        if is_first and kind not in (b"VP8 ", b"VP8L", b"VP8X"):
            refuse("structure", "the WebP does not begin with a picture")
        if kind == b"VP8X" and is_first:
            canvas, used = (yield from _webp_canvas(size)), 10
        elif kind == b"VP8 " and picture is None:
            picture, used = (yield from _webp_lossy(size)), 10
        elif kind == b"VP8L" and picture is None:
            picture, used = (yield from _webp_lossless(size)), 5
        else:
            frames += kind == b"ANMF"
            used = 0
        # Chunks are padded to an even size; some writers leave the last one's padding out of the RIFF size.
        padding = min(size % 2, left - size)
        yield from _skip(size - used + padding)
        left -= size + padding
        is_first = False
    if picture is None and not frames:
        refuse("structure", "the WebP holds no picture")
    if canvas and picture and canvas != picture:
        refuse("structure", "the WebP's picture does not have the size of its canvas")
    width, height = canvas or picture or (None, None)
    return ImageFacts("image/webp", "webp", width, height)


def _webp_canvas(size: int) -> Generator[Want, memoryview, tuple[int, int]]:
    if size < 10:
        refuse("structure", "the WebP's header is too short")
    header = yield from _exactly(10)
    return int.from_bytes(header[4:7], "little") + 1, int.from_bytes(header[7:10], "little") + 1


def _webp_lossy(size: int) -> Generator[Want, memoryview, tuple[int, int]]:
    if size < 10:
        refuse("structure", "the WebP's picture is too short")
    header = yield from _exactly(10)
    tag = int.from_bytes(header[:3], "little")
    width, height = (value & 0x3FFF for value in struct.unpack("<HH", header[6:]))
    # The tag: bit 0 is clear in a key frame, the upper 19 bits are the size of the first partition.
    if tag & 1 or header[3:6] != b"\x9d\x01\x2a" or tag >> 5 > size - 10 or not width or not height:
        refuse("structure", "the WebP's picture is not a VP8 key frame")
    return width, height


def _webp_lossless(size: int) -> Generator[Want, memoryview, tuple[int, int]]:
    if size < 5:
        refuse("structure", "the WebP's picture is too short")
    header = yield from _exactly(5)
    bits = int.from_bytes(header[1:], "little")
    if header[0] != 0x2F or bits >> 29:
        refuse("structure", "the WebP's picture is not VP8L")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1


# --- GIF -------------------------------------------------------------------------------------------


def _gif() -> Parser:
    _, width, height, flags, _, _ = struct.unpack("<6sHHBBB", (yield from _exactly(13)))
    yield from _skip(_gif_palette_bytes(flags))
    frames = 0
    while True:
        block = (yield 1, 1)[0]
        if block == 0x3B:
            break
        if block == 0x21:
            yield from _exactly(1)
        elif block == 0x2C:
            frame = yield from _exactly(9)
            # The local palette, and the byte with the smallest code size.
            yield from _skip(_gif_palette_bytes(frame[8]) + 1)
            frames += 1
        else:
            refuse("structure", "the GIF holds an unknown block")
        while size := (yield 1, 1)[0]:
            yield from _skip(size)
    if not frames or not width or not height:
        refuse("structure", "the GIF holds no picture")
    return ImageFacts("image/gif", "gif", width, height)


def _gif_palette_bytes(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


# --- AVIF and HEIC -----------------------------------------------------------------------------------

_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_FTYP_MAX_BYTES = 4096
_META_MAX_BYTES = 2**22
#: An image spatial extents box: size, type, version and flags, then width and height.
_ISPE = re.compile(rb"\x00\x00\x00\x14ispe\x00\x00\x00\x00(....)(....)", re.DOTALL)


def _heif() -> Parser:
    size = int.from_bytes((yield from _exactly(8))[:4])
    if not 16 <= size <= _FTYP_MAX_BYTES or size % 4:
        refuse("structure", "the file's type box makes no sense")
    box = yield from _exactly(size - 8)
    brands = {box[:4], *(box[at : at + 4] for at in range(8, len(box), 4))}
    if brands & _AVIF_BRANDS:
        media_type, extension = "image/avif", "avif"
    elif brands & _HEIC_BRANDS:
        media_type, extension = "image/heic", "heic"
    else:
        refuse("not-an-image", f"the file is not an image but {box[:4].decode('latin-1')!r}")
    meta: bytes | None = None
    has_data = False
    while meta is None or not has_data:
        size, kind = struct.unpack(">I4s", (yield from _exactly(8)))
        header_bytes = 8
        if size == 1:
            size, header_bytes = int.from_bytes((yield from _exactly(8))), 16
        payload_bytes = size - header_bytes
        if payload_bytes < 0:
            # Also size 0, a box without end: no telling whether it is whole.
            refuse("structure", "a box of the image has no size")
        if kind == b"meta":
            if payload_bytes > _META_MAX_BYTES:
                refuse("structure", "the image's description is too large")
            meta = yield from _gather(payload_bytes)
        else:
            has_data = has_data or (kind == b"mdat" and payload_bytes > 0)
            yield from _skip(payload_bytes)
    # Thumbnails and tiles have extents of their own; the picture's are the largest.
    extents = [(int.from_bytes(width), int.from_bytes(height)) for width, height in _ISPE.findall(meta)]
    width, height = max(extents, key=lambda size: size[0] * size[1], default=(None, None))
    return ImageFacts(media_type, extension, width, height)


# --- BMP -------------------------------------------------------------------------------------------


def _bmp() -> Parser:
    header = yield from _exactly(18)
    data_at, info_bytes = struct.unpack("<II", header[10:])
    if info_bytes == 12:
        width, height, planes, depth = struct.unpack("<HHHH", (yield from _exactly(8)))
        used, compression, image_bytes = 26, 0, 0
    elif info_bytes in (40, 52, 56, 64, 108, 124):
        info = yield from _exactly(20)
        width, height, planes, depth, compression, image_bytes = struct.unpack("<iiHHII", info)
        used = 38
    else:
        refuse("not-an-image", "the file is no image of a known kind")
    if width <= 0 or not height or planes != 1 or depth not in (1, 2, 4, 8, 16, 24, 32) or data_at < used:
        refuse("structure", "the BMP's header makes no sense")
    # 0, 3 and 6 are uncompressed rows, padded to four bytes; the others tell their size.
    if compression in (0, 3, 6):
        image_bytes = (width * depth + 31) // 32 * 4 * abs(height)
    yield from _skip(data_at - used + image_bytes)
    return ImageFacts("image/bmp", "bmp", width, abs(height))


# --- TIFF ------------------------------------------------------------------------------------------

#: Bytes of one value, by field type.
_TIFF_VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "I"}
_TIFF_MAX_FIELDS = 4096
_TIFF_MAX_STRIPS = 2**18
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
#: (offsets, byte counts) of strips, and of tiles.
_TIFF_DATA = ((273, 279), (324, 325))


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of a TIFF directory: its values lie at `offset`, or in `inline` when they fit there."""

    type: int
    count: int
    inline: bytes
    offset: int

    @property
    def size_bytes(self) -> int:
        return _TIFF_VALUE_BYTES.get(self.type, 0) * self.count

    @property
    def end(self) -> int:
        """Where the file must reach for the values to be there."""
        return self.offset + self.size_bytes if self.size_bytes > 4 else 0


def _tiff() -> Parser:
    """Follows the directories forward; one that lies behind the place reached is not seen."""
    header = yield from _exactly(8)
    order = "<" if header[:2] == b"II" else ">"
    (directory_at,) = struct.unpack(order + "I", header[4:])
    size: tuple[int, int] | None = None
    at, end = 8, 0
    while directory_at >= at:
        yield from _skip(directory_at - at)
        (count,) = struct.unpack(order + "H", (yield from _exactly(2)))
        if not 0 < count <= _TIFF_MAX_FIELDS:
            refuse("structure", "a directory of the TIFF makes no sense")
        table = yield from _gather(12 * count + 4)
        at = directory_at + 2 + len(table)
        fields = _tiff_fields(table, order)
        wanted = [fields[tag] for pair in _TIFF_DATA if pair[0] in fields for tag in pair if tag in fields]
        arrays: dict[int, tuple[int, ...]] = {}
        for field in sorted(wanted, key=lambda field: field.offset if field.end else 0):
            if not field.end:
                arrays[id(field)] = _tiff_integers(field, field.inline, order)
            elif at <= field.offset and field.count <= _TIFF_MAX_STRIPS:
                yield from _skip(field.offset - at)
                arrays[id(field)] = _tiff_integers(field, (yield from _gather(field.size_bytes)), order)
                at = field.end
        for offsets, counts in _TIFF_DATA:
            if offsets in fields and counts in fields:
                starts, lengths = (arrays.get(id(fields[tag]), ()) for tag in (offsets, counts))
                end = max(end, *(start + length for start, length in zip(starts, lengths)), 0)
        end = max(end, *(field.end for field in fields.values()))
        size = size or _tiff_size(fields, order)
        (directory_at,) = struct.unpack(order + "I", table[-4:])
    if size is None:
        refuse("structure", "the TIFF has no directory")
    yield from _skip(max(end - at, 0))
    return ImageFacts("image/tiff", "tiff", *size)


def _tiff_fields(table: bytes, order: str) -> dict[int, _Field]:
    fields = {}
    for tag, type_, count, inline in struct.iter_unpack(order + "HHI4s", table[:-4]):
        fields[tag] = _Field(type_, count, inline, *struct.unpack(order + "I", inline))
    return fields


def _tiff_integers(field: _Field, data: bytes, order: str) -> tuple[int, ...]:
    letter = _TIFF_INTEGERS.get(field.type)
    return struct.unpack_from(f"{order}{field.count}{letter}", data) if letter else ()


def _tiff_size(fields: dict[int, _Field], order: str) -> tuple[int, int]:
    found: list[int] = []
    for tag in (_TIFF_WIDTH, _TIFF_HEIGHT):
        field = fields.get(tag)
        if field is not None and field.count == 1:
            found += _tiff_integers(field, field.inline, order)
    if len(found) != 2 or not all(found):
        refuse("structure", "the TIFF does not tell its size")
    return found[0], found[1]


# --- telling the formats apart -----------------------------------------------------------------------

_BY_MAGIC: Iterable[tuple[bytes, Callable[[], Parser]]] = (
    (b"\x89PNG\r\n\x1a\n", png),
    (b"\xff\xd8\xff", _jpeg),
    (b"GIF87a", _gif),
    (b"GIF89a", _gif),
    (b"II*\x00", _tiff),
    (b"MM\x00*", _tiff),
    (b"BM", _bmp),
)
#: What files of these kinds begin with.
#: Files of these kinds begin with one of these.
MAGIC = tuple(magic for magic, _ in _BY_MAGIC)


def identify(head: bytes) -> Callable[[], Parser]:
    """The parser for a file that begins with these bytes."""
    if head[:4] == b"RIFF" and b"WEBP".startswith(head[8:12]):
        return _webp
    if head[4:8] == b"ftyp":
        return _heif
    for magic, parser in _BY_MAGIC:
        if head.startswith(magic):
            return parser
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        refuse("html", "the file is not an image but a web page")
    refuse("not-an-image", "the file is no image of a known kind")
