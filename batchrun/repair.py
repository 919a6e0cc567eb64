"""Rebuilding the state of a run from what is left of it: the damaged file, the result files, the images.

In this order: what can be read of the state, then results.jsonl (a line per settled row), then
images/metadata.jsonl, with every image proved by its SHA-256. Rows are believed to be done or failed when
something says so (`rules.rebuild`); all others are searched for at the service by the next start, before it
submits anything. Nothing is sent and nothing deleted: what was damaged is moved to `damaged-<n>/`, and the
new state takes its place in one step.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from hashlib import sha256
from pathlib import Path
from typing import Any

from batchrun.errors import OutputCorrupt, StoreDamaged, UsageError
from batchrun.manifest.job import Job
from batchrun.model import State, Tool
from batchrun.outputs.disk import disk_errors, sync_folder
from batchrun.outputs.verify import ImageFacts, Verifier
from batchrun.plan.identity import HASH_BYTES
from batchrun.rules.naming import stem
from batchrun.rules.rebuild import Rebuilt, rebuilt
from batchrun.store.damage import check_sound
from batchrun.store.folder import Folder
from batchrun.store.rebuilding import FoundRow, FoundRun, Image, Try, write_state
from batchrun.store.records import dumps
from batchrun.store.salvage import IS_SURE, Record, Remains, Wreck
from batchrun.tools.catalog import from_json, to_json

#: The service's clock and ours may differ by that much: tasks are searched for from so long before the run.
MARGIN_S = 86_400.0
_NEW = "rebuilt.sqlite3"
_CHUNK_BYTES = 1 << 20
_KEY = re.compile(rf"([0-9a-f]{{{2 * HASH_BYTES}}})(\.[1-9][0-9]*)?")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_PATH = re.compile(r"images/[0-9]{3,}/[A-Za-z0-9_][A-Za-z0-9._-]*_([0-9]+)\.([a-z0-9]{1,8})")
_MAX_ROW = 10**12


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
            if isinstance(name, str) and _PATH.fullmatch(f"images/{name}"):
                self._metadata[f"images/{name}"] = record
        for record in _records(self._folder.results):
            key = _key_of_line(record)
            if key is None:
                continue
            self._lines[key] = record
            for owned in (*_texts(record.get("task_ids")), *_texts(record.get("images"))):
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
        tools = {number: text for number, text in wreck.tools().items() if _is_tool(text)}
        for remains in wreck.rows():
            row = _row_of(remains, tools)
            if row is None or row.seq in self._seqs:
                continue
            if row.key not in self._lines and self._contradicts(row, remains):
                continue
            line = self._lines.pop(row.key, None)
            if self._complete(row, _state_of(remains), line, remains):
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
            if not isinstance(seq, int) or not 0 < seq < _MAX_ROW or seq in self._seqs:
                seq = self._free_number()
            id_, number = line.get("id"), line.get("line")
            number = number if isinstance(number, int) and 0 <= number < _MAX_ROW else 0
            known = _KEY.fullmatch(str(line.get("key")))
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
                _tool_named("unknown"),
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
            tasks = dict.fromkeys(_texts([self._metadata[path].get("task_id") for path in paths]))
            line = {"status": "done", "id": id_, "images": paths, "task_ids": list(tasks)}
            costs = [_decimal(self._metadata[path].get("cost_usd")) for path in paths]
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
                _tool_named("unknown"),
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
            row.cause = _text_or_none(line.get("cause")) or "unknown"
            row.message = _text_or_none(line.get("error")) or ""
        images = _texts(line.get("images")) if line and told == State.DONE else []
        if not images and remains is not None:
            images = [
                output["path"]
                for output in remains.outputs
                if output.get("state") == "saved"
                and output.get("generation") == row.generation
                and isinstance(output.get("path"), str)
            ]
        is_done = State.DONE in (stored, told)
        told_tasks = _texts(line.get("task_ids")) if line else []
        newer = line is not None and any(
            attempt.get("open") == 1
            and attempt[IS_SURE]
            and attempt.get("task_id") not in (None, *told_tasks)
            for attempt in (remains.attempts if remains else ())
        )
        refetch = is_done and not self._take_images(row, images, remains)
        self._take_tasks(row, told_tasks, line)
        # of tasks whose records disagree nothing is known: an older one is not the newest
        has_task = bool(row.tries) and (remains is None or _is_sure(remains))
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
        row.settled = row.settled or _MAX_ROW + row.seq
        return True

    def _take_tasks(self, row: FoundRow, told: list[str], line: Record | None) -> None:
        """All tasks of the row, oldest first, none of them another row's."""
        known = {one.task_id: one for one in row.tries}
        ids = [*(id_ for id_ in told if id_ not in known), *known]
        row.tries = [known.get(id_) or Try(id_) for id_ in ids if id_ not in self._tasks]
        cost = _decimal(line.get("cost_usd")) if line else None
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
            match = _PATH.fullmatch(path)
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
                    media_type=seen.media_type if seen else _text_or_none(output.get("media_type")),
                    width_px=seen.width_px
                    if seen
                    else _number_or_none(metadata.get("width"), output.get("width_px")),
                    height_px=seen.height_px
                    if seen
                    else _number_or_none(metadata.get("height"), output.get("height_px")),
                )
            )
        if remains is None:
            self._learn_request(row, self._metadata.get(paths[0], {}), paths[0])
        return is_whole

    def _learn_request(self, row: FoundRow, metadata: Record, path: str) -> None:
        """What an image's metadata tell of its row; the manifest will tell it better."""
        name = path.rpartition("/")[2].rpartition("_")[0]
        row.name = name if _NAME.fullmatch(name) else row.name
        row.images = len(row.outputs)
        parameters, extra = metadata.get("parameters"), metadata.get("extra")
        if isinstance(parameters, dict):
            row.given = dumps(parameters)
        if isinstance(extra, dict):
            row.extra = dumps(extra)
        if isinstance(metadata.get("tool"), str):
            row.tool = _tool_named(metadata["tool"])


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


def _key_of_line(record: Mapping[str, Any]) -> str | None:
    """The key of the row that a result line is about; None when it does not tell."""
    id_ = record.get("id")
    if isinstance(id_, str) and id_:
        return f"id:{id_}"
    key = record.get("key")
    return key if isinstance(key, str) and "." in key and _KEY.fullmatch(key) else None


def _row_of(remains: Remains, tools: Mapping[int, str]) -> FoundRow | None:
    """A row of the damaged state, if its record makes sense."""
    record = remains.row
    seq, key, content, id_ = (record.get(name) for name in ("seq", "key", "content", "id"))
    line, name, own = record.get("line"), record.get("name"), record.get("own")
    if not (
        isinstance(seq, int)
        and 0 < seq < _MAX_ROW
        and isinstance(content, bytes)
        and len(content) == HASH_BYTES
        and isinstance(line, int)
        and isinstance(name, str)
        and _NAME.fullmatch(name)
        and _state_of(remains) is not None
    ):
        return None
    if isinstance(id_, str):
        is_consistent = key == f"id:{id_}"
    else:
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        is_consistent = id_ is None and match is not None and match[1] == content.hex() and bool(match[2])
    if not is_consistent or not isinstance(key, str):
        return None
    given, extra, generation = record.get("given"), record.get("extra"), record.get("generation")
    images, settled = record.get("images"), record.get("settled")
    tool = tools.get(record["tool"]) if isinstance(record.get("tool"), int) else None
    is_request = tool is not None and _is_object(given)
    row = FoundRow(
        Rebuilt.LEAVE,
        seq,
        key,
        content,
        own if isinstance(own, bytes) and len(own) == HASH_BYTES else content,
        id_,
        line,
        name,
        tool if is_request and tool is not None else _tool_named("unknown"),
        given=str(given) if is_request else "{}",
        extra=str(extra) if _is_object(extra) else "{}",
        images=images if isinstance(images, int) and 0 <= images < _MAX_ROW else 0,
        present=record.get("present") != 0,
        generation=generation if isinstance(generation, int) and 0 <= generation < _MAX_ROW else 0,
        cause=_text_or_none(record.get("cause")),
        message=_text_or_none(record.get("message")),
        cells=remains.cells
        if _is_object(remains.cells) or (is_request and _is_patch(remains.cells))
        else None,
        settled=settled if isinstance(settled, int) and 0 < settled < _MAX_ROW else 0,
    )
    for output in remains.outputs:
        older, path, index = output.get("generation"), output.get("path"), output.get("number")
        if not (isinstance(older, int) and isinstance(index, int) and isinstance(path, str)):
            continue
        if older < row.generation and output.get("state") == "saved" and _PATH.fullmatch(path):
            row.older.append((older, Image(index, path, str(output.get("sha256") or ""), 0)))
    for attempt in remains.attempts:
        task_id = attempt.get("task_id")
        if isinstance(task_id, str) and task_id and attempt[IS_SURE]:
            cost = _decimal(attempt.get("cost_usd"))
            seconds = _decimal(attempt.get("seconds"))
            row.tries.append(
                Try(
                    task_id,
                    attempt["token"] if isinstance(attempt.get("token"), str) else "",
                    str(attempt.get("status") or ""),
                    _text_or_none(attempt.get("pexit")),
                    None if cost is None else f"{cost:f}",
                    None if seconds is None else f"{seconds:f}",
                    str(attempt.get("error") or ""),
                )
            )
    return row


def _is_sure(remains: Remains) -> bool:
    """Whether the newest task of a row is known for certain."""
    return not remains.attempts or remains.attempts[-1][IS_SURE]


def _state_of(remains: Remains) -> State | None:
    try:
        return State(str(remains.row.get("state")))
    except ValueError:
        return None


def _is_object(text: Any) -> bool:
    return isinstance(_json_of(text), dict)


def _is_patch(text: Any) -> bool:
    """Whether it is what a row changes of what it gives (records.given_back)."""
    match _json_of(text):
        case [dict()]:
            return True
    return False


def _json_of(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def _is_tool(text: str) -> bool:
    try:
        from_json(json.loads(text))
    except Exception:  # a description with a flipped bit may be wrong in any way
        return False
    return True


def _tool_named(slug: str) -> str:
    """A description that stands for a tool of which only the name is known: it sends what a row gives."""
    return dumps(to_json(Tool(slug, f"/Run/unknown/{slug}", slug, "", (), ())))


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str) and item] if isinstance(value, list) else []


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _number_or_none(*values: Any) -> int | None:
    return next((value for value in values if type(value) is int and 0 < value < _MAX_ROW), None)


def _decimal(value: Any) -> Decimal | None:
    """A sum of money or a time as told; None when it is none."""
    if not isinstance(value, str):
        return None
    try:
        number = Decimal(value)
    except InvalidOperation:
        return None
    return number if number.is_finite() and number >= 0 and math.isfinite(float(number)) else None


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
