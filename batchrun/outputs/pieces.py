"""Memory for what is on its way to disk, and the way from there past the system's page cache.

A program that writes leaves a copy of all it writes in the page cache; making that copy takes more CPU than
every check of an image, and it pushes out of memory what other programs read. So whole blocks are written
directly (O_DIRECT) where system and file system can, and as ever where they cannot; the bytes after the last
whole block always go the usual way. Neither makes anything durable: that is what a sync is for.

Direct writes want memory aligned like the blocks. Pieces of it are used again and again: fresh memory costs
as much as the copy that was saved.
"""

from __future__ import annotations

import errno
import os
from mmap import mmap

#: Where system and file system can: the blocks of almost all disks are as large as this, or smaller.
BLOCK_BYTES = 4096
PIECE_BYTES = 2**19

#: Up to twice as much freed memory stays with the process.
_KEPT_BYTES = 2**21

_DIRECT = getattr(os, "O_DIRECT", 0)
_free: list[memoryview] = []


def keep_freed_memory() -> None:
    """Lets the C library keep freed memory, which it otherwise gives back and asks for again all the time.

    Its bound grows with the largest block that it has seen freed (glibc, mallopt(3), M_TRIM_THRESHOLD).
    """
    bytes(_KEPT_BYTES)


def take() -> memoryview:
    """A piece of memory of PIECE_BYTES, with anything in it."""
    return _free.pop() if _free else memoryview(mmap(-1, PIECE_BYTES))


def give_back(piece: memoryview) -> None:
    """Let a piece be taken again; no thread may still use it."""
    _free.append(piece)


def opener(path: str | os.PathLike[str], flags: int) -> int:
    """Opens a file to be written by `write`, for `open` and the like."""
    flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if not _DIRECT or error.errno != errno.EINVAL:
            raise
    return os.open(path, flags, 0o666)


def write(file: int, data: memoryview) -> None:
    """Writes all of `data`, which begins where a piece begins, at the place where the file stands.

    After a part that is no whole number of blocks, nothing more of the file is written directly.
    """
    whole = len(data) // BLOCK_BYTES * BLOCK_BYTES if _DIRECT else 0
    rest = data
    if whole:
        try:
            rest = data[os.write(file, data[:whole]) :]
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    if rest:
        if _DIRECT:
            _write_through_cache(file)
        while rest:  # a disk that is nearly full takes a part, and fails the next time
            rest = rest[os.write(file, rest) :]


def _write_through_cache(file: int) -> None:
    import fcntl  # here, since systems without direct writes may not have it

    fcntl.fcntl(file, fcntl.F_SETFL, 0)
