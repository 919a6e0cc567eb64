"""What the fuzzers of `make fuzz` hold every parser to is true of their seeds and of what they found."""

from __future__ import annotations

import pytest

from fuzz.parsers import PARSERS
from fuzz.seeds import WORDS, seeds

#: Inputs that broke a promise, by parser.
FOUND = [
    ("manifest-csv", b'"a\nb",a\nx\ny,"c"\n"'),  # a column's name on two lines, in a message on one
    ("manifest-tsv", "a\u2028b\ta\u2028b\nx\n".encode()),
    ("manifest-csv", b"y" * 3000 + b",prompt\nq,a\n"),  # a message as long as the header
    ("job", b'manifest = "m.csv"\nconcurrency = """a\nb"""\n'),
    ("job", b'manifest = "m.csv"\n"a\\nb" = 1\n'),
    (
        "page",
        b"## Basic tool info\nTool name: a\nRun Task Endpoint (POST): https://a/Run/b/c\n## Tool Inputs:",
    ),
    ("job", b"manifest = m\r0\n"),
    ("manifest-jsonl", b"{" + b",".join(b'"%s": 1' % (b"k" * 1500) for _ in range(2)) + b"}\n"),
]


@pytest.fixture(scope="module")
def first() -> dict[str, list[bytes]]:
    """The seeds of every parser."""
    return seeds()


@pytest.mark.parametrize("name", PARSERS)
def test_every_parser_keeps_its_promises_for_its_own_seeds(name: str, first: dict[str, list[bytes]]) -> None:
    assert WORDS[name]
    assert len(first[name]) >= 3
    for content in first[name]:
        PARSERS[name](content)
        PARSERS[name](content[: len(content) // 2])


@pytest.mark.parametrize(("name", "content"), FOUND)
def test_what_was_once_found_stays_mended(name: str, content: bytes) -> None:
    PARSERS[name](content)
