"""The service is asked over TLS, as in earnest: its certificate is checked, against a user's own ones too."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest
import trustme

from tests.support.command import TOOL, Here, Wiro, simulator, until


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextmanager
def over_tls(wiro: Wiro, authority: trustme.CA) -> Iterator[None]:
    """Speak TLS before a simulator until the end of the block; `wiro.env` names the new addresses."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    port = urlsplit(wiro.env["WIRO_API_BASE_URL"]).port

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onwards = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(_pass_on(reader, onwards[1]), _pass_on(onwards[0], writer))

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(connected, "127.0.0.1", 0, ssl=context))
    host = f"localhost:{server.sockets[0].getsockname()[1]}"
    thread = Thread(target=loop.run_forever)
    thread.start()
    try:
        wiro.env |= {"WIRO_API_BASE_URL": f"https://{host}/v1", "WIRO_SOCKET_URL": f"wss://{host}/socket/v1"}
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.mark.parametrize("track", ["auto", "websocket"])
def test_a_run_over_tls_with_a_certificate_of_an_authority_of_the_user_s_own(
    tmp_path: Path, authority: trustme.CA, track: str
) -> None:
    with simulator() as wiro, over_tls(wiro, authority):
        here = Here(tmp_path, wiro)
        trusted = tmp_path / "authority.pem"
        authority.cert_pem.write_to_path(str(trusted))
        done = here.run(here.rows(4), "--track", track, "--log", "log", env={"SSL_CERT_FILE": str(trusted)})
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(here.images()) == 4
        assert "events cannot be had" not in (tmp_path / "log").read_text()


def test_a_certificate_that_nobody_trusts_is_said_to_be_why_the_run_waits_and_nothing_is_sent(
    tmp_path: Path, authority: trustme.CA
) -> None:
    with simulator() as wiro:
        with over_tls(wiro, authority):
            here = Here(tmp_path, wiro)
            process = here.start("run", here.rows(4), "--tool", TOOL, "--set", "samples=1", "--log", "log")
            log = tmp_path / "log"
            until(lambda: log.exists() and "cannot be reached" in log.read_text(), "it waits")
            process.terminate()
            told, _ = process.communicate(timeout=30)
        assert "the service cannot be reached: https://localhost:" in told
        assert "its certificate is not valid" in told
        assert process.returncode == 3
        assert wiro.stats()["requests"] == {}
