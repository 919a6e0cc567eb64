"""What is promised of every parser for any bytes: it ends soon, with a result that holds or an error of ours.

A function here takes the bytes of a fuzzer and returns nothing; whatever it raises is a finding. The tests
run the same functions over the seeds (tests/property/test_fuzz_parsers.py).
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

from batchrun.errors import JobError, OutputCorrupt, PageError, ServiceError, UsageError
from batchrun.manifest import json_text
from batchrun.manifest.expand import parse_axis, parse_values
from batchrun.manifest.job import Job, load_job
from batchrun.manifest.read import open_manifest
from batchrun.model import Problem, Severity, Task
from batchrun.outputs.formats import EXTENSIONS, ImageFacts
from batchrun.outputs.verify import Verifier
from batchrun.tools.catalog import dumps, from_json
from batchrun.tools.page import parse
from batchrun.wiro import wire

Parser = Callable[[bytes], None]

#: Small, so that a fuzzer's small inputs meet the bound.
MAX_ROW_BYTES = 4096
#: A message is read by a person.
MAX_MESSAGE_CHARS = 2000
#: HTTP statuses by an input's first byte.
STATUSES = (200, 201, 302, 400, 401, 403, 404, 408, 429, 500, 502, 524)


def _check_words(words: str, *, place: str = "") -> None:
    assert words
    for line in words.splitlines():
        assert place in line
        assert len(line) <= MAX_MESSAGE_CHARS, len(line)


def _check_position(position: int, text: str) -> None:
    assert 0 <= position <= len(text)


# --- manifests --------------------------------------------------------------------------------------


def manifest(form: str, data: bytes) -> None:
    """Rows in the file's order that can be kept, problems with their place, the end or a reason."""
    with open_manifest(io.BytesIO(data), format=form, max_row_bytes=MAX_ROW_BYTES) as opened:
        refused = False
        before = 0
        for item in opened.rows():
            if isinstance(item, Problem):
                refused = refused or item.severity is Severity.ERROR
                _check_words(str(item), place="-")
                continue
            assert item.line > before or form == "json", "rows come in the file's order"
            assert item.line >= before
            before = item.line
            # the state and the sidecar files keep the cells, and read the same ones back
            text = json_text.encode(dict(item.cells))
            text.encode()
            assert repr(json_text.decode(text)[0]) == repr(dict(item.cells))
        assert opened.complete or refused, "an end before the end of the file has a reason"


# --- job files and what stands in them --------------------------------------------------------------


@cache
def _scratch() -> Path:
    memory = Path("/dev/shm")  # noqa: S108  a fuzzer writes thousands of files a second: none to a disk
    return Path(tempfile.mkdtemp(prefix="fuzz", dir=memory if memory.is_dir() else None)) / "job.toml"


def job_file(data: bytes) -> None:
    """A Job that survives being stored, or an error that names the file."""
    file = _scratch()
    file.write_bytes(data)
    try:
        job = load_job(file)
    except JobError as error:
        return _check_words(str(error), place=str(file))
    assert Job.from_json(job.to_json()) == job
    for axis in job.axes:
        assert axis.size >= 1
    assert os.path.isabs(job.folder)


def expand(data: bytes) -> None:
    """Values that can be counted without being made, or an error that says what to write."""
    text = data.decode("utf-8", "replace")
    with suppress(UsageError):
        values = parse_values(text)
        first = next(iter(values))
        assert not isinstance(first, float)
        axis = parse_axis("seed", text)
        assert axis.size >= 1
        json_text.encode(first).encode()


# --- tool pages -------------------------------------------------------------------------------------


def tool_page(data: bytes) -> None:
    """A tool that survives being kept, or an error at a character of the page."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        tool = parse(text)
    except PageError as error:
        _check_words(str(error))
        return _check_position(error.position, text)
    assert tool.parameters
    assert tool.run_path.endswith(f"/{tool.slug}")
    assert ".." not in tool.run_path.split("/")
    assert from_json(json.loads(dumps(tool).encode())) == tool


# --- answers of the service -------------------------------------------------------------------------


def _check_error(error: ServiceError) -> None:
    for text in (str(error), error.detail):
        assert len(text) <= 400
        assert text.isprintable()


def _check_task(task: Task) -> None:
    for text in (task.id, task.token, task.status, task.pexit or "", task.debug_error, task.model_id):
        text.encode()
    assert str(int(task.id)) == task.id
    assert task.cost_usd is None or (task.cost_usd.is_finite() and task.cost_usd >= 0)
    assert task.elapsed_s is None or task.elapsed_s.is_finite()
    for output in task.outputs:
        (output.name + (output.url or "") + output.content_type).encode()
    repr(task.parameters)  # whoever walks it later meets no endless depth
    assert task.parameters == task.parameters


def wire_answer(data: bytes) -> None:
    """Records that the state can hold, or one of the service errors, fit for a terminal."""
    status, body = STATUSES[data[0] % len(STATUSES)] if data else 200, data[1:]
    try:
        accepted = wire.read_accepted(status, body)
        assert int(accepted.task_id) > 0
        accepted.token.encode()
    except ServiceError as error:
        _check_error(error)
    try:
        answer = wire.read_answer(status, body)
    except ServiceError as error:
        _check_error(error)
        return
    for read in (
        lambda: [_check_task(task) for task in wire.read_tasks(answer, whole=True)],
        lambda: [_check_task(task) for task in wire.read_tasks(answer, whole=False)],
        lambda: wire.read_upload(answer).encode(),
        lambda: [price.price_usd.as_integer_ratio() for price in wire.read_tool(answer).prices],
    ):
        try:
            read()
        except ServiceError as error:
            _check_error(error)


# --- images -----------------------------------------------------------------------------------------


def _verdict(data: bytes, size: int) -> ImageFacts | str:
    verifier = Verifier()
    try:
        for at in range(0, len(data), size):
            verifier.feed(data[at : at + size])
        return verifier.finish()
    except OutputCorrupt as error:
        return error.reason


def image(data: bytes) -> None:
    """An image or a reason why it is none, and the same one however the bytes were cut on the way."""
    verdict = _verdict(data, max(len(data), 1))
    assert verdict == _verdict(data, 7)
    if isinstance(verdict, ImageFacts):
        assert verdict.extension in EXTENSIONS
        assert verdict.width_px is None or verdict.width_px >= 0


#: The parsers by name.
PARSERS: dict[str, Parser] = {
    **{f"manifest-{form}": partial(manifest, form) for form in ("csv", "tsv", "jsonl", "json")},
    "job": job_file,
    "expand": expand,
    "page": tool_page,
    "wire": wire_answer,
    "image": image,
}
