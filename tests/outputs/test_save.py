"""Downloads from a CDN of files in memory, over every way in which one can go wrong, onto a real disk."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from batchrun.errors import DiskError, OutputCorrupt, OutputError, OutputGone, ReplyLost
from batchrun.model import Output
from batchrun.outputs import disk, pieces
from batchrun.outputs.disk import disk_errors, entry_added, free_bytes, sync_entries
from batchrun.outputs.save import (
    GATHER_BYTES,
    Fetch,
    Partial,
    Received,
    Saved,
    adopt,
    publish,
    receive,
    sweep,
)
from tests.support.images import draw

SMALL = draw("PNG")
LARGE = draw("PNG", size=(1000, 1000))
PHOTO = draw("JPEG")
LARGE_PHOTO = draw("JPEG", size=(2500, 2500))
URL = "http://127.0.0.1/0.png"
LIMIT = 2**26
CHUNK = 2**16


@dataclass(frozen=True)
class Reply:
    """What the CDN answers, with its body."""

    start: int
    total_bytes: int | None
    etag: str | None
    content_type: str
    chunks: AsyncIterator[bytes]


@dataclass
class Cdn:
    """Serves one file as an honest server does, unless a field says otherwise."""

    data: bytes
    etag: str | None = '"v1"'
    content_type: str = "image/png"
    #: Whether it tells the length, and keeps to Range.
    tells_total: bool = True
    ranges: bool = True
    #: The body of the first reply breaks off (with ReplyLost) after so many bytes; None: it does not.
    breaks_after: int | None = None
    #: Called before each further chunk is sent.
    between: Callable[[], None] = lambda: None
    #: (start, etag) of every fetch.
    asked: list[tuple[int, str | None]] = field(default_factory=list)

    @asynccontextmanager
    async def fetch(
        self, url: str, *, start: int, etag: str | None, silence_s: float = 60.0
    ) -> AsyncIterator[Reply]:
        self.asked.append((start, etag))
        if not self.ranges or etag != self.etag:
            start = 0
        total = len(self.data) if self.tells_total else None
        yield Reply(start, total, self.etag, self.content_type, self._body(start))

    async def _body(self, start: int) -> AsyncIterator[bytes]:
        end, self.breaks_after = self.breaks_after, None
        stop = len(self.data) if end is None else start + end
        for at in range(start, stop, CHUNK):
            yield self.data[at : min(at + CHUNK, stop)]
            self.between()
            await anyio.lowlevel.checkpoint()
        if end is not None:
            raise ReplyLost("the connection broke off")


def output(**changes) -> Output:
    return replace(Output(0, URL), **changes)


@pytest.fixture
def partial(tmp_path: Path) -> Partial:
    return Partial(tmp_path / "partial" / "1-a_0.part")


@pytest.fixture
def final(tmp_path: Path) -> Path:
    return tmp_path / "images" / "000" / "a_0.png"


async def save(
    fetch: Fetch, output: Output, partial: Partial, final: Path, *, max_bytes: int = LIMIT, **accept
) -> Saved:
    """Fetch it and put it in its place."""
    await receive(fetch, output, partial, max_bytes=max_bytes)
    return published(partial, output, final, **accept)


def published(partial: Partial, output: Output, final: Path, **accept) -> Saved:
    image = Received(partial, output.declared_bytes, lambda facts: final, **accept)
    publish([image])
    return image.outcome()


async def reason(cdn: Cdn, partial: Partial, output: Output, **accept) -> str:
    with pytest.raises(OutputCorrupt) as caught:
        await save(cdn.fetch, output, partial, partial.path.with_suffix(".png"), **accept)
    return caught.value.reason


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_an_image_is_saved_byte_for_byte_with_its_facts(data, partial, final):
    saved = await save(Cdn(data).fetch, output(declared_bytes=len(data)), partial, final)
    assert final.read_bytes() == data
    assert saved.sha256 == hashlib.sha256(data).hexdigest()
    assert (saved.size_bytes, saved.facts.extension, saved.warnings) == (len(data), "png", ())
    assert not partial.path.exists()


async def test_only_a_large_image_touches_the_partial_folder_while_it_comes(partial):
    assert len(SMALL) < GATHER_BYTES < len(LARGE)
    await receive(Cdn(SMALL).fetch, output(), partial, max_bytes=LIMIT)
    assert not partial.path.exists()
    await receive(Cdn(LARGE).fetch, output(), partial, max_bytes=LIMIT)
    written = partial.path.read_bytes()
    assert len(written) >= len(LARGE) - GATHER_BYTES
    assert LARGE.startswith(written)


@pytest.mark.parametrize(
    ("changes", "declared", "expected"),
    [
        ({"data": b""}, {}, "empty"),
        ({"data": b"<html>502 Bad Gateway</html>"}, {}, "html"),
        ({"data": SMALL[:-5]}, {}, "truncated"),
        ({"data": SMALL[:-5], "tells_total": False}, {}, "truncated"),
        ({"data": SMALL[:50] + b"\0" + SMALL[51:]}, {}, "crc"),
        ({"data": SMALL}, {"declared_bytes": len(SMALL) + 1}, "declared-size"),
        ({"data": SMALL}, {"content_type": "image/jpeg"}, "declared-type"),
        ({"data": SMALL, "content_type": "text/html; charset=utf-8"}, {}, "declared-type"),
        ({"data": PHOTO, "etag": f'"{"0" * 32}"', "content_type": "image/jpeg"}, {}, "etag"),
        ({"data": LARGE_PHOTO, "etag": f'"{"0" * 32}"', "content_type": "image/jpeg"}, {}, "etag"),
    ],
)
async def test_what_is_not_the_image_promised_is_refused(changes, declared, expected, partial):
    assert await reason(Cdn(**changes), partial, output(**declared)) == expected
    assert partial.resumes_at == 0


async def test_a_body_shorter_than_its_length_is_refused_even_if_it_is_a_whole_image(partial, final):
    cdn = Cdn(SMALL + b"trailing")

    @asynccontextmanager
    async def fetch(url, *, start, etag, **_):
        async with cdn.fetch(url, start=start, etag=etag) as reply:
            yield replace(reply, total_bytes=len(SMALL) + 100)

    with pytest.raises(OutputCorrupt) as caught:
        await save(fetch, output(), partial, final)
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("content_type", ["", "application/octet-stream", "image/PNG; q=1", "image/x-png"])
async def test_a_content_type_that_says_nothing_else_is_fine(content_type, partial, final):
    cdn = Cdn(SMALL, content_type=content_type)
    saved = await save(cdn.fetch, output(content_type="raw"), partial, final)
    assert saved.warnings == ()


@pytest.mark.parametrize("etag", [f'"{hashlib.md5(LARGE_PHOTO).hexdigest()}"', '"v1"', 'W/"0"', '""', None])
async def test_an_etag_is_compared_only_where_it_is_an_md5(etag, partial, final):
    cdn = Cdn(LARGE_PHOTO, etag=etag, content_type="image/jpeg")
    saved = await save(cdn.fetch, output(), partial, final)
    assert saved.size_bytes == len(LARGE_PHOTO) > GATHER_BYTES


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_a_png_is_believed_by_its_own_checksums_whatever_hash_the_etag_is(data, partial, final):
    saved = await save(Cdn(data, etag=f'"{"0" * 32}"').fetch, output(), partial, final)
    assert saved.warnings == ()


async def test_what_is_declared_wrong_twice_over_the_same_bytes_is_kept_with_warnings(partial, final):
    cdn, wrong = Cdn(SMALL), output(declared_bytes=7, content_type="image/webp")
    with pytest.raises(OutputCorrupt) as first:
        await save(cdn.fetch, wrong, partial, final)
    assert first.value.sha256 == hashlib.sha256(SMALL).hexdigest()
    saved = await save(cdn.fetch, wrong, partial, final, accept_sha256=first.value.sha256)
    assert saved.warnings == (
        f"declared with 7 bytes, came with {len(SMALL)}",
        "declared as image/webp, came as image/png",
    )
    assert saved.facts.extension == "png"  # the extension follows the bytes
    assert final.read_bytes() == SMALL


async def test_what_is_declared_wrong_over_other_bytes_than_before_is_refused_again(partial):
    assert (
        await reason(Cdn(SMALL), partial, output(declared_bytes=7), accept_sha256="0" * 64) == "declared-size"
    )


async def test_a_file_larger_than_the_limit_is_refused_before_or_while_it_comes(partial, final):
    for tells_total in (True, False):
        cdn = Cdn(LARGE, tells_total=tells_total)
        with pytest.raises(OutputError, match="larger than the limit"):
            await save(cdn.fetch, output(), partial, final, max_bytes=len(LARGE) - 1)
    saved = await save(Cdn(LARGE).fetch, output(), partial, final, max_bytes=len(LARGE))
    assert saved.size_bytes == len(LARGE)


async def test_an_output_without_an_address_cannot_be_fetched(partial, final):
    with pytest.raises(OutputError, match="no address"):
        await save(Cdn(SMALL).fetch, output(url=None), partial, final)


# --- going on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broke_at", [1, 1000, GATHER_BYTES - 1, GATHER_BYTES, GATHER_BYTES + CHUNK, len(LARGE) - 1]
)
async def test_a_download_that_broke_off_goes_on_where_it_ended(broke_at, partial, final):
    cdn = Cdn(LARGE, etag=f'"{hashlib.md5(LARGE).hexdigest()}"', breaks_after=broke_at)
    with pytest.raises(ReplyLost):
        await receive(cdn.fetch, output(), partial, max_bytes=LIMIT)
    await save(cdn.fetch, output(), partial, final)
    assert cdn.asked == [(0, None), (broke_at, cdn.etag)]
    assert final.read_bytes() == LARGE


@pytest.mark.parametrize(
    "changes",
    [
        {"etag": None},
        {"etag": 'W/"v1"'},  # a weak ETag does not promise the same bytes
        {"tells_total": False},
    ],
)
async def test_what_cannot_be_proven_the_same_begins_again_at_once(changes, partial, final):
    cdn = Cdn(LARGE, breaks_after=GATHER_BYTES + 5, **changes)
    with pytest.raises(ReplyLost):
        await receive(cdn.fetch, output(), partial, max_bytes=LIMIT)
    saved = await save(cdn.fetch, output(), partial, final)
    assert [start for start, _ in cdn.asked] == [0, 0]
    assert saved.sha256 == hashlib.sha256(LARGE).hexdigest()


@pytest.mark.parametrize("change", ["ignores ranges", "another file", "another address"])
async def test_a_whole_answer_to_a_request_for_the_rest_is_taken_from_its_beginning(change, partial, final):
    cdn = Cdn(LARGE, breaks_after=GATHER_BYTES + 5)
    with pytest.raises(ReplyLost):
        await receive(cdn.fetch, output(), partial, max_bytes=LIMIT)
    other = draw("PNG", size=(900, 901))
    if change == "ignores ranges":
        cdn.ranges = False
    elif change == "another file":
        cdn.data, cdn.etag = other, '"v2"'
    url = "http://127.0.0.1/other.png" if change == "another address" else URL
    saved = await save(cdn.fetch, output(url=url), partial, final)
    assert saved.sha256 == hashlib.sha256(cdn.data).hexdigest()
    assert final.read_bytes() == cdn.data
    assert cdn.asked[1][0] == (0 if change == "another address" else GATHER_BYTES + 5)


@pytest.mark.parametrize("lie", [{"etag": '"v2"'}, {"etag": None}, {"total_bytes": 9}, {"start": 17}])
async def test_the_rest_of_another_file_is_not_added_and_the_next_attempt_begins_again(lie, partial, final):
    cdn = Cdn(LARGE, breaks_after=1000)

    @asynccontextmanager
    async def lying(url, *, start, etag, **_):
        async with cdn.fetch(url, start=start, etag=etag) as reply:
            yield replace(reply, **lie)

    with pytest.raises(ReplyLost):
        await receive(cdn.fetch, output(), partial, max_bytes=LIMIT)
    with pytest.raises(OutputCorrupt) as caught:
        await save(lying, output(), partial, final)
    assert caught.value.reason == "range"
    saved = await save(cdn.fetch, output(), partial, final)
    assert saved.sha256 == hashlib.sha256(LARGE).hexdigest()


async def test_any_other_refusal_of_the_rest_makes_the_next_attempt_begin_again(partial):
    cdn = Cdn(LARGE, breaks_after=1000)

    @asynccontextmanager
    async def gone(url, *, start, etag, **_):
        raise OutputGone("gone", status=404)
        yield

    with pytest.raises(ReplyLost):
        await receive(cdn.fetch, output(), partial, max_bytes=LIMIT)
    with pytest.raises(OutputGone):
        await receive(gone, output(), partial, max_bytes=LIMIT)
    assert partial.resumes_at == 0


async def test_a_partial_file_deleted_from_outside_is_noticed_and_begun_again(partial, final):
    cdn = Cdn(LARGE, breaks_after=GATHER_BYTES + CHUNK)
    with pytest.raises(ReplyLost):
        await receive(cdn.fetch, output(), partial, max_bytes=LIMIT)
    partial.path.unlink()
    assert await reason(cdn, partial, output()) == "vanished"
    saved = await save(cdn.fetch, output(), partial, final)
    assert final.read_bytes() == LARGE
    assert saved.sha256 == hashlib.sha256(LARGE).hexdigest()


async def test_a_partial_folder_deleted_while_a_file_grows_is_noticed_and_begun_again(partial, final):
    cdn = Cdn(LARGE)
    cdn.between = lambda: shutil.rmtree(partial.path.parent, ignore_errors=True)
    assert await reason(cdn, partial, output()) == "vanished"
    cdn.between = lambda: None
    saved = await save(cdn.fetch, output(), partial, final)
    assert final.read_bytes() == LARGE
    assert saved.sha256 == hashlib.sha256(LARGE).hexdigest()


async def test_a_download_cancelled_at_any_moment_goes_on_afterwards(partial, final):
    cdn = Cdn(LARGE)
    for chunks in range(1, 30, 4):
        with anyio.CancelScope() as scope:
            seen = []
            cdn.between = lambda seen=seen, scope=scope, chunks=chunks: (
                seen.append(1),
                scope.cancel() if len(seen) >= chunks else None,
            )
            await receive(cdn.fetch, output(), partial, max_bytes=LIMIT)
    cdn.between = lambda: None
    saved = await save(cdn.fetch, output(), partial, final)
    assert final.read_bytes() == LARGE
    assert saved.sha256 == hashlib.sha256(LARGE).hexdigest()
    assert any(start for start, _ in cdn.asked)


async def test_memory_is_held_for_what_is_on_its_way_only(tmp_path):
    for data in (LARGE, SMALL):
        one = Partial(tmp_path / "partial" / "warm.part")
        await save(Cdn(data).fetch, output(), one, tmp_path / "images" / f"{len(data)}.png")
    free = len(pieces._free)
    on_their_way = [Partial(tmp_path / "partial" / f"{number}.part") for number in range(3)]
    for number, partial in enumerate(on_their_way):
        await receive(Cdn(SMALL).fetch, output(), partial, max_bytes=LIMIT)
        assert len(pieces._free) == max(0, free - number - 1)
    images = [
        Received(partial, None, lambda facts, number=number: tmp_path / "images" / f"{number}.png")
        for number, partial in enumerate(on_their_way)
    ]
    publish(images)
    assert len(pieces._free) == max(free, 3)
    broken = Partial(tmp_path / "partial" / "broken.part")
    assert await reason(Cdn(SMALL[:-5]), broken, output()) == "truncated"
    assert len(pieces._free) == max(free, 3)
    for etag in ('"v1"', None):  # gone on with, and begun again
        cdn = Cdn(LARGE, etag=etag, breaks_after=GATHER_BYTES + CHUNK)
        with pytest.raises(ReplyLost):
            await receive(cdn.fetch, output(), broken, max_bytes=LIMIT)
        assert len(pieces._free) == max(free, 3)


# --- under the final name --------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_publishing_twice_is_publishing_once(data, partial, final):
    saved = await save(Cdn(data).fetch, output(), partial, final)
    assert published(partial, output(), final) == saved
    assert await save(Cdn(data).fetch, output(), partial, final) == saved
    assert final.read_bytes() == data
    assert [path.name for path in final.parent.iterdir()] == [final.name]
    assert not partial.path.exists()


async def test_images_published_together_share_syncs_and_no_fate(tmp_path, monkeypatch):
    datas = [draw("PNG", size=(side, side)) for side in (10, 100, 700)]
    datas.insert(1, SMALL[:-5])
    received = []
    for number, data in enumerate(datas):
        partial = Partial(tmp_path / "partial" / f"{number}.part")
        await receive(Cdn(data).fetch, output(), partial, max_bytes=LIMIT)
        final = tmp_path / "images" / "000" / f"{number}.png"
        received.append(Received(partial, None, lambda facts, final=final: final))
    final.parent.mkdir(parents=True)
    disk.make_durable(final.parent)
    synced, there, real = [], [], os.fsync

    def noting(file: int) -> None:
        synced.append(os.fstat(file).st_ino)
        there.append({path.name for path in (tmp_path / "partial").iterdir()})
        real(file)

    monkeypatch.setattr(os, "fsync", noting)
    publish(received)
    with pytest.raises(OutputCorrupt):
        received[1].outcome()
    for number in (0, 2, 3):
        assert received[number].outcome().path.read_bytes() == datas[number]
    paths = [*(received[number].outcome().path for number in (0, 2, 3)), final.parent]
    assert synced == [path.stat().st_ino for path in paths]
    assert there[0] == {"0.part", "2.part", "3.part"}  # one commit of the file system's serves them all


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_another_file_under_the_final_name_is_never_replaced(data, partial, final):
    final.parent.mkdir(parents=True)
    final.write_bytes(b"the user's own")
    with pytest.raises(OutputError, match="already with other content"):
        await save(Cdn(data).fetch, output(), partial, final)
    assert final.read_bytes() == b"the user's own"


async def test_a_verified_file_deleted_before_its_rename_is_fetched_again(partial, final):
    await receive(Cdn(LARGE).fetch, output(), partial, max_bytes=LIMIT)
    partial.path.unlink()
    with pytest.raises(OutputCorrupt) as caught:
        published(partial, output(), final)
    assert caught.value.reason == "vanished"


async def test_a_file_cut_short_from_outside_never_gets_its_name(partial, final):
    await receive(Cdn(LARGE).fetch, output(), partial, max_bytes=LIMIT)
    os.truncate(partial.path, len(LARGE) - 1)
    with pytest.raises(OutputCorrupt) as caught:
        published(partial, output(), final)
    assert caught.value.reason == "vanished"
    assert not final.exists()


async def test_a_folder_deleted_between_two_images_is_made_again(partial, final):
    for _ in range(2):
        await save(Cdn(SMALL).fetch, output(), partial, final)
        assert final.read_bytes() == SMALL
        final.unlink()
        final.parent.rmdir()


async def test_an_image_saved_but_not_recorded_is_adopted_if_it_is_whole(partial, final):
    base = final.with_suffix("")
    assert await adopt(base, None) is None
    saved = await save(Cdn(SMALL).fetch, output(), partial, final)
    expected = Saved(final, saved.sha256, saved.size_bytes, saved.facts)
    assert await adopt(base, len(SMALL)) == await adopt(base, None) == expected
    assert await adopt(base, len(SMALL) + 1) is None
    final.write_bytes(SMALL[:-1])
    assert await adopt(base, None) is None
    final.write_bytes(draw("JPEG"))  # not what its name says
    assert await adopt(base, None) is None


# --- the disk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "cure"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EMFILE, "too many open files"),
        (errno.EXDEV, "lies on another disk"),
        (errno.ENOTDIR, "Not a directory"),
    ],
)
def test_the_systems_errors_say_what_to_do(code, cure):
    with pytest.raises(DiskError, match=f"cannot write x.png: .*{cure}"), disk_errors("write", Path("x.png")):
        raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_a_folder_that_cannot_be_written_is_a_disk_error_and_leaves_nothing_behind(
    data, partial, final, tmp_path
):
    (tmp_path / "partial").write_text("a file where the folder should be")
    with pytest.raises(DiskError, match="cannot write"):
        await save(Cdn(data).fetch, output(), partial, final)
    assert not final.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
async def test_a_full_disk_is_told_in_words(partial, final):
    partial.path.parent.mkdir()
    partial.path.symlink_to("/dev/full")
    with pytest.raises(DiskError, match="the disk is full"):
        await save(Cdn(LARGE).fetch, output(), partial, final)
    with pytest.raises(DiskError, match="the disk is full"):
        await save(Cdn(SMALL).fetch, output(), partial, final)
    assert not final.exists()


def test_the_partial_folder_is_swept_and_what_is_not_there_is_no_error(tmp_path, partial):
    sweep(partial.path.parent)
    partial.path.parent.mkdir()
    partial.path.write_bytes(b"left over")
    partial.discard()
    partial.discard()
    partial.path.write_bytes(b"left over")
    sweep(partial.path.parent)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_synced_once_for_all_who_wait_and_after_each_ones_entry_was_there(tmp_path, monkeypatch):
    begun, may_end = threading.Event(), threading.Event()
    seen: list[set[str]] = []
    real = os.fsync

    def slow_fsync(handle: int) -> None:
        seen.append({path.name for path in tmp_path.iterdir()})
        begun.set()
        may_end.wait(10)
        real(handle)

    def add(name: str) -> None:
        (tmp_path / name).touch()
        sync_entries(tmp_path, entry_added(tmp_path))
        assert any(name in names for names in seen)

    monkeypatch.setattr(os, "fsync", slow_fsync)
    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(add, "first")
        assert begun.wait(10)
        others = [threads.submit(add, f"other-{number}") for number in range(7)]
        while disk._shared[tmp_path].asked < 8:
            time.sleep(0.001)
        may_end.set()
        for added in (first, *others):
            added.result(10)
    assert "other-0" not in seen[0]
    assert len(seen) == 2


def test_free_space_is_known_before_the_folder_exists(tmp_path):
    assert free_bytes(tmp_path / "not" / "yet") > 0
