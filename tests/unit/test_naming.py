"""Names of output files, case by case."""

from __future__ import annotations

import pytest

from batchrun.rules.naming import image_base, image_path, partial_path, stem, stem_with_hash


@pytest.mark.parametrize(
    "id", ["a", "cat-01", "A.b_c", "00012", "005695-0057", "_x", "x" * 100, "con1", "comet"]
)
def test_a_safe_id_is_its_own_stem(id):
    assert stem(id, 1, "key") == id


@pytest.mark.parametrize(
    ("id", "begins"),
    [
        ("../../etc/passwd", "_.._etc_passwd-"),  # no way out of the folder
        ("/absolute", "_absolute-"),
        (".hidden", "hidden-"),
        ("-rf", "rf-"),
        ("ends.", "ends.-"),  # Windows drops the last dot
        ("a b", "a_b-"),
        ("Café", "Cafe-"),
        ("猫", "_-"),
        ("nul\0byte", "nul_byte-"),
        ("", "_-"),
        ("CON", "_CON-"),  # devices on Windows, whatever follows the dot
        ("aux.tar.gz", "_aux.tar.gz-"),
        ("lpt9", "_lpt9-"),
        ("y" * 101, "y" * 87 + "-"),
        ("cat-0123456789ab", "cat-0123456789ab-"),  # could be another id's hashed stem
    ],
)
def test_an_unsafe_id_is_cleaned_and_told_apart_by_a_hash(id, begins):
    made = stem(id, 1, "key")
    assert made.startswith(begins)
    assert len(made) == len(begins) + 12
    assert made == stem_with_hash(id)


def test_a_row_without_an_id_is_named_by_its_line_and_a_hash_of_its_key():
    assert stem(None, 12, "key") == "000012-2c70e12b7a06"
    assert stem(None, 12, "key") != stem(None, 12, "other")
    assert stem(None, 1234567, "key").startswith("1234567-")


def test_ids_that_differ_only_in_case_can_be_told_apart_with_a_hash():
    assert stem_with_hash("Cat").casefold() != stem_with_hash("cat").casefold()


def test_a_folder_holds_the_images_of_a_thousand_rows():
    assert image_path(1, "a", 0, "png") == "images/000/a_0.png"
    assert image_path(1000, "a", 3, "jpg") == "images/000/a_3.jpg"
    assert image_path(1001, "a", 0, "png") == "images/001/a_0.png"
    assert image_path(1_000_001, "a", 0, "png") == "images/1000/a_0.png"
    assert image_base(1, "a.b", 0) == "images/000/a.b_0"


def test_partial_files_are_apart_even_where_stems_meet():
    assert partial_path(7, "a", 0) == "partial/7-a_0.part"
    assert partial_path(8, "a", 0) != partial_path(7, "a", 0)


@pytest.mark.parametrize("extension", ["", "p/g", "../x", "PNG", ".png"])
def test_an_extension_from_elsewhere_is_refused(extension):
    with pytest.raises(ValueError, match="extension"):
        image_path(1, "a", 0, extension)
