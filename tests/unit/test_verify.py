"""The verifier against whole images, broken ones and things that are no images."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import pytest
from PIL import Image

from batchrun.errors import OutputCorrupt
from batchrun.outputs.formats import EXTENSIONS, ImageFacts
from batchrun.outputs.verify import Verifier
from tests.support.images import KINDS, draw, every_kind

REASONS = {"empty", "html", "not-an-image", "truncated", "structure", "crc"}


def verify(data: bytes) -> ImageFacts:
    verifier = Verifier()
    verifier.feed(data)
    return verifier.finish()


def refusal(data: bytes) -> str:
    with pytest.raises(OutputCorrupt) as caught:
        verify(data)
    assert caught.value.reason in REASONS
    return caught.value.reason


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


HEADER = (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
DATA = (b"IDAT", zlib.compress(b"\0\0"))
END = (b"IEND", b"")


@pytest.mark.parametrize("name", every_kind())
def test_a_whole_image_is_known_by_kind_and_size(name):
    data = every_kind()[name]
    facts = verify(data)
    with Image.open(BytesIO(data)) as image:
        image.load()
        assert (facts.width_px, facts.height_px) == image.size
    assert (facts.media_type, facts.extension) == KINDS[name.split("-")[0]]
    assert facts.extension in EXTENSIONS


@pytest.mark.parametrize("name", [name for name, data in every_kind().items() if len(data) < 4000])
def test_an_image_cut_anywhere_is_refused(name):
    data = every_kind()[name]
    with Image.open(BytesIO(data)) as image:
        image.load()
    for length in range(len(data)):
        if data[length:].strip(b"\0") or "TIFF" not in name:  # a TIFF may lack its last padding
            # A few bytes are not always enough to tell what the file would have been.
            assert refusal(data[:length]) in ("truncated", "empty", *["not-an-image"] * (length < 8))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_after_the_end_are_legal(kind):
    assert verify(draw(kind) + b"<html>trailing") == verify(draw(kind))


def test_any_changed_byte_of_a_png_is_refused():
    data = draw("PNG", size=(9, 9))
    for at in range(len(data)):
        assert refusal(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        ((HEADER, DATA, END), None),
        ((HEADER, (b"tEXt", b"a\0b"), DATA, DATA, END), None),
        ((DATA, END), "structure"),  # no header
        ((HEADER, END), "structure"),  # no picture
        ((HEADER, (b"IDAT", b""), END), "structure"),
        ((HEADER, HEADER, DATA, END), "structure"),
        ((HEADER, (b"ID\0T", b""), DATA, END), "structure"),
        ((HEADER, DATA), "truncated"),
        (((b"IHDR", struct.pack(">IIBBBBB", 0, 1, 8, 0, 0, 0, 0)), DATA, END), "structure"),  # no width
        (((b"IHDR", struct.pack(">IIBBBBB", 1, 1, 3, 0, 0, 0, 0)), DATA, END), "structure"),  # depth 3
        (((b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 3, 0, 0, 0)), DATA, END), "structure"),  # no palette
        (((b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 2)), DATA, END), "structure"),  # no such order
        (((b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 1, 0, 0)), DATA, END), "structure"),  # nor packing
    ],
)
def test_the_chunks_of_a_png_must_make_sense(chunks, reason):
    if reason is None:
        assert verify(png(*chunks)).extension == "png"
    else:
        assert refusal(png(*chunks)) == reason


def test_a_wrong_checksum_is_told_before_the_file_ends():
    data = bytearray(draw("PNG"))
    data[50] ^= 1
    with pytest.raises(OutputCorrupt) as caught:
        Verifier().feed(bytes(data[:-12]))
    assert caught.value.reason == "crc"


def test_a_jpeg_with_a_whole_jpeg_inside_ends_at_its_own_end():
    thumbnail = draw("JPEG", size=(3, 2))
    data = draw("JPEG")
    inside = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    with_thumbnail = data[:2] + inside + data[2:]
    assert verify(with_thumbnail).width_px == 61
    assert refusal(with_thumbnail[:-2]) == "truncated"


def test_a_jpeg_may_fill_the_space_before_a_marker():
    data = draw("JPEG")
    assert verify(data[:2] + b"\xff\xff\xff" + data[2:-2] + b"\xff\xff" + data[-2:]).width_px == 61


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:20] + b"\0" + data[20:],  # data between segments
        lambda data: data[:2] + b"\xff\xd8" + data[2:],  # a second start
        lambda data: data[:2] + b"\xff\xe1\0\1" + data[2:],  # a segment shorter than its own length
        lambda data: data[:20] + data[-2:],  # no picture
        lambda data: (
            data[: data.index(b"\xff\xc0")] + data[data.index(b"\xff\xda") :]
        ),  # a scan without a frame
        lambda data: data[:-40] + b"\xff\x42" + data[-38:],  # a reserved marker inside the scan
        # a frame header with one component more than there is room for
        lambda data: data[: data.index(b"\xff\xc0") + 9] + b"\4" + data[data.index(b"\xff\xc0") + 10 :],
        # a scan header with one component more than there is room for
        lambda data: data[: data.index(b"\xff\xda") + 4] + b"\4" + data[data.index(b"\xff\xda") + 5 :],
    ],
)
def test_a_jpeg_whose_segments_make_no_sense_is_refused(damage):
    assert refusal(damage(draw("JPEG"))) == "structure"


def test_a_webp_may_leave_out_the_last_padding():
    data = next(data for data in (draw("WEBP", quality=q) for q in range(30, 90)) if data[-1] == 0)
    size = struct.unpack("<I", data[16:20])[0]
    if size % 2 == 0:  # no padded one among them: pretend that the last zero is padding
        data = data[:16] + struct.pack("<I", size - 1) + data[20:]
    unpadded = data[:4] + struct.pack("<I", len(data) - 9) + data[8:-1]
    assert verify(unpadded) == verify(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: (
            data[:4] + struct.pack("<I", len(data) + 2) + data[8:] + bytes(10)
        ),  # size beyond the chunks
        lambda data: data[:4] + struct.pack("<I", len(data) - 20) + data[8:],  # chunk beyond the size
        lambda data: data[:12] + b"EXIF" + data[16:],  # no picture first
        lambda data: data[:23] + b"\0" + data[24:],  # no VP8 start code
        lambda data: data[:20] + bytes([data[20] | 1]) + data[21:],  # not a key frame
    ],
)
def test_a_webp_whose_chunks_make_no_sense_is_refused(damage):
    assert refusal(damage(draw("WEBP"))) == "structure"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:20] + b"\x2e" + data[21:],  # no VP8L signature
        lambda data: data[:24] + bytes([data[24] | 0x20]) + data[25:],  # a version that there is not
        lambda data: b"RIFF\x10\0\0\0WEBPVP8L\4\0\0\0" + data[20:24],  # shorter than its header
    ],
)
def test_a_lossless_webp_whose_header_makes_no_sense_is_refused(damage):
    data = draw("WEBP", lossless=True)
    assert data[12:16] == b"VP8L"
    assert refusal(damage(data)) == "structure"


GIF = b"GIF89a\3\0\2\0\0\0\0"
COMMENT = b"!\xfe\1c\0"
FRAME = b"," + bytes(9) + b"\2\1\0\0"


@pytest.mark.parametrize(
    "blocks",
    [
        GIF + COMMENT + b";",  # no picture
        GIF[:6] + b"\0\0" + GIF[8:] + FRAME + b";",  # no width
        GIF + FRAME + b"\1;",  # a block that there is not
    ],
)
def test_a_gif_without_a_picture_is_refused(blocks):
    assert verify(GIF + COMMENT + FRAME + b";").width_px == 3
    assert refusal(blocks) == "structure"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>", "html"),
        (b"<!DOCTYPE html><title>502 Bad Gateway</title>", "html"),
        (b"\xef\xbb\xbf \n<HTML><body>down for repairs", "html"),
        (b'{"result": false, "errors": []}', "not-an-image"),
        (b"%PDF-1.7 and so on", "not-an-image"),
        (b"plain text", "not-an-image"),
        (bytes(100), "not-an-image"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "not-an-image"),  # a film
        (b"\x89PN", "truncated"),
        (b"RIFF\x10\0\0\0WE", "truncated"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "not-an-image"),
    ],
)
def test_what_is_no_image_is_told_by_name(data, reason):
    assert refusal(data) == reason
