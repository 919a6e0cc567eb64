"""A fuzzer's first inputs: example jobs, the tools' pages, the simulator's answers, images of every kind."""

from __future__ import annotations

import asyncio
import gzip
import json
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from batchrun.simulator.server import Simulator
from batchrun.tools.catalog import load
from batchrun.wiro import signing
from fuzz.parsers import STATUSES
from tests.support.images import every_kind
from tests.support.tool_pages import PAGE, collapsed, line_form

JOBS = Path(__file__).parent.parent / "jobs"

_EXPAND = (
    "1..4",
    "4..1",
    "0..100..10",
    "random",
    '["a", "b"]',
    "[1, 2.50, null]",
    "a|b|c",
    "10,20",
    "1.5..3",
)
_JOB = """
tool = "instant-id"
manifest = "rows.csv"
concurrency = 8
extra = "keep"
skip_invalid = true
max_row_bytes = 1000
[set]
samples = 1
scale = 7.50
loras = [1, "2", {a = 1979-05-27}]
[map]
prompt = "caption"
[expand]
seed = "1..4"
repeat = 2
"""
#: Words that mean something to a parser: a fuzzer finds the rest by itself.
WORDS: dict[str, tuple[str, ...]] = {
    "manifest-csv": ('"', '""', '","', "\r\n", "\ufeff", "\u2028"),
    "manifest-tsv": ('"', '""', '"\t"', "\r\n", "\ufeff", "\u2028"),
    "manifest-jsonl": ('{"', '": ', '"}\n', "[[[[", "1e999", "NaN", "\\ud800", "\\u0000"),
    "manifest-json": ('[{"', '": ', '"},', "}]", "[[[[", "1e999", "NaN", "\\ud800", "\\u0000"),
    "expand": ("..", "|", '["', '", "', "]", "random", "999999999999999999"),
    "image": ("IHDR", "IDAT", "IEND", "PLTE", "RIFF", "WEBP", "VP8 ", "VP8L", "VP8X", "GIF89a", "ftyp"),
    "page": (
        "## Basic tool info", "## Tool Inputs:", "  - name: ", " label: ", " help: ", " type: text default: ",
        " options:", ' - value: "', " description:", " triggerwords: [", " generatesettings: [{",
        "Run Task Endpoint (POST): https://x/Run/a/b",
    ),
    "wire": (
        '"result"', '"errors"', '"code"', '"message"', '"taskid"', '"tasklist"', '"status"', '"pexit"',
        '"outputs"', '"totalcost"', '"parameters"', '"tool"', '"dynamicprice"', "true", "null", "1e999",
        "\\ud800",
    ),
    "job": ("manifest", "[set]", "[map]", "[expand]", "repeat", "1..4", "inf", "1979-05-27", '"""'),
}  # fmt: skip


def seeds() -> dict[str, list[bytes]]:
    """The first inputs of every parser, by its name; needs the loopback interface."""
    files = {file.name: file.read_bytes() for file in sorted(JOBS.iterdir()) if file.is_file()}
    csv = [content for name, content in files.items() if name.endswith(".csv")]
    jsonl = [content for name, content in files.items() if name.endswith(".jsonl")]
    quoted = b'id,prompt,seed\r\na,"two\r\nlines, ""quoted""",1..4\r\n'
    pages = [PAGE, collapsed(PAGE), *(line_form(tool) for tool in load().tools)]
    return {
        "manifest-csv": _packed([*csv, quoted, b"\xef\xbb\xbfprompt\n=cmd()\n"]),
        "manifest-tsv": _packed([content.replace(b",", b"\t") for content in [*csv, quoted]]),
        "manifest-jsonl": _packed([*jsonl, b'{"seed": 7.50, "loras": [1, {"a": null}]}\n']),
        "manifest-json": _packed([b"[" + content.strip().replace(b"\n", b",\n") + b"]" for content in jsonl]),
        "job": [_JOB.encode(), *(content for name, content in files.items() if name.endswith(".toml"))],
        "expand": [text.encode() for text in _EXPAND],
        "page": [page.encode() for page in pages],
        "wire": [bytes([number % len(STATUSES)]) + body for body in _answers() for number in (0, 10)],
        "image": [content for content in every_kind().values() if len(content) <= 8192],
    }


def _packed(contents: Iterable[bytes]) -> list[bytes]:
    """The contents as they are, and one of them packed."""
    plain = list(contents)
    return [*plain, gzip.compress(plain[0], mtime=0)]


def _answers() -> list[bytes]:
    """What the service says to each of the calls, well and badly."""
    return [*asyncio.run(_asked()), b"<html><h1>502 Bad Gateway</h1></html>"]


async def _asked() -> list[bytes]:
    tool = load().find("Retro-Cartoons")
    owner, slug = tool.run_path.split("/")[-2:]
    async with Simulator(seconds=0, faults=["task-odd-types@2"]) as simulator:

        async def asked(path: str, **body: Any) -> bytes:
            return await asyncio.to_thread(_post, simulator, path, body)

        return [
            await asked(tool.run_path, prompt="a cat", samples=1),
            await asked(tool.run_path, prompt="a dog", samples=1),
            await asked(tool.run_path),
            await asked("/Run/nobody/nothing"),
            *[await asked("/Task/Detail", taskid=str(task.id)) for task in simulator.tasks],
            await asked("/Task/List", type="model", sort="id", order="DESC", start="0", limit="100"),
            await asked("/Tool/Detail", slugowner=owner, slugproject=slug),
            await asked("/Task/Cancel", taskid="1"),
        ]


def _post(simulator: Simulator, path: str, body: dict[str, Any]) -> bytes:
    headers = signing.headers(simulator.key, simulator.secret, 1)
    request = urllib.request.Request(  # noqa: S310  the simulator's own address
        simulator.base_url + path,
        json.dumps(body).encode(),
        {**headers, "Content-Type": "application/json", "User-Agent": "fuzz/1"},
    )
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        content: bytes = answer.read()
    return content
