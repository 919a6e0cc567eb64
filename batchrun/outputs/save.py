"""Brings one output to disk: downloaded, verified whole, then under its final name and durable.

`download` makes one attempt. Up to GATHER_BYTES of a file are gathered in memory, so most images touch the
disk only in `publish`: one thread job that creates, writes, syncs and renames, the fastest way measured.
Larger ones are written as they come, in large pieces, to a file in `partial/`. Every byte passes the verifier
and the hash as it arrives; no file is read a second time.

An interrupted download stays in its `Partial`, held by the caller between attempts. The next one goes on
where it ended if the server proves that the file is still the same (RFC 9110, 13.1.5 and 14), else it begins
again. A new process always begins again: hashes do not outlive their process.

`publish` never replaces a file, and both steps are safe to repeat. What a crash leaves between the rename and
the record of it, `adopt` takes in.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
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
from batchrun.outputs.disk import disk_errors, make_durable, sync_folder
from batchrun.outputs.verify import EXTENSIONS, ImageFacts, Verifier

#: Larger files are written to disk while they come, in pieces of this size: a download never holds more than
#: twice as much, and the thread hops of a write cost nothing beside it.
GATHER_BYTES = 2**20
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
    """Opens a GET, with `start` above 0 for that Range, If-Range `etag`.

    Raises ServiceError or OutputGone.
    """

    def __call__(
        self, url: str, *, start: int, etag: str | None
    ) -> AbstractAsyncContextManager[Download]: ...


# --- what comes of it --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Saved:
    """A whole image, verified, at `path` (or still in memory)."""

    path: Path
    sha256: str
    size_bytes: int
    facts: ImageFacts
    #: What was declared otherwise and is kept all the same.
    warnings: tuple[str, ...] = ()
    #: The file itself when it is not at `path` yet; `publish` writes it.
    content: bytes | None = field(default=None, repr=False)


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
        #: Bytes arrived and verified so far.
        self.offset_bytes = 0
        self._held: list[bytes] = []
        self._written_bytes = 0
        self._verifier = Verifier()
        self._sha256 = hashlib.sha256()
        self._md5: hashlib._Hash | None = None

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
        self._verifier.feed(chunk)
        self._sha256.update(chunk)
        if self._md5:
            self._md5.update(chunk)
        self._held.append(chunk)
        self.offset_bytes += len(chunk)

    async def _flush(self) -> None:
        """Writes what is held in memory to the file."""
        data = b"".join(self._held)
        # Shielded: after a cancellation it must be known what is in the file, to go on with it.
        with anyio.CancelScope(shield=True), disk_errors("write", self.path), _vanishing(self.path):
            if not self._written_bytes:
                await anyio.to_thread.run_sync(lambda: self.path.parent.mkdir(parents=True, exist_ok=True))
            async with aiofiles.open(self.path, "ab" if self._written_bytes else "wb") as file:
                if await file.tell() != self._written_bytes:
                    raise OutputCorrupt(f"{self.path} was changed from outside", reason="vanished")
                await file.write(data)
        self._written_bytes += len(data)
        self._held.clear()

    async def _seal(
        self, *, declared_bytes: int | None, declared_types: tuple[str, ...], accept: str | None
    ) -> Saved:
        """Judges the complete body."""
        if self.total_bytes is not None and self.offset_bytes != self.total_bytes:
            message = f"{self.offset_bytes} of {self.total_bytes} bytes came"
            raise OutputCorrupt(message, reason="truncated")
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
        for declared in dict.fromkeys(declared_types):
            if _contradicts(declared, facts.media_type):
                reason = reason or "declared-type"
                warnings.append(f"declared as {declared}, came as {facts.media_type}")
        if warnings and sha256 != accept:
            raise OutputCorrupt("; ".join(warnings), reason=reason, sha256=sha256)
        content = None
        if self._written_bytes:
            await self._flush()
            with disk_errors("write", self.path), _vanishing(self.path):
                await anyio.to_thread.run_sync(_sync, self.path)
        else:
            content = b"".join(self._held)
        return Saved(self.path, sha256, self.offset_bytes, facts, tuple(warnings), content)


# --- the steps -----------------------------------------------------------------------------------------

#: After these the file at the other end is the same as before.
_RESUMABLE = (NotSent, ReplyLost, ServerFault, RateLimited)


async def download(
    fetch: Fetch, output: Output, partial: Partial, *, max_bytes: int, accept_sha256: str | None = None
) -> Saved:
    """Fetches an output once and verifies it; the result is durable only after `publish`.

    The declared size and type are part of the promise: a whole image that breaks it raises OutputCorrupt with
    the hash of what came (`declared-size`, `declared-type`). When the next complete fetch, called with that
    hash as `accept_sha256`, brings the same bytes, they are what the service has: kept, with warnings.

    Raises what `fetch` raises (after ReplyLost the partial stays for the next attempt), OutputCorrupt (fetch
    again; its reason a word of Verifier or one of `range`, `vanished`, `etag`, `declared-size`,
    `declared-type`), OutputError (larger than `max_bytes`, or without an address), DiskError.
    """
    if output.url is None:
        raise OutputError("the service gives no address for this output")
    if partial.url != output.url:
        partial.forget()
        partial.url = output.url
    try:
        asked = partial.resumes_at
        async with fetch(output.url, start=asked, etag=partial.etag if asked else None) as reply:
            partial._meet(reply, asked=asked)
            _check_limit(partial.total_bytes or 0, max_bytes)
            async for chunk in reply.chunks:
                _check_limit(partial.offset_bytes + len(chunk), max_bytes)
                partial._take(chunk)
                if partial.offset_bytes - partial._written_bytes >= GATHER_BYTES:
                    await partial._flush()
            declared_types = (output.content_type, reply.content_type)
        return await partial._seal(
            declared_bytes=output.declared_bytes, declared_types=declared_types, accept=accept_sha256
        )
    except _RESUMABLE:
        raise
    except BatchrunError:
        partial.forget()
        raise


async def publish(saved: Saved, final: Path) -> None:
    """Puts a verified image under its final name, durably, in one thread job; safe to repeat.

    Raises OutputError when another file is there already (nothing is ever replaced), OutputCorrupt
    (`vanished`) when the partial file was deleted from outside, DiskError.
    """
    await anyio.to_thread.run_sync(_publish, saved, final)


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


def _publish(saved: Saved, final: Path) -> None:
    with disk_errors("write", final), _vanishing(saved.path):
        if os.path.lexists(final):
            if not (final.is_file() and _hash(final) == saved.sha256):
                raise OutputError(f"{final} is there already with other content: move it away and run again")
            sync_folder(final.parent)
            saved.path.unlink(missing_ok=True)
            return
        if saved.content is not None:
            saved.path.parent.mkdir(parents=True, exist_ok=True)
            with saved.path.open("wb") as file:
                file.write(saved.content)
                file.flush()
                os.fsync(file.fileno())
        make_durable(final.parent)
        saved.path.rename(final)
        sync_folder(final.parent)


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


def _sync(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())
