"""What makes a row the same row: hashes of what it asks for, never of defaults, tools or addresses. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from hashlib import blake2b

from batchrun.model import LocalImage, Value

#: 96 bits: among a billion rows two hashes meet by chance once in 10**11 runs.
HASH_BYTES = 12
#: json.dumps makes an encoder anew for every call.
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def content_hash(
    run_path: str, given: Mapping[str, Value | LocalImage], *, without: Collection[str] = ()
) -> bytes:
    """The hash of what is asked for: the tool and the values given, a local image by its content.

    `without` leaves values out (those that `--set` gave).
    """
    values = {
        name: {"sha256": value.sha256} if isinstance(value, LocalImage) else value
        for name, value in given.items()
        if name not in without
    }
    return blake2b(_ENCODER.encode([run_path, values]).encode(), digest_size=HASH_BYTES).digest()
