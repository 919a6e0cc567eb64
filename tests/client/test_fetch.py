"""Files come whole, go on only where that is proven to be sound, and never cost us a secret."""

from __future__ import annotations

import asyncio
import errno
import json
import math
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from yarl import URL

from batchrun.errors import (
    NotSent,
    OutputGone,
    ProtocolError,
    RateLimited,
    ReplyLost,
    ServerFault,
    ServiceError,
)
from batchrun.settings import Credentials
from batchrun.wiro.client import Wiro
from batchrun.wiro.files import _followed, is_public
from batchrun.wiro.manners import Deadlines
from tests.client import raw
from tests.client.internet import PORT, PUBLIC, PUBLIC6
from tests.client.raw import Handler, Raw, Request, answer, answering, sending, serving

HASTY = Deadlines(connect_s=2.0, silence_s=0.2)
CONTENT = bytes(range(256)) * 4000
ETAG = '"abc"'
PATH = "/cdn/0.png"


@asynccontextmanager
async def fetching(handle: Handler, deadlines: Deadlines = HASTY) -> AsyncIterator[tuple[Wiro, Raw]]:
    async with serving(handle) as server, Wiro(server.credentials, deadlines=deadlines) as wiro:
        yield wiro, server


async def fetched(wiro: Wiro, url: str, *, start: int = 0, etag: str | None = None) -> tuple[int, bytes]:
    """Where the bytes begin, and the bytes."""
    async with wiro.fetch(url, start=start, etag=etag) as download:
        return download.start, b"".join([chunk async for chunk in download.chunks])


async def refused(handle: Handler, path: str = PATH) -> ServiceError | OutputGone:
    async with fetching(handle) as (wiro, server):
        with pytest.raises((ServiceError, OutputGone)) as caught:
            await fetched(wiro, server.origin + path)
    return caught.value


def ranged(content: bytes = CONTENT, etag: str = ETAG) -> Handler:
    """A server that honours Range and If-Range."""

    async def handle(request: Request, writer: asyncio.StreamWriter) -> bool:
        asked = request.headers.get("range")
        if asked is None or request.headers.get("if-range", etag) != etag:
            writer.write(answer(content, ETag=etag))
        else:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            part = f"bytes {start}-{len(content) - 1}/{len(content)}"
            writer.write(answer(content[start:], 206, ETag=etag, Content_Range=part))
        return True

    return handle


# --- whole files ---


async def test_a_file_comes_whole_with_what_the_server_says_about_it() -> None:
    async with fetching(answering(CONTENT, ETag=ETAG, Content_Type="image/png")) as (wiro, server):
        async with wiro.fetch(server.origin + PATH) as download:
            assert (download.status, download.start, download.total_bytes) == (200, 0, len(CONTENT))
            assert (download.etag, download.content_type) == (ETAG, "image/png")
            assert b"".join([chunk async for chunk in download.chunks]) == CONTENT
        await fetched(wiro, server.origin + PATH)
        assert server.connections == 1


async def test_no_keys_and_no_cookies_go_to_the_cdn_and_bytes_are_asked_for_as_they_are() -> None:
    async with fetching(answering(b"x", Set_Cookie="a=b")) as (wiro, server):
        await fetched(wiro, server.origin + PATH)
        await fetched(wiro, server.origin + PATH)
    for request in server.requests:
        assert request.headers.keys() == {"host", "user-agent", "accept", "accept-encoding"}
        assert request.headers["accept-encoding"] == "identity"
        assert raw.KEY not in str(request)


async def test_a_file_without_a_declared_length_comes_until_the_end() -> None:
    endless = sending(b"HTTP/1.1 200 X\r\n\r\n", CONTENT)
    async with fetching(endless) as (wiro, server), wiro.fetch(server.origin + PATH) as download:
        assert download.total_bytes is None
        assert b"".join([chunk async for chunk in download.chunks]) == CONTENT


async def test_an_empty_file_is_a_file() -> None:
    async with fetching(answering(b"")) as (wiro, server):
        assert await fetched(wiro, server.origin + PATH) == (0, b"")


async def test_a_packed_file_is_refused_not_unpacked() -> None:
    assert isinstance(await refused(answering(b"\x1f\x8b", Content_Encoding="gzip")), ProtocolError)


# --- going on ---


async def test_the_rest_of_a_file_comes_where_its_etag_proves_it() -> None:
    async with (
        fetching(ranged()) as (wiro, server),
        wiro.fetch(server.origin + PATH, start=1000, etag=ETAG) as download,
    ):
        assert (download.status, download.start, download.total_bytes) == (206, 1000, len(CONTENT))
        assert b"".join([chunk async for chunk in download.chunks]) == CONTENT[1000:]
    [request] = server.requests
    assert (request.headers["range"], request.headers["if-range"]) == ("bytes=1000-", ETAG)


@pytest.mark.parametrize("etag", [None, "", 'W/"abc"', "abc", '"a\r\nX: y"'])
async def test_without_a_strong_etag_the_whole_file_is_asked_for(etag: str | None) -> None:
    async with fetching(ranged()) as (wiro, server):
        assert await fetched(wiro, server.origin + PATH, start=1000, etag=etag) == (0, CONTENT)
    assert "range" not in server.requests[0].headers


@pytest.mark.parametrize(
    "part",
    [
        answer(
            CONTENT[1000:], 206, ETag='"other"', Content_Range=f"bytes 1000-{len(CONTENT) - 1}/{len(CONTENT)}"
        ),
        answer(CONTENT[1000:], 206, Content_Range=f"bytes 1000-{len(CONTENT) - 1}/{len(CONTENT)}"),  # no ETag
        answer(CONTENT[999:], 206, ETag=ETAG, Content_Range=f"bytes 999-{len(CONTENT) - 1}/{len(CONTENT)}"),
        answer(CONTENT[1000:], 206, ETag=ETAG),
        answer(CONTENT[1000:], 206, ETag=ETAG, Content_Range="bytes gibberish"),
        answer(b"", 416, Content_Range="bytes */10"),
    ],
)
async def test_a_part_that_is_not_proven_to_be_of_the_same_file_is_begun_anew(part: bytes) -> None:
    async def handle(request: Request, writer: asyncio.StreamWriter) -> bool:
        writer.write(part if "range" in request.headers else answer(CONTENT))
        return True

    async with fetching(handle) as (wiro, server):
        assert await fetched(wiro, server.origin + PATH, start=1000, etag=ETAG) == (0, CONTENT)
        assert len(server.requests) == 2


async def test_a_server_that_ignores_ranges_or_has_another_file_gives_it_whole() -> None:
    for handle in (answering(CONTENT), ranged(etag='"new"')):
        async with fetching(handle) as (wiro, server):
            assert await fetched(wiro, server.origin + PATH, start=1000, etag=ETAG) == (0, CONTENT)
            assert len(server.requests) == 1


@pytest.mark.parametrize("status", [204, 206, 304, 300])
async def test_an_answer_that_was_not_asked_for_is_not_taken_for_the_file(status: int) -> None:
    assert isinstance(await refused(answering(b"", status, Content_Range="bytes 0-0/1")), ProtocolError)


# --- files that break off ---


@pytest.mark.parametrize("end", ["close", "reset", "stall"])
async def test_what_came_before_a_break_is_kept_and_the_break_is_told(end: str) -> None:
    async def handle(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(CONTENT[:1000], length=len(CONTENT)))
        await writer.drain()
        if end == "stall":
            await asyncio.Event().wait()
        if end == "reset":
            await got.wait()  # a reset drops what is still on its way
            raw.abort(writer)

    got = asyncio.Event()
    pieces = bytearray()

    async def take(chunks: AsyncIterator[bytes]) -> None:
        async for chunk in chunks:
            pieces.extend(chunk)
            got.set()

    async with fetching(handle) as (wiro, server), wiro.fetch(server.origin + PATH) as download:
        with pytest.raises(ReplyLost):
            await take(download.chunks)
    assert pieces == CONTENT[:1000]


async def test_a_silence_is_waited_out_as_long_as_the_caller_says() -> None:
    async with fetching(raw.silence, Deadlines(silence_s=math.inf)) as (wiro, server):
        with pytest.raises(ReplyLost):
            async with wiro.fetch(server.origin + PATH, silence_s=0.2):
                pass


async def test_a_drip_is_cut_by_the_total_deadline() -> None:
    async def drip(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"", length=10**6))
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with fetching(drip, Deadlines(fetch_s=0.2)) as (wiro, server):
        with pytest.raises(ReplyLost, match="in time"):
            await fetched(wiro, server.origin + PATH)


@pytest.mark.parametrize("handle", [raw.hang_up, raw.reset, raw.silence])
async def test_no_answer_at_all_is_a_lost_answer(handle: Handler) -> None:
    assert isinstance(await refused(handle), ReplyLost)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "disk full"), TimeoutError(), RuntimeError("ours"), KeyError("x")]
)
async def test_errors_of_whoever_takes_the_bytes_pass_untouched(error: Exception) -> None:
    """A full disk must not be taken for a broken connection."""

    async def fail(wiro: Wiro, url: str) -> None:
        async with wiro.fetch(url) as download:
            await anext(aiter(download.chunks))
            raise error

    async with fetching(answering(CONTENT)) as (wiro, server):
        with pytest.raises(type(error)) as caught:
            await fail(wiro, server.origin + PATH)
        assert caught.value is error
        assert await fetched(wiro, server.origin + PATH) == (0, CONTENT)


# --- refusals ---


@pytest.mark.parametrize("status", [403, 404, 410])
async def test_a_file_that_is_gone_says_so(status: int) -> None:
    error = await refused(answering(b"", status))
    assert isinstance(error, OutputGone)
    assert error.status == status


async def test_waits_asked_for_are_told() -> None:
    slow = await refused(answering(b"", 429, Retry_After="4"))
    assert isinstance(slow, RateLimited)
    assert slow.retry_after_s == 4.0
    down = await refused(answering(b"", 503, Retry_After="5"))
    assert isinstance(down, ServerFault)
    assert (down.status, down.retry_after_s) == (503, 5.0)


# --- redirects and addresses ---


def redirecting(target: str, status: int = 302) -> Handler:
    """`/cdn` redirects to `target`, everything else is the file."""

    async def handle(request: Request, writer: asyncio.StreamWriter) -> bool:
        writer.write(answer(b"", status, Location=target) if request.path == PATH else answer(CONTENT))
        return True

    return handle


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed(status: int) -> None:
    async with fetching(redirecting("../elsewhere?x=1", status)) as (wiro, server):
        assert await fetched(wiro, server.origin + PATH) == (0, CONTENT)
    assert [request.path for request in server.requests] == [PATH, "/elsewhere?x=1"]


async def test_redirects_without_end_are_given_up() -> None:
    async with fetching(redirecting(PATH)) as (wiro, server):
        with pytest.raises(ProtocolError, match="without end"):
            await fetched(wiro, server.origin + PATH)
        assert len(server.requests) == 6


@pytest.mark.parametrize(
    "target", ["ftp://host/x", "file:///etc/passwd", "", "http://", "http://[::1", "//:80/"]
)
async def test_a_redirect_to_no_http_address_is_refused(target: str) -> None:
    assert isinstance(await refused(redirecting(target)), ProtocolError)


def test_a_redirect_may_go_from_http_to_https_but_not_back() -> None:
    plain, safe = URL("http://a.example/x"), URL("https://a.example/x")
    assert _followed(plain, "https://b.example/y") == URL("https://b.example/y")
    assert _followed(safe, "//b.example/y") == URL("https://b.example/y")
    with pytest.raises(ProtocolError, match="unprotected"):
        _followed(safe, "http://a.example/x")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "0.png",
        "/etc/passwd",
        "file:///etc/passwd",
        "ftp://host/x",
        "javascript:alert(1)",
        "http://",
        "http://[::1",
        "https://host:99999/x",
        "http://\0/x",
        "data:image/png;base64,AAAA",
        "//host/x",
    ],
)
async def test_an_address_that_is_not_http_is_refused(url: str) -> None:
    async with Wiro(Credentials("k", None, "http://127.0.0.1:9/v1")) as wiro:
        with pytest.raises(ServiceError) as caught:
            await fetched(wiro, url)
    assert isinstance(caught.value, ProtocolError | NotSent)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0"])
async def test_the_real_service_leads_to_no_address_inside(host: str) -> None:
    async with serving(answering(CONTENT)) as server, Wiro(Credentials("k", None)) as wiro:
        with pytest.raises((ProtocolError, NotSent)) as caught:
            await fetched(wiro, f"http://{host}:{server.port}/x")
        assert server.connections == 0
    if host in ("127.0.0.1", "localhost"):
        assert isinstance(caught.value, ProtocolError)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("1.1.1.1", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # where clouds tell machines their secrets
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("fec0::1", False),
        ("64:ff9b:1::7f00:1", False),
        ("2001:0:4136:e378:8000:63bf:80ff:fffe", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:1.1.1.1", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::101:101", True),
        ("2002:7f00:1::", False),
        ("::7f00:1", False),
        ("ff02::1", False),
    ],
)
def test_public_addresses_are_told_from_inner_ones_in_every_dress(address: str, expected: bool) -> None:
    assert is_public(address) is expected


#: An address → the public hosts that are asked; None after them: an address inside is met, and left alone.
JOURNEYS: dict[str, list[str | None]] = {
    "cdn.example/file": [PUBLIC],
    "cdn6.example/file": [PUBLIC6],
    "cdn.example/redirect/public": [PUBLIC, PUBLIC6],
    "both.example/file": [PUBLIC],  # one name, an inner and a public address
    "two.example/file": [None],
    "loop.example/file": [None],
    "loop6.example/file": [None],
    "inner.example/file": [None],
    "inner6.example/file": [None],
    "metadata.example/file": [None],
    "localhost/file": [None],
    "2130706433/file": [None],  # 127.0.0.1 in other spellings
    "0x7f000001/file": [None],
    "127.1/file": [None],
    "[fec0::1]/file": [None],
    "[fd00::1]/file": [None],
    "[::ffff:10.0.0.1]/file": [None],
    "cdn.example/redirect/inner": [PUBLIC, None],
    "cdn.example/redirect/loop": [PUBLIC, None],
    "cdn.example/redirect/loop6": [PUBLIC, None],
    "cdn.example/redirect/metadata": [PUBLIC, None],
    "cdn.example/redirect/chain": [PUBLIC, PUBLIC6, None],
    "cdn.example/redirect/long-chain": [PUBLIC, PUBLIC6, PUBLIC6, None],
    "cdn.example/redirect/rebound": [PUBLIC, PUBLIC, None],
}
NAMESPACES = ("unshare", "--map-root-user", "--net", "--mount")


@pytest.fixture(scope="module")
def journeys() -> dict[str, tuple[str, list[str]]]:
    """What came of fetching each address in an internet of our own, and the hosts that were reached."""
    if shutil.which("ip") is None or subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode:
        pytest.skip("needs network namespaces")
    urls = {f"http://{host}:{PORT}/{path}": name for name in JOURNEYS for host, path in [name.split("/", 1)]}
    command = [*NAMESPACES, sys.executable, "-m", "tests.client.internet", *urls]
    told = json.loads(subprocess.run(command, stdout=subprocess.PIPE, timeout=60, check=True).stdout)
    return {urls[url]: came for url, came in told.items()}


@pytest.mark.parametrize("name", JOURNEYS)
def test_whatever_a_name_or_a_chain_of_redirects_leads_to_only_public_addresses_are_connected_to(
    name: str, journeys: dict[str, tuple[str, list[str]]]
) -> None:
    came, reached = journeys[name]
    assert reached == [host for host in JOURNEYS[name] if host is not None]
    if None in JOURNEYS[name]:
        assert "no public address" in came or "not valid" in came
    else:
        assert came == "whole"
