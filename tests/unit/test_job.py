"""Jobs: what a job file and the command line may say, and what is answered when they say it wrong."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from pydantic import ValidationError

from batchrun.errors import JobError, UsageError
from batchrun.manifest.job import Job, job_for, load_job, parse_assignments


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "job.toml") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def faults(path: Path) -> list[str]:
    with pytest.raises(JobError) as caught:
        load_job(path)
    return [line.removeprefix(f"{path}:") for line in str(caught.value).split("\n")]


def test_a_job_file_holds_every_setting(write, tmp_path: Path) -> None:
    job = load_job(
        write(
            "\ufeff"  # some editors write one
            'manifest = "lists/prompts.csv"\r\ntool = "instant-id"\r\n'
            'concurrency = 8\r\nout = "../runs/x"\r\n'
            '[set]\r\nsamples = 1\r\nguidance = 7.50\r\nloras = ["a", "b"]\r\n'
            '[map]\r\nprompt = "caption"\r\n'
            '[expand]\r\nseed = "1..4"\r\nscheduler = ["DDIM", "PNDM"]\r\nrepeat = 3\r\n'
        )
    )
    assert job.manifest == tmp_path / "lists/prompts.csv"
    assert job.out == job.folder == tmp_path.parent / "runs/x"
    assert (job.tool, job.concurrency, job.repeat) == ("instant-id", 8, 3)
    assert job.set == {"samples": 1, "guidance": Decimal("7.50"), "loras": ["a", "b"]}
    assert str(job.set["guidance"]) == "7.50"  # the digits stay
    assert job.map == {"prompt": "caption"}
    assert [(axis.name, list(axis.values)) for axis in job.axes] == [
        ("seed", [1, 2, 3, 4]),
        ("scheduler", ["DDIM", "PNDM"]),
    ]


def test_all_faults_are_told_at_once_each_with_its_line_and_cure(write) -> None:
    path = write(
        'manifest = "a.csv"\nconcurency = 4\ntool = 5\ndownloads = "8"\nextra = "kep"\nout = 5\n'
        'skip_invalid = "yes"\nconcurrency = "many"\nmax_image_bytes = 2.5\nlimit = 0\nmap = "x"\n'
        'delimiter = "ab"\nformat = "xls"\n[set]\nwhen = 2020-01-01\nx = nan\n'
        '[expand]\nseed = "1.."\nid = "1..2"\nrepeat = 0\nempty = []\n'
    )
    expected = [
        ("2: concurency: unknown key", "did you mean concurrency?"),
        ("3: tool: must be text, not 5", "quotes"),
        ('4: downloads: must be a whole number, not "8"', "without quotes"),
        ("5: extra: must be 'error', 'keep' or 'drop', not \"kep\"", ""),
        ("6: out: must be a path", '"folder/name"'),
        ("7: skip_invalid: must be true or false", "without quotes"),
        ('8: concurrency: must be a whole number from 1 or "auto"', "write 8"),
        ("9: max_image_bytes: must be a whole number, not 2.5", ""),
        ("10: limit: must be at least 1", ""),
        ("11: map: must be a table", "[map]"),
        ("12: delimiter: must be one character", '";"'),
        ("13: format: must be 'csv', 'tsv', 'jsonl' or 'json'", ""),
        ("15: set.when: is a date", "in quotes"),
        ("16: set.x: must be a finite number", ""),
        ("18: expand.seed:", '"1..4"'),
        ("19: expand.id: cannot be expanded", "take it out"),
        ("20: expand.repeat: must be at least 1, not 0", ""),
        ("21: expand.empty: the list is empty", '["a", "b"]'),
    ]
    found = faults(path)
    assert len(found) == len(expected)
    for line, (start, cure) in zip(found, expected, strict=True):
        assert line.startswith(start)
        assert cure in line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tool = 'x'\n", "manifest: is missing"),
        ('manifest = "a.csv\n', "1: not TOML at column 18"),
        ('manifest = "a.csv"\n[set\n', "2: not TOML at column 5"),
        ('manifest = "a.csv"\nmanifest = "b.csv"\n', "2: not TOML"),
        ('manifest = "a.csv"\nx = "\\ud800"\n', "2: not TOML"),
        ('manifest = ""\n', "1: manifest: must be a path"),
        ('manifest = ["a.csv"]\n', "1: manifest: must be a path"),
        ('manifest = "a.csv"\nrepeat = 2\n[expand]\nrepeat = 3\n', "repeat is given twice"),
        ('manifest = "a.csv"\nset.x.y = nan\n', "2: set.x: must be a finite number"),
        ('manifest = "a.csv"\nset = {x = nan}\n', "2: set.x: must be a finite number"),
        (f"manifest = 'a.csv'\nlimit = {'9' * 5000}\n", "too long"),
        (f"manifest = 'a.csv'\n[set]\nx = {'[' * 80}{']' * 80}\n", "3: set.x: nested more than 64 deep"),
        ('manifest = "a.csv"\n[set]\nx = "a\\u0000b"\n', "3: set.x: a text holds a NUL"),
    ],
)
def test_a_wrong_job_file_is_answered_with_its_place(write, text: str, told: str) -> None:
    assert told in faults(write(text))[0]


def test_a_job_file_that_cannot_be_read_says_why(write, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="No such file"):
        load_job(tmp_path / "none.toml")
    path = tmp_path / "latin.toml"
    path.write_bytes(b'manifest = "a.csv"\ntool = "\xe9"\n')
    with pytest.raises(JobError, match=r"latin\.toml:2: not UTF-8"):
        load_job(path)


def test_the_command_line_goes_before_the_file_and_tables_merge_by_key(
    write, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(
        'manifest = "a.csv"\nskip_invalid = true\ntool = "x"\n[set]\na = 1\nb = 2\n'
        '[map]\np = "c"\n[expand]\nseed = "1..4"\nrepeat = 2\n'
    )
    job = job_for(
        path,
        set={"b": "3"},
        map={"q": "d"},
        expand={"seed": "5|6", "repeat": "4"},
        tool=None,
        concurrency=2,
        out="there",
    )
    assert job.set == {"a": 1, "b": "3"}
    assert job.map == {"p": "c", "q": "d"}
    assert (job.expand, job.repeat) == ({"seed": "5|6"}, 4)
    assert (job.tool, job.skip_invalid, job.concurrency) == ("x", True, 2)
    assert job.out == tmp_path / "there"
    assert job.with_overrides(skip_invalid=False, repeat=5).repeat == 5


def test_faults_of_the_command_line_name_its_options() -> None:
    for values, told in [
        ({"max_concurrency": 0}, "--max-concurrency: must be at least 1, not 0"),
        ({"concurrency": 100}, "--max-concurrency: is 64 while concurrency is 100; write 100 here too"),
        ({"set": {"a": "\udcff"}}, "--set a: a text holds half of a surrogate pair"),
        ({"expand": {"seed": "1.."}}, '--expand seed: "1.." is not a range'),
        ({"map": {"a": ""}}, "--map a: is empty"),
        ({"expand": {"repeat": "0"}}, "--expand repeat: must be at least 1, not 0"),
        ({"expand": {"repeat": "x"}}, '--expand repeat: must be a whole number, not "x"'),
        ({"expand": {"steps": "10,20"}}, '--expand steps: "10,20" is one single text'),
        ({"set": {"tool": "x"}}, "--set tool: is no parameter; write the tool of all rows as tool (--tool)"),
        ({"set": {"id": "x"}}, "--set id: cannot be the same for all rows"),
    ]:
        with pytest.raises(UsageError) as caught:
            job_for("a.csv", **values)
        assert str(caught.value).startswith(told)


def test_a_concurrency_above_64_is_meant_when_the_bound_is_raised_with_it() -> None:
    assert job_for("a.csv", concurrency=100, max_concurrency=100).concurrency == 100


@pytest.mark.parametrize(
    ("manifest", "name"),
    [
        ("a/list.csv.gz", "list"),
        ("list.v2.JSONL", "list.v2"),
        ("list", "list"),
        ("-", "stdin"),
        ("...csv", "manifest"),
        (".csv", "manifest"),
    ],
)
def test_a_run_is_named_after_its_manifest(manifest: str, name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = job_for(manifest)
    assert job.name == name
    assert job.folder == tmp_path / "runs" / name


def test_a_job_comes_back_from_its_record_exactly() -> None:
    job = job_for(
        "päth.csv",
        set={
            "a": 1.5,
            "b": Decimal("7.50"),
            "c": Decimal("5E3"),
            "d": None,
            "e": True,
            "f": "ü\u2028",
            "g": [1, {"h": []}],
        },
        expand={"seed": [1, Decimal("2.0")], "repeat": 2},
        concurrency="auto",
        delimiter="tab",
        out=Path("x\udcff"),  # a name that is no UTF-8
    )
    text = job.to_json()
    assert text.isascii()
    assert "\n" not in text
    again = Job.from_json(text)
    assert again == job
    assert repr(again) == repr(job)
    assert job.delimiter == "\t"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"manifest": "a.csv", "new": 1}'])
def test_a_record_of_another_version_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="newer batchrun"):
        Job.from_json(text)


def test_a_job_cannot_be_changed() -> None:
    job = Job(manifest="a.csv")
    with pytest.raises(ValidationError):
        job.tool = "x"


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Job.model_fields.values())


def test_assignments_are_split_at_the_first_equals_sign() -> None:
    assert parse_assignments(["a=b=c", " n = x ", "e="], "--set") == {"a": "b=c", "n": " x ", "e": ""}
    assert parse_assignments(["prompt = Long prompt "], "--map") == {"prompt": "Long prompt"}


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["seed"], 'write --set "parameter=value"'),
        (["=5"], '"=5" is not'),
        (["a=1", "a=2"], "a is given twice"),
    ],
)
def test_wrong_assignments_say_what_to_write(texts: list[str], told: str) -> None:
    with pytest.raises(UsageError, match="--set: ") as caught:
        parse_assignments(texts, "--set")
    assert told in str(caught.value)


def test_a_text_without_quotes_is_told_to_be_put_in_quotes(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("# mine\nmanifest = grid.csv  # rows\n")
    told = r'job\.toml:2: not TOML.*; put text in quotes: manifest = "grid\.csv"$'
    with pytest.raises(JobError, match=told):
        load_job(path)
