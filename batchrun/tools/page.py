"""Reads a tool's text page (`llms-full.txt`) into a Tool.

The page comes in two forms: with line breaks, and with every run of white space collapsed to one space. The
second can be made of the first but not the other way round, so both are read as the second: white space is
collapsed before anything else, and the two forms of a page give equal tools by construction. Positions in
errors are those of the text as it was given.

Grammar: wiro-api.md, "Tools" (read off the five seed documents). What it leaves open is settled here:

- An input begins at ` - name: ID label:`; its help ends at the first ` type: WORD default:`; its options
  begin at ` options: - value: "`, or are an empty list where it ends in ` options:`. Whatever else looks like
  a key is text.
- The inputs end at the first heading behind the last input, so a `##` in a default does not cut the list.
- Identical options (several tools list one scheduler twice) are kept once; options that differ in anything
  are all kept.
- A quoted default loses its quotes; every default loses the white space around it (one tool's has some).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

from batchrun.errors import PageError
from batchrun.model import Option, Parameter, Setting, Tool

_SPACE = re.compile(r"\s+")
#: Halves of UTF-16 pairs: neither a file nor a database can hold them.
_SURROGATE = re.compile("[\ud800-\udfff]")

_HEAD = "## Basic tool info"
_RUN = " Run Task Endpoint (POST):"
_INPUTS = re.compile(r" ## (?:Tool|Model) Inputs:(?= |$)")
#: The run path is also a file's place in the catalog, hence the plain words (and neither `.` nor `..`).
_RUN_URL = re.compile(
    r"https?://[^\s?#]+?(/Run/(?!\.+/)[\w.~%+-]+/(?!\.+(?:[/?#]|$))([\w.~%+-]+))/?(?:[?#]\S*)?"
)
_HEAD_FIELD = re.compile(r" (?:Tool|Model) (name|description|cover|categories|tags):(?= |$)")
#: Headings that follow the inputs on every page known.
_AFTER_INPUTS = re.compile(
    r" ## (?:[A-Z]\w* Parameter Inspires:|Integration Header Prepare"
    r"|Run Command|Get Task Detail|Task Status Information)"
)
_HEADING = re.compile(r" ## [A-Z]")
_INPUT = re.compile(r" - name: (\S+) label:(?= |$)")
_TYPE = re.compile(r" type: (\S+) default:(?= |$)")
_OPTIONS = re.compile(r' options:(?= - value: "|$)')
# A value's length is bounded, so that a page of nothing but beginnings is refused in good time.
_OPTION = re.compile(r' - value: "(.{0,500}?)" label:(?= |$)')
_ITEM = re.compile(r"(?:^| )- ")

#: Texts without which the picture would be the tool's own sample. See `_is_required`.
_REQUIRED_TEXTS = frozenset({"prompt", "generalPrompt"})


def parse(text: str) -> Tool:
    """The tool a page describes; raises PageError with the position at which the page stops making sense."""
    return _Page(text).tool()


class _Page:
    """One page: its collapsed text, and how to say where in the original something is wrong."""

    def __init__(self, text: str) -> None:
        self._original = _SURROGATE.sub("\ufffd", text)
        # A space in front, so that every key is preceded by one.
        self.text = " " + _SPACE.sub(" ", self._original).strip()

    def fail(self, message: str, at: int) -> NoReturn:
        """Raises PageError for the place `at` in the collapsed text."""
        # The n-th word of the one text is the n-th word of the other: only white space differs.
        words_before = self.text.count(" ", 0, at + 1)
        word_start = self.text.rfind(" ", 0, at + 1) + 1
        words = list(re.finditer(r"\S+", self._original))
        if not 0 < words_before <= len(words):
            raise PageError(message, len(self._original))
        position = words[words_before - 1].start() + max(0, at - word_start)
        raise PageError(message, min(position, len(self._original)))  # `at` may be behind the end

    def tool(self) -> Tool:
        head = self.text.find(f" {_HEAD} ")
        if head < 0:
            raise PageError(f'this is not a tool page: it has no "{_HEAD}"', 0)
        inputs = _INPUTS.search(self.text, head)
        if inputs is None:
            self.fail('the page has no "## Tool Inputs:" or "## Model Inputs:"', len(self.text))
        run = self.text.find(_RUN, head, inputs.start())
        if run < 0:
            self.fail(f'the page has no "{_RUN.strip()}" before its inputs', inputs.start() + 1)
        run_path, slug = self._run_path(run + len(_RUN))
        fields = self._head_fields(head + len(_HEAD) + 1, run)
        if not fields.get("name"):
            self.fail('the page has no "Tool name:" or "Model name:"', head + 1)
        categories = tuple(_items(fields.get("categories", "")))
        return Tool(
            slug=slug,
            run_path=run_path,
            title=fields["name"],
            description=fields.get("description", ""),
            categories=categories,
            parameters=self._parameters(inputs.end(), categories),
        )

    def _run_path(self, at: int) -> tuple[str, str]:
        """The path and the tool's name in the Run URL: the page's title may be spelled quite differently."""
        url = self.text[at:].split(maxsplit=1)[0]  # the inputs follow, so there is a word
        found = _RUN_URL.fullmatch(url)
        if found is None:
            self.fail("the Run address does not end in /Run/owner/tool", at + 1)
        return found[1], found[2]

    def _head_fields(self, start: int, end: int) -> dict[str, str]:
        """The head's texts by key; the first of each key counts."""
        found = list(_HEAD_FIELD.finditer(self.text, start, end))
        ends = [match.start() for match in found[1:]] + [end]
        texts: dict[str, str] = {}
        for match, stop in zip(found, ends):
            texts.setdefault(match[1], self.text[match.end() : stop].strip())
        return texts

    def _parameters(self, start: int, categories: tuple[str, ...]) -> tuple[Parameter, ...]:
        after = _AFTER_INPUTS.search(self.text, start)
        end = after.start() if after else len(self.text)
        found = list(_INPUT.finditer(self.text, start, end))
        if not found or found[0].start() != start:
            self.fail('expected an input, "- name: ID label: ..."', start + 1)
        heading = _HEADING.search(self.text, found[-1].end(), end)
        ends = [match.start() for match in found[1:]] + [heading.start() if heading else end]
        parameters: dict[str, Parameter] = {}
        for match, stop in zip(found, ends):
            if match[1] in parameters:
                self.fail(f'the input "{match[1]}" is listed twice', match.start() + 1)
            parameters[match[1]] = self._parameter(match[1], match.end(), stop, categories)
        return tuple(parameters.values())

    def _parameter(self, name: str, start: int, end: int, categories: tuple[str, ...]) -> Parameter:
        help_at = self.text.find(" help:", start, end)
        if help_at < 0:
            self.fail(f'the input "{name}" has no "help:"', start - len("label:"))
        kind = _TYPE.search(self.text, help_at + len(" help:"), end)
        if kind is None:
            self.fail(f'the input "{name}" has no "type: ... default:"', help_at + 1)
        label = self.text[start:help_at].strip()
        help_ = self.text[help_at + len(" help:") : kind.start()].strip()
        options: tuple[Option, ...] | None = None
        default_end = end
        # A slice, so that `$` means the end of this input.
        listed = _OPTIONS.search(self.text[kind.end() : end])
        if listed is not None:
            default_end = kind.end() + listed.start()
            options = self._options(kind.end() + listed.end(), end)
        default = _unquoted(self.text[kind.end() : default_end].strip())
        return Parameter(
            name=name,
            type=kind[1],
            default=default,
            label=label,
            help=help_,
            options=options,
            required=_is_required(name, kind[1], default, label, categories),
        )

    def _options(self, start: int, end: int) -> tuple[Option, ...]:
        found = list(_OPTION.finditer(self.text, start, end))
        if start < end and not (found and found[0].start() == start):
            self.fail('expected an option, "- value: "..." label: ..."', start + 1)
        ends = [match.start() for match in found[1:]] + [end]
        options = (self._option(match[1], match.end(), stop) for match, stop in zip(found, ends))
        return tuple(dict.fromkeys(options))

    def _option(self, value: str, start: int, end: int) -> Option:
        described = self.text.find(" description:", start, end)
        words = self.text.find(" triggerwords:", described if described >= 0 else start, end)
        settings = self.text.find(" generatesettings:", words, end) if words >= 0 else -1
        marks = [at for at in (described, words, end) if at >= 0]
        label = self.text[start : marks[0]].strip()
        description = ""
        if described >= 0:
            description = self.text[described + len(" description:") : marks[1]].strip()
        if words < 0:
            return Option(value=value, label=label, description=description)
        after_words = settings if settings >= 0 else end
        return Option(
            value=value,
            label=label,
            description=description,
            trigger_words=self._trigger_words(words + len(" triggerwords:"), after_words),
            settings=self._settings(settings + len(" generatesettings:"), end) if settings >= 0 else (),
        )

    def _trigger_words(self, start: int, end: int) -> tuple[str, ...]:
        words = self._json_list(start, end)
        if not all(isinstance(word, str) for word in words):
            self.fail("the trigger words are not all texts", start + 1)
        return tuple(_SURROGATE.sub("\ufffd", word) for word in words)

    def _settings(self, start: int, end: int) -> tuple[Setting, ...]:
        return tuple(self._setting(data, start + 1) for data in self._json_list(start, end))

    def _setting(self, data: Any, at: int) -> Setting:
        if not isinstance(data, dict) or not isinstance(data.get("id"), str) or not data["id"].strip():
            self.fail('a setting in "generatesettings" has no id', at)
        return Setting(
            id=_plain(data["id"]),
            type=_plain(data.get("type")) or "float",
            minimum=self._bound(data.get("minvalue"), at),
            maximum=self._bound(data.get("maxvalue"), at),
            default=_plain(data.get("defaultvalue")),
            step=self._bound(data.get("incrementby"), at),
        )

    def _bound(self, value: Any, at: int) -> Decimal | None:
        text = _plain(value)
        if not text:
            return None
        try:
            number = Decimal(text)
        except InvalidOperation:
            number = Decimal("NaN")
        if not number.is_finite():
            self.fail(f'a bound in "generatesettings" is not a number: {text[:40]}', at)
        return number

    def _json_list(self, start: int, end: int) -> list[Any]:
        """The JSON list between two places; nothing or `null` counts as an empty one."""
        text = self.text[start:end].strip()
        if text in ("", "null"):
            return []
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            self.fail(f"broken JSON list: {error.msg}", start + 1 + error.pos)
        except (ValueError, RecursionError):  # a number of 5000 digits, brackets 5000 deep
            self.fail("unreadable JSON list", start + 1)
        if not isinstance(data, list):
            self.fail("expected a JSON list", start + 1)
        return data


def _is_required(name: str, kind: str, default: str, label: str, categories: tuple[str, ...]) -> bool:
    """Whether a row must give this parameter. The page does not say, so it is read off the page's habits.

    A `prompt` or `generalPrompt` whose default is not empty: that default is a sample to show the tool off,
    and nobody should be billed for it (outpainting's is empty and may stay so). And the input image of an
    image-to-image tool: `inputImageUrl` under its own label (story-diffusion has it as an optional
    `pad-image-url`). Other files are left to the service, which refuses a request without them at no charge.
    """
    if name in _REQUIRED_TEXTS:
        return kind in ("text", "textarea") and default != ""
    return name == "inputImageUrl" and label == "input-image-url" and "image-to-image" in categories


def _items(text: str) -> Iterable[str]:
    """The words of a ` - a - b` list."""
    return (item.strip() for item in _ITEM.split(text) if item.strip())


def _unquoted(default: str) -> str:
    """A default without its quotes; a text that merely begins and ends with a quoted word keeps them."""
    inner = default[1:-1]
    if len(default) >= 2 and default[0] == default[-1] == '"' and '"' not in inner:
        return inner.strip()
    return default


def _plain(value: Any) -> str:
    """A setting's text or number as text; anything else as empty."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value).strip()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return ""
