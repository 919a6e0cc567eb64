"""Batch image generation with Wiro's hosted tools: from a manifest of prompts to images on disk, resumable.

    import batchrun

    outcome = await batchrun.run("jobs/cartoons.toml")

See `batchrun.api` for `run`, `running` (progress while it goes on) and `check`. Names are imported when they
are first used, so that `import batchrun` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Public name → the module it comes from.
_HOMES = {
    "BatchrunError": "batchrun.errors",
    "Checked": "batchrun.api",
    "Counts": "batchrun.model",
    "Credentials": "batchrun.settings",
    "Event": "batchrun.progress",
    "Fact": "batchrun.progress",
    "Failure": "batchrun.model",
    "Job": "batchrun.manifest.job",
    "ManifestError": "batchrun.errors",
    "Outcome": "batchrun.runner",
    "OutputError": "batchrun.errors",
    "Problem": "batchrun.model",
    "Progress": "batchrun.progress",
    "Runner": "batchrun.runner",
    "ServiceError": "batchrun.errors",
    "State": "batchrun.model",
    "StoreError": "batchrun.errors",
    "UsageError": "batchrun.errors",
    "check": "batchrun.api",
    "job_for": "batchrun.manifest.job",
    "run": "batchrun.api",
    "running": "batchrun.api",
}

__all__ = [
    "BatchrunError",
    "Checked",
    "Counts",
    "Credentials",
    "Event",
    "Fact",
    "Failure",
    "Job",
    "ManifestError",
    "Outcome",
    "OutputError",
    "Problem",
    "Progress",
    "Runner",
    "ServiceError",
    "State",
    "StoreError",
    "UsageError",
    "__version__",
    "check",
    "job_for",
    "run",
    "running",
]

if TYPE_CHECKING:
    from batchrun.api import Checked, check, run, running
    from batchrun.errors import (
        BatchrunError,
        ManifestError,
        OutputError,
        ServiceError,
        StoreError,
        UsageError,
    )
    from batchrun.manifest.job import Job, job_for
    from batchrun.model import Counts, Failure, Problem, State
    from batchrun.progress import Event, Fact, Progress
    from batchrun.runner import Outcome, Runner
    from batchrun.settings import Credentials


def __getattr__(name: str) -> Any:
    """A public name, imported at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'batchrun' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
