"""What people read: numbers in words, texts made safe, the lines before and after a run."""

from __future__ import annotations

import io
import json
import shlex
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.errors import UsageError
from batchrun.manifest.job import job_for
from batchrun.model import Counts, Failure, Problem, Row, State
from batchrun.plan.findings import Findings
from batchrun.plan.prices import Estimate
from batchrun.progress import Event, Fact, Progress
from batchrun.report import opening
from batchrun.report.lines import Lines, line
from batchrun.report.log import Log
from batchrun.report.pace import NOTE_S, WINDOW_S, Pace
from batchrun.report.summary import Commands, summary, to_json
from batchrun.report.talk import Talk
from batchrun.report.watch import Notes, Watch
from batchrun.report.words import about, count, duration, exact_usd, plain, rough_usd, size, spent
from batchrun.store.planning import Merged
from tests.support.command import has_controls


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a cat", "a cat"),
        ("\x1b[1;31mred\x1b[0m", "red"),  # a colour
        ("\x9b2Jgone", "gone"),  # the same in one C1 character
        ("\x1b]0;my title\x07text", "text"),  # a window title
        ("\x1b]8;;http://x\x1b\\link", "link"),
        ("\x1b]0;never ends", "]0;never ends"),  # nothing is swallowed for want of an end
        ("two\r\nlines\tand\u2028more", "two  lines and more"),
        ("a\u202eb\u2066c", "abc"),  # what turns the direction of writing
        ("a\x00\x07\x7fb", "ab"),
        ("half \ud800 of a character", "half  of a character"),
        ("Grüße 画 🐈", "Grüße 画 🐈"),
    ],
)
def test_a_foreign_text_is_shown_without_what_a_terminal_would_obey(text: str, shown: str) -> None:
    assert plain(text) == shown


@given(st.text(), st.integers(1, 50))
def test_no_text_whatever_keeps_a_control_character_or_outgrows_its_limit(text: str, limit: int) -> None:
    shown = plain(text, limit=limit)
    assert not has_controls(shown)
    assert len(shown) <= limit
    shown.encode()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (count(1, "row"), "1 row"),
        (count(2212, "image"), "2,212 images"),
        (size(0), "0 bytes"),
        (size(999), "999 bytes"),
        (size(4100), "4.1 kB"),
        (size(999_700), "1.0 MB"),
        (size(812_000_000), "812 MB"),
        (size(3 * 10**15), "3000 TB"),
        (duration(0.4), "0 s"),
        (duration(59.6), "1 min"),
        (duration(724), "12 min 4 s"),
        (duration(12_000), "3 h 20 min"),
        (duration(200_000), "2 d 7 h"),
        (about(3), "10 s"),
        (about(44), "40 s"),
        (about(431), "7 min"),
        (about(11_930), "3 h 20 min"),
        (exact_usd(Decimal("3.871000")), "3.871 USD"),
        (exact_usd(Decimal("0.000585")), "0.000585 USD"),
        (exact_usd(Decimal(3)), "3 USD"),
        (exact_usd(Decimal("1E-7")), "0.0000001 USD"),
        (rough_usd(Decimal("1234.5678")), "1,234.57 USD"),
        (rough_usd(Decimal("0.01234")), "0.0123 USD"),
        (rough_usd(Decimal("0.00001")), "under 0.0001 USD"),
        (spent(Decimal(0), rows_done=0), "0 USD"),
        (spent(Decimal(0), rows_done=7), "not told by the service"),  # never taken for free
    ],
)
def test_numbers_are_put_into_words(said: str, words: str) -> None:
    assert said == words


def test_the_pace_is_of_the_last_minutes_and_unknown_at_first() -> None:
    pace = Pace()
    assert pace.rows_per_s(0.0, 5) == 0.0
    assert pace.left_s(0.0, 5, 10) is None
    for second in range(0, 4000, 10):  # an hour of an outage, then a row a second
        pace.note(float(second), max(0, second - 3600))
    assert pace.rows_per_s(3990.0, 390) == pytest.approx(1.0)
    assert pace.left_s(3990.0, 390, 60) == pytest.approx(60.0)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=2000))
def test_the_pace_remembers_a_bounded_number_of_notes_and_is_never_negative(steps: list[float]) -> None:
    pace, now = Pace(), 0.0
    for rows, step in enumerate(steps):
        now += step
        pace.note(now, rows)
        assert pace.rows_per_s(now, rows - 3) >= 0
    assert len(pace._notes) <= WINDOW_S / NOTE_S + 2


# --- before -------------------------------------------------------------------------------------------


def merged(**facts: object) -> Merged:
    """A manifest of ten new rows, but for `facts`."""
    usual = {
        "rows": 10,
        "images": 40,
        "new": 10,
        "replaced": 0,
        "changed": 0,
        "rerun": 0,
        "gone": 0,
        "invalid": 0,
        "identical": 0,
        "by_tool": {"/Run/wiro/instant-id": (10, 40)},
    }
    return Merged(**{**usual, **facts})  # type: ignore[arg-type]


def said(lines: object) -> str:
    """Lines as one text."""
    return "\n".join(text for text, _ in lines)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (None, "price unknown"),
        (Estimate("instant-id", 10, 40, None), "price unknown"),
        (Estimate("/Run/wiro/instant-id", 10, 40, None), "price unknown"),
        (Estimate("instant-id", 10, 40, Decimal(0), is_price=False), "price unknown"),
        (Estimate("instant-id", 10, 40, Decimal("0.50")), "0.50 USD by the price list"),
        (
            Estimate("instant-id", 10, 40, Decimal("0.9"), range_usd=(Decimal("0.5"), Decimal("0.9"))),
            "0.50 to 0.90 USD by the price list",
        ),
        (
            Estimate("instant-id", 10, 40, Decimal("1.234"), is_price=False),
            "about 1.23 USD (the average of past runs; no price is published)",
        ),
    ],
)
def test_what_is_known_of_the_price_is_said_and_what_is_not_known_too(
    estimate: Estimate | None, words: str
) -> None:
    estimates = [estimate] if estimate else []
    lines = said(opening.planned(merged(), estimates, Counts(), to_buy=merged().by_tool, limit=None))
    assert lines.endswith(f"  instant-id: 10 rows, 40 images, {words}")


def test_what_changed_since_the_last_reading_is_told() -> None:
    counts = Counts({State.DONE: 6, State.PLANNED: 4, State.INVALID: 1})
    changes = merged(new=2, replaced=1, gone=3, changed=5)
    lines = said(opening.planned(changes, [], counts, to_buy={}, limit=4))
    assert "so far: 6 done, 1 invalid, 4 to do" in lines
    assert "in the manifest: 2 new, 1 corrected or changed, 3 no longer in it and left alone" in lines
    assert "5 rows bought already ask for something else now" in lines
    assert "--rerun-changed" in lines
    assert "only the first 4 rows (--limit)" in lines


def test_only_the_first_warnings_and_errors_are_said_and_the_others_counted() -> None:
    findings = Findings()
    for number in range(70):
        findings.add(Problem(f"no {number}\x1b[31m", "m.csv", number + 2, "steps"))
    from batchrun.model import Severity

    for number in range(25):
        findings.add(Problem(f"odd {number}", "m.csv", number + 2, severity=Severity.WARNING))
    errors = list(opening.errors(findings.errors, total=findings.error_count))
    assert errors[0] == ("m.csv:2: steps: no 0", "red")
    assert errors[-1][0] == "and 20 more"
    assert len(errors) == 51
    remarks = list(opening.remarks(findings))
    assert len(remarks) == 21
    assert remarks[-1][0] == "and 5 more warnings"


def test_the_same_fault_of_many_rows_is_said_once_with_the_lines_that_have_it() -> None:
    problems = [Problem("is no parameter", "m.csv", line, "note") for line in (2, 2, 3, 4, 5, 6, 7, 8, 9)]
    problems += [Problem("is required", "m.csv", 7, "prompt"), Problem("is required", "m.csv", 8, "prompt")]
    problems += [Problem("cannot be", "m.csv", 7, "steps"), Problem("cannot be", "m.csv", 7, "steps")]
    problems += [Problem("no such column", "m.csv", 0, "--map a=b")]
    assert said(opening.errors(problems, total=99)).splitlines() == [
        "m.csv: --map a=b: no such column",  # what concerns the whole file comes first
        "m.csv:2: note: is no parameter [the same in lines 3, 4, 5, 6, 7 and 2 more]",
        "m.csv:7: prompt: is required [the same in line 8]",
        "m.csv:7: steps: cannot be",  # twice, in one row that was expanded
        "and 85 more",
    ]


def test_changed_rows_are_counted_in_good_grammar() -> None:
    one = said(opening.planned(merged(changed=1, rerun=1), [], Counts(), to_buy=merged().by_tool, limit=None))
    assert "1 row bought already asks for something else now and is left alone" in one
    assert "in the manifest: 1 finished row bought again (--rerun-changed)" in one


# --- meanwhile ------------------------------------------------------------------------------------------


def watched(**counts: int) -> Watch:
    """A run with that many rows in each state."""
    progress = Progress()
    progress.begin(Counts({State(state): rows for state, rows in counts.items()}))
    watch = Watch(progress)
    watch.begin(beyond_limit=0)
    return watch


def test_the_line_says_rows_tasks_and_what_is_waited_for() -> None:
    watch = watched(done=3, failed=1, in_doubt=1, finished=2, in_flight=4, planned=9)
    progress = watch.progress
    progress.limit, progress.images = 8, 12
    progress.announce(Fact.INTENT, Row(7, "k", "a", 2, "a", 1, {}, {}, 1, State.PLANNED))
    progress.paused = "the balance is exhausted"
    assert line(watch.look()) == (
        "3 of 20 rows done, 1 failed, 1 in doubt; 5 of 8 tasks active, 2 rows being saved; "
        "12 images, 0 bytes; waiting: the balance is exhausted"
    )


def test_without_a_terminal_a_wait_is_told_at_once_and_one_that_comes_and_goes_not_each_time() -> None:
    stream = io.StringIO()
    lines = Lines(Talk(stream), watched(planned=1))
    for _ in range(3):
        lines.listen(Event(Fact.PAUSED, 0.0, details={"reason": "the service cannot be reached: http://x"}))
        lines.listen(Event(Fact.RESUMED, 0.0, details={"reason": None}))
    told = [each.split("  ", 1)[1] for each in stream.getvalue().splitlines()]
    assert told == ["waiting: the service cannot be reached: http://x", "going on"]


def test_what_was_cancelled_or_is_invalid_is_not_said_to_have_failed() -> None:
    watch = watched(done=3, failed=1, cancelled=2, invalid=4)
    assert line(watch.look()).startswith("3 of 10 rows done, 1 failed, 2 cancelled, 4 invalid; ")
    assert watch.look().settled == 10


def test_rows_beyond_the_limit_are_not_in_the_total() -> None:
    watch = watched(done=1, planned=9)
    watch.begin(beyond_limit=8)
    assert watch.look().total == 2


def test_the_picture_names_what_goes_on_within_the_width_of_the_terminal() -> None:
    from rich.console import Console

    from batchrun.report.display import Display

    watch = watched(done=3, failed=1, planned=6)
    display = Display(Talk(io.StringIO()), watch)
    for number in range(9):
        display.listen(Event(Fact.FAILED, 0.0, number, f"r{number}", number + 1, {"message": "x" * 500}))
    display.listen(Event(Fact.STOPPING, 0.0, details={"reason": "by Ctrl-C"}))
    console = Console(file=io.StringIO(), width=70, force_terminal=False)
    console.print(display._picture())
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert all(len(each) <= 70 for each in lines)
    assert "40%" in lines[1]
    assert lines[2].startswith("3 of 10 rows done  1 failed  ")
    assert lines[4].startswith("stopping (by Ctrl-C): finishing downloads")
    assert [each.split("row ")[1].split(" ")[0] for each in lines[5:]] == ["r4", "r5", "r6", "r7", "r8"]


def test_notes_are_of_what_is_out_of_the_ordinary() -> None:
    notes = Notes()
    told = [
        notes.note(Event(fact, 0.0, 3, None, 14, {"message": "why\x1b[0m", "reason": "r", "told": 4}))
        for fact in Fact
    ]
    texts = [note[0] for note in told if note]
    assert "line 14 failed: why" in texts
    assert "the account allows 4 tasks at once" in texts
    assert not any("saved" in text for text in texts)
    assert notes.note(Event(Fact.LIMIT, 0.0, details={"told": 4})) is None, "once is enough"


# --- after ----------------------------------------------------------------------------------------------

FAILED = (State.FAILED, Failure("rejected", "samples must be at most 4\x1b[31m"), 2, 14)
LOST = (State.FAILED, Failure("images gone", "HTTP 410"), 1, 20)
DOUBT = (State.IN_DOUBT, Failure("in doubt", "no answer"), 1, 9)


def test_a_run_that_is_done_needs_no_advice(tmp_path: Path) -> None:
    counts = Counts({State.DONE: 3}, images=12, bytes=5220, cost_usd=Decimal("0.001755"))
    assert said(summary(tmp_path, counts, (), elapsed_s=61)).splitlines() == [
        "all 3 rows done",
        f"images  12, 5.2 kB, in {tmp_path}/images",
        "cost    0.001755 USD",
        "time    1 min 1 s",
    ]


def test_failures_are_grouped_with_a_sample_and_the_commands_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "failed.csv").touch()
    counts = Counts({State.DONE: 3, State.FAILED: 3, State.IN_DOUBT: 1}, cost_usd=Decimal(1))
    lines = said(summary(folder, counts, (FAILED, LOST, DOUBT), left={5: "no word", 6: "no word"}))
    assert lines.startswith("3 of 7 rows done, 3 failed, 1 in doubt\n")
    assert "  2 rows failed: rejected (first in line 14): samples must be at most 4\n" in lines
    assert "  1 row failed: images gone (line 20): HTTP 410\n" in lines
    assert "  1 row in doubt (line 9): no answer\n" in lines
    assert "  2 rows left for the next start: no word\n" in lines
    assert f"batchrun retry '{folder}'\n" in lines
    assert f"batchrun retry '{folder}' --regenerate-lost" in lines
    assert f"batchrun retry '{folder}' --in-doubt" in lines


def test_a_stopped_run_says_why_and_that_the_same_command_goes_on(tmp_path: Path) -> None:
    counts = Counts({State.DONE: 3, State.PLANNED: 7})
    lines = said(summary(tmp_path, counts, (), stopped="by Ctrl-C")).splitlines()
    assert lines[0] == "stopped (by Ctrl-C): 3 of 10 rows done, 7 not finished"
    assert lines[-1] == "to go on: run the same command again"


def test_tasks_that_go_on_are_told_with_what_fetches_and_what_ends_them(tmp_path: Path) -> None:
    counts = Counts({State.DONE: 3, State.IN_FLIGHT: 1, State.PLANNED: 6})
    commands = Commands("batchrun run m.csv --limit 9", "batchrun run m.csv")
    lines = said(summary(tmp_path, counts, (), stopped="by Ctrl-C", commands=commands)).splitlines()
    assert lines[-2:] == [
        "1 task goes on at the service and will be billed: run again to fetch what it makes, or end it with "
        f"batchrun cancel {tmp_path}",
        "to go on: batchrun run m.csv --limit 9",
    ]
    done = Counts({State.DONE: 9, State.PLANNED: 1})
    lines = said(summary(tmp_path, done, (), beyond_limit=1, commands=commands)).splitlines()
    assert lines[-1] == "to do the rest: batchrun run m.csv"


def test_a_rehearsal_s_costs_are_called_made_up_and_its_commands_rehearse(tmp_path: Path) -> None:
    (tmp_path / "simulator.jsonl").touch()
    counts = Counts({State.DONE: 3, State.FAILED: 1, State.IN_FLIGHT: 2}, cost_usd=Decimal("0.0012"))
    lines = said(summary(tmp_path, counts, (FAILED,))).splitlines()
    assert "cost    0.0012 USD (made up: a rehearsal)" in lines
    assert not any("billed" in each for each in lines)
    assert [each for each in lines if "batchrun " in each] == [
        each for each in lines if each.endswith(" --simulate")
    ]
    assert to_json(tmp_path, counts, (), None)["rehearsal"] is True


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tool": "instant-id", "set": {"samples": "2", "prompt": 'it\'s a "cat"'}, "map": {"prompt": "a b"}},
        {"expand": {"seed": "1..4", "scheduler": ["A b", "C"]}, "repeat": 3, "extra": "keep", "limit": 5},
        {"concurrency": 9, "max_cost": "1.50", "halt": "fail=5%", "max_pause": 5400.0, "skip_invalid": True},
        {"delimiter": ";", "format": "csv", "lora_scale": "parameter", "on_stuck": "kill", "attempts": 1},
    ],
)
def test_the_command_that_goes_on_says_the_same_as_the_job_it_was_made_of(
    settings: dict[str, object], tmp_path: Path
) -> None:
    from batchrun.cli.command import as_told
    from batchrun.cli.options import SERVICE_NAMES, job_of
    from batchrun.cli.run import run

    job = job_for(tmp_path / "my rows.csv", out=tmp_path / "run", **settings)
    told = as_told(job, rehearsal=True)
    assert told is not None
    for command, limit in ((told.again, job.limit), (told.rest, None)):
        words = shlex.split(command)
        assert words[:2] == ["batchrun", "run"]
        values = run.make_context("run", words[2:]).params
        assert values["simulate"] is True
        known = {
            name: value for name, value in values.items() if name not in {*SERVICE_NAMES, "as_json", "job"}
        }
        made = job_of(values["job"], known)
        assert made.axes == job.axes
        assert made == job.model_copy(update={"limit": limit, "expand": made.expand})


def test_what_no_command_line_can_say_is_not_said(tmp_path: Path) -> None:
    from batchrun.cli.command import as_told

    for settings in ({"set": {"loras": ["61"]}}, {"max_image_bytes": 1000}):
        assert as_told(job_for(tmp_path / "m.csv", **settings), rehearsal=False) is None
    assert as_told(job_for("-", format="csv"), rehearsal=False) is None


def test_as_data_what_is_under_way_is_in_flight_and_costs_are_exact(tmp_path: Path) -> None:
    counts = Counts(
        {State.SUBMITTING: 1, State.IN_FLIGHT: 2, State.FINISHED: 3, State.PLANNED: 4},
        cost_usd=Decimal("1E-7"),
    )
    told = json.loads(json.dumps(to_json(tmp_path, counts, (FAILED,), None)))
    assert told["rows"]["in_flight"] == 6
    assert told["rows"]["planned"] == 4
    assert told["rows"]["total"] == 10
    assert told["cost_usd"] == "0.0000001"
    assert told["failures"][0]["rows"] == 2


def test_the_log_holds_no_secrets_and_survives_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    row = Row(1, "k", "a", 2, "a", 1, {}, {}, 1, State.DONE)
    progress = Progress()
    with Log(path, secrets=["hunter2", ""]) as log:
        progress.listen(log.listen)
        progress.announce(Fact.ACCEPTED, row, task="7", token="t0ken")
        progress.announce(Fact.NOTE, message="the key hunter2\u202e", cost=Decimal("1.5"))
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["fact"], first["id"], first["line"], first["task"]) == ("accepted", "a", 2, "7")
    assert "t0ken" not in path.read_text()
    assert second["message"] == "the key ***\u202e"
    assert "\u202e" not in path.read_text()
    assert second["cost"] == "1.5"
    full = Path("/dev/full")
    if full.exists():
        with Log(full) as log:
            log.listen(Event(Fact.NOTE, 0.0))
            log.listen(Event(Fact.NOTE, 0.0))
            assert log.fault
    with pytest.raises(UsageError, match="--log"):
        Log(tmp_path / "no" / "log.jsonl")


def test_a_stream_that_is_gone_ends_the_talking_and_nothing_else(tmp_path: Path) -> None:
    stream = (tmp_path / "out").open("w")
    talk = Talk(stream)
    talk.say("one\u2192")
    stream.close()
    talk.say("two")
    talk.say("three")
    assert talk.is_over
    assert (tmp_path / "out").read_text() == "one→\n"


def test_a_stream_of_few_characters_gets_the_others_replaced() -> None:
    raw = io.BytesIO()
    talk = Talk(io.TextIOWrapper(raw, encoding="ascii"))
    talk.say("p.csv → runs/p")
    assert raw.getvalue() == b"p.csv ? runs/p\n"
