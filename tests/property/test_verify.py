"""What holds for every way of cutting and spoiling a file."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.errors import OutputCorrupt
from batchrun.outputs.formats import ImageFacts
from batchrun.outputs.verify import Verifier
from tests.support.images import every_kind

FILES = every_kind()
NAMES = st.sampled_from(sorted(FILES))


def verdict(data: bytes, cuts: list[int]) -> ImageFacts | str:
    """What the verifier says of the bytes when they come in these pieces."""
    verifier = Verifier()
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    try:
        for start, end in pairwise(edges):
            verifier.feed(data[start:end])
        return verifier.finish()
    except OutputCorrupt as error:
        return error.reason


CUTS = st.lists(st.integers(0, 100_000), max_size=20)


@given(NAMES, CUTS)
def test_the_verdict_does_not_depend_on_how_the_bytes_were_cut(name, cuts):
    assert verdict(FILES[name], cuts) == verdict(FILES[name], [])


@given(NAMES, CUTS, st.integers(0, 100_000), st.integers(1, 255))
def test_the_verdict_on_a_spoiled_file_does_not_depend_on_the_cuts_either(name, cuts, at, change):
    data = bytearray(FILES[name])
    data[at % len(data)] ^= change
    assert verdict(bytes(data), cuts) == verdict(bytes(data), [])
    if name.startswith("PNG"):
        assert isinstance(verdict(bytes(data), []), str)


@given(st.binary(max_size=2000), st.sampled_from([data[:n] for data in FILES.values() for n in (0, 8, 30)]))
def test_noise_is_refused_or_understood_but_nothing_else_happens(noise, head):
    assert verdict(head + noise, [])


@pytest.mark.parametrize("name", sorted(FILES))
def test_bytes_that_come_one_at_a_time_are_the_same_file(name):
    data = FILES[name]
    assert verdict(data, list(range(len(data)))) == verdict(data, [])
