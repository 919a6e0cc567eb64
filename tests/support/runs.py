"""Runs against the real simulator over real sockets, as the tests of the run and of crashes need them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchrun.manifest.job import Job, job_for
from batchrun.outputs.verify import Verifier
from batchrun.progress import Event, Fact, Progress
from batchrun.runner import Again, Outcome, Runner
from batchrun.settings import Credentials
from batchrun.simulator.server import Simulator

#: The quickest of the tools to bind, with one image a row.
TOOL = "Retro-Cartoons"


def credentials_of(simulator: Simulator) -> Credentials:
    """What a client of that simulator needs."""
    return Credentials(simulator.key, simulator.secret, simulator.base_url, simulator.socket_url)


def write_rows(path: Path, rows: int, *, ids: bool = True) -> Path:
    """A CSV manifest of that many different rows."""
    header = "id,prompt\n" if ids else "prompt\n"
    lines = [f"{f'r{n},' if ids else ''}a picture of {n} birds\n" for n in range(1, rows + 1)]
    path.write_text(header + "".join(lines), encoding="utf-8")
    return path


def job_of(manifest: Path, **settings: Any) -> Job:
    """A job for TOOL beside its manifest, unless told otherwise."""
    settings = {"tool": TOOL, "set": {"samples": 1}, "out": manifest.parent / "run", **settings}
    return job_for(manifest, **settings)


class Facts(list[Event]):
    """A listener that keeps every event."""

    def __call__(self, event: Event) -> None:
        """Keep it."""
        self.append(event)

    def count(self, fact: Fact) -> int:  # type: ignore[override]
        """How often a fact was announced."""
        return sum(1 for event in self if event.fact is fact)


async def run_job(
    simulator: Simulator, job: Job, *, again: Again | None = None, facts: Facts | None = None
) -> Outcome:
    """One start of the job."""
    progress = Progress(*([facts] if facts is not None else []))
    return await Runner(job, credentials_of(simulator), progress=progress, again=again).run()


def abort_when(runner: Runner, condition: Callable[[Event], bool]) -> None:
    """Leave the run at once, as a crash would, at the first event that fulfils the condition."""
    runner.progress.listen(lambda event: runner.abort() if condition(event) else None)


def stop_when(runner: Runner, condition: Callable[[Event], bool]) -> None:
    """Stop the run in good order at the first event that fulfils the condition."""
    runner.progress.listen(lambda event: runner.stop("enough") if condition(event) else None)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file; every line must be whole."""
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def images_of(folder: Path) -> list[Path]:
    """The images of a run, each proved whole; partial files must be gone."""
    images = sorted(
        path for path in (folder / "images").rglob("*") if path.suffix in {".png", ".jpg", ".webp"}
    )
    for image in images:
        verifier = Verifier()
        verifier.feed(image.read_bytes())
        verifier.finish()
    return images


def check_complete(simulator: Simulator, folder: Path, rows: int, *, images: int | None = None) -> None:
    """Everything an undisturbed run would have left, and not one task more than needed."""
    images = rows if images is None else images
    assert not simulator.needless
    found = images_of(folder)
    assert len(found) == images
    metadata = lines_of(folder / "images" / "metadata.jsonl")
    assert sorted(record["file_name"] for record in metadata) == [
        path.relative_to(folder / "images").as_posix() for path in found
    ]
    results = lines_of(folder / "results.jsonl")
    assert [record["status"] for record in results] == ["done"] * rows
    assert len({(record["id"], record["line"], *record["images"]) for record in results}) == rows
    assert not any((folder / "partial").rglob("*.part"))
