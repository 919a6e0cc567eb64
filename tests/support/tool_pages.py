"""Tool pages to read: a renderer of the line form (wiro-api.md, "Tools"), and a short page of our own."""

from __future__ import annotations

import json
from collections.abc import Iterator

from batchrun.model import Option, Parameter, Setting, Tool


def collapsed(page: str) -> str:
    """The page as the seeds have it: every run of white space is one space."""
    return " ".join(page.split())


def line_form(tool: Tool, word: str = "Tool") -> str:
    """The tool's page with its line breaks; `word` is what the page calls it."""
    return "\n".join(_lines(tool, word)) + "\n"


def _lines(tool: Tool, word: str) -> Iterator[str]:
    yield "## Basic tool info"
    yield f"{word} name: {tool.title}"
    yield f"{word} description: {tool.description}"
    yield f"{word} cover: https://cdn.wiro.ai/cover.png"
    yield f"{word} categories:"
    yield from (f"  - {category}" for category in tool.categories)
    yield f"{word} tags:"
    yield "  - bruce timm"
    yield f"Run Task Endpoint (POST): https://api.wiro.ai/v1{tool.run_path}"
    yield "Get Task Detail Endpoint (POST): https://api.wiro.ai/v1/Task/Detail"
    yield ""
    yield f"## {word} Inputs:"
    for parameter in tool.parameters:
        yield from _input(parameter)
    yield ""
    yield f"## {word} Parameter Inspires:"
    yield "  - prompt: a man, wearing black suit"
    yield ""
    yield "## Integration Header Prepare"
    yield f'curl -X POST "https://api.wiro.ai/v1{tool.run_path}"'
    yield ""
    yield "## Task Status Information"
    yield "  - task_cancel : Task was cancelled by the user or system."


def _input(parameter: Parameter) -> Iterator[str]:
    yield f"  - name: {parameter.name}"
    yield f"    label: {parameter.label}"
    yield f"    help: {parameter.help}"
    yield f"    type: {parameter.type}"
    quoted = parameter.options is not None
    yield f'    default: "{parameter.default}"' if quoted else f"    default: {parameter.default}"
    if parameter.options is not None:
        yield "    options:"
        for option in parameter.options:
            yield from _option(option)


def _option(option: Option) -> Iterator[str]:
    yield f'      - value: "{option.value}"'
    yield f"        label: {option.label}"
    if option.description or option.trigger_words or option.settings:
        yield f"        description: {option.description}"
        yield f"        triggerwords: {json.dumps(option.trigger_words)}"
        yield f"        generatesettings: {json.dumps([_setting(each) for each in option.settings])}"


def _setting(setting: Setting) -> dict[str, str]:
    return {
        "type": setting.type,
        "template": "",
        "id": setting.id,
        "label": f"{setting.id} scale",
        "minvalue": "" if setting.minimum is None else str(setting.minimum),
        "maxvalue": "" if setting.maximum is None else str(setting.maximum),
        "value": setting.default,
        "defaultvalue": setting.default,
        "incrementby": "" if setting.step is None else str(setting.step),
    }


#: A tool none of the seeds is like: other types, settings twice, a title that is not its path.
PAGE = """\
Some words before the page.

## Basic tool info
Model name: acme/Cover Art Maker
Model description: Makes covers - "quickly": text | image # and more
Model cover: https://cdn.wiro.ai/uploads/models/cover.mp4
Model categories:
  - tool
  - image-to-image
Run Task Endpoint (POST): https://api.wiro.ai/v1/Run/acme/cover-art
Get Task Detail Endpoint (POST): https://api.wiro.ai/v1/Task/Detail

## Model Inputs:
  - name: prompt
    label: prompt
    help: What to draw - be "exact": use # and | freely
    type: textarea
    default: A cover
      in two lines ## With a heading - value: "3"
  - name: style
    label: Style - the look
    help: style-help
    type: selectwithcover
    default: "flat"
    options:
      - value: "flat"
        label: Flat - plain
      - value: "pop"
        label: Pop: "loud" | bright
      - value: "flat"
        label: Flat - plain
  - name: inputImage
    label: input-image
    help: input-image-help
    type: fileinput
    default:
  - name: extras
    label: extras
    help: extras-help
    type: multifileinput
    default:
  - name: fast
    label: fast
    help: fast-help
    type: checkbox
    default: true
  - name: looseSeed
    label: seed
    help: seed-help
    type: number
    default: 7 \n\
  - name: strength
    label: strength
    help: strength-help
    type: hologram
    default: 3

## Task Status Information
"""
