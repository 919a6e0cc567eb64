"""`batchrun tools`: what can be asked for, and adding to it."""

from __future__ import annotations

import json

from tests.support.command import Here
from tests.support.tool_pages import PAGE


def test_the_list_names_the_five_shipped_tools(alone: Here) -> None:
    lines = alone.batchrun("tools", "list").stdout.splitlines()
    assert lines[0] == "tool\trequired\ttitle"
    assert [line.split("\t")[0] for line in lines[1:]] == [
        "Retro-Cartoons",
        "instant-id",
        "outpainting-sdxl-advanced",
        "story-diffusion-advanced",
        "text-to-image-sd-lora",
    ]


def test_show_tells_parameters_and_counts_long_lists_of_options(alone: Here) -> None:
    said = alone.batchrun("tools", "show", "sd-lora")
    assert said.returncode == 2
    assert "did you mean wiro/text-to-image-sd-lora?" in said.stderr
    said = alone.batchrun("tools", "show", "text-to-image-sd-lora")
    assert "prompt (required)\t" in said.stdout
    many = alone.batchrun("tools", "show", "outpainting-sdxl-advanced").stdout
    assert " and 43 more (--all)" in many
    assert " more (--all)" not in alone.batchrun("tools", "show", "outpainting-sdxl-advanced", "--all").stdout


def test_show_as_json_is_the_whole_description(alone: Here) -> None:
    told = json.loads(alone.batchrun("tools", "show", "wiro/instant-id", "--json").stdout)
    assert (told["slug"], told["run_path"]) == ("instant-id", "/Run/wiro/instant-id")
    assert "prompt" in [parameter["name"] for parameter in told["parameters"]]
    assert len(json.loads(alone.batchrun("tools", "list", "--json").stdout)) == 5


def test_a_page_adds_a_tool_for_all_later_commands(alone: Here) -> None:
    added = alone.batchrun("tools", "add", "-", text=PAGE)
    assert added.returncode == 0, added.stderr
    assert added.stdout.startswith("cover-art (/Run/acme/cover-art) can be asked for: ")
    assert "cover-art" in alone.batchrun("tools", "list").stdout


def test_what_is_no_page_is_2_with_the_place(alone: Here) -> None:
    alone.write("page.txt", "nothing of the kind")
    ended = alone.batchrun("tools", "add", "page.txt")
    assert ended.returncode == 2
    assert ended.stderr.startswith("Error: page.txt: ")
    assert "at character" in ended.stderr
    assert alone.batchrun("tools", "add", "nowhere.txt").returncode == 2


def test_an_address_is_no_page_and_the_command_that_fetches_it_is_told(alone: Here) -> None:
    ended = alone.batchrun("tools", "add", "https://host.example/llms-full.txt")
    assert ended.returncode == 2
    assert "curl https://host.example/llms-full.txt | batchrun tools add -" in ended.stderr
