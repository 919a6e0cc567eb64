"""Whatever a row holds, it becomes a request that can be sent and stored, or problems under its columns."""

from __future__ import annotations

from decimal import Decimal

from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.errors import ManifestError
from batchrun.model import Cell, LocalImage, Parameter, Tool
from batchrun.store.records import given_from_json, given_to_json
from batchrun.tools.bind import Binder
from batchrun.tools.catalog import load

TOOLS = load().tools
BINDERS = {tool.slug: Binder(tool) for tool in TOOLS}

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
ANY_TEXT = st.text(alphabet=st.characters()) | st.sampled_from(
    ["random", "|", "[1", "[NC] a | b", "http://", "0.5", "61"]
)
SCALAR = st.none() | st.booleans() | st.integers() | st.decimals() | st.floats() | ANY_TEXT
CELL = SCALAR | st.lists(SCALAR, max_size=3) | st.dictionaries(st.text(max_size=3), SCALAR, max_size=2)


def image(path: str) -> LocalImage:
    return LocalImage(path, "00" * 32, len(path))


def options(parameter: Parameter) -> st.SearchStrategy[Cell]:
    """Values and labels of a parameter, and anything else."""
    names = [name for option in parameter.options or () for name in (option.value, option.label)]
    return st.sampled_from([*names, parameter.default]) | CELL


@st.composite
def rows(draw: st.DrawFn) -> tuple[Binder, dict[str, Cell]]:
    tool: Tool = draw(st.sampled_from(TOOLS))
    bound = BINDERS[tool.slug]
    cells: dict[str, Cell] = {"prompt": "a koi-fish"} if draw(st.booleans()) else {}
    for name in draw(st.lists(st.sampled_from([*bound.names, "other"]), unique=True, max_size=6)):
        parameter = tool.parameter(name)
        cells[name] = draw(options(parameter) if parameter else CELL)
    for name in ("generalPrompt", "inputImageUrl"):
        if bound.knows(name):
            cells.setdefault(name, "https://x/y")
    return bound, cells


@given(rows(), st.booleans())
@settings(max_examples=500, deadline=None)
def test_any_row_is_a_sendable_request_or_problems_under_its_columns(
    row: tuple[Binder, dict[str, Cell]], csv: bool
) -> None:
    bound, cells = row
    try:
        request = bound.bind(cells, blank_is_default=csv, read_image=image)
    except ManifestError as error:
        problems = error.problems
    else:
        assert set(request.given) <= set(cells)
        assert request.images >= 1
        stored = given_to_json(request.given).encode("utf-8")
        assert given_from_json(stored.decode("utf-8")) == request.given
        sent = bound.body(request.given, uploads={"00" * 32: "https://cdn/x"}, seed_key="k")
        assert list(sent) == [parameter.name for parameter in bound.tool.parameters]
        for value in sent.values():
            assert type(value) in (str, int) or all(type(part) is str for part in value)
        return
    for problem in problems:
        assert problem.column in {*cells, *bound.names}
        str(problem).encode("utf-8")


@given(rows())
@settings(deadline=None)
def test_binding_what_was_bound_changes_nothing(row: tuple[Binder, dict[str, Cell]]) -> None:
    bound, cells = row
    try:
        once = bound.bind(cells, blank_is_default=False, read_image=image)
    except ManifestError:
        return
    paths = {
        name: value.path if isinstance(value, LocalImage) else value for name, value in once.given.items()
    }
    assert bound.bind(paths, blank_is_default=False, read_image=image) == once


@given(st.integers(-(2**63), 2**63 - 1), st.sampled_from(["", ".0", "."]))
def test_a_whole_number_is_the_same_in_every_form(number: int, tail: str) -> None:
    bound = BINDERS["Retro-Cartoons"]
    for cell in (number, f" {number}{tail} ", Decimal(number)):
        given_ = bound.bind({"prompt": "x", "width": cell}, blank_is_default=True, read_image=image).given
        assert given_["width"] == number


@given(st.decimals(-(10**9), 10**9, places=3))
def test_a_floats_digits_are_kept(number: Decimal) -> None:
    bound = BINDERS["Retro-Cartoons"]
    for cell in (number, str(number)):
        given_ = bound.bind({"prompt": "x", "scale": cell}, blank_is_default=True, read_image=image).given
        assert given_["scale"] == str(number)


@given(
    st.dictionaries(
        TEXT,
        TEXT
        | st.integers()
        | st.lists(TEXT)
        | st.builds(LocalImage, path=TEXT, sha256=TEXT, size_bytes=st.integers(0, 2**40)),
    )
)
def test_what_a_row_gives_survives_its_storage(values: dict[str, str | int | list[str] | LocalImage]) -> None:
    assert given_from_json(given_to_json(values)) == values


@given(TEXT)
def test_a_drawn_seed_is_a_positive_31_bit_number(key: str) -> None:
    bound = BINDERS["story-diffusion-advanced"]
    seed = bound.body({"seed": "random"}, uploads={}, seed_key=key)["seed"]
    assert isinstance(seed, int)
    assert 1 <= seed < 2**31
