"""What saving and the sidecar files share: the system's errors in words, and durable folder entries."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from batchrun.errors import DiskError

_CURES = {
    errno.ENOSPC: "the disk is full: make room, then run the same command again",
    errno.EDQUOT: "the disk quota is used up: make room, then run the same command again",
    errno.EROFS: "the disk is read-only: make it writable or choose another folder with --out",
    errno.EACCES: "permission denied: make the folder writable or choose another one with --out",
    errno.EPERM: "permission denied: make the folder writable or choose another one with --out",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n) or lower --concurrency",
    errno.ENFILE: "too many open files on this machine: close some programs or lower --concurrency",
    errno.ENOENT: "its folder was deleted: run the same command again",
    errno.EIO: "the disk reports a fault: check it before going on",
}


@contextmanager
def disk_errors(verb: str, path: Path) -> Iterator[None]:
    """Turns the system's errors into DiskError with what to do about them."""
    try:
        yield
    except OSError as error:
        cure = _CURES.get(error.errno or 0) or error.strerror or type(error).__name__
        raise DiskError(f"cannot {verb} {path}: {cure}") from error


def sync_folder(folder: Path) -> None:
    """Makes the folder's entries (files created, renamed or removed) survive a power cut."""
    if os.name == "nt":  # Windows gives no handle to sync a folder with; NTFS journals its entries
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_bytes(path: Path) -> int:
    """Bytes that may still be written where `path` lies or will lie."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    with disk_errors("look at", there):
        return shutil.disk_usage(there).free
