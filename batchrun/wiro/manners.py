"""How every request is made: who it says is asking, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import aiohttp

from batchrun import __version__

#: Default User-Agents of libraries are refused by the firewall in front of the service.
USER_AGENT = f"batchrun/{__version__}"


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long each step of a call may take, in seconds."""

    #: Name look-up, connection and TLS handshake.
    connect_s: float = 10.0
    #: A whole Run, answer included: the service answers once the task is queued.
    submit_s: float = 60.0
    #: Any other call.
    call_s: float = 15.0
    #: Between two pieces of a file, unless the caller waits for less.
    silence_s: float = 60.0
    #: A whole file; a slow one goes on with Range.
    fetch_s: float = 900.0


DEADLINES = Deadlines()


@lru_cache(maxsize=64)
def timeout(total_s: float, connect_s: float, read_s: float | None) -> aiohttp.ClientTimeout:
    """For one request: for all of it, for its connection, and between two pieces of the answer."""
    return aiohttp.ClientTimeout(total=total_s, connect=connect_s, sock_read=read_s)
