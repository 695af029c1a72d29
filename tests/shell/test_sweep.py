"""Jobs of a sweep: what their folders say, whatever becomes of them, and what is read from that."""

import csv
import errno
import io
import json
import os
import re
import signal
from contextlib import suppress
from dataclasses import replace

import pytest
from references import child
from references.pages import first_line
from references.pictures import ink

from pulmo_jax.host.lock import claim
from pulmo_jax.shell import sweep
from pulmo_jax.shell.sweep import RECORD, REFUSED, TRACEBACK, Request, bury, collect, run_job, unwritable
from pulmo_jax.shell.sweep_pages import write_pages
from pulmo_jax.types import InputError, OutputError

METRICS = {
    "image": {"autoencoder": {"auroc": {"value": 0.9}, "ap": {"value": None}}, "intensity": {"auroc": {"value": 0.1}}},
    "pixel": {"autoencoder": {"auroc": {"value": 0.8}, "ap": {"value": 0.7}}},
}


def request_of(folder, *overrides, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    overrides = ("+experiment=lung", "resume=True", "hydra.sweep.dir=x", *(overrides or ("seed=0",)))
    return replace(Request(folder, overrides, "a: 1", "call-1", resume=False, replay=False, kind="train"), **changes)


def record_of(folder):
    return json.loads((folder / RECORD).read_text())


def never(resume):
    raise AssertionError("the job ran")


@pytest.fixture
def said():
    return []


# --- one job


def test_done_job_leaves_its_record(tmp_path, said):
    seen = []

    def work(resume):
        seen.append((resume, record_of(tmp_path)["status"], collect(tmp_path.parent)[0].status))
        return 0.25

    assert run_job(request_of(tmp_path), work, said.append) == 0.25
    record = record_of(tmp_path)
    assert seen == [(False, "running", "running")]
    assert (record["status"], record["objective"], record["reason"]) == ("done", 0.25, "")
    assert record["overrides"] == ["+experiment=lung", "seed=0"]
    assert record["seconds"] >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", record["started"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".pulmo_jax", RECORD]
    assert said == []


@pytest.mark.parametrize("result", [None, 3])
def test_only_a_float_is_an_objective(tmp_path, said, result):
    assert run_job(request_of(tmp_path), lambda resume: result, said.append) is None
    assert (record_of(tmp_path)["status"], record_of(tmp_path)["objective"]) == ("done", None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (InputError("a.tif: cannot be read\nrepair it"), "a.tif: cannot be read\nrepair it"),
        (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug"),
        (MemoryError("9 TB"), "MemoryError: 9 TB"),
        (SystemExit(3), "exit status 3"),
    ],
)
def test_failed_job_says_why_and_stops_nothing(tmp_path, said, error, reason):
    def work(resume):
        raise error

    assert run_job(request_of(tmp_path), work, said.append) is None
    assert (record_of(tmp_path)["status"], record_of(tmp_path)["reason"]) == ("failed", reason)
    assert len(said) == 1
    assert reason.splitlines()[0] in said[0]
    bug = not isinstance(error, InputError | SystemExit)
    assert (tmp_path / TRACEBACK).exists() == bug
    if bug:
        assert "raise error" in (tmp_path / TRACEBACK).read_text()


def test_objective_that_is_not_finite_is_a_failure(tmp_path, said):
    assert run_job(request_of(tmp_path), lambda resume: float("nan"), said.append) is None
    assert record_of(tmp_path)["reason"] == "the objective is nan"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SystemExit(143), "stopped by SIGTERM"),
        (KeyboardInterrupt(signal.SIGUSR1), "stopped by SIGUSR1"),
        (KeyboardInterrupt(), "stopped by SIGINT"),
    ],
)
def test_signals_are_recorded_and_go_on_upwards(tmp_path, said, error, reason):
    def work(resume):
        raise error

    with pytest.raises(type(error)):
        run_job(request_of(tmp_path), work, said.append)
    assert (record_of(tmp_path)["status"], record_of(tmp_path)["reason"]) == ("interrupted", reason)


# --- once more


def test_done_job_is_answered_from_its_folder(tmp_path, said):
    objective = 0.1 + 0.2
    run_job(request_of(tmp_path), lambda resume: objective, said.append)
    before = (tmp_path / RECORD).stat().st_mtime_ns
    assert run_job(request_of(tmp_path, resume=True, call="call-2"), never, said.append) == objective
    assert (tmp_path / RECORD).stat().st_mtime_ns == before
    assert "job" in said[0]
    assert "already finished" in said[0]


@pytest.mark.parametrize("error", [InputError("no"), KeyboardInterrupt()])
def test_job_that_did_not_finish_is_gone_on_with(tmp_path, said, error):
    def work(resume):
        raise error

    with suppress(KeyboardInterrupt):
        run_job(request_of(tmp_path), work, said.append)
    resumed = []
    again = request_of(tmp_path, resume=True, call="call-2")
    assert run_job(again, lambda resume: resumed.append(resume) or 0.5, said.append) == 0.5
    assert resumed == [True]
    assert record_of(tmp_path)["status"] == "done"


def test_without_resume_a_job_of_an_earlier_call_stays_as_it_is(tmp_path, said):
    run_job(request_of(tmp_path), lambda resume: 0.5, said.append)
    assert run_job(request_of(tmp_path, call="call-2"), never, said.append) is None
    assert "resume=true continues it" in said[0]
    assert record_of(tmp_path)["objective"] == 0.5


def test_job_that_a_scheduler_sends_again_goes_on_by_itself(tmp_path, said):
    def work(resume):
        raise SystemExit(138)

    with pytest.raises(SystemExit):
        run_job(request_of(tmp_path), work, said.append)
    resumed = []
    run_job(request_of(tmp_path), resumed.append, said.append)
    assert resumed == [True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"overrides": ("+experiment=lung", "seed=1")}, r"contains another job \(there: seed=0; now: seed=1\)"),
        ({"overrides": ("+experiment=lung",)}, r"there: seed=0; now: not given"),
        ({"config": "a: 2"}, "its config files have changed"),
    ],
)
def test_folder_of_another_job_is_refused_and_kept(tmp_path, said, changes, words):
    run_job(request_of(tmp_path / "0"), lambda resume: 0.5, said.append)
    other = replace(request_of(tmp_path / "0", resume=True, call="call-2"), **changes)
    assert run_job(other, never, said.append) is None
    assert re.search(words, said[0])
    assert record_of(tmp_path / "0")["objective"] == 0.5
    [row] = collect(tmp_path)
    assert row.status == "failed"
    assert re.search(words, row.reason)
    assert run_job(request_of(tmp_path / "0", resume=True), never, said.append) == 0.5
    assert not (tmp_path / "0" / REFUSED).exists()


def test_job_that_another_process_runs_is_refused(tmp_path, said):
    with claim(tmp_path, "run.lock"):
        assert run_job(request_of(tmp_path), never, said.append) is None
    assert "in use by process" in said[0]
    assert not (tmp_path / RECORD).exists()


def test_damaged_record_is_named(tmp_path, said):
    run_job(request_of(tmp_path), lambda resume: 0.5, said.append)
    (tmp_path / RECORD).write_text('{"status": "do')
    assert run_job(request_of(tmp_path, resume=True), never, said.append) is None
    assert f"{tmp_path / RECORD}: cannot be read" in said[-1]


def test_failure_in_the_middle_of_a_search_is_replayed_and_one_at_its_end_tried_again(tmp_path, said):
    def fail(resume):
        raise InputError("no")

    for name, work in (("9", fail), ("10", lambda resume: 0.5), ("11", fail)):
        run_job(request_of(tmp_path / name), work, said.append)
    again = {"resume": True, "replay": True, "call": "call-2"}
    assert run_job(request_of(tmp_path / "9", **again), never, said.append) is None
    assert "because the search continued: no" in said[-1]
    assert run_job(request_of(tmp_path / "11", **again), lambda resume: 0.25, said.append) == 0.25


# --- ends without a word


def test_killed_job_is_told_from_one_that_runs_and_can_be_buried(tmp_path, said):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom pulmo_jax.shell.sweep import Request, run_job\n"
        "request = Request(Path(sys.argv[1]), ('seed=0',), '', 'call-1', False, False, 'train')\n"
        "run_job(request, lambda resume: os.kill(os.getpid(), 9), print)\n"
    )
    (tmp_path / "0").mkdir()
    child.run_program(code, tmp_path / "0", status=-signal.SIGKILL)
    assert record_of(tmp_path / "0")["status"] == "running"
    [row] = collect(tmp_path)
    assert row.status == "unfinished"
    assert "killed" in row.reason
    assert bury(tmp_path, "another call") == []
    assert bury(tmp_path, "call-1") == ["0"]
    assert record_of(tmp_path / "0")["status"] == "failed"
    again = request_of(tmp_path / "0", overrides=("seed=0",), config="")
    assert run_job(again, never, said.append) is None  # not in the same call
    assert run_job(replace(again, resume=True, call="call-2"), lambda resume: 0.5, said.append) == 0.5


# --- a full disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_seen_through_what_libraries_make_of_it(tmp_path, number):
    full = OSError(number, os.strerror(number), "/data/x")
    assert unwritable(full, tmp_path) == "the disk is full: /data/x could not be written"
    try:
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise RuntimeError("a checkpoint was not written") from error
    except RuntimeError as error:
        assert unwritable(error, tmp_path) == f"the disk is full: {tmp_path} could not be written"
    assert unwritable(ValueError(f"RESOURCE: {os.strerror(number)} [x]"), tmp_path) is not None
    forbidden = unwritable(OSError(errno.EACCES, "Permission denied", "/data/x"), tmp_path)
    assert forbidden.startswith("/data/x: cannot be written (Permission denied)")
    assert unwritable(OSError(errno.ENOENT, "No such file", "/data/x"), tmp_path) is None


def test_full_disk_does_not_hide_the_failure_that_it_caused(tmp_path, said, monkeypatch):
    write = sweep.write_json

    def full_later(path, value):
        if value.get("status") != "running":
            raise OutputError(f"the disk is full: {path} could not be written") from OSError(errno.ENOSPC, "")
        write(path, value)

    def work(resume):
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x")

    monkeypatch.setattr(sweep, "write_json", full_later)
    assert run_job(request_of(tmp_path), work, said.append) is None
    assert "the disk is full: /data/x could not be written" in said[0]


# --- the sweep


@pytest.fixture
def jobs(tmp_path, said):
    """Two values with two seeds each; one failed, one was refused."""

    def work(folder, latent, seed):
        def done(resume):
            if (latent, seed) == ("16", "1"):
                raise InputError("<b>no luck</b>\nsecond line")
            (folder / "metrics.json").write_text(json.dumps(METRICS))
            return 0.01 * int(latent) + 0.001 * int(seed)

        return done

    for number, (latent, seed) in enumerate([("16", "0"), ("16", "1"), ("64", "0"), ("64", "1")]):
        folder = tmp_path / str(number)
        request = request_of(folder, f"model.latent={latent}", f"seed={seed}")
        run_job(request, work(folder, latent, seed), said.append)
    return tmp_path


def test_table_has_a_row_a_job_with_its_keys_and_measures(jobs):
    write_pages(jobs)
    rows = list(csv.DictReader(io.StringIO((jobs / "sweep.csv").read_text())))
    assert list(rows[0]) == [
        *("folder", "status", "objective", "reason", "seconds", "experiment", "model.latent", "seed"),
        *("image AUROC", "pixel AUROC", "pixel AP"),
    ]
    assert [row["folder"] for row in rows] == list("0123")
    assert [row["status"] for row in rows] == ["done", "failed", "done", "done"]
    assert float(rows[3]["objective"]) == 0.01 * 64 + 0.001
    assert rows[1]["reason"] == r"<b>no luck</b>\nsecond line"
    assert rows[1]["image AUROC"] == rows[1]["objective"] == ""
    assert [row["pixel AP"] for row in rows] == ["0.7", "", "0.7", "0.7"]


@pytest.mark.draws
def test_page_is_self_contained_and_names_failures(jobs):
    write_pages(jobs)
    page = (jobs / "sweep.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "&lt;b&gt;no luck&lt;/b&gt;" in page
    assert "3 done, 1 failed" in page
    assert "0.16, job 0" in page  # the lowest objective
    assert ink(jobs / "figures" / "sweep.png") > 0.01
    assert (jobs / "figures" / "sweep.pdf").read_bytes().startswith(b"%PDF")


def test_jobs_are_in_the_order_of_their_numbers(tmp_path, said):
    for number in (10, 9, 2):
        run_job(request_of(tmp_path / str(number), f"seed={number}"), lambda resume: 0.5, said.append)
    assert [row.folder.name for row in collect(tmp_path)] == ["2", "9", "10"]


@pytest.mark.draws
def test_sweep_without_objective_or_without_any_job(tmp_path, said):
    assert write_pages(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    for seed in "01":
        folder = tmp_path / seed
        run_job(request_of(folder, f"seed={seed}"), lambda resume: 2, said.append)
        (folder / "metrics.json").write_text('{"sources": 2, "highest_snr": 7.5, "null": {"mean": 0}}')
    write_pages(tmp_path)
    assert "highest_snr" in (tmp_path / "sweep.html").read_text()
    assert ink(tmp_path / "figures" / "sweep.png") > 0.01


def test_single_job_needs_no_figure(tmp_path, said):
    run_job(request_of(tmp_path / "0"), lambda resume: 0.5, said.append)
    write_pages(tmp_path)
    assert not (tmp_path / "figures").exists()
    assert "<td>0.5</td>" in (tmp_path / "sweep.html").read_text()


@pytest.mark.parametrize("line", ["Sample data: one patient.", ""])
def test_page_of_jobs_on_sample_data_says_so(tmp_path, said, line):
    def work(resume):
        (tmp_path / "0" / "metrics.json").write_text(json.dumps({"sample": line} if line else {}))
        return 0.5

    run_job(request_of(tmp_path / "0"), work, said.append)
    write_pages(tmp_path)
    assert ("Sample data" in (tmp_path / "sweep.html").read_text()) == bool(line)
    assert not line or first_line(tmp_path / "sweep.html") == line
