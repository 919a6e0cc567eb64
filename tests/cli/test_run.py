"""`batchrun run` from the outside: what it does, says and exits with."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
from datetime import datetime

import pytest

from tests.support.command import TOOL, Here, has_controls, simulator, until


def test_a_manifest_becomes_images_and_the_end_is_told(here: Here) -> None:
    ended = here.run(here.rows(3))
    assert ended.returncode == 0, ended.stderr
    assert here.images() == ["r1_0.png", "r2_0.png", "r3_0.png"]
    said = ended.stdout
    assert said.startswith("p.csv → runs/p\n3 rows, 3 images to expect\n")
    assert "all 3 rows done\nimages  3, " in said
    assert "cost    0." in said
    assert not has_controls(said + ended.stderr)
    assert ended.stderr == ""


def test_a_price_that_nobody_publishes_is_unknown_and_not_nothing(here: Here) -> None:
    with simulator("--fault", "tool-off*9") as wiro:
        ended = Here(here.folder, wiro).run(here.rows(2))
    assert f"  {TOOL}: 2 rows, 2 images, price unknown\n" in ended.stdout


def test_the_same_command_again_finds_all_done_and_buys_nothing(here: Here) -> None:
    here.run(here.rows(2))
    assert here.wiro is not None
    tasks = here.wiro.stats()["tasks"]
    again = here.run("p.csv")
    assert again.returncode == 0
    assert "the manifest is unchanged\nso far: 2 done\n" in again.stdout
    assert here.wiro.stats()["tasks"] == tasks


def test_added_rows_are_run_and_changed_ones_wait_for_a_word(here: Here) -> None:
    here.run(here.rows(2))
    here.write("p.csv", "id,prompt\nr1,something else\nr2,a picture of 2 birds\nr3,a new one\n")
    again = here.run("p.csv")
    assert "in the manifest: 1 new\n1 row bought already asks for" in again.stdout
    assert "--rerun-changed" in again.stdout
    assert here.images() == ["r1_0.png", "r2_0.png", "r3_0.png"]
    bought = here.run("p.csv", "--rerun-changed")
    assert "1 finished row bought again" in bought.stdout
    assert len(list((here.folder / "runs/p/superseded").rglob("*.png"))) == 1


def test_a_failed_row_is_1_and_the_summary_names_cause_line_and_command(here: Here) -> None:
    with simulator("--fault", "run-validation@2") as wiro:
        here = Here(here.folder, wiro)
        ended = here.run(here.rows(3), "--concurrency", "1")
    assert ended.returncode == 1
    assert "2 of 3 rows done, 1 failed\n  1 row failed: rejected (line 3): " in ended.stdout
    assert "rows that did not make it: runs/p/failed.csv, ready to be corrected and run" in ended.stdout
    assert "to try failed rows again: batchrun retry runs/p\n" in ended.stdout
    assert (here.folder / "runs/p/failed.csv").read_text().splitlines() == [
        "id,prompt",
        "r2,a picture of 2 birds",
    ]


def test_errors_of_the_manifest_are_all_found_before_anything_is_sent(alone: Here) -> None:
    rows = "".join(f"r{n},x,ten{n}\n" for n in range(60))
    alone.write("bad.csv", "id,prompt,steps\n" + rows)
    keys = {"WIRO_API_KEY": "k", "WIRO_API_BASE_URL": "http://127.0.0.1:9/v1"}
    ended = alone.run("bad.csv", env=keys)
    assert ended.returncode == 2
    lines = ended.stderr.splitlines()
    assert lines[0].startswith("bad.csv:2: steps: ")
    assert lines[50] == "and 10 more"
    assert "nothing was sent" in lines[51]
    assert not (alone.folder / "runs/p").exists()
    as_json = alone.run("bad.csv", "--json", env=keys)
    assert as_json.returncode == 2
    errors = json.loads(as_json.stdout)["errors"]
    assert len(errors) == 60
    assert (errors[59]["file"], errors[59]["line"], errors[59]["column"]) == ("bad.csv", 61, "steps")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere.csv",), "nowhere.csv"),
        (("p.csv", "--concurrency", "many"), "neither a whole number"),
        (("p.csv", "--concurrency", "99"), "--max-concurrency"),
        (("p.csv", "--set", "samples"), "--set"),
        (("p.csv", "--env-file", "no.env"), "no.env"),
        (("p.csv", "--env-file", "no.env", "--simulate"), "no.env"),
        (("p.csv", "--extra", "some"), "--extra"),
        (("-",), "--format"),
        ((), "JOB"),
    ],
)
def test_wrong_arguments_are_2_with_a_message_and_no_traceback(
    here: Here, arguments: tuple[str, ...], said: str
) -> None:
    here.rows(1)
    ended = here.batchrun("run", *arguments)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_without_keys_the_message_names_the_variable_and_the_rehearsal(alone: Here) -> None:
    ended = alone.run(alone.rows(1))
    assert ended.returncode == 2
    assert "WIRO_API_KEY" in ended.stderr
    assert "--simulate" in ended.stderr
    # what is wrong with the manifest needs no keys to be told
    alone.write("bad.csv", "id,prompt,steps\na,x,ten\n")
    wrong = alone.run("bad.csv")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("bad.csv:2: steps: ")
    assert "WIRO_API_KEY" not in wrong.stderr


def test_a_refused_key_stops_the_run_with_3_and_shows_no_key(here: Here) -> None:
    ended = here.run(here.rows(2), "--log", "log.jsonl", env={"WIRO_API_SECRET": "very-wrong-secret"})
    assert ended.returncode == 3
    assert "stopped (" in ended.stdout
    assert "check WIRO_API_KEY and WIRO_API_SECRET" in ended.stdout
    everything = ended.stdout + ended.stderr + (here.folder / "log.jsonl").read_text()
    assert "very-wrong-secret" not in everything
    assert here.wiro is not None
    assert here.wiro.key not in everything


def test_ctrl_c_stops_in_good_order_and_the_same_command_goes_on(here: Here) -> None:
    with simulator("--seconds", "2", "--slots", "4") as wiro:
        here = Here(here.folder, wiro)
        arguments = ("run", here.rows(6), "--tool", TOOL, "--set", "samples=1")
        with here.start(*arguments) as going:
            until(lambda: wiro.stats()["active"] == 4, "four tasks run")
            going.send_signal(signal.SIGINT)
            said, _ = going.communicate(timeout=60)
        assert going.returncode == 3, said
        assert "stopping: finishing downloads; again to leave at once\n" in said
        assert "stopped (by Ctrl-C): 0 of 6 rows done, 6 not finished\n" in said
        command = f"batchrun run p.csv --tool {TOOL} --set samples=1"
        assert said.endswith(
            "4 tasks go on at the service and will be billed: run again to fetch what they make, or end them "
            f"with batchrun cancel runs/p\nto go on: {command}\n"
        )
        assert wiro.stats()["tasks"] == 4
        wiro.weather(seconds=0.05)
        again = here.batchrun(*arguments)
        assert again.returncode == 0, again.stdout
        assert "so far: 4 in flight, 2 to do\n" in again.stdout
        assert len(here.images()) == 6
        assert (wiro.stats()["tasks"], wiro.stats()["needless"]) == (6, 0)


def test_sigterm_is_obeyed_like_ctrl_c_and_twice_is_at_once(here: Here) -> None:
    with simulator("--seconds", "600", "--fault", "cdn-drip=100%") as wiro:
        here = Here(here.folder, wiro)
        with here.start("run", here.rows(2), "--tool", TOOL) as going:
            until(lambda: wiro.stats()["active"] == 2, "two tasks run")
            going.send_signal(signal.SIGTERM)
            going.send_signal(signal.SIGTERM)
            said, _ = going.communicate(timeout=60)
    assert going.returncode == 3, said
    assert here.status()["rows"]["done"] == 0


def test_standard_input_is_a_manifest(here: Here) -> None:
    rows = '{"id": "a", "prompt": "a cat"}\n{"id": "b", "prompt": "a dog"}\n'
    ended = here.run("-", "--format", "jsonl", "--out", "cats", text=rows)
    assert ended.returncode == 0, ended.stderr
    assert here.images("cats") == ["a_0.png", "b_0.png"]


def test_ctrl_c_ends_a_run_that_reads_a_manifest_which_does_not_come(here: Here) -> None:
    arguments = ("run", "-", "--format", "csv", "--tool", TOOL, "--out", "x")
    with here.start(*arguments, stdin=subprocess.PIPE) as going:
        until((here.folder / "x/state.sqlite3").exists, "it reads")
        assert going.stdout is not None
        said = ""
        for _ in range(3):  # in good order, at once, and by force
            going.send_signal(signal.SIGINT)
            while "stopping" not in said:
                said += going.stdout.readline()
        assert going.wait(60) == 3


def test_a_job_file_says_it_all_and_options_win_over_it(here: Here) -> None:
    (here.folder / "jobs").mkdir()
    here.write("jobs/list.tsv", "id\tprompt\tsteps\nok\ta cat\t20\nbad\ta dog\tten\n")
    here.write(
        "jobs/cats.toml",
        f'manifest = "list.tsv"\ntool = "{TOOL}"\nout = "../made"\nskip_invalid = true\n[set]\nsamples = 3\n',
    )
    ended = here.batchrun("run", "jobs/cats.toml", "--set", "samples=2")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert here.images("made") == ["ok_0.png", "ok_1.png"]
    assert "1 row invalid (line 3): " in ended.stdout


def test_a_limit_runs_the_first_rows_only_and_says_so(here: Here) -> None:
    ended = here.run(here.rows(5, "my rows.csv"), "--limit", "2", "--out", "runs/p")
    assert ended.returncode == 0, ended.stdout
    assert here.images() == ["r1_0.png", "r2_0.png"]
    assert f"only the first 2 rows (--limit)\n  {TOOL}: 2 rows, 2 images, " in ended.stdout
    rest = f"batchrun run 'my rows.csv' --tool {TOOL} --set samples=1 --out runs/p\n"
    assert f"to do the rest: {rest}" in ended.stdout
    assert here.batchrun("status", "runs/p").stdout.endswith(f"to go on: {rest}")


def test_a_folder_of_another_manifest_is_refused(here: Here) -> None:
    here.run(here.rows(1), "--out", "here")
    ended = here.run(here.rows(1, "q.csv"), "--out", "here")
    assert ended.returncode == 2
    assert "belongs to another manifest" in ended.stderr


def test_the_log_has_a_line_of_json_per_event_with_utc_times(here: Here) -> None:
    here.run(here.rows(1), "--log", "log.jsonl")
    here.run("p.csv", "--limit", "1", "--log", "log.jsonl")
    events = [json.loads(line) for line in (here.folder / "log.jsonl").read_text().splitlines()]
    facts = [event["fact"] for event in events]
    assert facts[0] == "planned"
    for fact in ("intent", "accepted", "finished", "saved", "done"):
        assert fact in facts
    done = next(event for event in events if event["fact"] == "done")
    assert (done["id"], done["line"]) == ("r1", 2)
    for event in events:
        assert event["at"].endswith("Z")
        datetime.fromisoformat(event["at"])
        assert "token" not in event


def test_whatever_goes_wrong_is_told_as_json_where_that_is_asked_for(here: Here) -> None:
    here.run(here.rows(1))
    here.rows(1, "other.csv")
    ended = here.run("other.csv", "--out", "runs/p", "--json")
    assert ended.returncode == 2
    assert "belongs to another manifest" in json.loads(ended.stdout)["errors"][0]["message"]


def test_skipping_rows_is_advised_only_where_it_would_help(alone: Here) -> None:
    keys = {"WIRO_API_KEY": "k", "WIRO_API_SECRET": "s"}
    alone.write("m.csv", "id,prompt\na,\nb,x\n")
    assert "(--skip-invalid runs the other rows)" in alone.run("m.csv", env=keys).stderr
    assert alone.run("nowhere.csv", env=keys).stderr.startswith("Error: nowhere.csv: cannot be read: ")
    assert "--skip-invalid" not in alone.batchrun("run", "m.csv", "--tool", "none", env=keys).stderr
    alone.write("twice.csv", "id,prompt\na,x\nb,\na,z\n")
    refused = alone.run("twice.csv", "--skip-invalid", env=keys).stderr
    assert '--skip-invalid cannot help with twice.csv:4: id: "a" is already the id of line 2' in refused


def test_standard_input_is_called_by_its_name(alone: Here) -> None:
    keys = {"WIRO_API_KEY": "k", "WIRO_API_SECRET": "s"}
    ended = alone.run("-", "--format", "csv", text="id,prompt\na,\n", env=keys)
    assert ended.stdout.startswith("standard input → runs/stdin\n")


def test_run_as_json_ends_with_the_runs_end_as_data(here: Here) -> None:
    ended = here.run(here.rows(1), "--json")
    told = json.loads(ended.stdout)
    assert told["exit_code"] == 0
    assert told["stopped"] is None
    assert told["rows"]["done"] == 1
    assert "all 1 rows done" not in ended.stdout
    assert "the 1 row is done" in ended.stderr


def test_a_rehearsal_needs_no_keys_and_its_folder_is_never_taken_for_a_real_run(alone: Here) -> None:
    ended = alone.run(alone.rows(1), "--simulate")
    assert ended.returncode == 0, ended.stderr
    assert "a rehearsal" in ended.stdout
    assert " USD (made up: a rehearsal)\n" in ended.stdout
    assert alone.images() == ["r1_0.png"]
    real = alone.run("p.csv", env={"WIRO_API_KEY": "k"})
    assert real.returncode == 2
    assert "rehearsal" in real.stderr
    assert "a rehearsal: its pictures and its cost are made up\n" in alone.batchrun("status", "runs/p").stdout
    assert alone.status()["rehearsal"] is True


def test_a_rehearsal_that_is_killed_goes_on_with_the_tasks_of_the_first_simulator(alone: Here) -> None:
    log = alone.folder / "log.jsonl"
    arguments = ("run", alone.rows(6), "--tool", TOOL, "--set", "samples=1", "--simulate", "--log", str(log))
    with alone.start(*arguments, "--concurrency", "3") as going:
        until(lambda: log.exists() and log.read_text().count('"in flight"') >= 3, "three rows are in flight")
        going.kill()
        going.communicate()
    again = alone.batchrun(*arguments)
    assert again.returncode == 0, again.stdout
    facts = [json.loads(line)["fact"] for line in log.read_text().splitlines()]
    assert facts.count("intent") == 6
    assert len(alone.images()) == 6


def test_a_rehearsal_that_comes_to_nothing_leaves_nothing(alone: Here) -> None:
    alone.write("bad.csv", "prompt,steps\nx,ten\n")
    assert alone.run("bad.csv", "--simulate").returncode == 2
    assert sorted(path.name for path in alone.folder.iterdir() if path.name != "runs") == ["bad.csv"]
    assert not (alone.folder / "runs/bad").exists()


def test_a_real_runs_folder_is_not_rehearsed_in(here: Here) -> None:
    here.run(here.rows(1))
    ended = here.run("p.csv", "--simulate")
    assert ended.returncode == 2
    assert "is no rehearsal" in ended.stderr


def test_texts_of_others_reach_the_terminal_without_control_sequences(here: Here) -> None:
    evil = "\x1b[31mred\x1b]0;title\x07 \u202eturned"
    row = json.dumps({"id": f"i{evil}", "prompt": evil, "steps": f"no{evil}"})
    ended = here.run("-", "--format", "jsonl", "--out", "x", text=row + "\n")
    assert ended.returncode == 2
    assert not has_controls(ended.stderr.replace("\n", ""))
    assert " turned" in ended.stderr


def test_the_state_is_for_its_owner_only(here: Here) -> None:
    here.run(here.rows(1))
    assert stat.S_IMODE((here.folder / "runs/p/state.sqlite3").stat().st_mode) == 0o600
