"""Requests are signed as the tools' pages say, and keys are kept out of what answers say."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.wiro import signing


def test_signature_is_the_hmac_of_secret_and_nonce_under_the_key() -> None:
    """The expected text comes from `printf 's3cret1734513807' | openssl dgst -sha256 -hmac 'k3y'`."""
    assert signing.headers("k3y", "s3cret", 1734513807) == {
        "x-api-key": "k3y",
        "x-nonce": "1734513807",
        "x-signature": "25dfe2faff541ae9abed04b793372d187bf3b8415e50ed135166e2c171e9740d",
    }


def test_a_key_only_project_sends_the_key_and_nothing_else() -> None:
    assert signing.headers("k3y", None, 1) == {"x-api-key": "k3y"}


KEY, PROJECT_SECRET = 'k3y-Ab+/9_z.~Q7"x', "s3cr3t-0123456789abcdef"


def escaped(text: str) -> str:
    """Every character as an escape of JSON."""
    return "".join(f"\\u{ord(char):04X}" for char in text)


@pytest.mark.parametrize("secret", [KEY, PROJECT_SECRET])
@pytest.mark.parametrize(
    "spell",
    [
        str,
        lambda secret: json.dumps(secret)[1:-1],
        lambda secret: json.dumps(json.dumps(secret))[3:-3],
        escaped,
        lambda secret: escaped(secret)[:-6] + secret[-1:],
        lambda secret: escaped(quote(secret, safe="")),
        lambda secret: escaped(escaped(secret)),
        lambda secret: quote(secret, safe=""),
        lambda secret: "".join(f"%{ord(char):02x}" for char in secret),
        lambda secret: base64.b64encode(secret.encode()).decode(),
        lambda secret: base64.urlsafe_b64encode(b"a" + secret.encode()).decode(),
        lambda secret: base64.b64encode(b"ab" + secret.encode() + b"c").decode(),
    ],
)
def test_a_key_is_concealed_however_an_answer_spells_it(secret: str, spell: Callable[[str], str]) -> None:
    conceal = signing.concealer(KEY, PROJECT_SECRET)
    spelled = spell(secret)
    left = conceal(f"before {spelled} after".encode()).decode()
    assert left.startswith("before ")
    assert left.endswith(" after")
    assert "***" in left
    assert not any(spelled[at : at + 8] in left for at in range(len(spelled) - 7))


#: Ways to spell one character: itself, behind backslashes, as an escape of JSON, as one of addresses.
WAYS = ("{0}", "\\{0}", "\\\\{0}", "\\u{1:04x}", "\\\\u{1:04X}", "%{1:02x}", "%{1:02X}")


@given(st.sampled_from([KEY, PROJECT_SECRET]), st.data())
def test_a_key_is_concealed_when_each_character_is_spelled_in_a_way_of_its_own(
    secret: str, data: st.DataObject
) -> None:
    ways = data.draw(st.lists(st.sampled_from(WAYS), min_size=len(secret), max_size=len(secret)))
    spelled = "".join(way.format(char, ord(char)) for way, char in zip(ways, secret, strict=True))
    left = signing.concealer(KEY, PROJECT_SECRET)(f'[1] "{spelled}" [2]'.encode()).decode()
    assert left.startswith('[1] "')
    assert left.endswith('" [2]')
    assert len(left) <= len('[1] "***" [2]') + 2  # backslashes before its first character may stay


@pytest.mark.parametrize(
    "text", ['{"a": "\\u00e9 \\u2028 %20 \\\\u0041 \\u0022 \\u005c \\" \\/ 100%"}', "", "{}", "\xff", "\\"]
)
def test_what_quotes_no_key_means_the_same_as_before(text: str) -> None:
    left = signing.concealer(KEY, PROJECT_SECRET)(text.encode("latin-1")).decode("latin-1")
    assert left == text or json.loads(left) == json.loads(text)


def test_texts_too_short_for_keys_are_left_alone() -> None:
    assert signing.concealer("a", None)(b"a cat") == b"a cat"
    assert signing.concealer(None)(b"a cat") == b"a cat"
