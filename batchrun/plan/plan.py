"""A job's manifest as a whole: read in one pass, and made the run's rows where it is right.

The stamp tells whether that was done before: an unchanged manifest is not read again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from batchrun.errors import ManifestError
from batchrun.manifest.job import Job
from batchrun.manifest.read import open_manifest
from batchrun.model import Problem
from batchrun.plan.reading import Reading, form_columns
from batchrun.store.planning import Merged, Planning, form_json
from batchrun.store.records import dumps
from batchrun.tools.catalog import Catalog

#: Settings that decide what the rows of a manifest ask for.
_READING_SETTINGS = (
    "tool", "set", "map", "expand", "repeat", "extra", "format", "delimiter", "lora_scale", "skip_invalid",
    "allow_outside", "max_requests", "max_row_bytes",
)  # fmt: skip


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


def stamp_of(job: Job) -> str | None:
    """What tells an unchanged manifest: its size, time and hash, and the settings that read it.

    None for standard input. Raises ManifestError when it cannot be read.
    """
    if not isinstance(job.manifest, Path):
        return None
    settings = {name: getattr(job, name) for name in _READING_SETTINGS}
    try:
        with job.manifest.open("rb") as file:
            digest = sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        facts = job.manifest.stat()
    except OSError as error:
        problem = Problem(f"cannot be read: {error.strerror}; check the path", _shown(job.manifest))
        raise ManifestError([problem]) from error
    settings_print = sha256(dumps(settings).encode()).hexdigest()[:16]
    return dumps([facts.st_size, facts.st_mtime_ns, digest.hexdigest(), settings_print])
