"""The headers that say who asks.

Two kinds of project exist (the tools' pages, "Integration Header Prepare"): with a secret, a request carries
the lower-case hex HMAC-SHA256 of `secret + nonce` under the API key; without one, the key alone.
"""

from __future__ import annotations

import hmac


def headers(key: str, secret: str | None, nonce: int) -> dict[str, str]:
    """The authentication headers of one request, which takes a fresh `nonce`. The secret never travels."""
    if secret is None:
        return {"x-api-key": key}
    text = str(nonce)
    signature = hmac.digest(key.encode(), (secret + text).encode(), "sha256").hex()
    return {"x-api-key": key, "x-nonce": text, "x-signature": signature}
