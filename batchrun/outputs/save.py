"""Brings one output to disk: received, verified whole, then under its final name and durable.

`receive` makes one attempt at all bytes; nothing is looked at on the event loop. Up to GATHER_BYTES are
gathered in memory, so most images meet the disk only in `publish`: a thread job that verifies, hashes,
creates, writes, syncs and renames as many as are ready. Larger ones are verified and written as they come, a
thread job for each such piece, to a file in `partial/`. No file is read a second time.

An interrupted download stays in its `Partial`, held by the caller between attempts, with all its bytes in the
file: what waits takes no memory. The next attempt goes on where it ended if the server proves that the file
is still the same (RFC 9110, 13.1.5 and 14), else it begins again. A new process always begins again: hashes
do not outlive their process.

`publish` never replaces a file, and both steps are safe to repeat. What a crash leaves between the rename and
the record of it, `adopt` takes in.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import anyio
import anyio.to_thread
from aiofiles.threadpool.binary import AsyncFileIO

from batchrun.errors import (
    BatchrunError,
    NotSent,
    OutputCorrupt,
    OutputError,
    RateLimited,
    ReplyLost,
    ServerFault,
)
from batchrun.model import Output
from batchrun.outputs import pieces
from batchrun.outputs.disk import disk_errors, entry_added, rename_durably, sync_entries, sync_folder
from batchrun.outputs.formats import EXTENSIONS, ImageFacts
from batchrun.outputs.verify import Verifier

#: Larger files are written to disk while they come, in pieces of this size: a download holds little more than
#: that, and the thread hops of a write cost nothing beside it.
GATHER_BYTES = pieces.PIECE_BYTES
_READ_BYTES = 2**18


# --- what is fetched from ----------------------------------------------------------------------------


class Download(Protocol):
    """The answer to a fetch, its body still to be read."""

    @property
    def start(self) -> int:
        """Offset in the file at which the body begins; 0 when the server sends it whole."""

    @property
    def total_bytes(self) -> int | None:
        """Length of the whole file (not of the body); None when not told."""

    @property
    def etag(self) -> str | None:
        """The ETag header as it came, quotes and `W/` included."""

    @property
    def content_type(self) -> str:
        """The Content-Type header; empty when missing."""

    @property
    def chunks(self) -> AsyncIterator[bytes]:
        """The body in pieces of at most a few hundred KiB; raises ReplyLost when it breaks off."""


class Fetch(Protocol):
    """Opens a GET, with `start` above 0 for that Range, If-Range `etag`; `silence_s`: see `receive`.

    Raises ServiceError or OutputGone.
    """

    def __call__(
        self, url: str, *, start: int, etag: str | None, silence_s: float
    ) -> AbstractAsyncContextManager[Download]: ...


# --- what comes of it --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Saved:
    """A whole image, verified and durable, at `path`."""

    path: Path
    sha256: str
    size_bytes: int
    facts: ImageFacts
    #: What was declared otherwise and is kept all the same.
    warnings: tuple[str, ...] = ()


class Partial:
    """What has arrived of one output; the caller keeps it between the attempts of one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._piece: memoryview | None = None
        self.forget()

    def forget(self) -> None:
        """Makes the next attempt begin again."""
        self._give_back()
        self.url: str | None = None
        #: The strong ETag of the file that has begun to arrive; only with it can it be gone on with.
        self.etag: str | None = None
        self.total_bytes: int | None = None
        #: Bytes arrived so far.
        self.offset_bytes = 0
        #: How many of them are in memory only: at the beginning of the piece.
        self._held_bytes = 0
        #: How many the verifier and the hashes have seen, and how many are in the file.
        self._read_bytes = 0
        self._written_bytes = 0
        self._verifier = Verifier()
        self._sha256 = hashlib.sha256()
        #: To be compared with the ETag where that is one and the format has no checksums of its own.
        self._md5: hashlib._Hash | None = None
        #: The content types it was declared with: by the service, and by the server.
        self._declared_types: tuple[str, ...] = ()

    def discard(self) -> None:
        """Removes the file, if there is one, and begins again."""
        self.forget()
        with disk_errors("remove", self.path):
            self.path.unlink(missing_ok=True)

    @property
    def resumes_at(self) -> int:
        """The offset at which the next attempt can go on; 0: from the beginning."""
        # Without a total there is no telling whether anything is left to ask for.
        is_known = self.etag is not None and self.total_bytes is not None
        return self.offset_bytes if is_known and self.offset_bytes < (self.total_bytes or 0) else 0

    def _meet(self, reply: Download, *, asked: int) -> None:
        """Goes on with the reply if it is proven to be the rest of what is here; else begins anew with it."""
        if 0 < asked == reply.start and (reply.etag, reply.total_bytes) == (self.etag, self.total_bytes):
            return
        url = self.url
        self.forget()
        if reply.start != 0:
            raise OutputCorrupt("the server went on with another file or another part of it", reason="range")
        self.url = url
        self.etag = reply.etag if (reply.etag or "").startswith('"') else None
        self.total_bytes = reply.total_bytes
        self._md5 = hashlib.md5(usedforsecurity=False) if _md5_in(self.etag) else None

    def _take(self, chunk: memoryview) -> memoryview:
        """Keeps as much of it as there is room for in memory; returns the rest."""
        if self._piece is None:
            self._piece = pieces.take()
        taken = chunk[: GATHER_BYTES - self._held_bytes]
        self._piece[self._held_bytes : self._held_bytes + len(taken)] = taken
        self._held_bytes += len(taken)
        self.offset_bytes += len(taken)
        return chunk[len(taken) :]

    @property
    def _held(self) -> memoryview:
        """What is in memory only."""
        return memoryview(b"") if self._piece is None else self._piece[: self._held_bytes]

    def _give_back(self) -> None:
        """Lets others use the memory; no thread may be at work on it."""
        if self._piece is not None:
            pieces.give_back(self._piece)
            self._piece = None

    # --- in threads: a call that hashes lets other threads run, which on the event loop it would wait for ---

    def _read(self) -> None:
        """Gives what is in memory to the verifier and the hashes, once."""
        if self._read_bytes < self.offset_bytes:
            held = self._held
            self._verifier.feed(held)
            self._sha256.update(held)
            if self._md5 and not self._verifier.has_checksums:  # MD5 takes three times as long as the rest
                self._md5.update(held)
            self._read_bytes += len(held)

    @contextmanager
    def _written(self) -> Iterator[int]:
        """The file with all bytes in it, still to be synced."""
        file = pieces.opener(self.path, os.O_WRONLY) if self._written_bytes else self._created()
        try:
            if not self._written_bytes:
                pieces.write(file, self._held)
                self._written_bytes = self._held_bytes
            elif os.fstat(file).st_size != self._written_bytes:
                raise _changed(self.path)
            yield file
        finally:
            os.close(file)

    def _created(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            return pieces.opener(self.path, flags)
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return pieces.opener(self.path, flags)

    def _judge(self, declared_bytes: int | None, accept: str | None) -> tuple[ImageFacts, tuple[str, ...]]:
        """What the complete body is, and what is to be warned of."""
        if self.total_bytes is not None and self.offset_bytes != self.total_bytes:
            message = f"{self.offset_bytes} of {self.total_bytes} bytes came"
            raise OutputCorrupt(message, reason="truncated")
        self._read()
        facts = self._verifier.finish()
        sha256 = self._sha256.hexdigest()
        reason, warnings = "", []
        md5 = None if self._verifier.has_checksums else self._md5
        if md5 and md5.hexdigest() != _md5_in(self.etag):
            # some stores give hashes of another kind the same form: the same bytes twice are the file
            reason = "etag"
            warnings.append("the bytes do not match the MD5 in the ETag")
        if declared_bytes is not None and declared_bytes != self.offset_bytes:
            reason = reason or "declared-size"
            warnings.append(f"declared with {declared_bytes} bytes, came with {self.offset_bytes}")
        for declared in dict.fromkeys(self._declared_types):
            if _contradicts(declared, facts.media_type):
                reason = reason or "declared-type"
                warnings.append(f"declared as {declared}, came as {facts.media_type}")
        if warnings and sha256 != accept:
            raise OutputCorrupt("; ".join(warnings), reason=reason, sha256=sha256)
        return facts, tuple(warnings)


# --- the steps -----------------------------------------------------------------------------------------

#: After these the file at the other end is the same as before.
_RESUMABLE = (NotSent, ReplyLost, ServerFault, RateLimited)


async def receive(
    fetch: Fetch, output: Output, partial: Partial, *, max_bytes: int, silence_s: float = math.inf
) -> None:
    """Fetches an output once: all its bytes are in `partial` then, to be published.

    A server that says nothing for `silence_s` seconds is not waited for any longer: ReplyLost.

    Raises what `fetch` raises (after ReplyLost the partial stays for the next attempt), OutputCorrupt (fetch
    again; its reason a word of Verifier, `range` or `vanished`), OutputError (larger than `max_bytes`, or
    without an address), DiskError.
    """
    if output.url is None:
        raise OutputError("the service gives no address for this output")
    if partial.url != output.url:
        partial.forget()
        partial.url = output.url
    try:
        async with _Writing(partial) as file:
            try:
                await _gather(fetch, output, partial, file, max_bytes, silence_s)
            except _RESUMABLE:
                if not partial.resumes_at:
                    partial.forget()
                await file.write_rest()
                raise
            if partial._written_bytes:
                await file.write_rest()
    except _RESUMABLE:
        raise
    except BatchrunError:
        partial.forget()
        raise


async def _gather(
    fetch: Fetch, output: Output, partial: Partial, file: _Writing, max_bytes: int, silence_s: float
) -> None:
    """Takes in what is sent; every full piece is written."""
    assert output.url is not None
    asked = partial.resumes_at
    etag = partial.etag if asked else None
    async with fetch(output.url, start=asked, etag=etag, silence_s=silence_s) as reply:
        partial._meet(reply, asked=asked)
        partial._declared_types = (output.content_type, reply.content_type)
        _check_limit(partial.total_bytes or 0, max_bytes)
        async for chunk in reply.chunks:
            _check_limit(partial.offset_bytes + len(chunk), max_bytes)
            rest = partial._take(memoryview(chunk))
            while partial._held_bytes >= GATHER_BYTES:
                await file.write_held()
                rest = partial._take(rest)


@dataclass(slots=True, eq=False)
class Received:
    """An image of which all bytes have come, to be published; then what came of it."""

    partial: Partial
    declared_bytes: int | None
    #: Where it goes; not told before the bytes have been looked at.
    place: Callable[[ImageFacts], Path]
    #: The hash of bytes that came twice though they are not as declared: they are kept, with warnings.
    accept_sha256: str | None = None
    saved: Saved | None = None
    error: Exception | None = None

    def outcome(self) -> Saved:
        """Where the image now is; raises what stood in the way."""
        if self.error is not None:
            raise self.error
        assert self.saved is not None
        return self.saved


def publish(images: Sequence[Received]) -> None:
    """Verifies what was received and puts it where it belongs, durably; safe to repeat.

    To be run in a thread. All are written before the first is synced, and share the syncs of their folders.

    The declared size and type are part of the promise: a whole image that breaks it fails with OutputCorrupt
    and the hash of what came (`declared-size`, `declared-type`). When the next complete fetch brings the same
    bytes, published with that hash as `accept_sha256`, they are what the service has: kept, with warnings.

    What stands in the way of an image is told by its `outcome`: OutputCorrupt (fetch again; its reason a word
    of Verifier or one of `etag`, `declared-size`, `declared-type`, `vanished`: the partial file was deleted
    from outside), OutputError when another file is there already (nothing is ever replaced), DiskError.
    """
    ways = [(image, _publishing(image)) for image in images]
    while ways:
        ways = [(image, way) for image, way in ways if _goes_on(image, way)]


def _goes_on(image: Received, way: Generator[None, None, Saved]) -> bool:
    """Takes the image's next step; whether there is another."""
    try:
        next(way)
    except StopIteration as end:
        image.saved = end.value
    except Exception as error:
        image.error = error
    else:
        return True
    return False


async def adopt(base: Path, declared_bytes: int | None) -> Saved | None:
    """The whole image that lies at `base` plus one of EXTENSIONS already, or None when there is none.

    For outputs of which no record says that they are saved: a crash may have come right after the rename. One
    that is not as declared is not adopted: fetching it again finds out whether the service has it so.
    """
    return await anyio.to_thread.run_sync(_adopt, base, declared_bytes)


def sweep(folder: Path) -> None:
    """Removes what an earlier process left in the `partial/` folder."""
    with disk_errors("clear", folder):
        if folder.exists():
            shutil.rmtree(folder)


# --- judging -------------------------------------------------------------------------------------------

_MD5_ETAG = re.compile(r'"([0-9a-fA-F]{32})"')
_SAME_TYPE = {
    "image/jpg": "image/jpeg",
    "image/pjpeg": "image/jpeg",
    "image/x-png": "image/png",
    "image/x-ms-bmp": "image/bmp",
    "image/x-bmp": "image/bmp",
    "image/heif": "image/heic",
    "image/tif": "image/tiff",
}


def _md5_in(etag: str | None) -> str | None:
    found = _MD5_ETAG.fullmatch(etag or "")
    return found[1].lower() if found else None


def _contradicts(declared: str, media_type: str) -> bool:
    """Whether a declared content type says something else; octet-stream and the like say nothing."""
    kind = declared.partition(";")[0].strip().lower()
    says_something = kind.startswith(("image/", "text/")) and kind != "image/*"
    return says_something and _SAME_TYPE.get(kind, kind) != media_type


def _check_limit(size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise OutputError(f"the file is larger than the limit of {max_bytes} bytes for an image")


# --- large images, while they come ------------------------------------------------------------------------


class _Checking(io.FileIO):
    """The partial file: what is written to it is verified and hashed on its way, in the same thread job."""

    def __init__(self, partial: Partial) -> None:
        partial.path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(partial.path, "r+" if partial._written_bytes else "w", opener=pieces.opener)
        self._partial = partial
        if self.seek(0, os.SEEK_END) != partial._written_bytes:
            self.close()
            raise _changed(partial.path)

    def write(self, held: memoryview) -> int:  # type: ignore[override]
        self._partial._read()
        pieces.write(self.fileno(), held)
        return len(held)


class _Writing:
    """Writes what a partial holds to its file, which is opened for the first piece."""

    def __init__(self, partial: Partial) -> None:
        self._partial = partial
        self._file: AsyncFileIO | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._file is not None:
            with anyio.CancelScope(shield=True), disk_errors("write", self._partial.path):
                await self._file.close()

    async def write_held(self) -> None:
        """Verifies what is in memory and writes it."""
        path = self._partial.path
        # Shielded: after a cancellation it must be known what is in the file, to go on with it.
        with anyio.CancelScope(shield=True), disk_errors("write", path), _vanishing(path):
            if self._file is None:
                self._file = AsyncFileIO(await anyio.to_thread.run_sync(_Checking, self._partial), None, None)
            self._partial._written_bytes += await self._file.write(self._partial._held)
        self._partial._held_bytes = 0

    async def write_rest(self) -> None:
        """Verifies and writes what is in memory, if anything is, and lets the memory go."""
        if self._partial._held_bytes:
            await self.write_held()
        self._partial._give_back()


# --- disk work, in threads -------------------------------------------------------------------------------


def _changed(path: Path) -> OutputCorrupt:
    return OutputCorrupt(f"{path} was changed from outside", reason="vanished")


@contextmanager
def _vanishing(path: Path) -> Iterator[None]:
    """A partial file or its folder that was deleted behind our back costs another fetch, not the run."""
    try:
        yield
    except FileNotFoundError as error:
        raise OutputCorrupt(f"{path} was deleted from outside", reason="vanished") from error


def _publishing(image: Received) -> Generator[None, None, Saved]:
    """The way of an image to its place, in steps; between them others take theirs."""
    partial = image.partial
    try:
        facts, warnings = partial._judge(image.declared_bytes, image.accept_sha256)
        final = image.place(facts)
        saved = Saved(final, partial._sha256.hexdigest(), partial.offset_bytes, facts, warnings)
        with disk_errors("write", final), _vanishing(partial.path):
            if os.path.lexists(final):
                if not (final.is_file() and _hash(final) == saved.sha256):
                    raise OutputError(
                        f"{final} is there already with other content: move it away and run again"
                    )
                sync_folder(final.parent)
                partial.path.unlink(missing_ok=True)
            else:
                with partial._written() as file:
                    yield
                    os.fsync(file)
                rename_durably(partial.path, final)
                added = entry_added(final.parent)
                yield
                sync_entries(final.parent, added)
    except BatchrunError:
        partial.forget()
        raise
    partial._give_back()
    return saved


def _adopt(base: Path, declared_bytes: int | None) -> Saved | None:
    for extension in EXTENSIONS:
        path = base.parent / f"{base.name}.{extension}"
        with disk_errors("read", path):
            if not path.is_file():
                continue
            verifier, sha256, size = Verifier(), hashlib.sha256(), 0
            try:
                with path.open("rb") as file:
                    while chunk := file.read(_READ_BYTES):
                        verifier.feed(chunk)
                        sha256.update(chunk)
                        size += len(chunk)
                facts = verifier.finish()
            except OutputCorrupt:
                continue
            if declared_bytes in (None, size) and facts.extension == extension:
                sync_folder(path.parent)
                return Saved(path, sha256.hexdigest(), size, facts)
    return None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
