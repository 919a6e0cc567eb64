"""The tools that can be asked for: those shipped as data files, and those a user has added from their pages.

A tool's file is `owner/tool.json`, so the folders' listing is the catalog's index and only the tool asked for
is read. An added tool takes the place of a shipped one with the same run path: its page is the newer word.
The folder of added tools is `BATCHRUN_TOOLS_DIR`, else the user's data folder of the system.
"""

from __future__ import annotations

import json
import os
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from batchrun.errors import UsageError
from batchrun.model import Option, Parameter, Setting, Tool
from batchrun.tools.spelling import closest

_SHIPPED = Path(__file__).parent / "data"


def load(extra_dir: Path | None = None) -> Catalog:
    """The catalog of shipped and added tools; `extra_dir` stands in for the user's own tools folder."""
    return Catalog(_SHIPPED, extra_dir if extra_dir is not None else tools_folder())


def tools_folder() -> Path:
    """Where added tools are kept; the folder need not exist."""
    if chosen := os.environ.get("BATCHRUN_TOOLS_DIR"):
        return Path(chosen)
    from platformdirs import user_data_dir  # here, since most commands never need it

    return Path(user_data_dir("batchrun", appauthor=False)) / "tools"


class Catalog:
    """Tools by name, each read when first asked for."""

    def __init__(self, shipped: Path, added: Path) -> None:
        self._added = added
        #: File by `owner/tool`; a later folder replaces what an earlier one says.
        self._files: dict[str, Path] = {}
        for folder in (shipped, added):
            for file in sorted(folder.glob("*/*.json")):
                self._files[f"{file.parent.name}/{file.stem}"] = file
        self._read: dict[str, Tool] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Every tool as `owner/tool`, sorted without regard to case."""
        return tuple(sorted(self._files, key=str.casefold))

    @property
    def tools(self) -> tuple[Tool, ...]:
        """Every tool, in the order of `names`; reads all files."""
        return tuple(self._tool(name) for name in self.names)

    def find(self, name: str) -> Tool:
        """The tool of that name, `instant-id` or `wiro/instant-id`; case matters only where two differ by it.

        Raises UsageError naming the closest tools, or both when two owners have a tool of that name.
        """
        wanted = name.strip().strip("/").removeprefix("Run/")
        for same in (str, str.casefold):
            found = [
                known for known in self.names if same(wanted) in (same(known), same(known.split("/")[1]))
            ]
            if len(found) > 1:
                raise UsageError(f'"{name}" is the name of several tools; write one of: {", ".join(found)}')
            if found:
                return self._tool(found[0])
        told = name if len(name) <= 100 else f"{name[:97]}..."
        raise UsageError(f'no tool is called "{told}"; {self._suggestion(wanted)}')

    def add(self, page_text: str) -> Tool:
        """The tool of a page, from now on in the catalog. Raises PageError; UsageError if not kept."""
        from batchrun.tools.page import parse  # here, since only adding needs it

        tool = parse(page_text)
        name = f"{tool.owner}/{tool.slug}"
        file = self._added / tool.owner / f"{tool.slug}.json"
        part = file.with_suffix(f".{os.getpid()}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(dumps(tool), encoding="utf-8")
            part.replace(file)
        except OSError as error:
            raise UsageError(f"{file}: the tool cannot be kept: {error.strerror or error}") from error
        self._files[name] = file
        self._read[name] = tool
        return tool

    def _tool(self, name: str) -> Tool:
        if name not in self._read:
            self._read[name] = _read(self._files[name], name)
        return self._read[name]

    def _suggestion(self, wanted: str) -> str:
        by_word = {word: name for name in self.names for word in (name, name.split("/")[1])}
        close = closest(wanted, by_word)
        return f"did you mean {by_word[close]}?" if close else f"known are: {', '.join(self.names)}"


def _read(file: Path, name: str) -> Tool:
    try:
        tool = from_json(json.loads(file.read_text(encoding="utf-8")))
        if tool.run_path != f"/Run/{name}":
            raise ValueError(f"it describes {tool.run_path}")
    except OSError as error:
        raise UsageError(f"{file}: the tool cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: the tool's description is damaged: {error}; add its page again") from error
    return tool


# --- a tool as JSON ------------------------------------------------------------------------------


def dumps(tool: Tool) -> str:
    """The text of a tool's data file."""
    return json.dumps(to_json(tool), ensure_ascii=False, indent=1) + "\n"


def to_json(tool: Tool) -> dict[str, Any]:
    """The tool as plain JSON data; `from_json` undoes it."""
    return {
        "slug": tool.slug,
        "run_path": tool.run_path,
        "title": tool.title,
        "description": tool.description,
        "categories": list(tool.categories),
        "parameters": [_parameter_to_json(parameter) for parameter in tool.parameters],
    }


def _parameter_to_json(parameter: Parameter) -> dict[str, Any]:
    options = parameter.options
    return {
        "name": parameter.name,
        "type": parameter.type,
        "default": parameter.default,
        "label": parameter.label,
        "help": parameter.help,
        "required": parameter.required,
        "options": None if options is None else [_option_to_json(option) for option in options],
    }


def _option_to_json(option: Option) -> dict[str, Any]:
    return {
        "value": option.value,
        "label": option.label,
        "description": option.description,
        "trigger_words": list(option.trigger_words),
        "settings": [_setting_to_json(setting) for setting in option.settings],
    }


def _setting_to_json(setting: Setting) -> dict[str, Any]:
    return {
        "id": setting.id,
        "type": setting.type,
        "minimum": _decimal_text(setting.minimum),
        "maximum": _decimal_text(setting.maximum),
        "default": setting.default,
        "step": _decimal_text(setting.step),
    }


def _decimal_text(number: Decimal | None) -> str | None:
    return None if number is None else str(number)


def from_json(data: Any) -> Tool:
    """The tool of `to_json`'s data; raises ValueError naming what is missing or of the wrong kind."""
    return Tool(
        slug=_get(data, "slug", str),
        run_path=_get(data, "run_path", str),
        title=_get(data, "title", str),
        description=_get(data, "description", str),
        categories=_texts(data, "categories"),
        parameters=tuple(_parameter(each) for each in _get(data, "parameters", list)),
    )


def _parameter(data: Any) -> Parameter:
    options = None
    if _get(data, "options", list | None) is not None:
        options = tuple(_option(each) for each in data["options"])
    return Parameter(
        name=_get(data, "name", str),
        type=_get(data, "type", str),
        default=_get(data, "default", str),
        label=_get(data, "label", str),
        help=_get(data, "help", str),
        required=_get(data, "required", bool),
        options=options,
    )


def _option(data: Any) -> Option:
    return Option(
        value=_get(data, "value", str),
        label=_get(data, "label", str),
        description=_get(data, "description", str),
        trigger_words=_texts(data, "trigger_words"),
        settings=tuple(_setting(each) for each in _get(data, "settings", list)),
    )


def _setting(data: Any) -> Setting:
    return Setting(
        id=_get(data, "id", str),
        type=_get(data, "type", str),
        minimum=_decimal(data, "minimum"),
        maximum=_decimal(data, "maximum"),
        default=_get(data, "default", str),
        step=_decimal(data, "step"),
    )


def _get(data: Any, key: str, kind: Any) -> Any:
    if not isinstance(data, dict) or key not in data or not isinstance(data[key], kind):
        raise ValueError(f'"{key}" is missing or of the wrong kind')
    return data[key]


def _texts(data: Any, key: str) -> tuple[str, ...]:
    texts = _get(data, key, list)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f'"{key}" is not a list of texts')
    return tuple(texts)


def _decimal(data: Any, key: str) -> Decimal | None:
    text = _get(data, key, str | None)
    try:
        return None if text is None else Decimal(text)
    except InvalidOperation as error:
        raise ValueError(f'"{key}" is not a number') from error
