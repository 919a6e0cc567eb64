"""The one place where what aiohttp, TLS and sockets raise becomes ours."""

from __future__ import annotations

from types import TracebackType

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict, CIMultiDictProxy

from batchrun.errors import NotSent, ProtocolError, ReplyLost, ServiceError
from batchrun.wiro import wire

#: What aiohttp and the system raise, most specific first: ours, and the words for it. NotSent stands only
#: where aiohttp raises the class before the first byte of a request can go out (read in its client.py and
#: connector.py).
FOREIGN: tuple[tuple[type[Exception], type[ServiceError], str], ...] = (
    (aiohttp.ClientConnectorDNSError, NotSent, "the name cannot be resolved"),
    (aiohttp.ClientConnectorCertificateError, NotSent, "its certificate is not valid"),
    (aiohttp.ClientSSLError, NotSent, "no secure connection"),
    (aiohttp.ClientConnectorError, NotSent, "no connection"),
    (aiohttp.ServerFingerprintMismatch, NotSent, "its certificate is not the expected one"),
    (aiohttp.ConnectionTimeoutError, NotSent, "no connection in time"),
    (aiohttp.RedirectClientError, ReplyLost, "it points to no usable address"),
    (aiohttp.InvalidURL, NotSent, "the address is not valid"),
    (aiohttp.NonHttpUrlClientError, NotSent, "the address is not http"),
    (aiohttp.ServerDisconnectedError, ReplyLost, "it closed the connection without an answer"),
    (aiohttp.ClientPayloadError, ReplyLost, "the answer broke off"),
    (aiohttp.ClientResponseError, ProtocolError, "the answer is not HTTP"),
    (HttpProcessingError, ProtocolError, "the answer is not HTTP"),
    (TimeoutError, ReplyLost, "no answer in time"),  # aiohttp's own time-outs are of this class too
    (aiohttp.ClientError, ReplyLost, "the connection broke"),
    (OSError, ReplyLost, "the connection broke"),
    (UnicodeDecodeError, ReplyLost, "the answer cannot be read"),
    (UnicodeError, NotSent, "the name cannot be resolved"),  # a label that IDNA does not take, met at look-up
    (RuntimeError, ReplyLost, "the connection broke"),  # uvloop reports some dead sockets with this class
)


class NotPublic(OSError):
    """An address inside somebody's network, which no output of the service has a reason to name."""


class Translated:
    """Turns what aiohttp, TLS and sockets raise into our errors, the cause kept; cancellation just passes."""

    __slots__ = ("_host",)

    def __init__(self, host: str) -> None:
        self._host = host

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, _FOREIGN_CLASSES):
            raise _ours(error, self._host) from error


_FOREIGN_CLASSES = tuple(foreign for foreign, _, _ in FOREIGN)


def _ours(error: Exception, host: str) -> ServiceError:
    if isinstance(error, aiohttp.ClientResponseError):
        _forget_headers(error)
    if isinstance(getattr(error, "os_error", None), NotPublic):
        return ProtocolError(f"{host} is no public address: nothing is fetched from it")
    ours, words = next((ours, words) for foreign, ours, words in FOREIGN if isinstance(error, foreign))
    reason = wire.snippet(str(getattr(error, "strerror", None) or type(error).__name__))
    return ours(f"{host}: {words} ({reason})", detail=reason)


def _forget_headers(error: aiohttp.ClientResponseError) -> None:
    """Take the request's headers, keys among them, out of an error whose `repr` may come to be logged."""
    bare = error.request_info._replace(headers=CIMultiDictProxy(CIMultiDict()))
    error.request_info, error.args = bare, (bare, error.history)
