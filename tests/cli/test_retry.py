"""`batchrun retry`: rows that did not make it are asked for again, by the user's word and no further."""

from __future__ import annotations

from tests.support.command import TOOL, Here, simulator


def test_failed_rows_stay_failed_on_a_plain_rerun_and_retry_does_them(here: Here) -> None:
    with simulator("--fault", "run-validation*2") as wiro:
        here = Here(here.folder, wiro)
        here.run(here.rows(3))
        again = here.run("p.csv")
        assert again.returncode == 1
        assert "batchrun retry runs/p" in again.stdout
        retried = here.batchrun("retry", "runs/p")
        assert retried.returncode == 0, retried.stdout + retried.stderr
        assert "2 rows asked for again\nso far: 1 done, 2 to do\n" in retried.stdout
        assert "all 3 rows done" in retried.stdout
        assert wiro.stats()["needless"] == 0
    assert not (here.folder / "runs/p/failed.csv").exists()


def test_one_id_is_enough(here: Here) -> None:
    with simulator("--fault", "run-validation*2") as wiro:
        here = Here(here.folder, wiro)
        here.run(here.rows(2))
        unknown = here.batchrun("retry", "runs/p", "--id", "r2", "--id", "nosuch")
        retried = here.batchrun("retry", "runs/p", "--id", "r2")
    assert unknown.returncode == 2
    assert 'no row of the run has the id "nosuch"' in unknown.stderr
    assert retried.returncode == 1
    assert "1 row of those ids asked for again" in retried.stdout
    assert here.images() == ["r2_0.png"]


def test_rows_paid_for_and_lost_are_bought_again_only_by_that_word(here: Here) -> None:
    with simulator("--fault", "cdn-gone*1") as wiro:
        here = Here(here.folder, wiro)
        first = here.run(here.rows(2), "--concurrency", "1")
        assert first.returncode == 1, first.stdout
        assert "batchrun retry runs/p --regenerate-lost" in first.stdout
        tasks = wiro.stats()["tasks"]
        left = here.batchrun("retry", "runs/p")
        assert left.returncode == 1
        assert "1 row paid for whose images are lost is left" in left.stdout
        failed = here.folder / "runs/p/failed.csv"
        assert not failed.exists(), "to run it from there would buy it again"
        assert wiro.stats()["tasks"] == tasks
        bought = here.batchrun("retry", "runs/p", "--regenerate-lost")
        assert bought.returncode == 0, bought.stdout
        assert wiro.stats()["tasks"] == tasks + 1


def test_doubtful_rows_are_looked_up_once_more_and_submitted_by_the_users_word(here: Here) -> None:
    with simulator("--fault", "run-reset-before*2", "--fault", "list-off=100%") as wiro:
        here = Here(here.folder, wiro)
        first = here.run(here.rows(2))
        assert first.returncode == 1, first.stdout
        assert "in doubt" in first.stdout
        assert "batchrun retry runs/p --in-doubt" in first.stdout
        assert here.status()["rows"]["in_doubt"] == 2
        plain = here.batchrun("retry", "runs/p", "--id", "r2")
        assert plain.returncode == 1
        assert "row r2 is in doubt: --in-doubt looks it up once more\n" in plain.stdout
        assert wiro.stats()["tasks"] == 0
        retried = here.batchrun("retry", "runs/p", "--in-doubt", "--id", "r2")
        assert "1 row in doubt: looked up once more" in retried.stdout
        assert here.images() == ["r2_0.png"]
        assert wiro.stats()["tasks"] == 1


def test_nothing_to_retry_is_said(here: Here) -> None:
    here.run(here.rows(1))
    retried = here.batchrun("retry", "runs/p")
    assert retried.returncode == 0
    assert "no failed rows to ask for again" in retried.stdout


def test_a_folder_without_a_run_is_2(here: Here) -> None:
    assert here.batchrun("retry", "nowhere").returncode == 2
    assert TOOL not in here.batchrun("retry", "nowhere").stderr
