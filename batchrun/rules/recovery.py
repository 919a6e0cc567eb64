"""What stored facts say to do next: a row's next step on resume, and how a doubtful submit is settled.

Money hangs on `settle_doubt`, so it says "absent" only when every other explanation is ruled out, and
"adopt" only for a task that is certainly the row's own.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from functools import cached_property
from typing import Any

from batchrun.model import State, Task, Value

#: After a POST can last have been running, its task may still appear for this long.
GRACE_S = 20.0
#: Two clocks of the service (its Date header, its createtime) may differ by this much.
CLOCK_TOLERANCE_S = 2.0
#: They may be wrong by more than that, though hardly by more than this.
CLOCKS_APART_S = 300.0
#: While no task of ours proves the listing, two answers this far apart do.
SECOND_LOOK_S = 10.0
#: A listing that fails for this long leaves the doubt to the user.
LISTING_PATIENCE_S = 120.0


class Step(StrEnum):
    """What to do with a row next."""

    SUBMIT = "submit"
    LOOK_UP = "look up"
    FOLLOW = "follow"
    SAVE = "save"
    REST = "rest"


_STEPS = {
    State.PLANNED: Step.SUBMIT,
    State.SUBMITTING: Step.LOOK_UP,  # found so after a crash: the answer is as good as lost
    State.IN_DOUBT: Step.LOOK_UP,
    State.IN_FLIGHT: Step.FOLLOW,
    State.FINISHED: Step.SAVE,
}


def next_step(state: State) -> Step:
    """The next step of a row found in `state`, whatever happened before."""
    return _STEPS.get(state, Step.REST)


@dataclass(frozen=True, slots=True)
class Doubt:
    """A submit whose answer is unknown, with what was known before it was sent."""

    body: Mapping[str, Value]
    #: Parameters the row itself gives; an echo without them proves nothing.
    given: Collection[str]
    #: The newest task id known before the intent; 0 when the listing had none, None when it did not tell.
    after_task: int | None
    #: The service's time at the intent by its Date header, None when unknown.
    intent_server_at: float | None
    #: The number of the tool in the run, and the service's id of it, "" when not learned yet.
    tool: int = 0
    model_id: str = ""
    #: Parameters that are texts: "7" and "7.0" are two prompts, though one number.
    texts: Collection[str] = ()
    #: Parameters that hold addresses of images, which the service may tell in its own words.
    images: Collection[str] = ()


def task_number(task_id: str) -> int | None:
    """A task id as a number, larger for newer tasks; None for ids that are no such numbers.

    Ids come from outside: 18 digits are what the state can hold.
    """
    return int(task_id) if len(task_id) <= 18 and task_id.isascii() and task_id.isdecimal() else None


class Match(StrEnum):
    """How a listed task relates to a doubtful submit."""

    OLDER = "older"
    OTHER = "other"
    SAME = "same"
    #: The service does not tell enough to compare.
    UNKNOWABLE = "unknowable"


def compare(doubt: Doubt, task: Task) -> Match:
    """How `task`, claimed by no row, relates to `doubt`."""
    older = _is_older(doubt, task)
    if older:
        return Match.OLDER
    if doubt.model_id and task.model_id and task.model_id != doubt.model_id:
        return Match.OTHER
    echoed = task.parameters or {}
    shared = [name for name in doubt.body if name in echoed]
    unlike = [
        name for name in shared if not same_value(doubt.body[name], echoed[name], is_text=name in doubt.texts)
    ]
    if any(name in doubt.given and name not in doubt.images for name in unlike):
        return Match.OTHER
    if unlike or older is None or not shared or any(name not in echoed for name in doubt.given):
        return Match.UNKNOWABLE  # defaults and addresses may come back in the service's own words
    if not (doubt.model_id and task.model_id) and set(echoed) != set(doubt.body):
        return Match.UNKNOWABLE  # another tool may take the same prompt
    return Match.SAME


def is_older(doubt: Doubt, task: Task) -> bool:
    """Whether `task` certainly existed before the intent."""
    return _is_older(doubt, task) is True


def _is_older(doubt: Doubt, task: Task) -> bool | None:
    """Whether `task` existed before the intent, by ids or else by the service's own times; None: unknown."""
    number = task_number(task.id)
    if doubt.after_task and number is not None:
        return number <= doubt.after_task
    if doubt.intent_server_at is not None and task.created_at is not None:
        ahead_s = doubt.intent_server_at - task.created_at
        if ahead_s > CLOCKS_APART_S:
            return True
        # where the listing was empty before, only a listing that erred makes a task an older one
        return False if ahead_s <= CLOCK_TOLERANCE_S or doubt.after_task == 0 else None
    return False if doubt.after_task == 0 else None


def same_value(sent: Value, echoed: Any, *, is_text: bool = False) -> bool:
    """Whether an echoed parameter is what was sent, over the neighbouring types the service uses.

    `is_text`: two spellings of one number are two texts.
    """
    if isinstance(sent, list) or isinstance(echoed, list):
        left = sent if isinstance(sent, list) else _list_of(sent)
        right = echoed if isinstance(echoed, list) else _list_of(echoed)
        return [str(item) for item in left] == [str(item) for item in right]
    left_text, right_text = _text(sent), _text(echoed)
    return left_text == right_text or (not is_text and _same_number(left_text, right_text))


def print_of_value(value: Any) -> tuple[str, ...]:
    """What two values that are `same_value` have in common: a key to find them by. Others may share it."""
    items = value if isinstance(value, list) else _list_of(value)
    return tuple(_plain_number(_text(item)) for item in items)


def _plain_number(text: str) -> str:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    if not number.is_finite() or abs(number.adjusted()) > 1000:
        return text
    return f"{number.normalize():f}" if number else "0"


def _list_of(value: Any) -> list[Any]:
    text = _text(value)
    if text.startswith("["):
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, list):
            return parsed
    return [text] if text else []


def _text(value: Any) -> str:
    if value is None:
        return ""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text.replace("\r\n", "\n").strip()


def _same_number(left: str, right: str) -> bool:
    try:
        return Decimal(left) == Decimal(right)
    except InvalidOperation:
        return False


@dataclass(eq=False)
class Listing:
    """A reading of Task/List, newest first, begun at one moment and read back far enough or to its end.

    Many doubts are held against one listing, so what all of them look for is looked up, not gone through.
    """

    tasks: Sequence[Task]
    #: Seconds (monotonic) when the first page was asked for.
    begun_at: float
    #: True when the listing was read to its end.
    to_the_end: bool
    #: Ids in it that this run knows: they prove that the listing shows our tasks, and are claimed.
    claimed: set[str]
    #: Whether this run knows any task: a listing without one of them then proves nothing.
    ours_expected: bool = False
    _by_value: dict[str, dict[tuple[str, ...] | None, list[int]]] = field(default_factory=dict)

    def like(self, doubt: Doubt) -> list[Task]:
        """Tasks that no row claims, newest first, without most of those that ask for something else."""
        told = [name for name in doubt.given if name in doubt.body and name not in doubt.images]
        if told:
            name = max(told, key=lambda name: len(str(doubt.body[name])))
            by_value = self._places(name)
            places = sorted(by_value.get(print_of_value(doubt.body[name]), []) + by_value.get(None, []))
            tasks: Iterable[Task] = (self.tasks[place] for place in places)
        else:
            tasks = self.tasks
        return [task for task in tasks if task.id not in self.claimed]

    def _places(self, name: str) -> dict[tuple[str, ...] | None, list[int]]:
        """Where unclaimed tasks stand, by their value of a parameter; None: they do not tell it."""
        if name not in self._by_value:
            places = self._by_value[name] = defaultdict(list)
            for place, task in enumerate(self.tasks):
                if task.id not in self.claimed:
                    echoed = task.parameters or {}
                    places[print_of_value(echoed[name]) if name in echoed else None].append(place)
        return self._by_value[name]

    def reaches(self, doubt: Doubt) -> bool:
        """Whether it was read back to before the doubt's intent."""
        return self.to_the_end or any(is_older(doubt, task) for task in self._oldest)

    def shows(self, number: int) -> bool:
        """Whether it is as new as the task of that number, be it in it or not."""
        return self._newest is None or number <= self._newest

    @cached_property
    def _newest(self) -> int | None:
        numbers = (task_number(task.id) for task in self.tasks)
        return max((number for number in numbers if number is not None), default=None)

    @cached_property
    def _oldest(self) -> list[Task]:
        """The oldest tasks by each thing that age is told by."""
        numbered = [(number, task) for task in self.tasks if (number := task_number(task.id)) is not None]
        dated = [task for task in self.tasks if task.created_at is not None]
        bare = [task for task in dated if task_number(task.id) is None]
        oldest = [min(tasks, key=lambda task: task.created_at or 0) for tasks in (dated, bare) if tasks]
        return oldest + ([min(numbered, key=lambda each: each[0])[1]] if numbered else [])


@dataclass(frozen=True, slots=True)
class Adopt:
    """The task is the row's own."""

    task: Task


@dataclass(frozen=True, slots=True)
class Absent:
    """No task was made: the row may be submitted again."""


@dataclass(frozen=True, slots=True)
class LookAgain:
    """Nothing certain yet."""

    after_s: float


@dataclass(frozen=True, slots=True)
class Hold:
    """It cannot be known: the row stays in doubt until the user decides."""

    reason: str


def settle_doubt(
    doubt: Doubt,
    listing: Listing,
    *,
    lost_at: float,
    newest_known: int = 0,
    earlier_at: float | None = None,
) -> Adopt | Absent | LookAgain | Hold:
    """What a listing says of a doubt whose POST can last have been running at `lost_at` (monotonic s).

    `newest_known` is the newest task that was known while the lost one may have been on its way: a listing
    older than that may be too old for the lost one, too; 0: none was. `earlier_at` is when an earlier correct
    reading was begun; None when there was none.
    """
    matches = [(compare(doubt, task), task) for task in listing.like(doubt)]
    # the oldest match first: among identical rows the first lost submit takes the first task
    for match, task in reversed(matches):
        if match is Match.SAME:
            return Adopt(task)
    grace_left_s = lost_at + GRACE_S - listing.begun_at
    if grace_left_s > 0:
        return LookAgain(grace_left_s)
    if any(match is Match.UNKNOWABLE for match, _ in matches):
        return Hold("the service does not echo the parameters of its newest tasks")
    if not listing.reaches(doubt):
        return Hold("the listing does not reach back to before the submit")
    if not listing.shows(newest_known):
        return Hold("the listing does not show this run's newest tasks")
    if listing.claimed:
        return Absent()
    if listing.ours_expected:
        return Hold("the listing shows none of this run's tasks")
    if earlier_at is None or earlier_at < lost_at + GRACE_S:
        return LookAgain(SECOND_LOOK_S)  # an answer during the grace proves nothing
    waited_s = listing.begun_at - earlier_at
    return Absent() if waited_s >= SECOND_LOOK_S else LookAgain(SECOND_LOOK_S - waited_s)
