"""What holds for every id, however hostile."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath

from hypothesis import given
from hypothesis import strategies as st

from batchrun.rules.naming import image_path, partial_path, stem, stem_with_hash

HOSTILE = st.sampled_from(
    [
        "../../x",
        "/etc/passwd",
        "C:\\x",
        "\\\\host\\share",
        "CON",
        "nul.txt",
        "a\0b",
        ".",
        "..",
        "~",
        "x" * 300,
    ]
)
#: All of Unicode, lone surrogates included, and short near-misses that would collide if anything did.
ANY_ID = st.text(st.characters(), max_size=300) | HOSTILE | st.text("aA_-./ é", max_size=4)
WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)


@given(ANY_ID, st.integers(1, 10**7), st.integers(0, 999))
def test_an_image_never_leaves_its_folder_and_its_name_is_sound_everywhere(id, seq, index):
    path = image_path(seq, stem(id, 1, "key"), index, "png")
    folder, name = path.rsplit("/", 1)
    assert re.fullmatch(r"images/\d{3,}", folder)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.png", name)
    assert len(name.encode()) <= 255
    assert not WINDOWS_DEVICE.fullmatch(name.split(".")[0])
    assert PurePosixPath(path).parts == PureWindowsPath(path).parts
    assert len(PurePosixPath(partial_path(seq, stem(id, 1, "key"), index)).parts) == 2


@given(ANY_ID, ANY_ID)
def test_two_ids_never_share_a_stem(one, other):
    assert (stem(one, 1, "key") == stem(other, 1, "key")) == (one == other)
    assert (stem_with_hash(one).casefold() == stem_with_hash(other).casefold()) == (one == other)


@given(ANY_ID)
def test_an_id_that_is_anothers_stem_gets_one_of_its_own(id):
    hashed = stem_with_hash(id)
    assert stem(hashed, 1, "key") != hashed
    assert stem(stem(None, 5, id), 5, "key") != stem(None, 5, id)


@given(ANY_ID, st.integers(1, 10**6))
def test_a_stem_depends_on_nothing_but_the_row(id, line):
    assert stem(id, line, "one") == stem(id, line + 1, "two")
    assert len(stem(id, line, "key").encode()) <= 100
