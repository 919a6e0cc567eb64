"""A job's manifest as a whole: read in one pass, and made the run's rows where it is right.

The stamp tells whether that was done before: an unchanged manifest is not read again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from hashlib import file_digest, sha256
from pathlib import Path

from batchrun.errors import ManifestError
from batchrun.manifest.job import Job
from batchrun.manifest.read import open_manifest
from batchrun.model import Problem
from batchrun.plan.names import form_columns
from batchrun.plan.reading import Reading
from batchrun.store.planning import Merged, Planning, form_json
from batchrun.store.records import dumps
from batchrun.tools.catalog import Catalog

#: Settings that decide what the rows of a manifest ask for.
_READING_SETTINGS = (
    "tool", "set", "map", "expand", "repeat", "extra", "format", "delimiter", "lora_scale", "skip_invalid",
    "allow_outside", "max_requests", "max_row_bytes",
)  # fmt: skip


#: A file's times are trusted once they are that old.
_SETTLED_NS = 2_000_000_000


def plan(
    job: Job,
    catalog: Catalog,
    planning: Planning,
    *,
    stamp: str,
    checkpoint: Callable[[], None],
    keep: bool = True,
) -> tuple[Reading, Merged | None]:
    """Read the job's manifest and, when it is right, make its rows the run's; None when it is not.

    With `keep` false nothing is kept: a check.
    """
    source = job.manifest if isinstance(job.manifest, Path) else sys.stdin.buffer
    name = _shown(job.manifest)
    with open_manifest(
        source, name=name, format=job.format, delimiter=job.delimiter, max_row_bytes=job.max_row_bytes
    ) as manifest:
        reading = Reading(job, catalog, planning, name=name, checkpoint=checkpoint)
        try:
            reading.read(manifest)
            found = reading.findings
            if not keep or not found.allows(skip_invalid=job.skip_invalid):
                return reading, None
            form = form_json(
                format=manifest.format,
                delimiter=manifest.delimiter,
                columns=None if manifest.columns is None else form_columns(job, manifest.columns),
                bom=manifest.has_bom,
            )
            merged = planning.merge(
                stamp=stamp,
                form=form,
                rerun_changed=job.rerun_changed,
                manifest=str(job.manifest),
                job=job.to_json(),
                at=time.time(),
            )
            return reading, merged
        finally:
            planning.abandon()


def _shown(manifest: Path | str) -> str:
    """The manifest as messages name it: relative to the current folder where it lies below."""
    path = Path(manifest)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def stamp_of(job: Job, known: str | None = None) -> str | None:
    """What tells an unchanged manifest: its hash and the settings that read it; None for standard input.

    `known` is the stamp of the last reading: a file that is still the same to the system (size, times, place
    on the disk) is not read to be told. Raises ManifestError when it cannot be read.
    """
    if not isinstance(job.manifest, Path):
        return None
    settings = {name: getattr(job, name) for name in _READING_SETTINGS}
    settings_print = sha256(dumps(settings).encode()).hexdigest()[:16]
    try:
        facts = job.manifest.stat()
        seen = [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_dev, facts.st_ino]
        before = _parts(known)
        if before[0] == seen and before[2] == settings_print:
            return known
        if time.time_ns() - max(facts.st_mtime_ns, facts.st_ctime_ns) < _SETTLED_NS:
            seen = []  # a change to come within this tick of the clock would not be seen
        with job.manifest.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
    except OSError as error:
        problem = Problem(f"cannot be read: {error.strerror}; check the path", _shown(job.manifest))
        raise ManifestError([problem]) from error
    return dumps([seen, digest, settings_print])


def is_same(stamp: str | None, known: str | None) -> bool:
    """Whether two stamps tell the same manifest, read by the same settings."""
    return bool(stamp) and bool(known) and _parts(stamp)[1:] == _parts(known)[1:]


def _parts(stamp: str | None) -> tuple[object, object, object]:
    """A stamp's file as the system has it, hash and settings; earlier versions told size and time first."""
    parts = json.loads(stamp) if stamp else [None, None, None]
    return (None, parts[2], parts[3]) if len(parts) == 4 else tuple(parts)
