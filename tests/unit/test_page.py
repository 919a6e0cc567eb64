"""A tool page is read into a Tool, or refused with the place at which it stops making sense."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from batchrun.errors import PageError
from batchrun.model import Option, Setting, Tool
from batchrun.tools.catalog import load
from batchrun.tools.page import parse
from tests.support.tool_pages import PAGE, collapsed

SEEDS = Path(__file__).parents[3] / "shared" / "seeds"


@pytest.fixture(scope="module")
def tool() -> Tool:
    return parse(PAGE)


def test_both_forms_of_a_page_are_the_same_tool(tool: Tool) -> None:
    assert parse(collapsed(PAGE)) == tool
    assert parse(PAGE.replace("\n", "\r\n")) == tool


def test_the_run_path_and_slug_come_from_the_run_address_and_not_from_the_title(tool: Tool) -> None:
    assert (tool.run_path, tool.slug, tool.owner) == ("/Run/acme/cover-art", "cover-art", "acme")
    assert tool.title == "acme/Cover Art Maker"


def test_the_head_is_read_whole(tool: Tool) -> None:
    assert tool.description == 'Makes covers - "quickly": text | image # and more'
    assert tool.categories == ("tool", "image-to-image")


def test_parameters_keep_their_order_and_unknown_types_are_carried(tool: Tool) -> None:
    assert [(parameter.name, parameter.type) for parameter in tool.parameters] == [
        ("prompt", "textarea"),
        ("style", "selectwithcover"),
        ("inputImage", "fileinput"),
        ("extras", "multifileinput"),
        ("fast", "checkbox"),
        ("looseSeed", "number"),
        ("strength", "hologram"),
    ]


def test_punctuation_in_texts_ends_nothing(tool: Tool) -> None:
    prompt, style = tool.parameters[:2]
    assert prompt.help == 'What to draw - be "exact": use # and | freely'
    assert prompt.default == 'A cover in two lines ## With a heading - value: "3"'
    assert style.label == "Style - the look"


def test_identical_options_are_kept_once(tool: Tool) -> None:
    assert tool.parameters[1].options == (
        Option("flat", "Flat - plain"),
        Option("pop", 'Pop: "loud" | bright'),
    )


def test_defaults_lose_quotes_and_the_space_around_them(tool: Tool) -> None:
    defaults = {parameter.name: parameter.default for parameter in tool.parameters}
    assert (defaults["style"], defaults["looseSeed"], defaults["inputImage"]) == ("flat", "7", "")
    quoted_words = PAGE.replace("default: true", 'default: "a" and "b"')
    assert parse(quoted_words).parameters[4].default == '"a" and "b"'


def test_missing_options_are_told_from_an_empty_list(tool: Tool) -> None:
    empty = parse(PAGE.replace("    default: true", '    default: ""\n    options:'))
    assert tool.parameters[4].options is None
    assert empty.parameters[4].options == ()


def test_a_sample_prompt_and_no_other_text_is_required(tool: Tool) -> None:
    assert [parameter.name for parameter in tool.parameters if parameter.required] == ["prompt"]


def test_an_unknown_section_behind_the_inputs_is_no_part_of_them(tool: Tool) -> None:
    page = PAGE.replace("## Task Status", "## Pricing\n  - per run: 1 USD\n\n## Task Status")
    assert parse(page) == tool


def test_a_page_may_end_with_its_inputs(tool: Tool) -> None:
    assert parse(PAGE.split("## Task Status")[0]) == tool


def test_settings_of_an_option_are_read_with_their_bounds() -> None:
    lora = load().find("text-to-image-sd-lora").parameter("selectedLoraModel")
    assert lora is not None
    fish = next(option for option in lora.options or () if option.value == "61")
    assert fish.label == "Kairen92/Fish out of Water v1.0"
    assert fish.trigger_words[:2] == ("reef-fish", "gold-fish")
    assert fish.settings == (
        Setting("Fish-out-of-Water-v1.0", "float", Decimal("0.00"), Decimal(1), "0.3", Decimal("0.1")),
    )


# --- refusals ------------------------------------------------------------------------------------


def with_picker(words: str, settings: str) -> str:
    """The page with a model picker's option in it."""
    picker = f"        description: d\n        triggerwords: {words}\n        generatesettings: {settings}\n"
    return PAGE.replace('      - value: "pop"', picker + '      - value: "pop"', 1)


@pytest.mark.parametrize(
    ("page", "message", "at"),
    [
        # nothing of a page
        ("", "not a tool page", ""),
        ("<html>502 Bad Gateway</html>", "not a tool page", "<html>"),
        # a page cut short or mangled
        (PAGE.split("## Model Inputs")[0], "has no", ""),
        (PAGE.replace("Run Task Endpoint", "Walk Task Endpoint"), "Run Task Endpoint", "## Model Inputs"),
        (
            PAGE.replace("/Run/acme/cover-art", "/Run/cover-art"),
            "/Run/owner/tool",
            "https://api.wiro.ai/v1/Run",
        ),
        (
            PAGE.replace("/Run/acme/cover-art", "/Run/acme/.."),
            "/Run/owner/tool",
            "https://api.wiro.ai/v1/Run",
        ),
        (PAGE.replace("Model name:", "Nomen:"), "name", "## Basic"),
        (PAGE.replace("  - name: prompt\n", ""), "expected an input", "label: prompt"),
        (PAGE.replace("    help: fast-help\n", ""), "fast", "label: fast"),
        (PAGE.replace("    type: checkbox\n", ""), "fast", "help: fast-help"),
        (PAGE.replace("name: fast", "name: style"), "listed twice", "- name: style\n    label: fast"),
        # a model picker's JSON
        (with_picker("[]", '[{"id": }]'), "broken JSON", '}]\n      - value: "pop"'),
        (with_picker("{}", "[]"), "expected a JSON list", "{}"),
        (with_picker("[1]", "[]"), "not all texts", "[1]"),
        (with_picker("[]", '[{"id": ""}]'), "no id", '[{"id"'),
        (with_picker("[]", '[{"id": "x", "minvalue": "low"}]'), "not a number: low", '[{"id"'),
        (with_picker("[" * 50_000, "[]"), "unreadable JSON", "[[["),
        (with_picker("[]", "[" + "9" * 5000 + "]"), "unreadable JSON", "[999"),
    ],
)
def test_garbage_is_refused_with_its_place(page: str, message: str, at: str) -> None:
    with pytest.raises(PageError, match=message) as caught:
        parse(page)
    if at:
        assert page[caught.value.position :].startswith(at)
    else:
        assert caught.value.position == len(page.rstrip()) or caught.value.position == len(page)


# --- the pages themselves ------------------------------------------------------------------------


@pytest.mark.skipif(not SEEDS.is_dir(), reason="the seed pages are not at hand")
def test_the_shipped_tools_are_what_the_parser_makes_of_the_pages() -> None:
    pages = [parse(file.read_text(encoding="utf-8")) for file in SEEDS.glob("*.txt")]
    assert sorted(pages, key=lambda tool: tool.slug) == sorted(load().tools, key=lambda tool: tool.slug)
