"""Where the service is and who we are, read from the environment and, when asked for, one env file.

Only names the user set on purpose count: nothing is searched for, no file is read unasked, and an empty value
is no value. Keys never show: they are left out of `repr`, and no message quotes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from batchrun.errors import UsageError

KEY = "WIRO_API_KEY"
SECRET = "WIRO_API_SECRET"  # noqa: S105  the variable's name
BASE_URL = "WIRO_API_BASE_URL"
SOCKET_URL = "WIRO_SOCKET_URL"

DEFAULT_BASE_URL = "https://api.wiro.ai/v1"
DEFAULT_SOCKET_URL = "wss://socket.wiro.ai/v1"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who asks, and where: the key pair of a project and the addresses of the service."""

    key: str = field(repr=False)
    #: None for a key-only project: requests are then not signed.
    secret: str | None = field(repr=False)
    #: Without a slash at the end.
    base_url: str = DEFAULT_BASE_URL
    socket_url: str = DEFAULT_SOCKET_URL

    @property
    def has_own_socket(self) -> bool:
        """Whether both addresses are of one service, as far as that was said: both were given, or neither."""
        return (self.base_url == DEFAULT_BASE_URL) == (self.socket_url == DEFAULT_SOCKET_URL)

    @property
    def is_local(self) -> bool:
        """Whether the service runs on this machine (the simulator does)."""
        return is_loopback(urlsplit(self.base_url).hostname or "")


def credentials(environ: Mapping[str, str], env_file: Path | None = None) -> Credentials:
    """Credentials from `environ`, or from `env_file` where that sets a name: it was asked for by name.

    A file that sets the key without a secret means a key-only project, whatever secret the environment holds.
    Raises UsageError, saying what to set, for a missing or unusable value and for a file that cannot be read.
    """
    given = {name: environ.get(name, "") for name in (KEY, SECRET, BASE_URL, SOCKET_URL)}
    if env_file is not None:
        filed = _read(env_file)
        if filed.get(KEY):
            given[SECRET] = ""
        given |= filed
    given = {name: value.strip() for name, value in given.items()}
    if not given[KEY]:
        raise UsageError(
            f"no API key: set {KEY} (and {SECRET} if the project has a secret) in the environment "
            "or name a file that sets them with --env-file; to rehearse without an account, add --simulate"
        )
    return Credentials(
        key=_header_text(KEY, given[KEY]),
        secret=_header_text(SECRET, given[SECRET]) if given[SECRET] else None,
        base_url=_address(BASE_URL, given[BASE_URL] or DEFAULT_BASE_URL, plain="http", safe="https"),
        socket_url=_address(SOCKET_URL, given[SOCKET_URL] or DEFAULT_SOCKET_URL, plain="ws", safe="wss"),
    )


def is_loopback(host: str) -> bool:
    """Whether a host name or address text means this machine."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def _read(env_file: Path) -> dict[str, str]:
    from dotenv import dotenv_values

    if not env_file.is_file():  # dotenv takes a missing file for an empty one
        raise UsageError(f"--env-file {env_file}: there is no such file")
    try:
        # No interpolation: a `$` in a secret is a `$`.
        values = dotenv_values(env_file, interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--env-file {env_file}: cannot be read ({type(error).__name__})") from error
    return {name: values[name] or "" for name in (KEY, SECRET, BASE_URL, SOCKET_URL) if values.get(name)}


def _header_text(name: str, value: str) -> str:
    if not (value.isascii() and value.isprintable() and " " not in value):
        raise UsageError(
            f"{name} holds characters that no key has: copy it again, without quotes or line breaks"
        )
    return value


def _address(name: str, value: str, *, plain: str, safe: str) -> str:
    try:
        parts = urlsplit(value)
        host = parts.hostname or ""
        _ = parts.port  # raises ValueError when out of range
    except ValueError as error:
        raise UsageError(f"{name} is not a valid address: write it like {safe}://host/v1") from error
    if parts.username is not None or parts.query or parts.fragment:
        raise UsageError(f"{name} must be a plain address: no user, no query, no fragment")
    if not host or parts.scheme not in (plain, safe):
        raise UsageError(f"{name} must be a full address: write it like {safe}://host/v1")
    if parts.scheme == plain and not is_loopback(host):
        raise UsageError(
            f"{name} must begin with {safe}:// (plain {plain} only to this machine): keys travel with it"
        )
    return value.rstrip("/")
