"""The CDN sends files as HTTP says, and breaks them as the faults say."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import aiohttp
import pytest

from tests.simulator.wire import OUTPAINT, PORTRAIT, Caller, simulated


async def an_output(wire: Caller, **body: Any) -> dict[str, Any]:
    """The first output of a finished task."""
    return (await wire.detail(await wire.run(**body)))["outputs"][0]


async def test_a_file_has_its_length_its_type_and_its_md5_as_etag() -> None:
    async with simulated() as wire:
        output = await an_output(wire)
        status, headers, body = await wire.get(output["url"])
        assert status == 200
        assert headers["Content-Type"] == output["contenttype"] == "image/png"
        assert headers["Content-Length"] == output["size"] == str(len(body))
        assert headers["Etag"] == f'"{hashlib.md5(body).hexdigest()}"'
        assert headers["Accept-Ranges"] == "bytes"


@pytest.mark.parametrize(("kind", "starts"), [("opaque", '"v1-'), ("none", "")])
async def test_etags_may_be_opaque_or_missing(kind, starts) -> None:
    async with simulated(etag=kind) as wire:
        _, headers, _ = await wire.get((await an_output(wire))["url"])
        assert headers.get("Etag", "").startswith(starts)
        assert ("Etag" in headers) is (kind == "opaque")


async def test_ranges_are_answered_with_their_part() -> None:
    async with simulated() as wire:
        url = (await an_output(wire))["url"]
        _, headers, whole = await wire.get(url)
        total = len(whole)
        for wanted, part in (("10-", whole[10:]), ("10-19", whole[10:20]), ("-5", whole[-5:])):
            status, got, body = await wire.get(url, Range=f"bytes={wanted}")
            assert (status, body) == (206, part)
            assert got["Content-Range"].endswith(f"/{total}")
        assert (await wire.get(url, **{"Range": "bytes=10-", "If-Range": headers["Etag"]}))[0] == 206
        assert (await wire.get(url, **{"Range": "bytes=10-", "If-Range": '"other"'}))[::2] == (200, whole)
        status, got, _ = await wire.get(url, Range=f"bytes={total}-")
        assert (status, got["Content-Range"]) == (416, f"bytes */{total}")
        assert (await wire.get(url, Range="lines=1-2"))[0] == 200


async def test_the_same_request_gets_the_same_bytes_and_another_seed_others() -> None:
    async with simulated() as wire, simulated() as other:
        one = await wire.get((await an_output(wire, seed="1"))["url"])
        again = await other.get((await an_output(other, seed="1"))["url"])
        different = await wire.get((await an_output(wire, seed="2"))["url"])
        assert one[2] == again[2] != different[2]


async def test_addresses_cannot_be_guessed() -> None:
    async with simulated() as wire:
        url = (await an_output(wire))["url"]
        key = url.split("/")[4]
        for wrong in (
            key[:-1] + "_",
            "x",
            "1-2-3",
            key.replace("-0-0-", "-9-0-"),
            key.replace("-0-0-", "-0-1-"),
        ):
            assert (await wire.get(url.replace(key, wrong)))[0] == 404


@pytest.mark.parametrize(
    ("name", "status"),
    [("cdn-500", 500), ("cdn-404-once", 404), ("cdn-html", 200), ("cdn-empty", 200), ("cdn-redirect", 302)],
)
async def test_a_bad_answer_is_followed_by_the_file(name, status) -> None:
    async with simulated(f"{name}@1") as wire:
        output = await an_output(wire)
        first = await wire.get(output["url"])
        assert first[0] == status
        assert len(first[2]) != int(output["size"])
        assert len((await wire.get(output["url"]))[2]) == int(output["size"])


@pytest.mark.parametrize("name", ["cdn-truncated", "cdn-reset", "cdn-huge"])
async def test_a_body_may_break_off(name) -> None:
    async with simulated(f"{name}@1") as wire:
        url = (await an_output(wire))["url"]
        with pytest.raises(aiohttp.ClientError):
            await wire.get(url)
        assert (await wire.get(url))[0] == 200


async def test_a_body_may_stall() -> None:
    async with simulated("cdn-stall") as wire:
        url = (await an_output(wire))["url"]
        async with wire.session.get(url) as response:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(response.read(), 0.2)


async def test_a_body_may_drip_or_come_without_its_length() -> None:
    async with simulated("cdn-drip@1", "cdn-no-length@2") as wire:
        output = await an_output(wire)
        for has_length in (True, False):
            status, headers, body = await wire.get(output["url"])
            assert (status, len(body)) == (200, int(output["size"]))
            assert ("Content-Length" in headers) is has_length


@pytest.mark.parametrize(
    ("tool", "body"),
    [(None, {}), (PORTRAIT, {"inputImageUrl": "http://x"}), (OUTPAINT, {"inputImageUrl": "http://x"})],
)
async def test_wrong_bytes_have_the_right_length_and_the_true_etag(tool, body) -> None:
    async with simulated("cdn-wrong-bytes@1") as wire:
        output = await an_output(wire, **({"tool": tool} if tool else {}), **body)
        _, bad_headers, bad = await wire.get(output["url"])
        _, headers, good = await wire.get(output["url"])
        assert len(bad) == len(good)
        assert bad != good
        assert bad_headers["Etag"] == headers["Etag"]


async def test_an_expired_address_is_dead_for_good_and_detail_gives_a_fresh_one() -> None:
    async with simulated("cdn-403") as wire:
        task = await wire.run(samples=1)
        (stale,) = (await wire.detail(task))["outputs"]
        assert [(await wire.get(stale["url"]))[0] for _ in range(2)] == [403, 403]
        (fresh,) = (await wire.detail(task))["outputs"]
        assert fresh["url"] != stale["url"]
        assert (await wire.get(fresh["url"]))[0] == 200


async def test_files_may_be_gone_for_good_and_their_task_then_has_no_outputs() -> None:
    async with simulated("cdn-gone@1") as wire:
        task = await wire.run(samples=1)
        (output,) = (await wire.detail(task))["outputs"]
        assert [(await wire.get(output["url"]))[0] for _ in range(2)] == [410, 410]
        shown = await wire.detail(task)
        assert (shown["pexit"], shown["outputs"]) == ("0", [])


async def test_a_redirect_leads_to_the_file_and_a_loop_nowhere() -> None:
    async with simulated("cdn-redirect@1", "cdn-redirect-loop@3", "cdn-redirect-scheme@4") as wire:
        url = (await an_output(wire))["url"]
        async with wire.session.get(url) as response:
            assert response.status == 200
            assert len(response.history) == 1
        with pytest.raises(aiohttp.TooManyRedirects):
            await wire.session.get(url)
        assert (await wire.get(url))[1]["Location"].startswith("ftp://")


async def test_a_range_may_be_ignored_or_answered_from_another_version() -> None:
    async with simulated("cdn-ignore-range@1", "cdn-other-etag@2") as wire:
        url = (await an_output(wire))["url"]
        _, headers, whole = await wire.get(url)
        assert (await wire.get(url, Range="bytes=10-"))[::2] == (200, whole)
        status, other, part = await wire.get(url, Range="bytes=10-")
        assert status == 206
        assert other["Etag"] != headers["Etag"]
        assert part != whole[10:]


async def test_outputs_may_declare_a_wrong_size_or_type() -> None:
    async with simulated("cdn-wrong-size@1", "cdn-wrong-type@2") as wire:
        output = await an_output(wire)
        assert len((await wire.get(output["url"]))[2]) != int(output["size"])
        output = await an_output(wire, seed="2")
        _, headers, body = await wire.get(output["url"])
        assert headers["Content-Type"] == output["contenttype"] == "image/jpeg"
        assert body.startswith(b"\x89PNG")
