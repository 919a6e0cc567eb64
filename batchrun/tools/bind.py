"""A row's cells and a tool's description become a Request, or problems naming column, fault and cure.

A Binder is compiled once per tool and used for every row. It keeps what the row itself gives apart from the
tool's defaults, which are added when the request is sent (see send.py): a changed default does not make
another row of it. All problems of a row are reported at once; their `column` is the parameter's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from batchrun.errors import ManifestError
from batchrun.model import Cell, LocalImage, Option, Problem, Request, Severity, Tool, Value
from batchrun.tools.send import LoraScale, Sender
from batchrun.tools.spelling import closest
from batchrun.tools.values import (
    STORY,
    Reader,
    Refused,
    image_address,
    is_image,
    is_seed,
    is_text,
    plain,
    reader,
    setting_reader,
    show,
    takes_many,
)

__all__ = ["Binder", "LoraScale", "ReadImage", "Refused", "closest"]

#: From a path as the manifest has it to the image; raises ManifestError when it is none. Relative paths, the
#: folder they must lie in and the hash are its business.
ReadImage = Callable[[str], LocalImage]

_PROMPT = "prompt"
_SAMPLES = "samples"
#: Where trigger words are looked for.
_PROMPTS = (_PROMPT, STORY)
#: The label by which story-diffusion's page calls the picture that gives a character its face.
_INIT_IMAGE_LABEL = "init-image-url"
_INIT_IMAGE_WORD = re.compile(r"\bimg\b")

_WHAT_TO_WRITE = {
    _PROMPT: "write what the picture shall show",
    STORY: "write the story, a line for each picture, separated by |",
}
_WRITE_IMAGE = "write the address (https://...) or the path of an image"


@dataclass(frozen=True, slots=True)
class _Trigger:
    """An option that takes effect only when the prompt holds one of its words."""

    label: str
    #: As the page has them.
    words: tuple[str, ...]
    #: In lower case; an entry like "red tunic, red shirt" counts as two.
    needles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Owner:
    """The option that a setting belongs to."""

    parameter: str
    value: str
    label: str


def gives_nothing(cell: Cell, *, blank_is_default: bool) -> bool:
    """Whether a cell leaves its parameter to the tool's default: None does, in tables a blank does, too."""
    return cell is None or (blank_is_default and type(cell) is str and (not cell or cell.isspace()))


class Binder:
    """Turns rows into requests to one tool."""

    def __init__(self, tool: Tool, *, lora_scale: LoraScale = "prompt") -> None:
        self.tool = tool
        self._sender = Sender(tool, lora_scale)
        self._readers: dict[str, Reader] = {}
        #: Whether it takes a list, by image parameter.
        self._images: dict[str, bool] = {}
        self._many: set[str] = set()
        self._triggers: dict[str, dict[str, _Trigger]] = {}
        self._owners: dict[str, list[_Owner]] = {}
        self._required: dict[str, str] = {}
        for parameter in tool.parameters:
            image = is_image(parameter)
            if image:
                self._images[parameter.name] = takes_many(parameter)
            else:
                self._readers[parameter.name] = reader(parameter)
            if takes_many(parameter) or parameter.name == STORY:
                self._many.add(parameter.name)
            if parameter.required:
                advice = _WRITE_IMAGE if image else _WHAT_TO_WRITE.get(parameter.name, "write a value")
                self._required[parameter.name] = f"is required; {advice}"
        for parameter in tool.parameters:
            for option in parameter.options or ():
                self._learn(parameter.name, option)
        #: Every column a row may have: the parameters in the tool's order, then the settings of options.
        self.names: tuple[str, ...] = (*(p.name for p in tool.parameters), *self._owners)
        self._known = frozenset(self.names)
        self._init_image = next((p.name for p in tool.parameters if p.label == _INIT_IMAGE_LABEL), None)
        #: Parameters that are texts, those that hold images, and those that take any whole number.
        self.texts = frozenset(p.name for p in tool.parameters if is_text(p))
        self.images = frozenset(self._images)
        whole = (p.name for p in tool.parameters if p.type == "number" or is_seed(p))
        self.numbers = frozenset(whole) - self.images
        samples = tool.parameter(_SAMPLES)
        self._samples = int(samples.default) if samples and samples.default.isdecimal() else 1

    def _learn(self, parameter: str, option: Option) -> None:
        if option.trigger_words:
            needles = [part.strip().casefold() for words in option.trigger_words for part in words.split(",")]
            trigger = _Trigger(option.label, option.trigger_words, tuple(filter(None, needles)))
            self._triggers.setdefault(parameter, {})[option.value] = trigger
        for setting in option.settings:
            if self.tool.parameter(setting.id) is not None:
                continue  # a parameter of that name comes first
            self._owners.setdefault(setting.id, []).append(_Owner(parameter, option.value, option.label))
            self._readers.setdefault(setting.id, setting_reader(setting))

    def knows(self, name: str) -> bool:
        """Whether a column of that exact name is a parameter of the tool or a setting of an option."""
        return name in self._known

    def expandable(self, name: str, value: Cell) -> bool:
        """Whether the value is a list under a single-valued name: alternatives, each a request of its own."""
        return isinstance(value, list) and name in self._known and name not in self._many

    def reader(self, name: str, read_image: ReadImage) -> Callable[[Cell], Value | LocalImage]:
        """What makes a cell its value in sending form; raises Refused, or ManifestError for an image."""
        return self._readers.get(name) or partial(self._image, name, read_image=read_image)

    @property
    def required(self) -> frozenset[str]:
        """What every row must give."""
        return frozenset(self._required)

    @property
    def counts_images(self) -> str | None:
        """The parameter that tells how many images are made; None: always one."""
        return STORY if STORY in self._readers else _SAMPLES if _SAMPLES in self._known else None

    def always_alone(self, name: str) -> bool:
        """Whether `stands_alone` holds for whatever the parameter may be given."""
        required = self._required.keys() - self.texts  # a text that is there is not blank
        return name not in self._owners.keys() | required | self._triggers.keys() | {self._init_image}

    def stands_alone(self, name: str, value: Value | LocalImage) -> bool:
        """Whether nothing else in the row decides if this value is right, or worth a warning."""
        if name in self._owners or name == self._init_image or (name in self._required and not value):
            return False
        triggers = self._triggers.get(name)
        chosen = value if isinstance(value, list) else [value]
        return triggers is None or not any(isinstance(each, str) and each in triggers for each in chosen)

    def images_of(self, given: Mapping[str, Value | LocalImage]) -> int:
        """How many images the tool will make for values that are right."""
        return self._count_images(given, [])

    def bind(self, cells: Mapping[str, Cell], *, blank_is_default: bool, read_image: ReadImage) -> Request:
        """The request a row asks for; its `problems` are warnings. Raises ManifestError with every error.

        `cells` are by parameter name. None means the tool's default, and so does a blank text when
        `blank_is_default` (CSV). `given` has the values in sending form, in the order of the cells.
        """
        given: dict[str, Value | LocalImage] = {}
        problems: list[Problem] = []
        readers = self._readers
        for name, cell in cells.items():
            if gives_nothing(cell, blank_is_default=blank_is_default):
                continue
            try:
                read = readers.get(name)
                given[name] = read(cell) if read is not None else self._image(name, cell, read_image)
            except Refused as refused:
                problems.append(Problem(str(refused), column=name))
            except ManifestError as error:
                problems.extend(replace(problem, column=name) for problem in error.problems)
        images = self._count_images(given, problems)
        self._check_required(given, problems)
        if self._owners:
            self._check_settings(given, problems)
        if problems:
            raise ManifestError(problems)
        warnings = (*self._trigger_warnings(given), *self._init_image_warnings(given))
        return Request(given=given, images=images, problems=warnings)

    def body(
        self, given: Mapping[str, Value | LocalImage], *, uploads: Mapping[str, str], seed_key: str
    ) -> dict[str, Value]:
        """The whole set of parameters to send, in the tool's order; see Sender.body."""
        return self._sender.body(given, uploads=uploads, seed_key=seed_key)

    def _image(self, name: str, cell: Cell, read_image: ReadImage) -> Value | LocalImage:
        many = self._images.get(name)
        if many is None:
            like = closest(name, self.names)
            raise Refused("there is no such parameter" + (f"; did you mean {like}?" if like else ""))
        if many and isinstance(cell, list) and len(cell) != 1:
            return [self._address(part) for part in cell]
        if isinstance(cell, list) and len(cell) == 1:
            cell = cell[0]
        if not isinstance(cell, str):
            raise Refused(f"{show(cell)} is not an image; {_WRITE_IMAGE}")
        text = plain(cell).strip()
        address = image_address(text) if text else ""
        if address is None:
            return read_image(text)
        return [address] if many and address else address

    def _address(self, cell: Cell) -> str:
        address = image_address(cell.strip()) if isinstance(cell, str) else None
        if address is None:
            raise Refused(f"{show(cell)}: of several images, each must be an address (https://...)")
        return address

    def _count_images(self, given: Mapping[str, Value | LocalImage], problems: list[Problem]) -> int:
        """How many images the tool will make: a story's lines, else its samples, else one."""
        story = given.get(STORY)
        if isinstance(story, str) and STORY in self._readers:
            lines = sum(1 for line in story.split("|") if line.strip())
            if story.strip() and not lines:
                problems.append(Problem(f"has no lines; {_WHAT_TO_WRITE[STORY]}", column=STORY))
            return lines
        samples = given.get(_SAMPLES, self._samples)
        if not isinstance(samples, int):
            samples = int(samples) if isinstance(samples, str) and samples.isdecimal() else 1
        if samples < 1:
            problems.append(Problem(f"{samples} images cannot be made; write 1 or more", column=_SAMPLES))
        return samples

    def _check_required(self, given: Mapping[str, Value | LocalImage], problems: list[Problem]) -> None:
        for name, message in self._required.items():
            value = given.get(name)
            blank = not value or (isinstance(value, str) and value.isspace())
            if blank and not any(problem.column == name for problem in problems):
                problems.append(Problem(message, column=name))

    def _check_settings(self, given: Mapping[str, Value | LocalImage], problems: list[Problem]) -> None:
        """A setting without its option would be paid for and do nothing."""
        for name in given:
            owners = self._owners.get(name)
            if owners is None or any(_chosen(given, owner) for owner in owners):
                continue
            owner = owners[0]
            if any(problem.column == owner.parameter for problem in problems):
                continue  # what was chosen is not known
            message = f"belongs to {show(owner.label)}, which this row does not choose; "
            cure = f"write {owner.value} under {owner.parameter}, or leave this empty"
            problems.append(Problem(message + cure, column=name))

    def _trigger_warnings(self, given: Mapping[str, Value | LocalImage]) -> list[Problem]:
        warnings: list[Problem] = []
        for parameter, triggers in self._triggers.items():
            value = given.get(parameter)
            if value is None:
                continue
            text = " ".join(str(given.get(name, "")) for name in _PROMPTS).casefold()
            for chosen in value if isinstance(value, list) else [value]:
                trigger = triggers.get(chosen) if isinstance(chosen, str) else None
                if trigger is None or any(needle in text for needle in trigger.needles):
                    continue
                message = f"has none of the trigger words of {show(trigger.label)}; write one of: "
                warnings.append(_warning(message + ", ".join(trigger.words), _PROMPT))
        return warnings

    def _init_image_warnings(self, given: Mapping[str, Value | LocalImage]) -> list[Problem]:
        if self._init_image is None or not given.get(self._init_image):
            return []
        if _INIT_IMAGE_WORD.search(str(given.get(_PROMPT, ""))):
            return []
        message = f'lacks the word img, which ties the character to {self._init_image}; write "img" before it'
        return [_warning(message, _PROMPT)]


def _chosen(given: Mapping[str, Value | LocalImage], owner: _Owner) -> bool:
    value = given.get(owner.parameter)
    return owner.value in value if isinstance(value, list) else value == owner.value


def _warning(message: str, column: str) -> Problem:
    return Problem(message, column=column, severity=Severity.WARNING)
