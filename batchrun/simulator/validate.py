"""What the service checks before it takes a task, in its documented words; our own reading, not the client's.

Required texts and files are named by tool, since the tools' pages do not say what is required (the seeds'
sample requests leave everything else empty). Ranges are generous: the service has some, the pages tell none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from batchrun.model import Parameter, Tool
from batchrun.simulator.envelope import VALIDATION, Refusal

#: Texts without which a tool does not run; tools not named here go by what their description says.
REQUIRED_TEXTS = {
    "text-to-image-sd-lora": ("prompt",),
    "Retro-Cartoons": ("prompt",),
    "instant-id": ("prompt",),
    "story-diffusion-advanced": ("prompt", "generalPrompt"),
    "outpainting-sdxl-advanced": (),
}
REQUIRED_FILES = {"instant-id": ("inputImageUrl",), "outpainting-sdxl-advanced": ("inputImageUrl",)}
#: Smallest and largest value of a number, where the simulator draws a line.
RANGES = {"samples": (1, 32), "steps": (1, 500), "width": (16, 8192), "height": (16, 8192)}
#: Keys that every tool takes and that are no parameters of the task.
COMMON = ("callbackUrl", "projectid")

_INTEGER = re.compile(r"\s*[+-]?\d+\s*")
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


def validate(tool: Tool, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as the task will echo them, numbers as text; raises Refusal where one is wrong."""
    for name in required_texts(tool):
        if not _text(given.get(name)).strip():
            raise Refusal(VALIDATION, f"Request parameter [{name}] required")
    for name in required_files(tool):
        part = name.removesuffix("Url")
        if not (_text(given.get(name)) or _text(given.get(part))):
            raise Refusal(VALIDATION, f"Request files [{part}] required")
    settings = {s.id: s for p in tool.parameters for option in p.options or () for s in option.settings}
    for name, value in given.items():
        if (parameter := tool.parameter(name)) is not None:
            _check(parameter, value)
        elif (setting := settings.get(name)) is not None and _text(value):
            _check_range(name, value, setting.minimum, setting.maximum)
    return {name: _echoed(value) for name, value in given.items() if name not in COMMON}


def required_texts(tool: Tool) -> tuple[str, ...]:
    """Names of the texts that a request to this tool must give."""
    if tool.slug in REQUIRED_TEXTS:
        return REQUIRED_TEXTS[tool.slug]
    return tuple(p.name for p in tool.parameters if p.required and not p.name.endswith("Url"))


def required_files(tool: Tool) -> tuple[str, ...]:
    """Names of the parameters that must give the address of a file."""
    if tool.slug in REQUIRED_TEXTS:
        return REQUIRED_FILES.get(tool.slug, ())
    return tuple(p.name for p in tool.parameters if p.required and p.name.endswith("Url"))


def _check(parameter: Parameter, value: Any) -> None:
    if parameter.type == "multiselect":
        if not isinstance(value, list):
            value = [value] if _text(value) else []
        for item in value:
            _check_choice(parameter, item)
        return
    if isinstance(value, list | dict):
        raise Refusal(VALIDATION, "Request parameters are invalid.")
    if not _text(value).strip():
        return  # an empty text means the default
    match parameter.type:
        case "number" | "float" | "range":
            _check_range(parameter.name, value, *RANGES.get(parameter.name, (None, None)))
        case "select" | "selectwithcover":
            _check_choice(parameter, value)


def _check_choice(parameter: Parameter, value: Any) -> None:
    # No options, or an empty list: any id goes. A default is valid though unlisted: the lists are partial.
    choices = {option.value for option in parameter.options or ()}
    if choices and _text(value) not in choices | {parameter.default, ""}:
        raise Refusal(VALIDATION, f"Request parameters are invalid. [{parameter.name}]")


def _check_range(name: str, value: Any, low: Decimal | int | None, high: Decimal | int | None) -> None:
    if isinstance(value, bool) or not _NUMBER.fullmatch(_text(value)):
        raise Refusal(VALIDATION, f"Request parameter [{name}] must be integer or float")
    number = Decimal(_text(value).strip())
    if (low is not None and number < low) or (high is not None and number > high):
        raise Refusal(VALIDATION, f"Request parameter [{name}] must be between {low} and {high}")


def integer(parameters: Mapping[str, Any], tool: Tool, name: str, fallback: int) -> int:
    """The integer a task works with: the given one, else the tool's default, else `fallback`."""
    parameter = tool.parameter(name)
    for text in (_text(parameters.get(name)), parameter.default if parameter else ""):
        if _INTEGER.fullmatch(text):
            return int(text)
    return fallback


def frames(parameters: Mapping[str, Any]) -> list[str]:
    """The lines of a story: story-diffusion makes one image for each `|` separated text of generalPrompt."""
    return [line.strip() for line in _text(parameters.get("generalPrompt")).split("|") if line.strip()]


def image_count(tool: Tool, parameters: Mapping[str, Any]) -> int:
    """How many images the tool makes for these parameters."""
    if tool.parameter("generalPrompt") is not None:
        return len(frames(parameters))
    return integer(parameters, tool, "samples", 1)


def _echoed(value: Any) -> Any:
    if isinstance(value, list):
        return [_echoed(item) for item in value]
    return value if isinstance(value, dict) else _text(value)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
