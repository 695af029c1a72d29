"""Output folders: what is refused, recorded, replaced and removed."""

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from references import child

from pulmo_jax.host.files import replacing, write_json, write_text
from pulmo_jax.host.lock import NAME as LOCK
from pulmo_jax.host.marks import MARK, adopt
from pulmo_jax.host.outputs import check_output, joined, output_folder, recorded_below
from pulmo_jax.types import InputError, OutputError


def tree(folder):
    """Every path below a folder with its kind and content."""
    return {path.relative_to(folder).as_posix(): content(path) for path in sorted(folder.rglob("*"))}


def content(path):
    """Target of a link, bytes of a file, None for a folder or anything else."""
    if path.is_symlink():
        return os.readlink(path)
    return path.read_bytes() if path.is_file() else None


def refused(folder, kind, words, error=InputError):
    """Opening the folder fails with these words, and nothing is changed."""
    before = tree(folder.parent)
    with pytest.raises(error, match=words), output_folder(folder, kind):
        raise AssertionError("it was opened")
    assert tree(folder.parent) == before


def test_new_and_empty_folders_are_used_and_marked(tmp_path):
    for folder in (tmp_path / "deep" / "new", tmp_path / "empty"):
        if folder.name == "empty":
            folder.mkdir()
        with output_folder(folder, "detect"):
            assert (folder / LOCK).exists()
            write_text(folder / "b.txt", "1")
            write_text(folder / "sub" / "a.txt", "1")
        lines = (folder / MARK).read_text().splitlines()
        assert json.loads(lines[0])["kind"] == "detect"
        assert [json.loads(line) for line in lines[1:]] == ["b.txt", "sub/a.txt"]
        assert sorted(path.name for path in folder.iterdir()) == [MARK, "b.txt", "sub"]


def test_nothing_written_leaves_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new" / "one", tmp_path / "empty"):
        with pytest.raises(InputError, match="^bad data"), output_folder(folder, "train"):
            raise InputError("bad data")
    assert tree(tmp_path) == {"empty": None}


def test_folder_with_other_files_is_refused_and_untouched(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "paper.pdf").write_text("only copy")
    refused(tmp_path, "detect", r"holds files that are not results of pulmo_jax \(figures\)")


def test_results_of_another_kind_are_refused(tmp_path):
    with output_folder(tmp_path / "run", "train"):
        write_text(tmp_path / "run" / "report.html", "training")
    refused(tmp_path / "run", "evaluate", "holds results of `train`, not of `evaluate`")


@pytest.mark.parametrize("place", ["run/c.npy", "run", "run/sub/deep.npy"])
def test_input_in_the_output_folder_is_refused(tmp_path, place):
    with output_folder(tmp_path / "run", "detect"):
        write_text(tmp_path / "run" / "snr.fits", "1")
        write_text(tmp_path / "run" / "sub" / "x", "1")
    (tmp_path / place).touch() if "." in place else None
    (tmp_path / "link").symlink_to(tmp_path / place)
    for path in (tmp_path / place, tmp_path / "link"):
        with pytest.raises(InputError, match=f"^data.cube={path}: lies in the output folder"):
            check_output(tmp_path / "run", "detect", [("data.cube", path)])
    check_output(tmp_path / "run", "detect", [("data.cube", tmp_path / "other.npy")])


def test_only_recorded_files_are_replaced_and_cleared(tmp_path):
    run = tmp_path / "run"
    with output_folder(run, "detect"):
        write_text(run / "old.fits", "1")
        write_text(run / "figures" / "a.png", "1")
        write_text(run / "report.html", "1")
    (run / "figures" / "paper.pdf").write_text("mine")
    (run / "new.fits").write_text("mine")
    with output_folder(run, "detect") as output:
        write_text(run / "report.html", "2")
        output.clear()
        with pytest.raises(InputError, match=f"^{run}/new.fits: exists and was not written by pulmo_jax"):
            write_text(run / "new.fits", "2")
    assert {name: text for name, text in tree(run).items() if text and name != MARK} == {
        "figures/paper.pdf": b"mine", "new.fits": b"mine", "report.html": b"2",
    }  # fmt: skip


def test_results_are_not_written_through_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    run = tmp_path / "run"
    with output_folder(run, "evaluate"):
        write_text(run / "metrics.json", "1")
        (run / "figures").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(InputError, match=f"^{run}/figures: is a link"):
            write_text(run / "figures" / "a.png", "1")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("name", ["../victim", "/victim", "a/../../victim", "sub/victim"])
def test_forged_record_removes_nothing_outside(tmp_path, name):
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("mine")
    (run / "sub").symlink_to(tmp_path)
    (run / "own.txt").write_text("1")
    forged = f"{tmp_path}{name}" if name.startswith("/") else name
    adopt(run, "detect", [run / "own.txt"])
    with (run / MARK).open("a") as file:
        file.write(f"{json.dumps(forged)}\n[1]\n7\nnonsense\n")
    with output_folder(run, "detect") as output:
        output.clear()
    assert victim.read_text() == "mine"
    assert not (run / "own.txt").exists()


@pytest.mark.parametrize("content", ["", "mine", "{}", '{"format": 1, "kind": 2}', '["format"]', "[" * 5000])
def test_mark_that_is_not_ours_is_refused(tmp_path, content):
    (tmp_path / MARK).write_text(content)
    with pytest.raises(InputError, match=f"^{tmp_path}/{MARK}: is not a record of pulmo_jax"):
        check_output(tmp_path, "train")
    assert tree(tmp_path) == {MARK: content.encode()}


def test_mark_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / MARK)
    with pytest.raises(InputError, match="is not a record of pulmo_jax"):
        check_output(tmp_path, "train")


def test_lock_file_of_the_users_is_refused(tmp_path):
    (tmp_path / LOCK).write_text("mine")
    with pytest.raises(InputError, match="is not a lock of pulmo_jax"), output_folder(tmp_path, "train"):
        raise AssertionError("it was opened")
    assert tree(tmp_path) == {LOCK: b"mine"}


KILLED = """
import os, sys
from pathlib import Path
from pulmo_jax.host.files import replacing, write_text
from pulmo_jax.host.outputs import output_folder
run = Path(sys.argv[1])
with output_folder(run, "detect"):
    write_text(run / "whole.txt", "1")
    with replacing(run / "figures" / "a.png") as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), 9)
"""


def test_unfinished_file_of_a_killed_process_goes_with_the_next_call(tmp_path):
    for name in ("same", "sibling"):
        child.run_program(KILLED, tmp_path / name, status=-9)
        assert [path.name for path in (tmp_path / name / "figures").iterdir()] != []
        (tmp_path / name / "figures" / ".b.png.1.writing").write_text("mine: not in the record")
    with output_folder(tmp_path / "same", "detect"):
        write_text(tmp_path / "same" / "figures" / "a.png", "2")
    for name in ("same", "sibling"):
        left = {path.name for path in (tmp_path / name / "figures").iterdir()} - {"a.png"}
        assert left == {".b.png.1.writing"}
        assert not (tmp_path / name / LOCK).exists()
        assert (tmp_path / name / "whole.txt").exists()


def test_record_does_not_depend_on_interruptions(tmp_path):
    child.run_program(KILLED, tmp_path / "killed", status=-9)
    for name in ("killed", "straight"):
        with output_folder(tmp_path / name, "detect"):
            write_text(tmp_path / name / "whole.txt", "1")
            write_text(tmp_path / name / "figures" / "a.png", "2")
    assert tree(tmp_path / "killed") == tree(tmp_path / "straight")


def test_process_killed_while_it_begins_the_record_leaves_nothing(tmp_path):
    (tmp_path / f"{MARK}.writing").write_text('{"format": "pulmo')
    with output_folder(tmp_path, "detect"):
        write_text(tmp_path / "a.txt", "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARK, "a.txt"]
    (tmp_path / f"{MARK}.writing").write_text("mine")
    with output_folder(tmp_path, "detect"):
        write_text(tmp_path / "b.txt", "1")
    assert (tmp_path / f"{MARK}.writing").read_text() == "mine"
    with output_folder(tmp_path, "detect"):
        write_text(tmp_path / "b.txt", "2")


def test_truncated_line_of_the_record_spoils_no_later_one(tmp_path):
    with output_folder(tmp_path, "detect"):
        write_text(tmp_path / "a.txt", "1")
    with (tmp_path / MARK).open("a") as file:
        file.write('"b.t')
    with output_folder(tmp_path, "detect"):
        write_text(tmp_path / "c.txt", "1")
        write_text(tmp_path / "c.txt", "2")
    with output_folder(tmp_path, "detect"):
        write_text(tmp_path / "c.txt", "3")
    assert [path.name for path in sorted(tmp_path.iterdir())] == [MARK, "a.txt", "c.txt"]


def test_nested_use_and_folders_inside(tmp_path):
    with output_folder(tmp_path / "sweep", "sweep"), output_folder(tmp_path / "sweep" / "0", "train"):
        with output_folder(tmp_path / "sweep" / "0", "train"):
            write_text(tmp_path / "sweep" / "0" / "job.json", "1")
        refused(tmp_path / "sweep" / "0", "detect", "holds results of `train`")
        write_text(tmp_path / "sweep" / "sweep.csv", "1")
        assert recorded_below(tmp_path / "sweep") == [tmp_path / "sweep" / "sweep.csv"]
    assert json.loads((tmp_path / "sweep" / "0" / MARK).read_text().splitlines()[1]) == "job.json"


def test_another_process_of_a_sweep_records_its_files_too(tmp_path):
    with output_folder(tmp_path, "sweep"):
        write_text(tmp_path / "sweep.csv", "1")
        child.run_program(
            "import sys\nfrom pathlib import Path\nfrom pulmo_jax.host.outputs import joined\n"
            "from pulmo_jax.host.files import write_text\nfolder = Path(sys.argv[1])\n"
            "with joined(folder):\n    write_text(folder / 'sweep.html', '1')\n",
            tmp_path,
        )
    with output_folder(tmp_path, "sweep"):
        write_text(tmp_path / "sweep.html", "2")
    assert (tmp_path / "sweep.html").read_text() == "2"
    with joined(tmp_path / "nothing here"):
        pass
    assert not (tmp_path / "nothing here").exists()


# --- places that cannot be written


def test_full_disk_is_told_from_a_name_that_is_too_long(tmp_path):
    with pytest.raises(InputError, match="cannot be written .File name too long."):
        write_text(tmp_path / ("x" * 300), "1")
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path / "a\0b", "1")
    full = f"^the disk is full: {tmp_path}/a could not be written"
    for error, words in (
        (OSError(28, "No space left on device"), full),
        (OSError("Can't write data (errno = 27, error message = 'File too large')"), "limit on the size of files"),
        (OSError("100 requested and 10 written"), full),
    ):
        with pytest.raises(OutputError, match=words), replacing(tmp_path / "a"):
            raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    refused(tmp_path / "out", "train", f"^{tmp_path}/out: cannot be written", OutputError)


# --- any tree of user's files

names = st.sampled_from(["a.fits", "figures", "report.html", MARK, LOCK, "config.yaml", ".saving-3", "x.writing", "é"])
contents = st.binary(max_size=20) | st.sampled_from([b'{"format": "pulmo_jax output 1", "kind": "detect"}\n"a.fits"\n'])
trees = st.recursive(contents, lambda inner: st.dictionaries(names, inner, max_size=4), max_leaves=8)


def plant(folder: Path, content):
    if isinstance(content, bytes):
        folder.write_bytes(content)
        return
    folder.mkdir()
    for name, inner in content.items():
        plant(folder / name, inner)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(content=trees, record=st.booleans())
def test_files_of_the_users_keep_their_bytes(tmp_path_factory, content, record):
    top = tmp_path_factory.mktemp("tree")
    plant(top / "out", content)
    before = tree(top)
    listed = recorded_names(top / "out" / MARK)
    try:
        with output_folder(top / "out", "detect") as output:
            output.clear()
            for name in ("a.fits", "figures/a.png", "report.html", "config.yaml"):
                write_json(top / "out" / name, 1)
    except InputError:
        pass
    after = tree(top)
    ours = {f"out/{name}" for name in (*listed, MARK)}
    kept = {path: value for path, value in before.items() if path not in ours}
    assert {path: after.get(path) for path in kept} == kept


def recorded_names(mark):
    """Files that a valid record lists."""
    if not mark.is_file() or not mark.read_bytes().startswith(b'{"format": "pulmo_jax output 1", "kind": "detect"}\n'):
        return []
    return [json.loads(line) for line in mark.read_text().splitlines()[1:]]
