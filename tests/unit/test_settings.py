"""Credentials come from the environment or a named file, and never show."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchrun.errors import UsageError
from batchrun.settings import DEFAULT_BASE_URL, DEFAULT_SOCKET_URL, Credentials, credentials, is_loopback


def test_the_key_alone_is_enough() -> None:
    assert credentials({"WIRO_API_KEY": " k "}) == Credentials(
        "k", None, DEFAULT_BASE_URL, DEFAULT_SOCKET_URL
    )


def test_an_empty_value_is_no_value() -> None:
    got = credentials({"WIRO_API_KEY": "k", "WIRO_API_SECRET": "", "WIRO_API_BASE_URL": " "})
    assert (got.secret, got.base_url) == (None, DEFAULT_BASE_URL)


def test_a_missing_key_says_what_to_set_and_how_to_rehearse() -> None:
    with pytest.raises(UsageError, match=r"WIRO_API_KEY.*--env-file.*--simulate"):
        credentials({})


def test_a_named_file_wins_and_keeps_dollars_and_quotes(tmp_path: Path) -> None:
    file = tmp_path / "wiro.env"
    file.write_text("WIRO_API_KEY=filed\nexport WIRO_API_SECRET='a$b'\nOTHER=1\n")
    got = credentials({"WIRO_API_KEY": "k", "b": "no", "WIRO_API_SECRET": "s"}, file)
    assert (got.key, got.secret) == ("filed", "a$b")


def test_the_key_of_a_file_is_never_signed_with_the_secret_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "wiro.env"
    file.write_text("WIRO_API_KEY=filed\n")
    assert credentials({"WIRO_API_SECRET": "other project's"}, file).secret is None


def test_a_file_may_add_the_secret_to_the_key_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "wiro.env"
    file.write_text("WIRO_API_SECRET=s\n")
    got = credentials({"WIRO_API_KEY": "k"}, file)
    assert (got.key, got.secret) == ("k", "s")


def test_a_missing_file_a_folder_and_a_file_of_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.env").write_bytes(b"WIRO_API_KEY=\xff\xfe")
    for name in ("missing.env", ".", "bytes.env"):
        with pytest.raises(UsageError, match="--env-file"):
            credentials({"WIRO_API_KEY": "k"}, tmp_path / name)


def test_secrets_never_show() -> None:
    text = repr(Credentials("the-key", "the-secret"))
    assert "the-key" not in text
    assert "the-secret" not in text


@pytest.mark.parametrize("name", ["WIRO_API_KEY", "WIRO_API_SECRET"])
@pytest.mark.parametrize("value", ["two words", "line\nbreak", "smart“quote", "tab\tbed"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_quoted(name: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        credentials({"WIRO_API_KEY": "k", name: value})
    assert name in str(caught.value)
    assert value not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://api.wiro.ai/v1",  # keys in the clear
        "http://127.0.0.1.evil.example/v1",
        "ftp://127.0.0.1/v1",
        "api.wiro.ai/v1",
        "https://user:pass@api.wiro.ai/v1",
        "https://api.wiro.ai/v1?x=1",
        "https://api.wiro.ai:99999/v1",
        "https://[::1/v1",
        "https:///v1",
    ],
)
def test_an_unusable_base_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="WIRO_API_BASE_URL"):
        credentials({"WIRO_API_KEY": "k", "WIRO_API_BASE_URL": url})


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "[::1]:9", "wiro.localhost"])
def test_plain_http_is_for_this_machine(host: str) -> None:
    got = credentials(
        {"WIRO_API_KEY": "k", "WIRO_API_BASE_URL": f"http://{host}/v1/", "WIRO_SOCKET_URL": f"ws://{host}/s"}
    )
    assert got.base_url == f"http://{host}/v1"
    assert got.is_local


def test_the_real_service_is_not_local() -> None:
    assert not credentials({"WIRO_API_KEY": "k"}).is_local
    with pytest.raises(UsageError, match="WIRO_SOCKET_URL"):
        credentials({"WIRO_API_KEY": "k", "WIRO_SOCKET_URL": "ws://socket.wiro.ai/v1"})


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.9.9.9", True), ("::1", True), ("LOCALHOST.", True), ("10.0.0.1", False), ("localhost.com", False)],
)
def test_loopback_is_told_by_name_or_address(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, True),
        ({"WIRO_API_BASE_URL": "https://a.example/v1", "WIRO_SOCKET_URL": "wss://a.example/s"}, True),
        ({"WIRO_API_BASE_URL": "https://a.example/v1"}, False),
        ({"WIRO_SOCKET_URL": "wss://a.example/s"}, False),
        ({"WIRO_API_BASE_URL": f"{DEFAULT_BASE_URL}/"}, True),
    ],
)
def test_events_are_of_the_same_service_where_both_addresses_were_given_or_neither(given, expected):
    assert credentials({"WIRO_API_KEY": "k"} | given).has_own_socket is expected
