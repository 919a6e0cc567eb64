"""Brings one output to disk: received, verified whole, then under its final name and durable.

`receive` makes one attempt at all bytes; nothing is looked at on the event loop. Up to GATHER_BYTES are
gathered in memory, so most images meet the disk only in `publish`: one thread job that verifies, hashes,
creates, writes, syncs and renames, the fastest way measured. Larger ones are verified and written as they
come, a job for each such piece, to a file in `partial/`. No file is read a second time.

An interrupted download stays in its `Partial`, held by the caller between attempts. The next one goes on
where it ended if the server proves that the file is still the same (RFC 9110, 13.1.5 and 14), else it begins
again. A new process always begins again: hashes do not outlive their process.

`publish` never replaces a file, and both steps are safe to repeat. What a crash leaves between the rename and
the record of it, `adopt` takes in.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import aiofiles
import anyio
import anyio.to_thread

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
from batchrun.outputs.disk import disk_errors, make_durable, sync_folder, sync_folder_together
from batchrun.outputs.verify import EXTENSIONS, ImageFacts, Verifier

#: Larger files are written to disk while they come, in pieces of this size: a download holds little more than
#: that, and the thread hops of a write cost nothing beside it.
GATHER_BYTES = 2**19
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
        self.forget()

    def forget(self) -> None:
        """Makes the next attempt begin again."""
        self.url: str | None = None
        #: The strong ETag of the file that has begun to arrive; only with it can it be gone on with.
        self.etag: str | None = None
        self.total_bytes: int | None = None
        #: Bytes arrived so far.
        self.offset_bytes = 0
        #: Those of them that are in memory only, and how many there are.
        self._held: list[bytes] = []
        self._held_bytes = 0
        #: How many of the pieces in memory the verifier and the hashes have seen.
        self._read_pieces = 0
        self._written_bytes = 0
        self._verifier = Verifier()
        self._sha256 = hashlib.sha256()
        #: To be compared with the ETag where that is one.
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

    def _take(self, chunk: bytes) -> None:
        self._held.append(chunk)
        self._held_bytes += len(chunk)
        self.offset_bytes += len(chunk)

    async def _spill(self) -> None:
        """Verifies what is in memory and writes it to the file."""
        # Shielded: after a cancellation it must be known what is in the file, to go on with it.
        with anyio.CancelScope(shield=True), disk_errors("write", self.path), _vanishing(self.path):
            await anyio.to_thread.run_sync(self._read)
            if not self._written_bytes:
                await anyio.to_thread.run_sync(lambda: self.path.parent.mkdir(parents=True, exist_ok=True))
            async with aiofiles.open(self.path, "ab" if self._written_bytes else "wb") as file:
                if await file.tell() != self._written_bytes:
                    raise OutputCorrupt(f"{self.path} was changed from outside", reason="vanished")
                await file.write(b"".join(self._held))
        self._written_bytes += self._held_bytes
        self._held.clear()
        self._held_bytes = self._read_pieces = 0

    # --- in threads: a call that hashes lets other threads run, which on the event loop it would wait for ---

    def _read(self) -> None:
        """Gives what is in memory to the verifier and the hashes."""
        if not self._written_bytes and self._read_pieces == 0 and len(self._held) > 1:
            self._held = [b"".join(self._held)]
        for chunk in self._held[self._read_pieces :]:
            self._verifier.feed(chunk)
            self._sha256.update(chunk)
            if self._md5:
                self._md5.update(chunk)
            self._read_pieces += 1

    def _store(self) -> None:
        """Makes the whole file durable at `path`."""
        if self._written_bytes:
            with _opened(self.path, 0) as file:
                os.fsync(file)
            return
        try:
            opened = _opened(self.path, os.O_CREAT | os.O_TRUNC)
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            opened = _opened(self.path, os.O_CREAT | os.O_TRUNC)
        with opened as file:
            for chunk in self._held:
                _write(file, chunk)
            os.fsync(file)

    def _judge(self, declared_bytes: int | None, accept: str | None) -> tuple[ImageFacts, tuple[str, ...]]:
        """What the complete body is, and what is to be warned of."""
        if self.total_bytes is not None and self.offset_bytes != self.total_bytes:
            message = f"{self.offset_bytes} of {self.total_bytes} bytes came"
            raise OutputCorrupt(message, reason="truncated")
        self._read()
        facts = self._verifier.finish()
        sha256 = self._sha256.hexdigest()
        reason, warnings = "", []
        if self._md5 and self._md5.hexdigest() != _md5_in(self.etag):
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
        asked = partial.resumes_at
        etag = partial.etag if asked else None
        async with fetch(output.url, start=asked, etag=etag, silence_s=silence_s) as reply:
            partial._meet(reply, asked=asked)
            partial._declared_types = (output.content_type, reply.content_type)
            _check_limit(partial.total_bytes or 0, max_bytes)
            async for chunk in reply.chunks:
                _check_limit(partial.offset_bytes + len(chunk), max_bytes)
                partial._take(chunk)
                if partial._held_bytes >= GATHER_BYTES:
                    await partial._spill()
        if partial._written_bytes and partial._held:
            await partial._spill()
    except _RESUMABLE:
        raise
    except BatchrunError:
        partial.forget()
        raise


async def publish(
    partial: Partial,
    output: Output,
    place: Callable[[ImageFacts], Path],
    *,
    accept_sha256: str | None = None,
    limiter: anyio.CapacityLimiter | None = None,
) -> Saved:
    """Verifies what was received and puts it where `place` says, durably, in one thread job; safe to repeat.

    The declared size and type are part of the promise: a whole image that breaks it raises OutputCorrupt with
    the hash of what came (`declared-size`, `declared-type`). When the next complete fetch brings the same
    bytes, published with that hash as `accept_sha256`, they are what the service has: kept, with warnings.

    Raises OutputCorrupt (fetch again; its reason a word of Verifier or one of `etag`, `declared-size`,
    `declared-type`, `vanished`: the partial file was deleted from outside), OutputError when another file is
    there already (nothing is ever replaced), DiskError.
    """
    try:
        return await anyio.to_thread.run_sync(
            _publish, partial, output.declared_bytes, place, accept_sha256, limiter=limiter
        )
    except BatchrunError:
        partial.forget()
        raise


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


# --- disk work, in threads -------------------------------------------------------------------------------


@contextmanager
def _vanishing(path: Path) -> Iterator[None]:
    """A partial file or its folder that was deleted behind our back costs another fetch, not the run."""
    try:
        yield
    except FileNotFoundError as error:
        raise OutputCorrupt(f"{path} was deleted from outside", reason="vanished") from error


def _publish(
    partial: Partial, declared_bytes: int | None, place: Callable[[ImageFacts], Path], accept: str | None
) -> Saved:
    facts, warnings = partial._judge(declared_bytes, accept)
    final = place(facts)
    saved = Saved(final, partial._sha256.hexdigest(), partial.offset_bytes, facts, warnings)
    with disk_errors("write", final), _vanishing(partial.path):
        if os.path.lexists(final):
            if not (final.is_file() and _hash(final) == saved.sha256):
                raise OutputError(f"{final} is there already with other content: move it away and run again")
            sync_folder(final.parent)
            partial.path.unlink(missing_ok=True)
            return saved
        partial._store()
        make_durable(final.parent)
        os.rename(partial.path, final)
        sync_folder_together(final.parent)
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


@contextmanager
def _closing(file: int) -> Iterator[int]:
    try:
        yield file
    finally:
        os.close(file)


def _opened(path: Path, flags: int) -> AbstractContextManager[int]:
    """The file, opened to be written as it is: Python's own files ask the system three things more."""
    return _closing(os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o666))


def _write(file: int, data: bytes) -> None:
    written = os.write(file, data)
    while written < len(data):  # a disk that is nearly full takes a part, and fails the next time
        written += os.write(file, memoryview(data)[written:])
