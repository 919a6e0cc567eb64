"""What saving and the sidecar files share: the system's errors in words, names that survive a power cut."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    errno.EXDEV: "its folder lies on another disk: keep the whole of a run's folder on one",
    errno.EIO: "the disk reports a fault: check it before going on",
}


def cure_of(error: OSError) -> str | None:
    """What to do about an error of the system's; None for one that is not about disks or files in general."""
    return _CURES.get(error.errno or 0)


@contextmanager
def disk_errors(verb: str, path: Path) -> Iterator[None]:
    """Turns the system's errors into DiskError with what to do about them."""
    try:
        yield
    except OSError as error:
        cure = cure_of(error) or error.strerror or type(error).__name__
        raise DiskError(f"cannot {verb} {path}: {cure}") from error


#: What a file system answers that cannot sync folders; nothing can be done about it.
_CANNOT_SYNC = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP})

#: Folders whose own name this process has made durable: an image costs one sync of a folder, not two.
_durable_folders: set[Path] = set()
_durable_folders_lock = threading.RLock()


def sync_folder(folder: Path) -> None:
    """Makes the folder's entries (files created, renamed or removed) survive a power cut."""
    if os.name == "nt":  # Windows gives no handle to sync a folder with; NTFS journals its entries
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(handle)


@dataclass(slots=True)
class _Shared:
    """Who waits for a folder to be synced, as numbers given in order."""

    turn: threading.Lock = field(default_factory=threading.Lock)
    asked: int = 0
    synced: int = 0


_shared: defaultdict[Path, _Shared] = defaultdict(_Shared)


def entry_added(folder: Path) -> int:
    """Notes that there is a new name in the folder; returns its number for `sync_entries`."""
    with _durable_folders_lock:
        shared = _shared[folder]
        shared.asked += 1
        return shared.asked


def sync_entries(folder: Path, number: int) -> None:
    """`sync_folder`, unless a sync that was begun after this entry has ended meanwhile, or now does."""
    shared = _shared[folder]
    with shared.turn:
        if shared.synced >= number:
            return
        covered = shared.asked
        sync_folder(folder)
        shared.synced = covered


def make_durable(folder: Path) -> None:
    """Makes the folder and sees to it that a power cut cannot take it away with what is in it.

    Folders found here are synced too, once: they may be of a process that was killed before its sync.
    """
    with _durable_folders_lock:
        if folder == folder.parent or (folder in _durable_folders and folder.is_dir()):
            return
        make_durable(folder.parent)
        was_there = folder.is_dir()
        folder.mkdir(exist_ok=True)
        try:
            sync_folder(folder.parent)
        except PermissionError:
            if not was_there:
                raise  # one far above may be closed to us, and is none of ours
        _durable_folders.add(folder)


def rename_durably(source: Path, target: Path) -> None:
    """Moves a synced file to a folder that is made if it is not there; its entry is still to be synced."""
    if target.parent not in _durable_folders:
        make_durable(target.parent)
    try:
        os.rename(source, target)
    except FileNotFoundError:  # perhaps the folder was deleted from outside
        make_durable(target.parent)
        os.rename(source, target)


def free_bytes(path: Path) -> int:
    """Bytes that may still be written where `path` lies or will lie."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    with disk_errors("look at", there):
        return shutil.disk_usage(there).free
