"""Who may speak to the simulator: API keys, signatures, and the firewall's dislike of library User-Agents.

A signature is the lower-case hex HMAC-SHA256 with the API key as key and secret + nonce as message; an old
nonce is fine, it may be any integer (wiro-api.md, "Authentication").
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from batchrun.simulator.envelope import KEY_REFUSED, SIGNATURE_REFUSED, Refusal

#: Default User-Agents of libraries which the firewall before the service turns away.
UNWELCOME_AGENTS = ("python-urllib/", "python-requests/", "python/")


def welcome(headers: Mapping[str, str]) -> bool:
    """Whether the firewall lets the request's User-Agent pass."""
    return not headers.get("User-Agent", "").lower().startswith(UNWELCOME_AGENTS)


def check(headers: Mapping[str, str], *, key: str, secret: str | None) -> None:
    """Raise Refusal (HTTP 401) unless the headers carry `key` and, given a secret, a true signature."""
    if not _same(headers.get("x-api-key", ""), key):
        raise Refusal(KEY_REFUSED, "Your API key is not valid.", status=401)
    if secret is None:
        return
    nonce = headers.get("x-nonce", "")
    expected = hmac.new(key.encode(), (secret + nonce).encode(), hashlib.sha256).hexdigest()
    if not _is_integer(nonce) or not _same(headers.get("x-signature", ""), expected):
        raise Refusal(SIGNATURE_REFUSED, "Your signature is not valid.", status=401)


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()
