"""What a manifest probably does not mean: told before money is spent, never an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from batchrun.model import LocalImage, Problem, Request, Severity, Tool, Value

#: A column of texts this long looks like prompts.
_PROSE_CHARS = 20
#: Rows of JSON may each have columns of their own.
_MAX_COLUMNS = 20


class Hints:
    """Watches requests go by and says at the end what looks unmeant."""

    def __init__(self) -> None:
        self._requests: Counter[str] = Counter()
        self._samples_left: Counter[str] = Counter()
        self._seeds: dict[str, set[str]] = {}
        self._seeded: Counter[str] = Counter()
        self._prose: Counter[str] = Counter()
        self._tools: dict[str, Tool] = {}
        self._unexpanded: Counter[str] = Counter()
        self._misspelt: dict[str, str] = {}

    def requests(
        self, tool: Tool, count: int, *, samples_left: int, seeds: Iterable[Value | LocalImage | None]
    ) -> None:
        """Take in bound requests: how many, how many leave `samples` at several, the seeds given.

        Seeds are asked for only until two are different.
        """
        self._tools[tool.slug] = tool
        self._requests[tool.slug] += count
        if samples_left:
            self._samples_left[tool.slug] += samples_left
        known = self._seeds.setdefault(tool.slug, set())
        if len(known) < 2:
            for seed in seeds:
                known.add("" if seed is None else str(seed))
                if len(known) == 2:
                    break

    def request(self, tool: Tool, request: Request) -> None:
        """Take in one."""
        left = request.images > 1 and "samples" not in request.given and tool.parameter("samples") is not None
        self.requests(tool, 1, samples_left=int(left), seeds=(request.given.get("seed"),))

    def unused(self, cells: Mapping[str, Any]) -> None:
        """Take in the cells of a row that are no parameters."""
        for column, cell in cells.items():
            if isinstance(cell, str) and len(cell) >= _PROSE_CHARS and " " in cell.strip():
                self._prose[column] += 1

    def misspelt(self, cells: Mapping[str, Any], spellings: Mapping[str, str]) -> None:
        """Take in the cells of a row that are no parameters; `spellings` are names by their lower case."""
        for column in cells:
            if (name := spellings.get(column.casefold())) and len(self._misspelt) < _MAX_COLUMNS:
                self._misspelt[column] = name

    def unexpanded(self, name: str) -> None:
        """A row gives a value of its own for a parameter that the job expands."""
        self._unexpanded[name] += 1

    def told(self, *, file: str, identical: int) -> Iterator[Problem]:
        """The hints; `identical` is how many requests repeat an earlier one."""
        for slug, left in self._samples_left.items():
            default = self._tools[slug].parameter("samples")
            each = default.default if default else "several"
            yield _hint(
                file,
                "samples",
                f"{_count(left, 'row')} of {slug} {'leaves' if left == 1 else 'leave'} it at {each}: "
                f"{each} images a row are made and billed; "
                "for one image a row use --set samples=1",
            )
        for slug, seeds in self._seeds.items():
            if len(seeds) == 1 and self._requests[slug] > 1 and seeds != {"random"} and self._has_seed(slug):
                seed = next(iter(seeds))
                same = f"is {seed}" if seed else "is the tool's default"
                yield _hint(
                    file,
                    "seed",
                    f"{same} in all {self._requests[slug]:,} rows of {slug}; "
                    "for a seed of its own in each row use --expand seed=random",
                )
        if identical:
            yield _hint(
                file,
                "",
                f"{_count(identical, 'row')} {'asks' if identical == 1 else 'ask'} for the very same as "
                "another row; each is made and billed, "
                "and with the same seed the images may be the same",
            )
        for column, rows in self._prose.most_common(3):
            yield _hint(
                file,
                column,
                f"holds text in {_count(rows, 'row')} and no parameter uses it; "
                f"for one use --map prompt={column}",
            )
        for column, name in self._misspelt.items():
            yield _hint(
                file,
                column,
                f"is not {name}, since upper and lower case matter; if it is meant, rename it or use "
                f"--map {name}={column}",
            )
        for name, rows in self._unexpanded.items():
            yield _hint(
                file,
                name,
                f"{_count(rows, 'row')} {'has' if rows == 1 else 'have'} a value of "
                f"{'its' if rows == 1 else 'their'} own, which wins over --expand {name}: "
                "not expanded along it",
            )

    def _has_seed(self, slug: str) -> bool:
        return self._tools[slug].parameter("seed") is not None


def _count(number: int, noun: str) -> str:
    """`1 row`, `2,212 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _hint(file: str, column: str, message: str) -> Problem:
    return Problem(message, file=file, column=column, severity=Severity.HINT)
