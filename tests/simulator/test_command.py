"""`batchrun simulate` is a well-behaved process: one line out, ends when told, with its parent where told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from batchrun.simulator.command import simulate

PROGRAM = "from batchrun.simulator.command import simulate; simulate()"


@contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """The process and what its first line says."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_it_prints_its_address_listens_on_loopback_and_ends_well_when_told(name) -> None:
    with started("--slots", "3") as (process, address):
        assert list(address) == ["base_url", "socket_url", "key", "secret"]
        assert address["base_url"].startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address["base_url"].removesuffix("/v1") + "/simulator/stats") as response:
            assert json.load(response)["slots"] == 3
        os.kill(process.pid, getattr(signal, name))
        assert process.wait(timeout=20) == 0
        assert process.stdout is not None
        assert process.stdout.read() == ""


def test_it_ends_with_its_parent_where_told() -> None:
    with started("--with-parent") as (process, _):
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=20) == 0


def test_a_project_of_key_only_has_no_secret() -> None:
    with started("--key-only") as (_, address):
        assert address["secret"] is None


def test_fault_help_lists_the_faults() -> None:
    result = CliRunner().invoke(simulate, ["--fault", "help"])
    assert result.exit_code == 0
    assert "run-reset" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fault", "run-50"], "did you mean"),
        (["--seconds", "soon"], "not understood"),
        (["--balance", "much"], "not an amount of USD"),
        (["--balance", "NaN"], "not an amount of USD"),
        (["--images", "huge"], "'tiny', 'real'"),
        (["--memory", "/no/such/folder/memory"], "cannot be opened"),
    ],
)
def test_what_makes_no_sense_is_refused_with_exit_code_2(arguments, words) -> None:
    result = CliRunner().invoke(simulate, arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_importing_the_command_loads_neither_aiohttp_nor_pil() -> None:
    program = "import sys, batchrun.simulator.command; print({'aiohttp', 'PIL', 'anyio'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_port_that_is_taken_is_a_wrong_argument_in_clear_words() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = CliRunner().invoke(simulate, ["--port", str(port)])
    assert ended.exit_code == 2
    assert f"--port {port} cannot be had: another program serves there; choose another one" in ended.output
