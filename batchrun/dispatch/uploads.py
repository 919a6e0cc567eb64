"""Local input images on their way to the service: each content is uploaded once, whichever rows share it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from hashlib import file_digest
from pathlib import Path
from random import Random
from typing import Protocol

import anyio
import anyio.to_thread

from batchrun import errors
from batchrun.model import LocalImage, Value
from batchrun.rules.policy import Fail, Troubles, after_upload
from batchrun.store.store import Store

#: Files on their way to the service at once.
MAX_UPLOADS = 4


class Uploading(Protocol):
    """What uploading needs of the service's client."""

    async def upload(self, path: Path, name: str, size_bytes: int) -> str:
        """Put a file at the service; its address there."""
        ...


class Uploads:
    """Addresses of local images at the service, remembered in the state."""

    def __init__(self, store: Store, service: Uploading, path_of: Callable[[str], Path], rng: Random) -> None:
        self._store = store
        self._service = service
        self._path_of = path_of
        self._rng = rng
        self._turns: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)
        self._limiter = anyio.CapacityLimiter(MAX_UPLOADS)

    async def addresses(self, given: Mapping[str, Value | LocalImage]) -> dict[str, str]:
        """The address of every local image a row gives, by SHA-256; uploads what is not there yet.

        Raises UsageError when an image cannot be sent, CredentialsRefused.
        """
        images = [value for value in given.values() if isinstance(value, LocalImage)]
        return {image.sha256: await self._address(image) for image in images}

    async def _address(self, image: LocalImage) -> str:
        async with self._turns[image.sha256]:  # rows that share an image wait for its one upload
            known = await self._store.upload_url(image.sha256)
            if known is not None:
                return known
            path = self._path_of(image.path)
            await anyio.to_thread.run_sync(_check_unchanged, path, image)
            url = await self._upload(path, image)
            await self._store.record_upload(image.sha256, url, at=time.time())
            return url

    async def _upload(self, path: Path, image: LocalImage) -> str:
        """Try until the service is well enough, or has refused the image for good."""
        met = Troubles()
        while True:
            try:
                async with self._limiter:
                    return await self._service.upload(path, path.name, image.size_bytes)
            except errors.CredentialsRefused:
                raise
            except errors.ServiceError as error:
                troubles, elapsed_s = met.add(error, now=anyio.current_time())
                next_ = after_upload(error, troubles=troubles, elapsed_s=elapsed_s, rng=self._rng)
                if isinstance(next_, Fail):
                    raise errors.UsageError(f'"{image.path}" cannot be sent: {error}') from error
            await anyio.sleep(next_.after_s)


def _check_unchanged(path: Path, image: LocalImage) -> None:
    """Raises UsageError when the file is not the one that was planned."""
    try:
        with path.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise errors.UsageError(
            f'"{image.path}" cannot be read: {error.strerror}; put it back and retry'
        ) from error
    if digest != image.sha256:
        raise errors.UsageError(
            f'"{image.path}" has changed since it was planned; run the manifest again to use it'
        )
