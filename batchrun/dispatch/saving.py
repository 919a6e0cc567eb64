"""Bringing a finished row's images to disk: fetched, verified, published, recorded, one by one.

Images of a row that was asked for anew wait in `pending/` until all of them are whole; only then the old ones
move to `superseded/` and the new ones take their names. Every step looks at what is there and is safe to
repeat, so a crash between two of them costs nothing but the step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Protocol

import anyio
import anyio.to_thread

from batchrun import errors
from batchrun.dispatch.publishing import Publisher
from batchrun.dispatch.stopping import StopSign
from batchrun.model import Failure, Output, Row, Task
from batchrun.outputs.disk import disk_errors, free_bytes, make_durable, sync_folder
from batchrun.outputs.formats import EXTENSIONS, ImageFacts
from batchrun.outputs.save import Fetch, Partial, Saved, adopt, receive, sweep
from batchrun.progress import Fact, Progress
from batchrun.rules.naming import image_base, image_path, partial_path
from batchrun.rules.policy import Fail, Troubles, after_download, are_gone, silence_s
from batchrun.store.store import Store

#: Downloads begin only while this much of the disk is free beside what they declare.
SPARE_BYTES = 16 * 1024 * 1024
#: Images that have come and may wait to be published, beside those that are being fetched.
IN_HAND = 16
#: How often the disk is asked how much is free; what was begun since then is taken off.
ROOM_S = 1.0
#: Folders of images whose content at the start of the process is remembered.
KNOWN_FOLDERS = 64


class Source(Protocol):
    """What saving needs of the service's client."""

    @property
    def fetch(self) -> Fetch:
        """Opens a download."""
        ...

    async def detail(self, task_id: str, token: str = "") -> Task | None:
        """The task, with fresh addresses of its outputs."""
        ...


@dataclass(frozen=True, slots=True)
class Image:
    """An image under its final name."""

    output: Output
    warning: str


@dataclass(frozen=True, slots=True)
class Unsaved:
    """An image cannot be had."""

    failure: Failure


class Saver:
    """Saves the images of finished rows under the run's folder."""

    def __init__(
        self,
        folder: Path,
        store: Store,
        source: Source,
        progress: Progress,
        sign: StopSign,
        *,
        downloads: int,
        max_image_bytes: int,
        rng: Random | None = None,
    ) -> None:
        self.downloads = downloads
        self._folder = folder
        self._store = store
        self._source = source
        self._progress = progress
        self._sign = sign
        self._max_image_bytes = max_image_bytes
        # not CapacityLimiters, which go once round the loop even where there is room
        self._downloading = anyio.Semaphore(downloads, fast_acquire=True)
        self._publisher = Publisher()
        #: Images that may be in memory, each up to GATHER_BYTES.
        self._in_hand = anyio.Semaphore(downloads + IN_HAND, fast_acquire=True)
        self._room_asked_at = float("-inf")
        self._room_bytes = 0
        #: Names in folders of images as they were before this process saved anything there.
        self._names_before: dict[Path, frozenset[str]] = {}
        self._looking = anyio.Lock()
        self._rng = rng or Random()

    async def begin(self) -> None:
        """Remove what an earlier process left half fetched."""
        await anyio.to_thread.run_sync(sweep, self._folder / "partial")

    async def run(self) -> None:
        """Publish what was fetched; images are saved only while this goes on."""
        await self._publisher.run()

    async def save(self, row: Row) -> Row | Unsaved:
        """The row with all its images saved; Unsaved when one cannot be had (the others are kept).

        Raises DiskError when the disk cannot take them.
        """
        older = await self._store.older_outputs(row.seq) if row.generation else []
        missing = [output for output in row.outputs if not self._is_there(row, output)]
        lost: list[Unsaved] = []
        last: list[Image] = []

        async def one(output: Output) -> None:
            image = await self._save_output(row, output, held=bool(older))
            if isinstance(image, Unsaved):
                lost.append(image)
                return
            missing.remove(output)
            if missing or older:
                await self._store.record_output(
                    row.seq, image.output, held=bool(older), warning=image.warning
                )
                self._tell_saved(row, image)
            else:
                last.append(image)  # recorded together with the row's end

        try:
            if len(missing) == 1:
                await one(missing[0])
            else:
                async with anyio.create_task_group() as group:
                    for output in tuple(missing):
                        group.start_soon(one, output)
        except* errors.BatchrunError as faults:
            raise _first(faults) from None
        if lost:
            return lost[0]
        superseded = await self._supersede(row, older) if older else {}
        if last:
            done = await self._store.record_saved(
                row.seq, last=last[0].output, warning=last[0].warning, superseded=superseded
            )
            self._tell_saved(row, last[0])
        else:
            done = await self._store.record_saved(row.seq, superseded=superseded)
        if len(done.outputs) < done.images:
            self._warn(row, f"{len(done.outputs)} images came where {done.images} were asked for")
        return done

    def _tell_saved(self, row: Row, image: Image) -> None:
        output = image.output
        self._progress.announce(
            Fact.SAVED, row, index=output.index, path=output.path, bytes=output.size_bytes
        )

    def _is_there(self, row: Row, output: Output) -> bool:
        """Whether the image is saved; one that was deleted since is fetched again while its address lives."""
        if output.path is None:
            return False
        # of images that replace others, some may have got their names before a crash
        final = image_path(row.seq, row.name, output.index, output.path.rpartition(".")[2])
        return any((self._folder / path).is_file() for path in (output.path, final))

    async def _save_output(self, row: Row, output: Output, *, held: bool) -> Image | Unsaved:
        """Fetch until the image is whole under its final name, to be recorded next."""
        base = self._folder / image_base(row.seq, row.name, output.index)
        saved = None
        if not held and await self._was_there(base):
            saved = await adopt(base, output.declared_bytes)
        if saved is None:
            result = await self._fetch(row, output, held=held)
            if isinstance(result, Unsaved):
                return result
            saved = result
        final = _final_path(row, output, saved.facts, held=held)
        self._progress.announce(Fact.PUBLISHED, row, index=output.index, path=final)
        for warning in saved.warnings:
            self._warn(row, warning)
        record = replace(
            output,
            path=final,
            sha256=saved.sha256,
            size_bytes=saved.size_bytes,
            media_type=saved.facts.media_type,
            width_px=saved.facts.width_px,
            height_px=saved.facts.height_px,
        )
        return Image(record, "; ".join(saved.warnings))

    async def _was_there(self, base: Path) -> bool:
        """Whether a file of that name was there already: an earlier process may have been killed after it."""
        names = self._names_before.get(base.parent)
        if names is None:
            async with self._looking:  # many rows meet a folder at the same moment: it is read once
                names = self._names_before.get(base.parent)
                if names is None:
                    names = await anyio.to_thread.run_sync(_names_in, base.parent)
                    self._names_before[base.parent] = names
                    if len(self._names_before) > KNOWN_FOLDERS:
                        del self._names_before[next(iter(self._names_before))]
        return bool(names) and any(f"{base.name}.{extension}" in names for extension in EXTENSIONS)

    async def _fetch(self, row: Row, output: Output, *, held: bool) -> Saved | Unsaved:
        """The image under its final name; Unsaved when it cannot be had, or cannot be put there."""
        partial = Partial(self._folder / partial_path(row.seq, row.name, output.index))
        met = Troubles()
        missing_since, looks, lost = 0.0, 0, 0
        accept: str | None = None

        def place(facts: ImageFacts) -> Path:
            return self._folder / _final_path(row, output, facts, held=held)

        while True:
            try:
                async with self._in_hand:
                    async with self._downloading:
                        self._check_disk(output)
                        await receive(
                            self._source.fetch,
                            output,
                            partial,
                            max_bytes=self._max_image_bytes,
                            silence_s=silence_s(lost),
                        )
                    self._progress.announce(Fact.DOWNLOADED, row, index=output.index)
                    return await self._publisher.publish(partial, output, place, accept)
            except errors.DiskError:
                with suppress(errors.DiskError):
                    partial.discard()  # on a full disk its room is needed
                raise
            except (errors.ServiceError, errors.OutputError) as error:
                lost += isinstance(error, errors.ReplyLost)
                troubles, elapsed_s = met.add(error, now=anyio.current_time())
                next_ = after_download(error, troubles=troubles, elapsed_s=elapsed_s, rng=self._rng)
                self._progress.announce(Fact.NOTE, row, message=f"image {output.index}: {error}")
            if isinstance(next_, Fail):
                partial.discard()
                return Unsaved(next_.failure)
            accept = next_.accept_sha256 or accept
            with self._sign.wait() as waiting:
                await anyio.sleep(next_.after_s)
            if waiting.cancelled_caught:  # what is under way is finished, what is in trouble is left
                return Unsaved(Failure("download stopped", "the run stopped while the image was waited for"))
            if next_.refresh:
                refreshed = await self._refresh(row, output)
                now = anyio.current_time()
                looks = looks + 1 if refreshed is None else 0
                missing_since = missing_since if looks > 1 else now
                if are_gone(missing_for_s=now - missing_since, looks=looks):
                    return Unsaved(Failure("images gone", "the service has deleted the task's images"))
                output = refreshed or output

    def _check_disk(self, output: Output) -> None:
        """Raises DiskError when there is no room for the image; the disk is asked now and then."""
        now = anyio.current_time()
        wanted = (output.declared_bytes or 0) + SPARE_BYTES
        if now >= self._room_asked_at + ROOM_S or self._room_bytes < wanted:
            self._room_asked_at, self._room_bytes = now, free_bytes(self._folder)
        if self._room_bytes < wanted:
            raise errors.DiskError(
                f"the disk is nearly full ({self._room_bytes / 1e6:.0f} MB left): make room, then run again"
            )
        self._room_bytes -= output.declared_bytes or 0

    async def _refresh(self, row: Row, output: Output) -> Output | None:
        """The output with the address the service gives now; None when it shows no images of the task."""
        attempt = row.attempt
        assert attempt is not None
        assert attempt.task_id is not None
        try:
            task = await self._source.detail(attempt.task_id, attempt.token)
        except errors.CredentialsRefused:
            raise
        except errors.ServiceError:
            return output  # the old address again, later
        if task is None:
            return output
        fresh = [remote for remote in task.outputs if remote.url]
        if not fresh and task.status == "task_postprocess_end":
            return None
        if len(fresh) != len(row.outputs):
            return output
        await self._store.refresh_outputs(row.seq, fresh)
        return replace(output, url=fresh[output.index].url)

    async def _supersede(self, row: Row, older: Sequence[tuple[int, Output]]) -> dict[str, str]:
        """Move the old images aside and give the new ones their names; returns old path → new path."""
        current = await self._store.row(row.seq)
        moved = {
            output.path: f"superseded/{generation}/{output.path.removeprefix('images/')}"
            for generation, output in older
            if output.path
        }
        fresh = []
        for output in current.outputs:
            assert output.path is not None
            final = image_path(row.seq, row.name, output.index, output.path.rpartition(".")[2])
            fresh.append((output, final))
        moves = [*moved.items(), *((output.path or "", final) for output, final in fresh)]
        await anyio.to_thread.run_sync(self._move_all, moves)
        for output, final in fresh:
            await self._store.record_output(row.seq, replace(output, path=final), held=True)
        return moved

    def _move_all(self, moves: Sequence[tuple[str, str]]) -> None:
        """Move files in order, durably; one whose target exists was moved before a crash."""
        touched: set[Path] = set()
        for source, target in moves:
            old, new = self._folder / source, self._folder / target
            touched |= {folder for path in (old, new) for folder in path.relative_to(self._folder).parents}
            if new.exists() or not old.exists():
                continue
            with disk_errors("move", old):
                make_durable(new.parent)
                old.rename(new)
        for folder in (self._folder / place for place in touched):
            if folder.is_dir():
                with disk_errors("write", folder):
                    sync_folder(folder)

    def _warn(self, row: Row, message: str) -> None:
        self._progress.warnings += 1
        self._progress.announce(Fact.NOTE, row, message=message)


def _final_path(row: Row, output: Output, facts: ImageFacts, *, held: bool) -> str:
    """Where an image goes, relative to the run's folder; `held`: to wait for the others of its row."""
    extension = facts.extension
    if held:
        return f"pending/{row.seq}-{row.generation}-{output.index}.{extension}"
    return image_path(row.seq, row.name, output.index, extension)


def _names_in(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except FileNotFoundError:
        return frozenset()


def _first(faults: BaseExceptionGroup[errors.BatchrunError]) -> errors.BatchrunError:
    fault = faults.exceptions[0]
    return _first(fault) if isinstance(fault, BaseExceptionGroup) else fault
