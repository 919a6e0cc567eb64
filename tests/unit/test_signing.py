"""Requests are signed as the tools' pages say."""

from __future__ import annotations

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
