"""One cell against one parameter: what its type accepts, and the form in which the value is sent.

`reader(parameter)` compiles a parameter into a function from a cell to its value, so that a million rows pay
for the look-up tables once. A cell is what a manifest can hold (model.Cell): text, or any JSON or TOML value.
A cell that cannot be a value is refused with a sentence that says what to write.

Forms (wiro-api.md, "Run"): number as a JSON integer, float as text with the digits as the user wrote them,
select as the option's value, multiselect as a list of values, everything else as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from decimal import Decimal

from batchrun.model import Cell, Option, Parameter, Setting, Value
from batchrun.tools.spelling import closest

Reader = Callable[[Cell], Value]

#: A seed of this value is drawn when the request is sent.
RANDOM = "random"
#: The parameter whose lines are a picture each.
STORY = "generalPrompt"

_FILE_TYPES = frozenset({"fileinput", "multifileinput", "combinefileinput"})
_MANY_TYPES = frozenset({"multiselect", "multifileinput", "combinefileinput"})
_SELECT_TYPES = frozenset({"select", "selectwithcover"})
_SEED = re.compile(r"(?:^|_)seed$|Seed$")
# Spreadsheets write a column of whole numbers with gaps as 20.0.
_WHOLE = re.compile(r"([+-]?[0-9]{1,19})(?:\.0*)?")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_WEB = re.compile(r"https?://[^\s/]+\S*", re.IGNORECASE)
# At least two letters: `C:\pictures` and `C://pictures` are paths.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://|(data):", re.IGNORECASE)
#: Digits beyond which a number in a manifest is a slip, not a setting.
_MAX_DIGITS = 40
#: Options beyond which a message names the closest only.
_MAX_LISTED = 12


class Refused(Exception):
    """A cell cannot be its parameter's value; the text says why and what to write. The Binder catches it."""


def reader(parameter: Parameter) -> Reader:
    """The function that checks this parameter's cells; it raises Refused."""
    if is_seed(parameter):
        return _seed(parameter)
    if parameter.type == "number":
        return _whole(parameter)
    if parameter.type == "float":
        return _number(parameter)
    if parameter.type == "multiselect":
        return _several(parameter)
    if parameter.type in _SELECT_TYPES:
        return _Choice(parameter)
    if parameter.name == STORY:
        return _story
    return _text if parameter.type in ("text", "textarea") else _unknown


def setting_reader(setting: Setting) -> Reader:
    """The function that checks the cells of an option's own setting, bounds included; it raises Refused."""
    parameter = Parameter(name=setting.id, type=setting.type, default=setting.default)
    read = _whole(parameter) if setting.type == "number" else _number(parameter)
    low, high = setting.minimum, setting.maximum

    def bounded(cell: Cell) -> Value:
        value = read(cell)
        number = Decimal(str(value))
        if (low is not None and number < low) or (high is not None and number > high):
            raise Refused(f"{value} is out of bounds; write a number {_bounds(low, high)}")
        return value

    return bounded


def is_seed(parameter: Parameter) -> bool:
    """Whether the parameter is a seed, whose value may be "random"."""
    return _SEED.search(parameter.name) is not None and parameter.type not in _SELECT_TYPES | _MANY_TYPES


def is_image(parameter: Parameter) -> bool:
    """Whether the parameter takes an image: by the name it goes by in the seeds, or by a file type.

    Not every `Url` does: `selectedLoraModelPrivateUrl` takes the address of a model file.
    """
    name = parameter.name
    return (name.endswith("Url") and "image" in name.lower()) or parameter.type in _FILE_TYPES


def is_text(parameter: Parameter) -> bool:
    """Whether the parameter's value is free text, so that "7" and "7.0" differ."""
    return parameter.type in ("text", "textarea") and not is_seed(parameter) and not is_image(parameter)


def takes_many(parameter: Parameter) -> bool:
    """Whether the parameter's value is a list."""
    return parameter.type in _MANY_TYPES


def default_value(parameter: Parameter) -> Value:
    """The parameter's default in sending form; a number that is none, as it stands."""
    if takes_many(parameter):
        return [parameter.default] if parameter.default else []
    whole = _WHOLE.fullmatch(parameter.default)
    if parameter.type == "number" and whole:
        return int(whole[1])
    return parameter.default


def image_address(text: str) -> str | None:
    """The text as an http(s) address to send as it is, or None when it is a local path; raises Refused."""
    if _WEB.fullmatch(text):
        return text
    scheme = _SCHEME.match(text)
    if scheme is None:
        return None
    kind = (scheme[1] or scheme[2]).lower()
    if kind in ("http", "https"):
        raise Refused(f"{show(text)} is not a whole address; write one like https://example.com/face.jpg")
    raise Refused(f"addresses of the kind {kind}: cannot be used; write an https address or a path")


def show(cell: Cell) -> str:
    """The cell quoted for a message: on one line, at most 60 characters."""
    try:
        text = (
            str(cell)
            if isinstance(cell, (str, Decimal))
            else json.dumps(cell, ensure_ascii=False, default=str)
        )
    except (ValueError, RecursionError):  # a number of 5000 digits, lists 5000 deep
        text = f"this {type(cell).__name__}"
    text = text if len(text) <= 60 else text[:57] + "..."
    text = json.dumps(text, ensure_ascii=False) if isinstance(cell, str) else text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# --- texts ---------------------------------------------------------------------------------------


def plain(cell: Cell) -> str:
    """A text as it is, a number as its digits; raises Refused for anything else."""
    if type(cell) is str:
        if not cell.isascii():
            try:
                cell.encode("utf-8")
            except UnicodeEncodeError:
                raise Refused("the text holds half a character (\\ud800 to \\udfff); correct it") from None
        return cell
    if isinstance(cell, bool) or not isinstance(cell, (int, float, Decimal)):
        raise Refused(f"{show(cell)} is not a text; write it in quotes")
    return _digits(cell)


def _digits(cell: float | Decimal) -> str:
    number = Decimal(cell) if isinstance(cell, int) else Decimal(str(cell))
    if not number.is_finite() or abs(number.adjusted()) > _MAX_DIGITS:
        raise Refused(f"{show(number)} is no number of use here")
    return format(number, "f")


def _text(cell: Cell) -> Value:
    return plain(cell)


def _unknown(cell: Cell) -> Value:
    """A parameter of a type we do not know is sent as text; true and false as the words."""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    return plain(cell)


def _story(cell: Cell) -> Value:
    """Lines, a picture each: a list joined with ` | `, or text that is. `[NC]` and `#` pass through."""
    lines = cell
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            lines = json.loads(cell)
        except (ValueError, RecursionError):  # "[NC]leaf falls | ..." is no JSON
            lines = cell
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            lines = cell
    if isinstance(lines, list):
        return " | ".join(plain(line).strip() for line in lines)
    return plain(cell)


# --- numbers -------------------------------------------------------------------------------------


def _whole(parameter: Parameter) -> Reader:
    default = parameter.default
    default_sent = default_value(parameter)
    example = default if isinstance(default_sent, int) else "20"

    def read(cell: Cell) -> Value:
        if type(cell) is int:
            value = cell
        else:
            text = cell.strip() if isinstance(cell, str) else _numeric(cell, example)
            found = _WHOLE.fullmatch(text)
            if found is None:
                if text == default:
                    return default_sent
                raise Refused(f"{show(cell)} is not a whole number; write one like {example}")
            value = int(found[1])
        if not -(2**63) <= value < 2**63:
            raise Refused(f"{show(cell)} is too large; write a whole number like {example}")
        return value

    return read


def _number(parameter: Parameter) -> Reader:
    default = parameter.default
    example = default if _NUMBER.fullmatch(default) else "7.5"

    def read(cell: Cell) -> Value:
        text = cell.strip() if isinstance(cell, str) else _numeric(cell, example)
        if _NUMBER.fullmatch(text) and len(text) <= _MAX_DIGITS:
            return text
        if text == default:
            return default
        pointed = text.replace(",", ".")
        wanted = pointed if _NUMBER.fullmatch(pointed) else f"one like {example}"
        raise Refused(f"{show(cell)} is not a number; write {wanted}")

    return read


def _numeric(cell: Cell, example: str) -> str:
    if isinstance(cell, bool) or not isinstance(cell, (int, float, Decimal)):
        raise Refused(f"{show(cell)} is not a number; write one like {example}")
    return _digits(cell)


def _seed(parameter: Parameter) -> Reader:
    """A whole number in the parameter's own form (as text with its zeros in front), or "random"."""
    default = parameter.default
    whole = _whole(parameter) if parameter.type == "number" else None

    def read(cell: Cell) -> Value:
        text = plain(cell).strip()
        if text.casefold() == RANDOM:
            return RANDOM
        if whole is not None and text != "":
            return whole(cell)
        found = _WHOLE.fullmatch(text)
        if found is not None:
            return found[1]
        if text == default or (text == "" and whole is None):
            return text
        raise Refused(f"{show(cell)} is not a seed; write a whole number, or {RANDOM}")

    return read


def _bounds(low: Decimal | None, high: Decimal | None) -> str:
    if low is None or high is None:
        return f"from {low} up" if high is None else f"up to {high}"
    return f"from {low} to {high}"


# --- choices -------------------------------------------------------------------------------------


class _Choice:
    """One of a parameter's options: by value, else by label, else by either in other letters' case.

    The default is always valid: the lists of the pages are partial (instant-id's "79" is not in its own).
    With no options listed, any text goes.
    """

    def __init__(self, parameter: Parameter) -> None:
        self._options: tuple[Option, ...] = parameter.options or ()
        values = {value: value for value in (parameter.default, *(option.value for option in self._options))}
        labels = [(option.label, option.value) for option in self._options]
        self._exact = _unique(labels) | values
        self._folded = _unique((name.strip().casefold(), value) for name, value in (*values.items(), *labels))

    def __call__(self, cell: Cell) -> str:
        # JSON's true for an option "true": booleans are the option's own string.
        text = str(_unknown(cell)) if isinstance(cell, bool) and self._options else plain(cell)
        value = self._exact.get(text)
        if value is None:
            folded = text.strip().casefold()
            # An empty text is never a name in other letters.
            value = self._folded.get(folded) if folded else None
        if value is not None:
            return value
        if not self._options:
            return text.strip()
        raise Refused(self._why_not(text))

    def knows(self, text: str) -> bool:
        """Whether the whole text names an option."""
        return text in self._exact

    def _why_not(self, text: str) -> str:
        same = [option.value for option in self._options if option.label == text]
        if len(same) > 1:
            return f"{show(text)} labels several options; write the value: {' or '.join(map(show, same))}"
        like = closest(text, self._exact) if text else None
        if like is not None:
            return f"there is no option {show(text)}; did you mean {show(like)}?"
        if len(self._options) <= _MAX_LISTED:
            return f"there is no option {show(text)}; write one of {', '.join(map(_named, self._options))}"
        return f"there is no option {show(text)}; write one of the {len(self._options)} values or labels"


def _named(option: Option) -> str:
    return show(option.value) if option.label in ("", option.value) else show(option.label)


def _unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Value by name, without the names that stand for several values."""
    values: dict[str, set[str]] = {}
    for name, value in pairs:
        values.setdefault(name, set()).add(value)
    return {name: next(iter(found)) for name, found in values.items() if len(found) == 1}


def _several(parameter: Parameter) -> Reader:
    """Any number of options: a list, or text that is a JSON list or names separated by `|`; each once."""
    choose = _Choice(parameter)

    def read(cell: Cell) -> Value:
        return list(dict.fromkeys(choose(part) for part in _parts(cell, choose) if part != ""))

    return read


def _parts(cell: Cell, choose: _Choice) -> list[Cell]:
    if isinstance(cell, list):
        return cell
    text = plain(cell).strip()
    if not text:
        return []
    if text.startswith("["):
        try:
            data = json.loads(text, parse_float=Decimal)
        except (ValueError, RecursionError):
            data = None
        if isinstance(data, list):
            return data
    if choose.knows(text):
        return [text]
    return [part.strip() for part in text.split("|") if part.strip()]
