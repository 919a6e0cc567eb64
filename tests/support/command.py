"""The real command in a process of its own, against the real simulator in another one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOOL = "Retro-Cartoons"
TIMEOUT_S = 60
COMMAND = (sys.executable, "-m", "batchrun")


def clean_environment(folder: Path, **extra: str) -> dict[str, str]:
    """The environment without anything that a developer's shell may hold for batchrun or terminals."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WIRO_", "BATCHRUN_"))
        and name not in {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM"}
    }
    return {**kept, "BATCHRUN_TOOLS_DIR": str(folder / "tools"), "PYTHONWARNINGS": "error", **extra}


class Wiro:
    """A simulator elsewhere."""

    def __init__(self, address: Mapping[str, str]) -> None:
        self.key, self.secret = address["key"], address["secret"]
        self.env = {
            "WIRO_API_KEY": self.key,
            "WIRO_API_SECRET": self.secret,
            "WIRO_API_BASE_URL": address["base_url"],
            "WIRO_SOCKET_URL": address["socket_url"],
        }
        self._control = address["base_url"].removesuffix("/v1") + "/simulator"

    def stats(self) -> dict[str, Any]:
        """What it has seen."""
        with urllib.request.urlopen(f"{self._control}/stats") as answer:
            return dict(json.load(answer))

    def weather(self, **changes: Any) -> None:
        """Change it from now on."""
        request = urllib.request.Request(f"{self._control}/weather", json.dumps(changes).encode())
        urllib.request.urlopen(request).close()


@contextmanager
def simulator(*arguments: str) -> Iterator[Wiro]:
    """`batchrun simulate` until the end of the block; tasks take no time unless told."""
    command = [*COMMAND, "simulate", "--with-parent", "--seconds", "0.05", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Wiro(json.loads(process.stdout.readline()))
        finally:
            process.kill()


class Here:
    """A folder to work in, as a user would in a shell."""

    def __init__(self, folder: Path, wiro: Wiro | None = None) -> None:
        self.folder = folder
        self.wiro = wiro
        self.env = clean_environment(folder, **(wiro.env if wiro else {}))

    def write(self, name: str, text: str) -> Path:
        """Write a file."""
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def rows(self, number: int, name: str = "p.csv") -> str:
        """Write a manifest of that many rows; returns its name."""
        self.write(
            name, "id,prompt\n" + "".join(f"r{n},a picture of {n} birds\n" for n in range(1, number + 1))
        )
        return name

    def batchrun(
        self, *arguments: str, text: str | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        return subprocess.run(
            [*COMMAND, *arguments],
            cwd=self.folder,
            env={**self.env, **(env or {})},
            input=text,
            stdin=None if text is not None else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    def start(self, *arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
        """Start the command; its standard output and errors go into one pipe."""
        return subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=self.folder,
            env=self.env,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """`batchrun run ... --tool TOOL --set samples=1`."""
        return self.batchrun("run", *arguments, "--tool", TOOL, "--set", "samples=1", **kwargs)

    def status(self, folder: str = "runs/p") -> dict[str, Any]:
        """`batchrun status --json`."""
        return dict(json.loads(self.batchrun("status", folder, "--json").stdout))

    def images(self, folder: str = "runs/p") -> list[str]:
        """The names of the images of a run."""
        return sorted(path.name for path in (self.folder / folder / "images").rglob("*.png"))


def until(fact: Any, what: str) -> None:
    """Wait until `fact()` is true."""
    deadline = time.monotonic() + TIMEOUT_S
    while not fact():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.02)


def has_controls(text: str) -> bool:
    """Whether a terminal would obey something in the text."""
    return re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text) is not None
