"""Every error that HTTP can raise under us becomes one of ours, and says truly whether a request went out."""

from __future__ import annotations

import asyncio
import http.client
import ssl
from collections.abc import Iterator

import aiohttp
import anyio
import pytest
from aiohttp import client_exceptions
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from batchrun.errors import NotSent, ProtocolError, ReplyLost, ServiceError
from batchrun.wiro.foreign import FOREIGN, Translated


def descendants(root: type[BaseException]) -> Iterator[type[BaseException]]:
    yield root
    for child in root.__subclasses__():
        yield from descendants(child)


#: Everything of aiohttp, and what its connections let through from the system.
FOREIGN_CLASSES = sorted(
    {
        kind
        for root in (aiohttp.ClientError, HttpProcessingError, ssl.SSLError, TimeoutError, ConnectionError)
        for kind in descendants(root)
        if kind.__module__.partition(".")[0] in ("aiohttp", "ssl", "builtins")
    }
    | {OSError, UnicodeError, UnicodeEncodeError, UnicodeDecodeError},
    key=lambda kind: kind.__name__,
)
#: Classes that aiohttp raises before the first byte of a request can go out.
BEFORE_SENDING = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.ServerFingerprintMismatch,
    aiohttp.InvalidURL,
    aiohttp.NonHttpUrlClientError,
    UnicodeError,
)


def test_the_walk_meets_every_exported_error_of_aiohttp() -> None:
    exported = {getattr(client_exceptions, name) for name in client_exceptions.__all__}
    # The one left out is a TypeError about messages of WebSockets, which are not used here.
    assert exported - set(FOREIGN_CLASSES) == {aiohttp.WSMessageTypeError}


@pytest.mark.parametrize("kind", FOREIGN_CLASSES)
def test_no_foreign_error_is_unmapped_and_the_cause_is_kept(kind: type[Exception]) -> None:
    error = kind.__new__(kind)  # their constructors differ; here only the class matters
    if isinstance(error, aiohttp.ClientResponseError):
        error.request_info, error.history = _request_info(), ()
    with pytest.raises(ServiceError) as caught, Translated("api.wiro.ai"):
        raise error
    assert caught.value.__cause__ is error
    assert str(caught.value).startswith("api.wiro.ai: ")


def _request_info() -> aiohttp.RequestInfo:
    url = URL("http://h")
    return aiohttp.RequestInfo(url, "POST", CIMultiDictProxy(CIMultiDict({"x-api-key": "k-e-y"})), url)


def test_the_headers_that_aiohttp_keeps_in_an_error_are_forgotten() -> None:
    error = aiohttp.ClientResponseError(_request_info(), (), status=400, message="bad")
    assert "k-e-y" in repr(error)
    with pytest.raises(ProtocolError), Translated("h"):
        raise error
    assert "k-e-y" not in repr(error) + repr(error.args) + repr(vars(error))


@pytest.mark.parametrize("kind", FOREIGN_CLASSES)
def test_not_sent_is_said_only_of_what_comes_before_sending(kind: type[Exception]) -> None:
    """Redirects and decoding come after an answer, whatever else their errors are a kind of."""
    late = issubclass(kind, aiohttp.RedirectClientError | UnicodeDecodeError)
    early = issubclass(kind, BEFORE_SENDING) and not late
    ours = next(ours for foreign, ours, _ in FOREIGN if issubclass(kind, foreign))
    assert (ours is NotSent) == early
    assert ours in (NotSent, ReplyLost, ProtocolError)


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), ValueError("x"), ProtocolError("ours"), asyncio.CancelledError(), KeyboardInterrupt()],
)
def test_what_is_not_the_networks_passes_untouched(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, Translated("h"):
        raise error
    assert caught.value is error
    assert error.__cause__ is None


async def test_a_deadline_from_outside_passes_through() -> None:
    with pytest.raises(TimeoutError), anyio.fail_after(0), Translated("h"):
        await anyio.sleep_forever()


def test_dead_sockets_reported_as_runtime_errors_by_uvloop_are_lost_answers() -> None:
    with pytest.raises(ReplyLost), Translated("h"):
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")


def test_errors_of_other_http_libraries_are_not_ours_to_map() -> None:
    with pytest.raises(http.client.HTTPException), Translated("h"):
        raise http.client.HTTPException
