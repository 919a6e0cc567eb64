"""A row's cells become a request in sending form, or problems that say what to write."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from batchrun.errors import ManifestError
from batchrun.model import Cell, LocalImage, Option, Parameter, Problem, Request, Setting, Severity, Tool
from batchrun.tools.bind import Binder, LoraScale, closest
from batchrun.tools.catalog import load
from batchrun.tools.page import parse
from tests.support.tool_pages import PAGE

CATALOG = load()
FISH = "Fish-out-of-Water-v1.0"
FACE = LocalImage("faces/a.png", "ab" * 32, 5)


def read_image(path: str) -> LocalImage:
    """Stands for the manifest's reader: one file is an image, nothing else is there."""
    if path != FACE.path:
        raise ManifestError([Problem(f"{path} is not there", column="somewhere")])
    return FACE


def binder(slug: str, lora_scale: LoraScale = "prompt") -> Binder:
    return Binder(CATALOG.find(slug), lora_scale=lora_scale)


def bind(tool: Binder | str, cells: dict[str, Cell], *, csv: bool = True) -> Request:
    bound = binder(tool) if isinstance(tool, str) else tool
    return bound.bind(cells, blank_is_default=csv, read_image=read_image)


def errors(tool: Binder | str, cells: dict[str, Cell], *, csv: bool = True) -> dict[str, str]:
    """Messages by column."""
    with pytest.raises(ManifestError) as caught:
        bind(tool, cells, csv=csv)
    assert all(problem.severity is Severity.ERROR for problem in caught.value.problems)
    return {problem.column: problem.message for problem in caught.value.problems}


def body(bound: Binder, request: Request, seed_key: str = "row-1") -> dict[str, Any]:
    return bound.body(request.given, uploads={FACE.sha256: "https://cdn/face"}, seed_key=seed_key)


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell", ["20", " 20 ", 20, "20.0", "20.", "+20", "020", Decimal("20.0"), Decimal("2E+1"), 20.0]
)
def test_a_whole_number_in_any_form_is_sent_as_an_integer(cell: Cell) -> None:
    assert bind("Retro-Cartoons", {"prompt": "x", "steps": cell}).given["steps"] == 20


@pytest.mark.parametrize(
    "cell",
    [
        # not numbers
        *("abc", "2O", "20 px", "1_000", "٢٠", True, [20], {"n": 20}),
        # not whole
        *("20.5", Decimal("20.5"), "1e3"),
        # beyond 64 bits or any use
        *(
            "9223372036854775808",
            2**63,
            "9" * 50,
            Decimal("1E+999999"),
            Decimal("NaN"),
            float("inf"),
        ),
    ],
)
def test_what_is_no_whole_number_is_refused_with_an_example(cell: Cell) -> None:
    message = errors("Retro-Cartoons", {"prompt": "x", "steps": cell}, csv=False)["steps"]
    assert "60" in message or "no number of use" in message


def test_a_number_of_many_digits_is_refused() -> None:
    assert "too large" in errors("Retro-Cartoons", {"prompt": "x", "steps": 10**5000})["steps"]


@pytest.mark.parametrize(
    ("cell", "sent"),
    [
        ("7.5", "7.5"),
        ("7.50", "7.50"),
        (" 7 ", "7"),
        (7, "7"),
        (Decimal("7.50"), "7.50"),
        (7.5, "7.5"),
        ("1e-3", "1e-3"),
    ],
)
def test_a_float_is_sent_as_text_with_the_users_digits(cell: Cell, sent: str) -> None:
    assert bind("Retro-Cartoons", {"prompt": "x", "scale": cell}).given["scale"] == sent


@pytest.mark.parametrize(
    "cell", ["nan", "inf", "x", "7,5", False, Decimal("Infinity"), float("nan"), [7], "9" * 60]
)
def test_what_is_no_float_is_refused(cell: Cell) -> None:
    assert set(errors("Retro-Cartoons", {"prompt": "x", "scale": cell}, csv=False)) == {"scale"}


def test_a_decimal_comma_is_answered_with_the_point() -> None:
    assert errors("Retro-Cartoons", {"prompt": "x", "scale": "7,5"})["scale"].endswith("write 7.5")


@pytest.mark.parametrize(
    ("tool", "cell", "sent"),
    [
        # text in four tools: its digits as they are
        ("Retro-Cartoons", "007", "007"),
        ("Retro-Cartoons", 7, "7"),
        ("Retro-Cartoons", "42.0", "42"),
        ("Retro-Cartoons", "Random", "random"),
        # a number in the fifth
        ("story-diffusion-advanced", "007", 7),
        ("story-diffusion-advanced", "random", "random"),
    ],
)
def test_a_seed_is_a_whole_number_or_random(tool: str, cell: Cell, sent: Cell) -> None:
    assert bind(tool, {"prompt": "x", "generalPrompt": "y"} if "story" in tool else {"prompt": "x"}).images
    cells = {"prompt": "x", "seed": cell} | ({"generalPrompt": "y"} if "story" in tool else {})
    assert bind(tool, cells).given["seed"] == sent


@pytest.mark.parametrize("cell", ["abc", "1.5", "1 2", True, [1]])
def test_what_is_no_seed_is_refused(cell: Cell) -> None:
    assert "seed" in errors("Retro-Cartoons", {"prompt": "x", "seed": cell}, csv=False)


# --- choices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slug", "column", "cell", "sent"),
    [
        # by value, by label, by either in other letters' case
        ("outpainting-sdxl-advanced", "selectedModel", "850", "850"),
        ("outpainting-sdxl-advanced", "selectedModel", 850, "850"),
        ("outpainting-sdxl-advanced", "selectedModel", "Lykon/DreamShaper-XL", "850"),
        ("outpainting-sdxl-advanced", "selectedModel", " lykon/dreamshaper-xl ", "850"),
        ("Retro-Cartoons", "refiner", "YES", ""),
        ("Retro-Cartoons", "refiner", "no", "--only_base_model"),
        ("Retro-Cartoons", "scheduler", "ddimscheduler", "DDIMScheduler"),
        # a default outside its own list
        ("instant-id", "selectedModel", "79", "79"),
        # nothing listed: any id
        ("instant-id", "selectedModelPrivate", "4711", "4711"),
    ],
)
def test_a_select_takes_values_and_labels(slug: str, column: str, cell: Cell, sent: str) -> None:
    cells = {"prompt": "x"} | ({} if slug == "Retro-Cartoons" else {"inputImageUrl": "https://x/y.png"})
    assert bind(slug, cells | {column: cell}).given[column] == sent


@pytest.mark.parametrize(
    ("cell", "advice"),
    [
        ("DDIMSchedular", 'did you mean "DDIMScheduler"?'),
        ("zzz", "write one of"),
        (True, "write one of"),
        ("", "write one of"),
        (["DDIMScheduler"], "write it in quotes"),
    ],
)
def test_an_unknown_choice_is_answered_with_the_closest(cell: Cell, advice: str) -> None:
    assert advice in errors("Retro-Cartoons", {"prompt": "x", "scheduler": cell}, csv=False)["scheduler"]


def test_a_label_of_two_options_must_be_written_as_a_value() -> None:
    options = (Option("1", "same"), Option("2", "same"), Option("3", "SAME"))
    tool = Tool("t", "/Run/o/t", "t", "", (), (Parameter("m", "select", "1", options=options),))
    assert bind(Binder(tool), {"m": "SAME"}).given["m"] == "3"
    assert "1" in errors(Binder(tool), {"m": "same"})["m"]
    assert "m" in errors(Binder(tool), {"m": "Same"})


def test_true_is_the_options_own_word() -> None:
    options = (Option("true", "yes"), Option("false", "no"))
    tool = Tool("t", "/Run/o/t", "t", "", (), (Parameter("m", "select", "", options=options),))
    assert bind(Binder(tool), {"m": True}, csv=False).given["m"] == "true"


@pytest.mark.parametrize(
    ("cell", "sent"),
    [
        # lists
        (["61", "62"], ["61", "62"]),
        ([61, "Ostris/Emotion Happy Slider v1.0"], ["61", "62"]),
        # texts: a JSON list, or separated
        ('["61", 62]', ["61", "62"]),
        ("61|62", ["61", "62"]),
        (" 61 | Ostris/Emotion Happy Slider v1.0 | ", ["61", "62"]),
        ("61", ["61"]),
        (61, ["61"]),
        # each once; none
        (["61", "61"], ["61"]),
        ([], []),
        ("", []),
        ("[]", []),
    ],
)
def test_a_multiselect_takes_lists_of_values_and_labels(cell: Cell, sent: list[str]) -> None:
    cells = {"prompt": "reef-fish", "selectedLoraModel": cell}
    assert bind("text-to-image-sd-lora", cells, csv=False).given["selectedLoraModel"] == sent


@pytest.mark.parametrize("cell", ["61,62", "61|99", ["61", True], [["61"]], {"61": 1}, "[61"])
def test_an_unknown_choice_among_several_is_refused(cell: Cell) -> None:
    cells = {"prompt": "x", "selectedLoraModel": cell}
    assert set(errors("text-to-image-sd-lora", cells, csv=False)) == {"selectedLoraModel"}


# --- texts and blanks ----------------------------------------------------------------------------


def test_texts_are_kept_as_they_are_and_numbers_as_their_digits() -> None:
    assert bind("Retro-Cartoons", {"prompt": "  a\nb 😀 "}).given["prompt"] == "  a\nb 😀 "
    assert bind("Retro-Cartoons", {"prompt": Decimal("1.50")}).given["prompt"] == "1.50"


@pytest.mark.parametrize("cell", [True, ["x"], {"x": 1}, "half \ud83d", Decimal("NaN")])
def test_what_is_no_text_is_refused(cell: Cell) -> None:
    assert set(errors("Retro-Cartoons", {"prompt": cell}, csv=False)) == {"prompt"}


def test_a_blank_cell_means_the_default_in_csv_only() -> None:
    cells: dict[str, Cell] = {"prompt": "x", "negativePrompt": "", "steps": " ", "scheduler": None}
    assert bind("Retro-Cartoons", cells).given == {"prompt": "x"}
    assert (
        bind("Retro-Cartoons", {"prompt": "x", "negativePrompt": ""}, csv=False).given["negativePrompt"] == ""
    )
    assert "steps" in errors("Retro-Cartoons", {"prompt": "x", "steps": ""}, csv=False)


@pytest.mark.parametrize(
    ("slug", "columns"),
    [
        ("text-to-image-sd-lora", {"prompt"}),
        ("Retro-Cartoons", {"prompt"}),
        ("instant-id", {"prompt", "inputImageUrl"}),
        ("outpainting-sdxl-advanced", {"inputImageUrl"}),
        ("story-diffusion-advanced", {"prompt", "generalPrompt"}),
    ],
)
@pytest.mark.parametrize("cell", [None, "", "  "])
def test_what_is_required_must_not_be_blank(slug: str, columns: set[str], cell: Cell) -> None:
    for csv in (True, False):
        found = errors(slug, dict.fromkeys(columns, cell), csv=csv)
        assert set(found) == columns
        assert all("is required; write" in message for message in found.values())


def test_all_problems_of_a_row_are_told_at_once() -> None:
    cells = {
        "prompt": "",
        "steps": "x",
        "scale": "y",
        "scheduler": "z",
        "negativeprompt": "q",
        "samples": "0",
    }
    found = errors("Retro-Cartoons", cells)
    assert set(found) == {"prompt", "steps", "scale", "scheduler", "negativeprompt", "samples"}
    assert "did you mean negativePrompt?" in found["negativeprompt"]


def test_messages_are_short_and_on_one_line() -> None:
    message = errors("Retro-Cartoons", {"prompt": "x", "steps": "a\nb\x1b[31m" * 500})["steps"]
    assert message.isprintable()
    assert len(message) < 200


# --- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["https://x.org/a b.png".replace(" ", "%20"), " HTTP://x/y?z=1 "])
def test_an_address_is_sent_as_it_is(cell: str) -> None:
    assert bind("outpainting-sdxl-advanced", {"inputImageUrl": cell}).given["inputImageUrl"] == cell.strip()


def test_a_path_is_read_and_replaced_by_its_upload_when_sent() -> None:
    tool = binder("outpainting-sdxl-advanced")
    request = bind(tool, {"inputImageUrl": " faces/a.png "})
    assert request.given["inputImageUrl"] is FACE
    assert body(tool, request)["inputImageUrl"] == "https://cdn/face"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("ftp://x/y.png", "ftp:"),
        ("file:///y.png", "file:"),
        ("data:image/png;base64,AAAA", "data:"),
        ("https://", "whole address"),
        ("https://x/a b.png", "whole address"),
        ("nowhere.png", "nowhere.png is not there"),
        (r"C:\faces\a.png", "is not there"),
        (5, "write the address"),
        (["a.png", "b.png"], "write the address"),
    ],
)
def test_what_is_no_image_is_refused_under_its_own_column(cell: Cell, message: str) -> None:
    assert message in errors("outpainting-sdxl-advanced", {"inputImageUrl": cell}, csv=False)["inputImageUrl"]


def test_the_address_of_a_model_file_is_a_text() -> None:
    given = bind(
        "text-to-image-sd-lora", {"prompt": "x", "selectedLoraModelPrivateUrl": "s3://a.safetensors"}
    ).given
    assert given["selectedLoraModelPrivateUrl"] == "s3://a.safetensors"


def test_file_parameters_of_other_tools_take_images() -> None:
    tool = Binder(parse(PAGE))
    one = bind(tool, {"prompt": "x", "inputImage": "faces/a.png", "extras": "faces/a.png"})
    assert (body(tool, one)["inputImage"], body(tool, one)["extras"]) == (
        "https://cdn/face",
        ["https://cdn/face"],
    )
    several = bind(tool, {"prompt": "x", "extras": ["https://x/1", "https://x/2"]}, csv=False)
    assert body(tool, several)["extras"] == ["https://x/1", "https://x/2"]
    assert "extras" in errors(tool, {"prompt": "x", "extras": ["https://x/1", "faces/a.png"]}, csv=False)


# --- LoRA ----------------------------------------------------------------------------------------


def lora(**cells: Cell) -> dict[str, Cell]:
    return {"prompt": "a koi-fish", "selectedLoraModel": "61", **cells}


def test_missing_trigger_words_are_a_warning_with_the_words() -> None:
    request = bind("text-to-image-sd-lora", lora(prompt="a cat"))
    assert [problem.severity for problem in request.problems] == [Severity.WARNING]
    assert "Fish out of Water" in str(request.problems[0])
    assert "reef-fish, gold-fish" in str(request.problems[0])


@pytest.mark.parametrize(
    ("chosen", "prompt"),
    [
        # one of several alternatives, in any case
        ("61", "A Shark-Fish"),
        # a part of an entry that lists several
        ("524", "in an office"),
        # no words to say
        ("62", "a cat"),
    ],
)
def test_one_trigger_word_is_enough(chosen: str, prompt: str) -> None:
    assert not bind("text-to-image-sd-lora", {"prompt": prompt, "selectedLoraModel": chosen}).problems


def test_models_have_trigger_words_too() -> None:
    cells = {"inputImageUrl": "https://x/y", "selectedModel": "966"}
    assert "niji style" in str(bind("outpainting-sdxl-advanced", cells).problems[0])
    assert not bind("outpainting-sdxl-advanced", cells | {"prompt": "niji style cat"}).problems


def test_a_setting_goes_into_the_prompt_once() -> None:
    tool = binder("text-to-image-sd-lora")
    request = bind(tool, lora(**{FISH: "0.30"}))
    assert request.given[FISH] == "0.30"
    sent = body(tool, request)
    assert sent["prompt"] == f"a koi-fish <lora:{FISH}:0.30>"
    assert FISH not in sent
    own = bind(tool, lora(prompt=f"koi-fish <lora:{FISH}:1>", **{FISH: "0.3"}))
    assert body(tool, own)["prompt"] == f"koi-fish <lora:{FISH}:1>"


def test_a_setting_can_be_sent_as_a_parameter() -> None:
    tool = binder("text-to-image-sd-lora", "parameter")
    cells = lora(selectedLoraModel="61|62", **{FISH: "0.3", "Emotion-Happy-Slider-v1.0": "5"})
    sent = body(tool, bind(tool, cells))
    assert sent["prompt"] == "a koi-fish"
    assert list(sent.items())[-2:] == [(FISH, "0.3"), ("Emotion-Happy-Slider-v1.0", 5)]


@pytest.mark.parametrize("cell", ["1.1", "-0.1", "x", True])
def test_a_setting_is_held_to_its_bounds(cell: Cell) -> None:
    assert set(errors("text-to-image-sd-lora", lora(**{FISH: cell}), csv=False)) == {FISH}


def test_a_bound_is_within_its_bounds() -> None:
    for value in ("0", "1", "1.00"):
        assert bind("text-to-image-sd-lora", lora(**{FISH: value})).given[FISH] == value


def test_a_setting_without_its_lora_is_an_error() -> None:
    message = errors("text-to-image-sd-lora", {"prompt": "x", "selectedLoraModel": "62", FISH: "0.3"})[FISH]
    assert "write 61 under selectedLoraModel" in message
    # what was meant by a wrong choice is not guessed at
    assert set(errors("text-to-image-sd-lora", lora(selectedLoraModel="zzz", **{FISH: "0.3"}))) == {
        "selectedLoraModel"
    }


def test_a_parameter_comes_before_a_setting_of_its_name() -> None:
    option = Option("1", "one", settings=(Setting("prompt", "float", None, Decimal(1), "1"),))
    parameters = (Parameter("m", "select", "1", options=(option,)), Parameter("prompt", "text", ""))
    tool = Binder(Tool("t", "/Run/o/t", "t", "", (), parameters))
    assert tool.names == ("m", "prompt")
    assert bind(tool, {"prompt": "a cat"}).given == {"prompt": "a cat"}


# --- story-diffusion -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "text", "images"),
    [
        # a list, in JSONL and as CSV text
        (["at home #at home", "[NC]leaf falls"], "at home #at home | [NC]leaf falls", 2),
        ('["a", "b"]', "a | b", 2),
        # text passes through
        ("a | [NC]b # c |", "a | [NC]b # c |", 2),
        ("[NC] a | b", "[NC] a | b", 2),
        ("[1]", "[1]", 1),
        ("a||b", "a||b", 2),
        ("a", "a", 1),
    ],
)
def test_a_story_is_lines_and_makes_an_image_of_each(cell: Cell, text: str, images: int) -> None:
    request = bind("story-diffusion-advanced", {"prompt": "x", "generalPrompt": cell}, csv=False)
    assert (request.given["generalPrompt"], request.images) == (text, images)


@pytest.mark.parametrize("cell", [[], ["", " "], "|", " | | ", [True], [["a"]]])
def test_a_story_without_lines_is_refused(cell: Cell) -> None:
    assert set(errors("story-diffusion-advanced", {"prompt": "x", "generalPrompt": cell}, csv=False)) == {
        "generalPrompt"
    }


@pytest.mark.parametrize(
    ("prompt", "warned"), [("a man", True), ("imgage", True), ("a man img, tall", False), ("img", False)]
)
def test_an_init_image_needs_the_word_img(prompt: str, warned: bool) -> None:
    cells = {"prompt": prompt, "generalPrompt": "a", "inputImage2Url": "https://x/y"}
    assert bool(bind("story-diffusion-advanced", cells).problems) is warned
    del cells["inputImage2Url"]
    assert not bind("story-diffusion-advanced", cells).problems


@pytest.mark.parametrize(("cells", "images"), [({}, 4), ({"samples": "1"}, 1), ({"samples": 7}, 7)])
def test_other_tools_make_their_samples(cells: dict[str, Cell], images: int) -> None:
    assert bind("Retro-Cartoons", {"prompt": "x", **cells}).images == images


@pytest.mark.parametrize("cell", [0, -1, "0"])
def test_no_samples_are_refused(cell: Cell) -> None:
    assert "write 1 or more" in errors("Retro-Cartoons", {"prompt": "x", "samples": cell})["samples"]


def test_a_tool_without_samples_makes_one_image() -> None:
    assert bind(Binder(parse(PAGE)), {"prompt": "x"}).images == 1


# --- sending -------------------------------------------------------------------------------------


def test_the_whole_set_of_parameters_is_sent_in_the_tools_order() -> None:
    tool = binder("text-to-image-sd-lora")
    assert body(tool, bind(tool, {"steps": "20", "prompt": "a cat"})) == {
        "selectedModel": "1",
        "selectedModelPrivate": "",
        "selectedLoraModel": [],
        "selectedLoraModelPrivate": [],
        "selectedLoraModelPrivateUrl": "",
        "prompt": "a cat",
        "negativePrompt": "",
        "samples": 4,
        "steps": 20,
        "scale": "7.5",
        "seed": "123456",
        "clipSkip": 4,
        "width": 512,
        "height": 512,
        "scheduler": "EulerDiscreteScheduler",
    }
    for shipped in CATALOG.tools:
        sent = Binder(shipped).body({}, uploads={}, seed_key="")
        assert list(sent) == [parameter.name for parameter in shipped.parameters]


def test_samples_of_the_page_are_never_sent() -> None:
    tool = binder("story-diffusion-advanced")
    sent = body(tool, bind(tool, {"prompt": "x", "generalPrompt": "y"}))
    assert sent["extraEventPrompts"] == ""
    assert sent["negativePrompt"].startswith("naked")
    assert sent["seed"] == 123456
    assert Binder(parse(PAGE)).body({}, uploads={}, seed_key="")["prompt"] == ""


def test_lists_sent_are_the_callers_own() -> None:
    tool = binder("text-to-image-sd-lora")
    request = bind(tool, lora())
    body(tool, request)["selectedLoraModel"].append("x")
    body(tool, request)["selectedLoraModelPrivate"].append("x")
    assert body(tool, request)["selectedLoraModel"] == ["61"]
    assert body(tool, request)["selectedLoraModelPrivate"] == []


def test_unknown_types_are_sent_as_text() -> None:
    tool = Binder(parse(PAGE))
    sent = body(tool, bind(tool, {"prompt": "x", "fast": False, "strength": 5}, csv=False))
    assert (sent["fast"], sent["strength"], sent["looseSeed"]) == ("false", "5", 7)


@pytest.mark.parametrize(("slug", "kind"), [("Retro-Cartoons", str), ("story-diffusion-advanced", int)])
def test_a_random_seed_is_the_same_for_the_same_row(slug: str, kind: type) -> None:
    tool = binder(slug)
    request = bind(tool, {"prompt": "x", "seed": "random"} | ({"generalPrompt": "y"} if kind is int else {}))
    seeds = [body(tool, request, key)["seed"] for key in ("a", "a", "b")]
    assert seeds[0] == seeds[1] != seeds[2]
    assert all(type(seed) is kind and 1 <= int(seed) < 2**31 for seed in seeds)


def test_drawn_seeds_never_change() -> None:
    tool = binder("Retro-Cartoons")
    assert body(tool, bind(tool, {"prompt": "x", "seed": "random"}), "row-1")["seed"] == "99011243"


# --- names ---------------------------------------------------------------------------------------


def test_the_columns_of_a_tool_are_its_parameters_and_settings() -> None:
    tool = binder("text-to-image-sd-lora")
    assert tool.names[:2] == ("selectedModel", "selectedModelPrivate")
    assert tool.names[-2:] == (FISH, "Roman-Legionary-Lorica-Segmentata-Armor-v1.0")
    assert tool.knows("prompt")
    assert tool.knows(FISH)
    assert not tool.knows("Prompt")


@pytest.mark.parametrize(
    ("slug", "name", "value", "expands"),
    [
        ("Retro-Cartoons", "seed", [1, 2], True),
        ("text-to-image-sd-lora", FISH, ["0.1", "0.2"], True),
        # not lists, or lists that are the value itself
        ("Retro-Cartoons", "seed", "[1, 2]", False),
        ("text-to-image-sd-lora", "selectedLoraModel", ["61"], False),
        ("story-diffusion-advanced", "generalPrompt", ["a", "b"], False),
        ("Retro-Cartoons", "nothing", [1], False),
    ],
)
def test_a_list_under_a_single_valued_name_stands_for_several_requests(
    slug: str, name: str, value: Cell, expands: bool
) -> None:
    assert binder(slug).expandable(name, value) is expands


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("negative_prompt", ["prompt", "negativePrompt"], "negativePrompt"),
        ("PROMPT", ["prompt", "negativePrompt"], "prompt"),
        ("promt", ["prompt", "steps"], "prompt"),
        ("DreamShaper", ["79", "Lykon/DreamShaper-XL"], "Lykon/DreamShaper-XL"),
        ("category", ["prompt", "steps"], None),
        ("", ["prompt"], None),
        ("日本", ["prompt"], None),
    ],
)
def test_the_closest_name(name: str, known: list[str], meant: str | None) -> None:
    assert closest(name, known) == meant
