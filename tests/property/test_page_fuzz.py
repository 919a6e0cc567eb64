"""Any text is either a tool page or refused with a PageError; both forms of a page are the same tool."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.errors import PageError
from batchrun.model import Option, Parameter, Setting, Tool
from batchrun.tools.catalog import dumps, from_json, load, to_json
from batchrun.tools.page import parse
from tests.support.tool_pages import PAGE, collapsed, line_form

SEEDS = Path(__file__).parents[3] / "shared" / "seeds"
PAGES = [PAGE, collapsed(PAGE), *(line_form(tool) for tool in load().tools)]
if SEEDS.is_dir():
    PAGES += [file.read_text(encoding="utf-8") for file in sorted(SEEDS.glob("*.txt"))]

#: Pieces that mean something to the parser, to be put where they do not belong.
TOKENS = [
    "## Basic tool info",
    "## Tool Inputs:",
    "\n  - name: x\n    label: ",
    " help:",
    " type: text default:",
    " options:",
    ' - value: "1" label: one',
    " triggerwords: [",
    " generatesettings: [{",
    "Run Task Endpoint (POST): https://x/Run/a/b",
    "[" * 3000,
    '"',
    "\\ud800",
    "\ud800",
    "\u2028",
    "\0",
    "\ufffd",
]


def reads_or_refuses(text: str) -> None:
    try:
        tool = parse(text)
    except PageError as error:
        refused_at = error.position
    else:
        assert tool.run_path.endswith(f"/{tool.slug}")
        assert tool.parameters
        # what was read can be kept
        assert from_json(json.loads(dumps(tool).encode("utf-8"))) == tool
        return
    assert 0 <= refused_at <= len(text)


@given(st.text(alphabet=st.characters()))
def test_any_text_is_read_or_refused(text: str) -> None:
    reads_or_refuses(text)


@given(st.lists(st.sampled_from([*TOKENS, " ", "word", "\n"]), max_size=30))
def test_any_heap_of_keys_is_read_or_refused(pieces: list[str]) -> None:
    reads_or_refuses("".join(pieces))


@given(
    st.sampled_from(PAGES),
    st.lists(
        st.tuples(
            st.integers(0, 30_000),
            st.integers(0, 400),
            st.sampled_from(TOKENS) | st.text(alphabet=st.characters(), max_size=5),
        ),
        min_size=1,
        max_size=4,
    ),
)
@settings(max_examples=300, deadline=None)
def test_a_mangled_page_is_read_or_refused(page: str, edits: list[tuple[int, int, str]]) -> None:
    for at, length, text in edits:
        at %= len(page) + 1
        page = page[:at] + text + page[at + length :]
    reads_or_refuses(page)


# --- both forms ----------------------------------------------------------------------------------

#: Words as labels, helps and descriptions have them, with all that could be taken for a key.
WORDS = st.sampled_from(
    [
        "a",
        "-",
        "- b",
        '"q"',
        ":",
        "x:",
        "#",
        "# c",
        "##",
        "|",
        "[NC]",
        "(y)",
        "1.0",
        "é",
        "\ufffd",
        "-name:",
        "options:",
        "{}",
    ]
)
TEXT = st.lists(WORDS, max_size=5).map(" ".join)
NAME = st.from_regex(r"[A-Za-z][A-Za-z0-9_.]{0,8}", fullmatch=True)
BOUND = st.none() | st.decimals(-100, 100, places=2)
SETTING = st.builds(
    Setting, NAME, st.sampled_from(["number", "float"]), BOUND, BOUND, st.sampled_from(["", "0.3"]), BOUND
)
OPTION = st.builds(
    Option,
    value=st.text("ab1-_/", max_size=4),
    label=TEXT,
    description=TEXT,
    trigger_words=st.lists(st.sampled_from(["fish", 'a "b" - c', "x, y"]), max_size=2).map(tuple),
    settings=st.lists(SETTING, max_size=2).map(tuple),
)
OPTIONS = st.none() | st.lists(OPTION, max_size=4, unique=True).map(tuple)


@st.composite
def parameters(draw: st.DrawFn, name: str) -> Parameter:
    options = draw(OPTIONS)
    # A quoted default holds no quotes; one that ends in "options:" would announce a list.
    default = draw(TEXT).replace('"', "").strip() if options is not None else draw(TEXT)
    if default == '"q"' or default.endswith("options:"):
        default = ""
    kind = draw(st.sampled_from(["text", "number", "float", "select", "multiselect", "hologram"]))
    return Parameter(name, kind, " ".join(default.split()), draw(TEXT), draw(TEXT), options)


@st.composite
def tools(draw: st.DrawFn) -> Tool:
    names = draw(st.lists(NAME, min_size=1, max_size=4, unique=True))
    slug = draw(NAME)
    return Tool(
        slug=slug,
        run_path=f"/Run/{draw(NAME)}/{slug}",
        title="acme/" + draw(NAME),
        description=draw(TEXT),
        categories=tuple(draw(st.lists(NAME, max_size=3))),
        parameters=tuple(draw(parameters(name)) for name in names),
    )


@given(tools(), st.sampled_from(["Tool", "Model"]))
@settings(deadline=None)
def test_a_tool_is_read_back_from_both_forms_of_its_page(tool: Tool, word: str) -> None:
    page = line_form(tool, word)
    read = parse(page)
    assert read == parse(collapsed(page))
    assert replace(read, parameters=tuple(replace(each, required=False) for each in read.parameters)) == tool
    assert from_json(to_json(read)) == read


def test_bounds_survive_with_their_digits() -> None:
    setting = Setting("x", "float", Decimal("0.00"), Decimal("1E+1"), "1", None)
    option = Option("1", "one", settings=(setting,))
    tool = Tool("b", "/Run/a/b", "a/b", "", (), (Parameter("p", "select", "", options=(option,)),))
    assert str(parse(line_form(tool)).parameters[0].options[0].settings[0].minimum) == "0.00"  # type: ignore[index]
