"""The catalog finds the shipped tools and those a user has added."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchrun.errors import PageError, UsageError
from batchrun.tools import catalog
from batchrun.tools.catalog import Catalog, from_json, load, to_json
from tests.support.tool_pages import PAGE, line_form

SHIPPED = (
    "retroAIx/Retro-Cartoons",
    "wiro/instant-id",
    "wiro/outpainting-sdxl-advanced",
    "wiro/story-diffusion-advanced",
    "wiro/text-to-image-sd-lora",
)


@pytest.fixture
def tools(tmp_path: Path) -> Catalog:
    return load(tmp_path / "tools")


def test_five_tools_are_shipped(tools: Catalog) -> None:
    assert tools.names == SHIPPED
    assert tuple(tool.run_path.removeprefix("/Run/") for tool in tools.tools) == SHIPPED


@pytest.mark.parametrize(
    ("slug", "required"),
    [
        ("text-to-image-sd-lora", {"prompt"}),
        ("Retro-Cartoons", {"prompt"}),
        ("instant-id", {"prompt", "inputImageUrl"}),
        ("outpainting-sdxl-advanced", {"inputImageUrl"}),
        ("story-diffusion-advanced", {"prompt", "generalPrompt"}),
    ],
)
def test_what_each_shipped_tool_requires(tools: Catalog, slug: str, required: set[str]) -> None:
    assert {parameter.name for parameter in tools.find(slug).parameters if parameter.required} == required


@pytest.mark.parametrize(
    "name", ["instant-id", "wiro/instant-id", "/Run/wiro/instant-id", "Instant-ID", " instant-id "]
)
def test_a_tool_is_found_by_each_of_its_names(tools: Catalog, name: str) -> None:
    assert tools.find(name).run_path == "/Run/wiro/instant-id"


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("instantid", "did you mean wiro/instant-id"),
        ("retro_cartoon", "did you mean retroAIx/Retro-Cartoons"),
        ("zzz", "known are: retroAIx/Retro-Cartoons, wiro/"),
        ("", "known are"),
    ],
)
def test_an_unknown_tool_is_answered_with_the_closest_name(
    tools: Catalog, name: str, suggestion: str
) -> None:
    with pytest.raises(UsageError, match=suggestion):
        tools.find(name)


def test_an_added_tool_is_there_at_once_and_the_next_time(tools: Catalog, tmp_path: Path) -> None:
    added = tools.add(PAGE)
    assert tools.find("cover-art") is added
    assert load(tmp_path / "tools").find("acme/cover-art") == added
    assert len(load(tmp_path / "tools").tools) == 6


def test_a_tool_added_twice_is_there_once(tools: Catalog, tmp_path: Path) -> None:
    tools.add(PAGE)
    tools.add(PAGE)
    assert [file.name for file in (tmp_path / "tools").rglob("*.*")] == ["cover-art.json"]


def test_an_added_tool_replaces_the_shipped_one_of_its_run_path(tools: Catalog, tmp_path: Path) -> None:
    newer = PAGE.replace("/Run/acme/cover-art", "/Run/wiro/instant-id")
    tools.add(newer)
    assert load(tmp_path / "tools").find("instant-id").title == "acme/Cover Art Maker"
    assert load(tmp_path / "tools").names == SHIPPED


def test_a_name_two_owners_share_must_be_written_out(tools: Catalog) -> None:
    tools.add(PAGE.replace("/Run/acme/cover-art", "/Run/acme/instant-id"))
    with pytest.raises(UsageError, match="acme/instant-id, wiro/instant-id"):
        tools.find("instant-id")
    assert tools.find("acme/instant-id").owner == "acme"


def test_garbage_is_not_added(tools: Catalog, tmp_path: Path) -> None:
    with pytest.raises(PageError):
        tools.add("<html>")
    assert not (tmp_path / "tools").exists()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"slug": 5}', '{"slug": "cover-art"}', "[" * 20_000, b"\xff\xfe"],
)
def test_a_damaged_file_is_named(tools: Catalog, tmp_path: Path, content: str | bytes) -> None:
    tools.add(PAGE)
    file = tmp_path / "tools" / "acme" / "cover-art.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    again = load(tmp_path / "tools")
    assert again.find("instant-id").slug == "instant-id"  # the damage is nobody else's
    with pytest.raises(UsageError, match=r"cover-art\.json.*damaged"):
        again.find("cover-art")


def test_a_file_that_describes_another_tool_is_damaged(tools: Catalog, tmp_path: Path) -> None:
    tools.add(PAGE)
    file = tmp_path / "tools" / "acme" / "cover-art.json"
    file.rename(file.with_name("other.json"))
    with pytest.raises(UsageError, match="describes /Run/acme/cover-art"):
        load(tmp_path / "tools").find("other")


def test_the_folder_of_added_tools_is_chosen_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHRUN_TOOLS_DIR", str(tmp_path))
    load().add(PAGE)
    assert (tmp_path / "acme" / "cover-art.json").is_file()
    monkeypatch.delenv("BATCHRUN_TOOLS_DIR")
    assert catalog.tools_folder().parts[-2:] == ("batchrun", "tools")


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be kept"):
        load(tmp_path / "file" / "tools").add(PAGE)


def test_every_tool_survives_json(tools: Catalog) -> None:
    for tool in tools.tools:
        assert from_json(json.loads(json.dumps(to_json(tool)))) == tool


def test_every_shipped_tool_is_what_its_own_page_would_say(tools: Catalog) -> None:
    from batchrun.tools.page import parse

    for tool in tools.tools:
        assert parse(line_form(tool)) == tool


@pytest.mark.parametrize("place", ["options", "required", "default"])
def test_a_description_of_the_wrong_kind_is_a_value_error(tools: Catalog, place: str) -> None:
    data = to_json(tools.find("instant-id"))
    data["parameters"][0][place] = 5
    with pytest.raises(ValueError, match=place):
        from_json(data)
