"""The headers that say who asks, and how these keys are kept out of what is shown.

Two kinds of project exist (the tools' pages, "Integration Header Prepare"): with a secret, a request carries
the lower-case hex HMAC-SHA256 of `secret + nonce` under the API key; without one, the key alone.
"""

from __future__ import annotations

import base64
import hmac
import re
from collections.abc import Callable, Iterator
from functools import lru_cache


def headers(key: str, secret: str | None, nonce: int) -> dict[str, str]:
    """The authentication headers of one request, which takes a fresh `nonce`. The secret never travels."""
    if secret is None:
        return {"x-api-key": key}
    text = str(nonce)
    signed = _begun(key, secret).copy()
    signed.update(text.encode())
    return {"x-api-key": key, "x-nonce": text, "x-signature": signed.hexdigest()}


@lru_cache(maxsize=4)
def _begun(key: str, secret: str) -> hmac.HMAC:
    """The signature of the secret, to be gone on with.

    `hmac.digest` would let other threads run, and make the event loop wait for them at every request.
    """
    return hmac.new(key.encode(), secret.encode(), "sha256")


#: What a spelling of characters as numbers has, backslashes left out; honest answers hardly ever do.
_NUMBERED = (re.compile(rb"u00[2-7]"), re.compile(rb"%[2-9a-fA-F]"))

#: Printable ASCII that JSON spells as an escape; before it, whole escapes of backslashes.
_ESCAPED = re.compile(rb"((?<!\\)(?:\\\\)*)\\u00([2-7][0-9a-fA-F])")


def concealer(*secrets: str | None) -> Callable[[bytes], bytes]:
    """A function that puts `***` in the place of these secrets in bytes that may quote them.

    Found are also the spellings of JSON, of addresses (`%41` for A) and of base64. Secrets of fewer than 8
    characters are left alone: they are no real ones, and would tear holes into sound answers.
    """
    coded = [secret.encode() for secret in secrets if secret and len(secret) >= 8]
    plain = [text for secret in coded for text in (secret, *_base64(secret))]
    bare = [_bare(secret) for secret in coded]
    spelled = [re.compile(b"".join(map(_character, secret))) for secret in coded]

    def conceal(said: bytes) -> bytes:
        if b"\\u00" in said:  # what is spelled so may itself be a spelling
            said = _ESCAPED.sub(_unescaped, said)
        for text in plain:
            said = said.replace(text, b"***")
        if b"\\" in said or b"%" in said:
            # the patterns take long: first whether the answer, free of backslashes, can spell a secret at all
            text = _bare(said)
            if any(mark.search(text) for mark in _NUMBERED) or any(secret in text for secret in bare):
                for pattern in spelled:
                    said = pattern.sub(b"***", said)
        return said

    return conceal


def _bare(text: bytes) -> bytes:
    """A text without its backslashes."""
    return text.translate(None, b"\\")


def _unescaped(escape: re.Match[bytes]) -> bytes:
    """The same JSON with the character itself, behind a backslash where it needs one."""
    char = bytes([int(escape[2], 16)])
    return escape[1] + (b"\\" + char if char in b'"\\' else char)


def _base64(secret: bytes) -> Iterator[bytes]:
    """What of the secret stands in base64, which may begin at three places of a longer text."""
    for before in range(3):
        coded = base64.b64encode(bytes(before) + secret)
        sure = coded[-(-before * 8 // 6) : (before + len(secret)) * 8 // 6]
        yield from {sure, sure.translate(bytes.maketrans(b"+/", b"-_"))}


def _character(byte: int) -> bytes:
    """A pattern for one character of a secret, however it is spelled.

    Each way begins with a plain character, so that searching passes quickly over all others.
    """
    itself, digits = re.escape(bytes([byte])), b"(?i:%02x)" % byte
    return b"(?:%b|%%%b|\\\\\\\\*(?:u00%b|%b))" % (itself, digits, digits, itself)
