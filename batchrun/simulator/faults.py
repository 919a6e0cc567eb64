"""Planned faults: what can go wrong, by name, and when it does.

A fault belongs to a *point* of the service (an endpoint, a task's life, the CDN) and strikes when a rule of
the plan says so. Rules are written as text:

    NAME             every time             NAME@3,7   the 3rd and 7th time it could strike, counted from 1
    NAME=2%, =0.02   by (seeded) chance     NAME*5     the first five times
    NAME:TOOL...     only for one tool (slug), before any of the endings above
    all=2%           every fault of the group "everyday": what a runner must survive without failing a row

`all` shows mercy: it never strikes one request's tasks, or one file, more than twice in a row, so that three
attempts are always enough; rules that name a fault show none. Points where nothing is told apart (a Detail, a
List) need no mercy: they can be asked for ever. Each rule draws from its own random numbers, so that adding
one changes no other.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from random import Random

from batchrun.errors import UsageError

#: How often in a row `all` may strike one thing: one less than the attempts that a row has by default.
MERCY = 2


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that can go wrong."""

    name: str
    #: Where it strikes: run, detail, list, upload, tool, stop, socket, task, cdn, cdn-range.
    point: str
    summary: str
    #: Whether a runner must survive it without failing a row.
    everyday: bool = True
    #: Whether the service does what it was asked before the fault strikes.
    acts: bool = False
    #: Whether it strikes one thing (a file) only once.
    once: bool = False

    @property
    def kind(self) -> str:
        """The name without its point: `reset` of `run-reset`."""
        return self.name.partition("-")[2]


RARE = False

_NAMED = [
    # Submitting. A fault that acts leaves a task behind whose id the client never learns.
    Fault("run-refused", "run", "the connection is closed before the request is read"),
    Fault("run-reset", "run", "the task is made, then the connection is reset without an answer", acts=True),
    Fault("run-reset-before", "run", "the connection is reset, no task is made"),
    Fault("run-stall", "run", "the task is made, then no answer comes for long", acts=True),
    Fault("run-500", "run", "the task is made, then HTTP 500", acts=True),
    Fault("run-500-before", "run", "HTTP 500, no task is made"),
    Fault("run-524", "run", "the task is made, then the CDN's time-out page (HTTP 524)", acts=True),
    Fault("run-html", "run", "HTTP 502 with an HTML page, no task is made"),
    Fault("run-broken-json", "run", "the task is made, then half a JSON text", acts=True),
    Fault("run-half", "run", "the task is made, then the answer breaks off in the middle", acts=True),
    Fault("run-no-id", "run", "the task is made, then an answer without a task id", acts=True),
    Fault("run-429", "run", "HTTP 429 with Retry-After in seconds"),
    Fault("run-429-date", "run", "HTTP 429 with Retry-After as a date"),
    Fault("run-code0", "run", "code 0, trouble at the server (not validation)"),
    Fault("run-validation", "run", "code 0, the parameters are refused", RARE),
    Fault("run-notfound", "run", "code 1, there is no such tool", RARE),
    Fault("run-limit", "run", "code 96 though slots are free"),
    Fault("run-limit-nonumber", "run", "code 96 with a message that names no limit"),
    Fault("run-limit-odd", "run", "code 96 as text, with `msg` for `message`, and no `result`"),
    Fault("run-balance", "run", "code 97, the balance is exhausted", RARE),
    Fault("run-401", "run", "HTTP 401, the key is refused", RARE),
    Fault("run-98", "run", "code 98 in an answer of HTTP 200", RARE),
    Fault("run-99", "run", "code 99 in an answer of HTTP 200", RARE),
    # Tracking.
    Fault("detail-empty", "detail", "an empty tasklist"),
    Fault("detail-unknown", "detail", "code 1, there is no such task", RARE),
    Fault("list-off", "list", "HTTP 404, code 1: there is no such endpoint", RARE),
    Fault("list-late", "list", "shows a task only some seconds after it was made"),
    Fault("list-empty", "list", "a correct answer that shows no task at all", RARE),
    Fault("list-no-parameters", "list", "echoes {} as every task's parameters", RARE),
    Fault("tool-off", "tool", "code 1, there is no such tool", RARE),
    Fault("stop-ignored", "stop", "Cancel and Kill answer well, but the task goes on", RARE),
    Fault("socket-refused", "socket", "HTTP 503 instead of a WebSocket"),
    Fault("socket-drop", "socket", "the WebSocket is closed after its first event"),
    Fault("socket-silent", "socket", "the WebSocket never sends an event"),
    # A task's life.
    Fault("task-fails", "task", 'ends with pexit "1"; not charged'),
    Fault("task-cancelled", "task", "is cancelled by the service; not charged"),
    Fault("task-error-end", "task", 'task_error for good, with endtime and pexit "1"; not charged'),
    Fault("task-error-passing", "task", "task_error in the middle, then goes on and succeeds"),
    Fault("task-empty", "task", 'pexit "0" without outputs, and charged', RARE),
    Fault("task-fewer", "task", "one image fewer than asked (where more than one was)", RARE),
    Fault("task-late-outputs", "task", "the outputs appear one look later than the end"),
    Fault("task-stuck", "task", "starts and never moves again", RARE),
    Fault("task-unknown-status", "task", "passes through a status that no documentation names"),
    Fault("task-backwards", "task", "its status goes back once before it goes on"),
    Fault("task-skips", "task", "skips most statuses"),
    Fault("task-pexit-null", "task", "succeeds with pexit null"),
    Fault("task-pexit-empty", "task", 'succeeds with pexit ""'),
    Fault("task-pexit-number", "task", "succeeds with pexit 0 as a number"),
    Fault("task-pexit-absent", "task", "succeeds without the key pexit"),
    Fault("task-odd-types", "task", "numbers, lists and parameters come in their neighbouring JSON types"),
    Fault("task-raw", "task", "an extra output of type raw, without a URL"),
    Fault("task-names", "task", "its outputs have hostile names"),
    # Saving.
    Fault("cdn-truncated", "cdn", "Content-Length says more than is sent"),
    Fault("cdn-reset", "cdn", "the connection is reset in the middle of the file"),
    Fault("cdn-stall", "cdn", "half the file, then nothing for long"),
    Fault("cdn-drip", "cdn", "the file comes in small pieces, slowly"),
    Fault("cdn-500", "cdn", "HTTP 500"),
    Fault("cdn-404-once", "cdn", "HTTP 404 at first", once=True),
    Fault("cdn-404", "cdn", "HTTP 404 whenever asked, though Detail shows the image", RARE),
    Fault("cdn-403", "cdn", "the address has expired (HTTP 403); a new Detail gives a fresh one", once=True),
    Fault("cdn-gone", "cdn", "HTTP 410 for good; Detail shows the task without outputs", RARE),
    Fault("cdn-html", "cdn", "HTTP 200 with an HTML page"),
    Fault("cdn-wrong-bytes", "cdn", "the right length, but bytes of the image are wrong"),
    Fault("cdn-no-length", "cdn", "no Content-Length"),
    Fault("cdn-empty", "cdn", "0 bytes"),
    Fault("cdn-redirect", "cdn", "HTTP 302 to another address of the same file"),
    Fault("cdn-redirect-loop", "cdn", "HTTP 302 to itself, for ever", RARE),
    Fault("cdn-redirect-scheme", "cdn", "HTTP 302 to an ftp address", RARE),
    Fault("cdn-huge", "cdn", "Content-Length says a terabyte", RARE),
    Fault("cdn-ignore-range", "cdn-range", "a Range is answered with the whole file (HTTP 200)"),
    Fault(
        "cdn-other-etag", "cdn-range", "a Range is answered from another version of the file, with its ETag"
    ),
    Fault("cdn-wrong-size", "task", "the outputs declare a wrong size"),
    Fault("cdn-wrong-type", "task", "outputs and CDN name a wrong media type"),
]
_TRANSPORT = {
    "reset": "the connection is reset without an answer",
    "500": "HTTP 500",
    "html": "HTTP 502 with an HTML page",
    "429": "HTTP 429 with Retry-After in seconds",
    "broken-json": "half a JSON text",
    "stall": "no answer for long",
}
_ENDPOINTS = {
    "detail": "Task/Detail",
    "list": "Task/List",
    "upload": "File/Upload",
    "tool": "Tool/Detail and Tool/List",
    "stop": "Task/Cancel and Task/Kill",
}

FAULTS = {
    fault.name: fault
    for fault in [
        *_NAMED,
        *(
            # The answer to an upload or a stop order is lost after the deed; reads have no deed.
            Fault(
                f"{point}-{kind}", point, f"{title}: {words}", acts=kind in ("reset", "broken-json", "stall")
            )
            for point, title in _ENDPOINTS.items()
            for kind, words in _TRANSPORT.items()
        ),
    ]
}


def listing() -> list[tuple[str, str]]:
    """(name, what happens) of every fault, in order of the service's points; everyday ones are marked `*`."""
    return [(fault.name, fault.summary + (" *" if fault.everyday else "")) for fault in FAULTS.values()]


@dataclass(slots=True)
class Rule:
    """When one fault strikes; counts the times it could have."""

    fault: Fault
    rng: Random
    #: Only for the tool of this slug; None: for all.
    tool: str | None = None
    probability: float = 1.0
    #: Only at these times it could strike, from 1; None: at any.
    at: frozenset[int] | None = None
    #: At most so often; None: without end.
    at_most: int | None = None
    merciful: bool = False
    seen: int = 0
    struck: int = 0
    _done: set[Hashable] = field(default_factory=set)

    def strikes(self, tool: str | None, key: Hashable) -> bool:
        """Whether the fault strikes now; to be asked once for each time it could."""
        if self.tool is not None and self.tool != tool:
            return False
        if self.fault.once and key in self._done:
            return False
        self.seen += 1
        if self.at is not None:
            return self.seen in self.at
        if self.at_most is not None and self.struck >= self.at_most:
            return False
        return self.probability >= 1.0 or self.rng.random() < self.probability

    def record(self, key: Hashable) -> None:
        """Note that it struck `key`."""
        self.struck += 1
        if self.fault.once:
            self._done.add(key)


class Plan:
    """The rules in force; `strike` asks them, first come first served."""

    def __init__(self, rules: Iterable[str] = (), *, seed: int = 0) -> None:
        """Read the rules; raises UsageError where one is not understood."""
        self.texts = tuple(rules)
        self._by_point: dict[str, list[Rule]] = {}
        self._streaks: dict[Hashable, int] = {}
        for text in self.texts:
            for rule in _parse(text, seed):
                self._by_point.setdefault(rule.fault.point, []).append(rule)

    def strike(self, point: str, *, tool: str | None = None, key: Hashable = None) -> Fault | None:
        """The fault that strikes now at `point`, or None; `key` names the file or request it would strike."""
        chosen: Rule | None = None
        for rule in self._by_point.get(point, ()):
            # Every rule is asked, so that "the third time" does not depend on the other rules.
            if not rule.strikes(tool, key) or chosen is not None:
                continue
            if rule.merciful and key is not None and self._streaks.get((point, key), 0) >= MERCY:
                continue
            chosen = rule
        if key is not None:
            self.note(point, key, struck=chosen is not None)
        if chosen is None:
            return None
        chosen.record(key)
        return chosen.fault

    def counts(self) -> dict[str, int]:
        """How often each fault of the plan has struck, by name."""
        counts: dict[str, int] = {}
        for rules in self._by_point.values():
            for rule in rules:
                counts[rule.fault.name] = counts.get(rule.fault.name, 0) + rule.struck
        return counts

    def note(self, point: str, key: Hashable, *, struck: bool) -> None:
        """Count towards mercy that `key` was struck at `point`, or spared."""
        if point not in self._by_point:
            return
        if struck:
            self._streaks[point, key] = self._streaks.get((point, key), 0) + 1
        else:
            self._streaks.pop((point, key), None)


_RULE = re.compile(
    r"(?P<name>[a-z0-9-]+)(:(?P<tool>[\w./-]+))?"
    r"(=(?P<chance>\d+(\.\d+)?%?)|@(?P<at>\d+(,\d+)*)|\*(?P<first>\d+))?"
)


def _parse(text: str, seed: int) -> list[Rule]:
    match = _RULE.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"fault {text!r} is not understood: write NAME, NAME=2%, NAME@3,7 or NAME*5, or NAME:TOOL=2%"
        )
    name = match["name"]
    if name == "all":
        if match["chance"] is None:
            raise UsageError("fault 'all' needs a probability: write all=2%")
        faults = [fault for fault in FAULTS.values() if fault.everyday]
    elif name in FAULTS:
        faults = [FAULTS[name]]
    else:
        near = difflib.get_close_matches(name, FAULTS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`batchrun simulate --fault help` lists them"
        raise UsageError(f"there is no fault {name!r}: {hint}")
    return [
        Rule(
            fault=fault,
            rng=Random(f"{seed}:{fault.name}"),
            tool=match["tool"].rpartition("/")[2] if match["tool"] else None,
            probability=_probability(text, match["chance"]),
            at=frozenset(map(int, match["at"].split(","))) if match["at"] else None,
            at_most=int(match["first"]) if match["first"] else None,
            merciful=name == "all",
        )
        for fault in faults
    ]


def _probability(text: str, chance: str | None) -> float:
    if chance is None:
        return 1.0
    value = float(chance[:-1]) / 100 if chance.endswith("%") else float(chance)
    if value > 1:
        raise UsageError(f"fault {text!r}: a probability is at most 1, or 100%")
    return value
