"""Images deleted behind our back are noticed, each once, whatever became of their folders."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from batchrun.outputs import missing as module
from batchrun.outputs.missing import Missing, missing

PATHS = ["images/000/a_0.png", "images/000/a_1.png", "images/001/b_0.jpg", "images/001/c_0.webp"]


@dataclass
class Place:
    number: int
    path: str
    mark: str | None
    asked: list[int]

    def saved(self) -> list[str]:
        self.asked.append(self.number)
        return [path for path in PATHS if path.startswith(self.path)]


def places(marks: Mapping[int, str] | None = None, asked: list[int] | None = None) -> list[Place]:
    """The folders of the paths, with what was known of them."""
    noted = [] if asked is None else asked
    return [Place(number, f"images/{number:03d}", (marks or {}).get(number), noted) for number in (0, 1)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "_SETTLED_NS", 0)
    for path in PATHS:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    return tmp_path


def gone_of(folder: Path) -> Missing | None:
    return missing(folder, places())[0]


def test_nothing_is_missing_where_every_image_is_in_its_place(folder):
    assert gone_of(folder) is None
    assert missing(folder, []) == (None, {})


@pytest.mark.parametrize("gone", [PATHS[:1], PATHS[1:3], PATHS])
def test_missing_images_are_counted_and_the_first_is_named(folder, gone):
    for path in gone:
        (folder / path).unlink()
    assert gone_of(folder) == Missing(len(gone), gone[0])


def test_images_of_a_folder_that_is_gone_or_no_folder_any_more_are_missing(folder):
    for path in PATHS:
        (folder / path).unlink()
    (folder / "images/000").rmdir()
    (folder / "images/001").rmdir()
    (folder / "images/001").touch()
    assert gone_of(folder) == Missing(4, PATHS[0])


def test_each_folder_is_listed_once_and_no_file_is_opened(folder, monkeypatch):
    listed = []
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda place: listed.append(place) or real(place))
    assert gone_of(folder) is None
    assert listed == [folder / "images/000", folder / "images/001"]


def test_a_folder_that_cannot_be_listed_says_nothing_against_its_images(folder, monkeypatch):
    def refuse(place):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    assert gone_of(folder) is None


def test_a_folder_found_whole_is_not_looked_through_again_until_a_name_comes_or_goes(folder):
    _, marks = missing(folder, places())
    assert set(marks) == {0, 1}
    asked: list[int] = []
    assert missing(folder, places(marks, asked)) == (None, {})
    assert asked == []
    time.sleep(0.02)  # a tick of the clock that folders are stamped with
    (folder / PATHS[2]).unlink()
    assert missing(folder, places(marks, asked)) == (Missing(1, PATHS[2]), {})
    assert asked == [1]


def test_a_folder_that_lacks_an_image_or_was_changed_a_moment_ago_is_never_told_by_its_times(
    folder, monkeypatch
):
    (folder / PATHS[0]).unlink()
    assert set(missing(folder, places())[1]) == {1}
    monkeypatch.setattr(module, "_SETTLED_NS", 60_000_000_000)
    assert missing(folder, places())[1] == {}
