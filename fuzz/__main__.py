"""`make fuzz`: every parser in turn, each for FUZZ_SECONDS (60); `python -m fuzz NAME...` for some of them.

Inputs are gathered under runs/fuzz/NAME/corpus, where the next start goes on. What breaks a promise is left
beside it as crash-*, timeout-* or oom-*, and ends the command with 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from fuzz.parsers import PARSERS
from fuzz.seeds import WORDS, seeds

ROOT = Path("runs/fuzz")
#: An input that takes longer, or makes the process larger, is a finding.
TIMEOUT_S = 10
MEMORY_MB = 1024
MAX_INPUT_BYTES = 32 * 1024


def main(names: Iterable[str]) -> int:
    """Fuzz these parsers, or all; returns the exit code: 1 with a finding."""
    chosen = list(names) or list(PARSERS)
    if unknown := [name for name in chosen if name not in PARSERS]:
        return _say(f"no parser is called {unknown[0]}; there are {', '.join(PARSERS)}", 2)
    told = os.environ.get("FUZZ_SECONDS", "60")
    if not told.isascii() or not told.isdigit() or int(told) < 1:
        return _say(f"FUZZ_SECONDS is a whole number of seconds from 1, not {told!r}", 2)
    first = seeds()
    failed = [name for name in chosen if not _fuzz(name, first[name], int(told))]
    if failed:
        return _say(f"findings: {', '.join(failed)}; their inputs are under {ROOT}", 1)
    return _say(f"no finding in {len(chosen)} parsers, {told} s each", 0)


def _fuzz(name: str, first: Iterable[bytes], seconds: int) -> bool:
    """Whether a parser kept its promises for so long."""
    folder = ROOT / name
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for content in first:
        (corpus / sha256(content).hexdigest()[:16]).write_bytes(content)
    words = folder / "words"
    words.write_text("".join(map(_entry, WORDS[name])), encoding="ascii")
    _say(f"{name}: {seconds} s")
    harness = (sys.executable, "-m", "fuzz.harness", name)
    bounds = (
        f"-max_total_time={seconds}", f"-timeout={TIMEOUT_S}", f"-rss_limit_mb={MEMORY_MB}",
        f"-max_len={MAX_INPUT_BYTES}", f"-dict={words}", f"-artifact_prefix={folder}/", "-verbosity=0",
    )  # fmt: skip
    return subprocess.run([*harness, *bounds, str(corpus)], check=False).returncode == 0  # noqa: S603


def _entry(word: str) -> str:
    """A word in the form of libFuzzer's dictionaries."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in word.encode()) + '"\n'


def _say(text: str, code: int = 0) -> int:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
