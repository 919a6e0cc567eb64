"""Images deleted behind our back are noticed, each once, whatever became of their folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from batchrun.outputs.missing import Missing, missing

PATHS = ["images/000/a_0.png", "images/000/a_1.png", "images/001/b_0.jpg", "images/001/c_0.webp"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in PATHS:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    return tmp_path


def test_nothing_is_missing_where_every_image_is_in_its_place(folder):
    assert missing(folder, PATHS) is None
    assert missing(folder, []) is None


@pytest.mark.parametrize("gone", [PATHS[:1], PATHS[1:3], PATHS])
def test_missing_images_are_counted_and_the_first_is_named(folder, gone):
    for path in gone:
        (folder / path).unlink()
    assert missing(folder, PATHS) == Missing(len(gone), gone[0])


def test_images_of_a_folder_that_is_gone_or_no_folder_any_more_are_missing(folder):
    for path in PATHS:
        (folder / path).unlink()
    (folder / "images/000").rmdir()
    (folder / "images/001").rmdir()
    (folder / "images/001").touch()
    assert missing(folder, PATHS) == Missing(4, PATHS[0])


def test_each_folder_is_listed_once_and_no_file_is_opened(folder, monkeypatch):
    listed = []
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda place: listed.append(place) or real(place))
    assert missing(folder, PATHS) is None
    assert listed == [folder / "images/000", folder / "images/001"]


def test_a_folder_that_cannot_be_listed_says_nothing_against_its_images(folder, monkeypatch):
    def refuse(place):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    assert missing(folder, PATHS) is None
