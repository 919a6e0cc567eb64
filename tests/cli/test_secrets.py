"""Keys are nowhere in what batchrun writes, whatever fails; a task's token is in the state file alone.

The service is a simulator behind a proxy that quotes the key and the token it was sent, in every spelling,
wherever an answer has room for words.
"""

from __future__ import annotations

import base64
import json
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote

import pytest

from tests.support.command import TOOL, Here, Wiro, simulator, until


def spellings(secret: str) -> set[str]:
    """A secret as it could be quoted."""
    coded = secret.encode()
    return {
        secret,
        quote(secret, safe=""),
        "".join(f"%{byte:02X}" for byte in coded),
        json.dumps(secret)[1:-1],
        "".join(f"\\u{byte:04x}" for byte in coded),
        base64.b64encode(coded).decode(),
        base64.urlsafe_b64encode(coded).decode(),
        base64.b64encode(b"key:" + coded).decode(),
    }


class Hostile:
    """Passes requests on to a simulator and quotes what it was told."""

    def __init__(self, wiro: Wiro, fault: str) -> None:
        self.wiro = wiro
        self.fault = fault
        self.tokens: set[str] = set()

    def answer(self, path: str, true: dict[str, Any], status: int) -> tuple[int, bytes]:
        """What is sent in the place of the true answer."""
        for entry in (true, *true.get("tasklist", [])):
            self.tokens |= {entry["socketaccesstoken"]} if entry.get("socketaccesstoken") else set()
        quoted = " ".join(sorted(spellings(self.wiro.key)))
        token = true.get("socketaccesstoken", "") if path.startswith("/v1/Run") else ""
        said = f"bad: {quoted} tasktoken: {token}"
        is_run = path.startswith("/v1/Run")
        match self.fault:
            case "page" if is_run:
                return 500, f"<html>{said}</html>".encode()
            case "500" if is_run:
                return 500, json.dumps({"result": False, "errors": [{"code": 0, "message": said}]}).encode()
            case "refused" if is_run:
                message = f"Request parameter [prompt] required: {quoted}"
                escaped = "".join(f"\\u{ord(char):04x}" for char in message)
                return 200, b'{"result": false, "errors": [{"code": 0, "message": "%b"}]}' % escaped.encode()
            case "credentials" if is_run:
                return 401, json.dumps({"errors": [{"code": 98, "message": said}]}).encode()
            case "no id" if is_run:
                return 200, json.dumps({**true, "taskid": said}).encode()
            case "task" if path.endswith("/Detail"):
                for task in true.get("tasklist", []):
                    words = f"{quoted} {task['socketaccesstoken']}"
                    task.update(debugerror=words, pexit="1", status="task_postprocess_end", outputs=[])
        return status, json.dumps(true).encode()


@contextmanager
def hostile(wiro: Wiro, fault: str) -> Iterator[tuple[Hostile, dict[str, str]]]:
    """The proxy, and what the environment of a client of it is."""
    proxy = Hostile(wiro, fault)
    origin = wiro.env["WIRO_API_BASE_URL"].removesuffix("/v1")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kept = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            request = urllib.request.Request(origin + self.path, body, kept)
            try:
                with urllib.request.urlopen(request) as response:
                    true, status = json.load(response), response.status
            except HTTPError as error:
                true, status = json.load(error), error.code
            status, content = proxy.answer(self.path, true, status)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy, {**wiro.env, "WIRO_API_BASE_URL": f"http://127.0.0.1:{server.server_port}/v1"}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def written(folder: Path, said: str) -> dict[str, str]:
    """Everything that was said, and every file by its name, those of temporary folders too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    texts = {str(path.relative_to(folder)): path.read_bytes().decode("latin-1") for path in files}
    return {**texts, "what was said": said, "names": "\n".join(map(str, files))}


def check_secrets(folder: Path, said: str, wiro: Wiro, tokens: set[str]) -> None:
    """No key anywhere; tokens in the state alone."""
    texts = written(folder, said)
    assert len(said) > 50
    assert any(name.endswith("state.sqlite3") for name in texts)
    for secret in (wiro.key, wiro.secret):
        assert len(secret) >= 8
        for spelling in spellings(secret):
            core = spelling.rstrip("=")[:-2] if spelling != secret else secret
            assert [name for name, text in texts.items() if core in text] == []
    for token in tokens:
        places = {name for name, text in texts.items() if token in text}
        assert all("state.sqlite3" in name for name in places), places


@pytest.fixture
def away(tmp_path: Path, wiro: Wiro) -> Here:
    """A folder of its own whose temporary files are in it too."""
    here = Here(tmp_path, wiro)
    (tmp_path / "tmp").mkdir()
    here.env["TMPDIR"] = str(tmp_path / "tmp")
    return here


def told(here: Here, *arguments: str) -> str:
    """All that a command says."""
    ended = here.batchrun(*arguments)
    assert ended.returncode in {0, 1, 3}, ended.stderr
    return ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("refused", "Request parameter [prompt] required: "),
        ("credentials", "refuses"),
        ("task", "***"),
    ],
)
def test_words_of_the_service_that_quote_the_key_reach_no_file_and_no_screen(
    away: Here, wiro: Wiro, fault: str, seen: str
) -> None:
    with hostile(wiro, fault) as (proxy, env):
        away.env.update(env)
        said = told(
            away, "run", away.rows(2), "--tool", TOOL, "--set", "samples=1", "--attempts", "1", "--json",
            "--log", "log.jsonl",
        )  # fmt: skip
        assert seen in said
        for command in (("status", "runs/p"), ("status", "runs/p", "--json"), ("retry", "runs/p")):
            said += told(away, *command)
        said += told(away, "cancel", "runs/p")
        check_secrets(away.folder, said, wiro, proxy.tokens)


@pytest.mark.parametrize("fault", ["page", "500", "no id"])
def test_a_run_killed_while_answers_quote_the_key_leaves_no_key_behind(
    away: Here, wiro: Wiro, fault: str
) -> None:
    log = away.folder / "log.jsonl"
    with hostile(wiro, fault) as (proxy, env):
        away.env.update(env)
        arguments = ("run", away.rows(2), "--tool", TOOL, "--set", "samples=1", "--log", str(log))
        with away.start(*arguments) as going:
            until(lambda: log.exists() and "doubt" in log.read_text(), "a submit is in doubt")
            command_line = Path(f"/proc/{going.pid}/cmdline").read_text()
            going.send_signal(signal.SIGKILL)
            said, _ = going.communicate(timeout=60)
        said += told(away, "status", "runs/p", "--json")
        proxy.fault = "none"
        said += told(away, *arguments)
        check_secrets(away.folder, said + command_line, wiro, proxy.tokens)
        assert proxy.tokens


def test_a_service_that_is_not_there_brings_no_key_to_light(away: Here, wiro: Wiro) -> None:
    away.env["WIRO_API_BASE_URL"] = "http://127.0.0.1:9/v1"
    log = away.folder / "log.jsonl"
    with away.start("run", away.rows(1), "--tool", TOOL, "--log", str(log)) as going:
        until(lambda: log.exists() and "no connection" in log.read_text(), "no connection")
        going.send_signal(signal.SIGTERM)
        said, _ = going.communicate(timeout=60)
    check_secrets(away.folder, said, wiro, set())


def test_the_state_is_where_a_token_is(away: Here, wiro: Wiro) -> None:
    """The search finds what is there: without this the tests above could not fail."""
    with simulator("--seconds", "600") as slow, hostile(slow, "none") as (proxy, env):
        away.env.update(env)
        with away.start("run", away.rows(1), "--tool", TOOL) as going:
            until(lambda: slow.stats()["active"] == 1 and proxy.tokens, "a task runs")
            until(
                lambda: any(
                    next(iter(proxy.tokens)) in text
                    for name, text in written(away.folder, "").items()
                    if "state.sqlite3" in name
                ),
                "the token is in the state",
            )
            going.send_signal(signal.SIGKILL)
            said, _ = going.communicate(timeout=60)
        check_secrets(away.folder, said, slow, proxy.tokens)
