"""What a reading found wrong or worth telling."""

from __future__ import annotations

from dataclasses import dataclass, field

from batchrun.errors import ManifestError
from batchrun.model import Problem, Severity

#: Problems kept one by one; beyond that they are counted.
MAX_PROBLEMS = 10_000


@dataclass(slots=True)
class Findings:
    """What a reading found wrong or worth telling."""

    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    hints: list[Problem] = field(default_factory=list)
    error_count: int = 0
    warning_count: int = 0
    #: Those errors that no skipping of rows can help.
    blocking: list[Problem] = field(default_factory=list)
    #: Requests that have no error.
    valid_rows: int = 0

    @property
    def fatal(self) -> bool:
        """Whether there are errors that no skipping of rows can help."""
        return bool(self.blocking)

    def allows(self, *, skip_invalid: bool) -> bool:
        """Whether a run may begin."""
        return not self.blocking and (skip_invalid or not self.error_count)

    def as_error(self) -> ManifestError:
        """All errors, to be raised where nothing can be run."""
        return ManifestError(
            self.errors, total=self.error_count, blocking=self.blocking, valid_rows=self.valid_rows
        )

    def block(self, problem: Problem) -> None:
        """Add an error that no skipping of rows can help."""
        self.add(problem)
        if len(self.blocking) < MAX_PROBLEMS:
            self.blocking.append(problem)

    def add(self, problem: Problem) -> None:
        """Count a problem and keep it while there are not too many."""
        if problem.severity is Severity.ERROR:
            self.error_count += 1
            kept = self.errors
        else:
            self.warning_count += 1
            kept = self.warnings
        if len(kept) < MAX_PROBLEMS:
            kept.append(problem)
