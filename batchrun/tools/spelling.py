"""What a misspelled name was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache


def closest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` most like `name`, whatever the case and punctuation; None when none is like it."""
    return _closest(name[:200], tuple(names))  # what is remembered is short


# One misspelled column or value comes back in every row of a manifest.
@lru_cache(maxsize=1024)
def _closest(name: str, names: tuple[str, ...]) -> str | None:
    import difflib  # here, since only a mistake needs it

    wanted = _letters(name)
    by_letters = {_letters(known): known for known in reversed(names)}
    if wanted in by_letters:
        return by_letters[wanted]
    like = difflib.get_close_matches(wanted, by_letters, n=1, cutoff=0.6)
    if not like and len(wanted) >= 3:
        like = [letters for letters in by_letters if wanted in letters][:1]
    return by_letters[like[0]] if like else None


def _letters(name: str) -> str:
    return "".join(char for char in name.casefold() if char.isalnum()) or name
