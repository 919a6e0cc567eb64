"""Rebuilding the state of a run from what is left of it: the damaged file, the result files, the images.

In this order: what can be read of the state, then results.jsonl (a line per settled row), then
images/metadata.jsonl, with every image proved by its SHA-256. Rows are believed to be done or failed when
something says so (`rules.rebuild`); all others are searched for at the service by the next start, before it
submits anything. Nothing is sent and nothing deleted: what was damaged is moved to `damaged-<n>/`, and the
new state takes its place in one step.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from hashlib import sha256
from pathlib import Path

from batchrun.errors import OutputCorrupt, StoreDamaged, UsageError
from batchrun.manifest.job import Job
from batchrun.model import State
from batchrun.outputs.disk import disk_errors, sync_folder
from batchrun.outputs.formats import ImageFacts
from batchrun.outputs.verify import Verifier
from batchrun.repair.evidence import (
    KEY,
    MAX_ROW,
    NAME,
    PATH,
    decimal_or_none,
    is_sure,
    is_tool,
    key_of_line,
    number_or_none,
    row_of,
    state_of,
    text_or_none,
    texts,
    tool_named,
)
from batchrun.rules.naming import stem
from batchrun.rules.rebuild import Rebuilt, rebuilt
from batchrun.store.damage import check_sound
from batchrun.store.folder import Folder
from batchrun.store.rebuilding import FoundRow, FoundRun, Image, Try, write_state
from batchrun.store.records import dumps
from batchrun.store.salvage import IS_SURE, Record, Remains, Wreck

#: The service's clock and ours may differ by that much: tasks are searched for from so long before the run.
MARGIN_S = 86_400.0
_NEW = "rebuilt.sqlite3"
_CHUNK_BYTES = 1 << 20


@dataclass(slots=True)
class Repaired:
    """What a repair found and did."""

    #: Where the damaged files are now.
    aside: Path
    fetch_missing: bool
    #: Rows of the new state by how they stand, and by where they were found.
    rows: dict[str, int] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    #: Images.
    whole: int = 0
    damaged: int = 0
    missing: int = 0
    #: The manifest that the run was told; None when that is lost.
    command: str | None = None


def repair(
    folder: Folder, *, fetch_missing: bool = False, note: Callable[[str], None] = lambda text: None
) -> Repaired | None:
    """Rebuild the state of the run in a folder; None when it is sound.

    `fetch_missing`: rows whose images are not there any more are fetched again. `note` is told what is wrong.
    Raises UsageError when there is no run, FolderBusy while a runner lives, StoreError, DiskError.
    """
    if not folder.path.is_dir() or not (folder.state.exists() or folder.has_results or _asides(folder)):
        folder.expect_run()
        raise UsageError(f"{folder.path} holds no run")
    with folder.locked():
        aside = _interrupted(folder)
        if aside is not None:
            note("an interrupted repair is brought to its end")
            _put_in_place(folder, aside)
        try:
            check_sound(folder, patience_s=None)
        except StoreDamaged as error:
            note(str(error).partition("; images")[0])
        else:
            folder.expect_run()
            return None
        return _Repair(folder, fetch_missing=fetch_missing).run()


def _asides(folder: Folder) -> list[Path]:
    """The folders of damaged files, newest last."""
    found = [path for path in folder.path.glob("damaged-*") if path.name[8:].isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[8:]))


def _interrupted(folder: Folder) -> Path | None:
    """Where a repair was killed between moving the old state away and putting the new one in its place."""
    asides = _asides(folder)
    is_so = bool(asides) and not folder.state.exists() and (asides[-1] / _NEW).is_file()
    return asides[-1] if is_so else None


def _put_in_place(folder: Folder, aside: Path) -> None:
    """The new state takes the place of the old one; safe to repeat."""
    with disk_errors("move", folder.state):
        # the log last of the old ones: no state is ever beside a log that is not its own
        for end in ("", "-shm", "-wal"):
            old = folder.state.with_name(folder.state.name + end)
            if old.exists():
                old.rename(_free(aside / old.name))
        sync_folder(aside)
        (aside / _NEW).rename(folder.state)
        sync_folder(folder.path)


def _free(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


class _Repair:
    """One repair, under the folder's lock."""

    def __init__(self, folder: Folder, *, fetch_missing: bool) -> None:
        self._folder = folder
        asides = _asides(folder)
        number = int(asides[-1].name[8:]) + 1 if asides else 1
        self._done = Repaired(folder.path / f"damaged-{number}", fetch_missing)
        self._metadata: dict[str, Record] = {}
        #: Lines of results.jsonl by the row's key; newer ones win.
        self._lines: dict[str, Record] = {}
        #: What lines say of tasks and images: the key of the row they belong to.
        self._owners: dict[str, str] = {}
        self._seqs: set[int] = set()
        self._tasks: set[str] = set()
        self._damaged_images: list[str] = []

    def run(self) -> Repaired:
        """Build the new state beside the old one, and put it in its place."""
        done, folder = self._done, self._folder
        with disk_errors("write", done.aside):
            done.aside.mkdir()
            for old in _asides(folder):
                (old / _NEW).unlink(missing_ok=True)  # of a repair that came to nothing
        self._read_files()
        wreck = Wreck(folder.state, done.aside / "reading")
        try:
            run = self._found_run(wreck)
            rows = [*self._from_state(wreck), *self._from_results(), *self._from_metadata()]
        finally:
            wreck.close()
        done.command = run.manifest or None
        written = write_state(done.aside / _NEW, run, rows)
        done.rows = {standing.value: written.get(standing, 0) for standing in Rebuilt if standing in written}
        with disk_errors("write", done.aside):
            for file in (folder.results, folder.metadata):
                if file.is_file():
                    shutil.copy2(file, done.aside / file.name)
            for path in self._damaged_images:
                target = done.aside / path
                target.parent.mkdir(parents=True, exist_ok=True)
                (folder.path / path).rename(target)
        _put_in_place(folder, done.aside)
        return done

    # --- what is read --------------------------------------------------------------------------------

    def _read_files(self) -> None:
        for record in _records(self._folder.metadata):
            name = record.get("file_name")
            if isinstance(name, str) and PATH.fullmatch(f"images/{name}"):
                self._metadata[f"images/{name}"] = record
        for record in _records(self._folder.results):
            key = key_of_line(record)
            if key is None:
                continue
            self._lines[key] = record
            for owned in (*texts(record.get("task_ids")), *texts(record.get("images"))):
                self._owners[owned] = key

    def _found_run(self, wreck: Wreck) -> FoundRun:
        record, now = wreck.run(), time.time()
        times = [at for at in wreck.times() if at <= now]
        job, manifest = record.get("job"), record.get("manifest")
        try:
            Job.from_json(job or "")
        except Exception:  # whatever is wrong with it: it is told again by the next start
            job, manifest = "", ""
        limit = record.get("account_limit")
        created_at = record.get("created_at")
        return FoundRun(
            manifest=manifest if isinstance(manifest, str) else "",
            job=job if isinstance(job, str) else "",
            created_at=created_at if created_at in times and isinstance(created_at, float) else 0.0,
            account_limit=limit if isinstance(limit, int) and 0 < limit < 10_000 else None,
            since=max(0.0, min(times) - MARGIN_S) if times else 0.0,
            until=now,
            uploads=[one for one in wreck.uploads() if one[1].startswith("http") and one[2] <= now],
        )

    # --- rows ----------------------------------------------------------------------------------------

    def _from_state(self, wreck: Wreck) -> Iterator[FoundRow]:
        tools = {number: text for number, text in wreck.tools().items() if is_tool(text)}
        for remains in wreck.rows():
            row = row_of(remains, tools)
            if row is None or row.seq in self._seqs:
                continue
            if row.key not in self._lines and self._contradicts(row, remains):
                continue
            line = self._lines.pop(row.key, None)
            if self._complete(row, state_of(remains), line, remains):
                self._count("what could be read of the state")
                yield row

    def _contradicts(self, row: FoundRow, remains: Remains) -> bool:
        """Whether the results say that another row owns its tasks or images: its identity is damaged."""
        paths = (output.get("path") for output in remains.outputs)
        owned = [one.task_id for one in row.tries] + [path for path in paths if isinstance(path, str)]
        return any(self._owners.get(each, row.key) != row.key for each in owned)

    def _from_results(self) -> Iterator[FoundRow]:
        for key, line in self._lines.items():
            seq = line.get("row")
            if not isinstance(seq, int) or not 0 < seq < MAX_ROW or seq in self._seqs:
                seq = self._free_number()
            id_, number = line.get("id"), line.get("line")
            number = number if isinstance(number, int) and 0 <= number < MAX_ROW else 0
            known = KEY.fullmatch(str(line.get("key")))
            content = bytes.fromhex(known[1]) if known else b""
            row = FoundRow(
                Rebuilt.LEAVE,
                seq,
                key,
                content,
                content,
                id_,
                number,
                stem(id_, number, key),
                tool_named("unknown"),
            )
            if self._complete(row, None, line, None):
                self._count(self._folder.results.name)
                yield row

    def _from_metadata(self) -> Iterator[FoundRow]:
        """Rows with an id of which only images and their metadata are left."""
        by_id: dict[str, list[str]] = {}
        for path, record in self._metadata.items():
            if path not in self._owners and isinstance(record.get("id"), str) and record["id"]:
                by_id.setdefault(record["id"], []).append(path)
        for id_, paths in by_id.items():
            tasks = dict.fromkeys(texts([self._metadata[path].get("task_id") for path in paths]))
            line = {"status": "done", "id": id_, "images": paths, "task_ids": list(tasks)}
            costs = [decimal_or_none(self._metadata[path].get("cost_usd")) for path in paths]
            line["cost_usd"] = f"{sum((cost for cost in costs if cost is not None), Decimal(0)):f}"
            key = f"id:{id_}"
            row = FoundRow(
                Rebuilt.LEAVE,
                self._free_number(),
                key,
                b"",
                b"",
                id_,
                0,
                stem(id_, 0, key),
                tool_named("unknown"),
            )
            if self._complete(row, None, line, None):
                self._count("images/metadata.jsonl")
                yield row

    def _free_number(self) -> int:
        return max(self._seqs, default=0) + 1

    def _count(self, source: str) -> None:
        self._done.sources[source] = self._done.sources.get(source, 0) + 1

    def _complete(
        self, row: FoundRow, stored: State | None, line: Record | None, remains: Remains | None
    ) -> bool:
        """Give a row its standing and all that is known of it; False when the manifest tells more."""
        told = str(line.get("status")) if line else None
        failed = (State.FAILED, State.CANCELLED)
        if line and told in failed and stored not in failed:
            row.cause = text_or_none(line.get("cause")) or "unknown"
            row.message = text_or_none(line.get("error")) or ""
        images = texts(line.get("images")) if line and told == State.DONE else []
        if not images and remains is not None:
            images = [
                output["path"]
                for output in remains.outputs
                if output.get("state") == "saved"
                and output.get("generation") == row.generation
                and isinstance(output.get("path"), str)
            ]
        is_done = State.DONE in (stored, told)
        told_tasks = texts(line.get("task_ids")) if line else []
        newer = line is not None and any(
            attempt.get("open") == 1
            and attempt[IS_SURE]
            and attempt.get("task_id") not in (None, *told_tasks)
            for attempt in (remains.attempts if remains else ())
        )
        refetch = is_done and not self._take_images(row, images, remains)
        self._take_tasks(row, told_tasks, line)
        # of tasks whose records disagree nothing is known: an older one is not the newest
        has_task = bool(row.tries) and (remains is None or is_sure(remains))
        row.standing = rebuilt(
            stored=stored,
            told=told,
            cause=row.cause,
            has_task=has_task,
            has_newer_task=newer and has_task,
            refetch=refetch,
        )
        if row.standing is Rebuilt.SEARCH and row.given == "{}":
            row.standing = Rebuilt.LEAVE
        if row.standing is Rebuilt.LEAVE:
            return False
        self._seqs.add(row.seq)
        self._tasks.update(one.task_id for one in row.tries)
        for path in images:
            self._owners[path] = row.key
        row.settled = row.settled or MAX_ROW + row.seq
        return True

    def _take_tasks(self, row: FoundRow, told: list[str], line: Record | None) -> None:
        """All tasks of the row, oldest first, none of them another row's."""
        known = {one.task_id: one for one in row.tries}
        ids = [*(id_ for id_ in told if id_ not in known), *known]
        row.tries = [known.get(id_) or Try(id_) for id_ in ids if id_ not in self._tasks]
        cost = decimal_or_none(line.get("cost_usd")) if line else None
        if row.tries and cost is not None and not known:
            row.tries[-1].cost_usd = f"{cost:f}"

    # --- images --------------------------------------------------------------------------------------

    def _take_images(self, row: FoundRow, paths: list[str], remains: Remains | None) -> bool:
        """The row's images as they are on disk; False when one is to be fetched again."""
        if not paths:
            return False
        stored = {output.get("path"): output for output in (remains.outputs if remains else ())}
        is_whole = True
        for path in paths:
            match = PATH.fullmatch(path)
            if match is None:
                return False
            metadata, output = self._metadata.get(path, {}), stored.get(path, {})
            wanted = {
                text
                for text in (metadata.get("sha256"), output.get("sha256"))
                if isinstance(text, str) and text
            }
            image, facts = _look(self._folder.path / path, wanted)
            if image is None:
                self._done.missing += 1
                is_whole = is_whole and not self._done.fetch_missing
                size = metadata.get("bytes", output.get("size_bytes"))
                image = (min(wanted, default=""), size if isinstance(size, int) else 0)
            elif facts is False:
                self._done.damaged += 1
                self._damaged_images.append(path)
                is_whole = False
            else:
                self._done.whole += 1
            seen = facts if isinstance(facts, ImageFacts) else None
            row.outputs.append(
                Image(
                    index=int(match[1]),
                    path=path,
                    sha256=image[0],
                    size_bytes=image[1],
                    media_type=seen.media_type if seen else text_or_none(output.get("media_type")),
                    width_px=seen.width_px
                    if seen
                    else number_or_none(metadata.get("width"), output.get("width_px")),
                    height_px=seen.height_px
                    if seen
                    else number_or_none(metadata.get("height"), output.get("height_px")),
                )
            )
        if remains is None:
            self._learn_request(row, self._metadata.get(paths[0], {}), paths[0])
        return is_whole

    def _learn_request(self, row: FoundRow, metadata: Record, path: str) -> None:
        """What an image's metadata tell of its row; the manifest will tell it better."""
        name = path.rpartition("/")[2].rpartition("_")[0]
        row.name = name if NAME.fullmatch(name) else row.name
        row.images = len(row.outputs)
        parameters, extra = metadata.get("parameters"), metadata.get("extra")
        if isinstance(parameters, dict):
            row.given = dumps(parameters)
        if isinstance(extra, dict):
            row.extra = dumps(extra)
        if isinstance(metadata.get("tool"), str):
            row.tool = tool_named(metadata["tool"])


# --- reading records --------------------------------------------------------------------------------


def _records(path: Path) -> Iterator[Record]:
    """The objects of a file of JSON lines; lines that are none are left out."""
    if not path.is_file():
        return
    with disk_errors("read", path), path.open("rb") as file:
        for line in file:
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record


def _look(path: Path, wanted: set[str]) -> tuple[tuple[str, int] | None, ImageFacts | bool]:
    """An image's SHA-256 and size with what it is; None when it is not there, False when it is not whole.

    True in the place of what it is: it is the file that was saved, by its hash. Without one it must be whole.
    """
    digest, verifier, size = sha256(), Verifier(), 0
    fault: OutputCorrupt | None = None
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                if not wanted:
                    try:
                        verifier.feed(chunk)
                    except OutputCorrupt as error:
                        fault = error
                        break
    except FileNotFoundError:
        return None, False
    except OSError:  # the disk does not give it
        return ("", size), False
    if wanted:
        return (digest.hexdigest(), size), digest.hexdigest() in wanted
    try:
        facts = verifier.finish() if fault is None else None
    except OutputCorrupt:
        facts = None
    return (digest.hexdigest(), size), facts if facts is not None else False
