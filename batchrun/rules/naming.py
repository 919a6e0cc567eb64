"""Names of output files that never leave the output folder, whatever an id says.

A row's *stem* is its id when every file system can hold it as it is, else a cleaned form of it with a hash.
The two kinds never meet: an id that itself ends like a hashed stem gets a hash too. Nothing the service says
goes into a name: the extension is chosen from the bytes. A folder holds the images of at most
`ROWS_PER_FOLDER` rows, so file browsers stay quick and a hash only has to be unique among those.
"""

from __future__ import annotations

import re
import unicodedata
from hashlib import sha256

#: Rows whose images share a subfolder.
ROWS_PER_FOLDER = 1000
#: Longest stem in bytes; with number, index and extension a name stays well under the usual limit of 255.
MAX_STEM_BYTES = 100
#: 48 bits: in a folder of 1000 rows with one cleaned form, two share a hash once in 500 million folders.
HASH_DIGITS = 12

#: Device names on Windows, with any extension: the part before the first dot decides.
_DEVICE = r"(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|\Z)"
_RESERVED = re.compile(_DEVICE)
_SAFE = re.compile(rf"(?!{_DEVICE})[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")
_HASHED = re.compile(rf"-[0-9a-fA-F]{{{HASH_DIGITS}}}\Z")
_EXTENSION = re.compile(r"[a-z0-9]{1,8}")


def stem(id: str | None, line: int, key: str) -> str:
    """The file name stem of a row: its id, made safe; without an id its line and a hash of its key.

    `line` is the one the row was first seen on. Different ids have different stems, but perhaps only by the
    case of ASCII letters: whoever keeps the stems of a run settles that with `stem_with_hash`.
    """
    if id is None:
        return f"{line:06d}-{_digest(key)}"
    is_safe = len(id) <= MAX_STEM_BYTES and _SAFE.fullmatch(id)
    if is_safe and not _HASHED.match(id, len(id) - HASH_DIGITS - 1):
        return id
    return stem_with_hash(id)


def stem_with_hash(id: str) -> str:
    """A safe stem for any id that differs from all others' even where case does not count."""
    plain = "".join(char for char in unicodedata.normalize("NFKD", id) if not unicodedata.combining(char))
    clean = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).lstrip(".-") or "_"
    if _RESERVED.match(clean):
        clean = "_" + clean
    return f"{clean[: MAX_STEM_BYTES - HASH_DIGITS - 1]}-{_digest(id)}"


def image_base(seq: int, stem: str, index: int) -> str:
    """An image's path without its extension, relative to the run folder: `images/000/<stem>_<index>`."""
    return f"{image_folder((seq - 1) // ROWS_PER_FOLDER)}/{stem}_{index}"


def image_folder(number: int) -> str:
    """A folder of images by its number, from 0, relative to the run folder."""
    return f"images/{number:03d}"


def image_path(seq: int, stem: str, index: int, extension: str) -> str:
    """An image's path relative to the run folder; `extension` without its dot, one of our own choosing."""
    if not _EXTENSION.fullmatch(extension):
        raise ValueError(f"not a file name extension: {extension!r}")
    return f"{image_base(seq, stem, index)}.{extension}"


def partial_path(seq: int, stem: str, index: int) -> str:
    """Where an image is gathered while it is downloaded, relative to the run folder; unique in the run."""
    return f"partial/{seq}-{stem}_{index}.part"


def _digest(text: str) -> str:
    # surrogatepass: JSON can bring lone surrogates, which UTF-8 refuses.
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:HASH_DIGITS]
