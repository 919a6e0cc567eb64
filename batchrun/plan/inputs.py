"""Local input images named by rows: found, kept to the manifest's folder, proved to be images, hashed."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from batchrun.errors import ManifestError, OutputCorrupt
from batchrun.model import LocalImage, Problem
from batchrun.outputs.verify import Verifier

#: File/Upload takes files up to 100 MB.
MAX_UPLOAD_BYTES = 100 * 1000 * 1000
_CHUNK_BYTES = 1 << 20
#: Remembered images; many rows share few files.
_REMEMBERED = 10_000


class LocalImages:
    """Reads local images; the same path is read once."""

    def __init__(self, folder: Path, *, allow_outside: bool) -> None:
        self._folder = folder.resolve()
        self._allow_outside = allow_outside
        self._known: dict[str, LocalImage | str] = {}

    def read(self, path_text: str) -> LocalImage:
        """The image at a path as a row writes it; raises ManifestError saying what to write instead."""
        known = self._known.get(path_text)
        if known is None:
            known = self._look(path_text)
            if len(self._known) < _REMEMBERED:
                self._known[path_text] = known
        if isinstance(known, str):
            raise ManifestError([Problem(known)])
        return known

    def path(self, path_text: str) -> Path:
        """Where an image named by a row lies."""
        return self._folder / Path(path_text).expanduser()

    def _look(self, path_text: str) -> LocalImage | str:
        if "\0" in path_text:
            return "is no path; write the path of an image or its address (https://...)"
        path = self.path(path_text)
        try:
            inside = path.resolve().is_relative_to(self._folder)
            if not inside and not self._allow_outside:
                return (
                    f'"{path_text}" is outside the manifest\'s folder; move it there or use --allow-outside'
                )
            if not path.is_file():
                return f'there is no file "{path_text}" in {self._folder}; write an image\'s path or address (https://...)'
            return self._hash(path_text, path)
        except OSError as error:
            return f'"{path_text}" cannot be read: {error.strerror or error}'

    @staticmethod
    def _hash(path_text: str, path: Path) -> LocalImage | str:
        size = path.stat().st_size
        if size > MAX_UPLOAD_BYTES:
            return f'"{path_text}" has {size / 1e6:.0f} MB; the service takes up to 100 MB: make it smaller'
        digest, verifier = sha256(), Verifier()
        try:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    verifier.feed(chunk)
            verifier.finish()
        except OutputCorrupt as error:
            return f'"{path_text}" is not a whole image ({error}); write the path of a PNG, JPEG or WebP file'
        return LocalImage(path_text, digest.hexdigest(), size)
