"""Output folders of every verb as careless users give them: files of their own keep their bytes, whatever the keys."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from references import child

from pulmo_jax.host.marks import FORMAT, MARK

SMALL = [
    "data.patch_size=32", "model.width=8", "model.latent=8", "trainer.batch_size=8", "trainer.steps=4",
    "trainer.validation_patches=16", "evaluation.replicates=10", "calibration.pixel_rate=0.01",
]  # fmt: skip
DETECTION = ["+experiment=adi", "contrast.rings=0", "data.synthetic.frames=10", "data.synthetic.size=41"]


def picture(seed, bright=False):
    image = np.random.default_rng(seed).integers(1000, 3000, (64, 64)).astype(np.uint16)
    if bright:
        image[20:40, 20:40] += 20000
    return image


def folder(path, *names):
    """A folder of images with these names, each with content of its own."""
    for name in names:
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        image = picture(sum(name.encode()))
        if name.lower().endswith(".png"):
            Image.fromarray(image).save(file)
        else:
            tifffile.imwrite(file, image)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished run, and images."""
    root = tmp_path_factory.mktemp("world")
    folder(root / "normals", *(f"n{i}.tif" for i in range(8)))
    folder(root / "new", "x0.tif", "x1.tif")
    folder(root / "test", "normal/a.tif", "normal/b.tif", "bad/c.tif")
    child.run(
        "pulmo_jax.train", "+experiment=lung", f"data.train={root}/normals", f"hydra.run.dir={root}/run", *SMALL,
    )  # fmt: skip
    return root


def tree(top):
    return {
        path.relative_to(top).as_posix(): path.read_bytes()
        for path in sorted(top.rglob("*")) if path.is_file() and not path.is_symlink()
    }  # fmt: skip


# --- any tree of user's files

NAMES = (
    "figures", "maps", "records", "checkpoints", "evaluation", "aligned", ".hydra", "a.fits", "snr.fits", "report.html",
    "config.yaml", "metrics.json", "summary.json", "detections.csv", "multirun.yaml", "job.json", "sweep.csv", "0",
    "s.h5", "s.h5.json", "s.h5.part", ".s.h5.writing", ".s.h5.lock", "metadata.json", "run.lock", "paper.pdf", ".stop",
    "detect.log", "200", ".saving-4",
)  # fmt: skip
FOREIGN_MARK = json.dumps({"format": FORMAT, "kind": "other"}).encode() + b'\n"paper.pdf"\n'
leaves = st.sampled_from([b"", b"mine", b'{"host": "mine"}', b"pulmo_jax store part 2\nmine", FOREIGN_MARK])
inner_trees = st.dictionaries(st.sampled_from(NAMES), leaves, max_size=2)
trees = st.dictionaries(st.sampled_from((*NAMES, MARK)), leaves | inner_trees, min_size=1, max_size=5)
KEYS = {
    "train": ("resume=true", "name=x", "callbacks=[]"),
    "predict": ("overwrite=true", "hydra.run.dir=out"),
    "evaluate": ("seed=1",),
    "detect": ("resume=true", "search.threshold=4"),
    "ingest": ("verify=true", "near_bits=3"),
}
HYDRA = ("hydra.output_subdir=figures", "hydra.output_subdir=.", "hydra/job_logging=default", "hydra.job.chdir=true")


def command(verb, world):
    """Arguments of a verb that writes to out/ below the current folder."""
    return {
        "train": ["+experiment=lung", f"data.train={world}/normals", "hydra.run.dir=out", *SMALL],
        "predict": [f"run={world}/run", f"input={world}/new", "output=out"],
        "evaluate": [f"run={world}/run", f"data.test={world}/test", "hydra.run.dir=out"],
        "detect": [*DETECTION, "hydra.run.dir=out"],
        "ingest": [f"input={world}/new", "output=out/s.h5"],
    }[verb]


def plant(top, content):
    top.mkdir(parents=True)
    for name, inner in content.items():
        if isinstance(inner, dict):
            plant(top / name, inner)
        else:
            (top / name).write_bytes(inner)


@pytest.mark.slow
@pytest.mark.parametrize("verb", KEYS)
@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=6, deadline=None)
@given(content=trees, data=st.data())
def test_files_of_the_users_keep_their_bytes(world, tmp_path_factory, verb, content, data):
    top = tmp_path_factory.mktemp("top")
    plant(top / "out", content)
    keys = data.draw(st.lists(st.sampled_from(KEYS[verb]), unique=True))
    keys += data.draw(st.lists(st.sampled_from(HYDRA), max_size=1))
    swept = verb in ("train", "detect") and data.draw(st.booleans())
    sweep = ["-m", "seed=0,1", "hydra.sweep.dir=out"] if swept else []
    before = tree(top)
    done = child.attempt(f"pulmo_jax.{verb}", *command(verb, world), *keys, *sweep, cwd=top)
    after = tree(top)
    assert {name: after.get(name) for name in before} == before
    assert done.returncode in (0, 2, 3), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["train", "predict", "evaluate", "detect"])
def test_folder_with_other_files_is_refused_in_one_line(world, tmp_path, verb):
    plant(tmp_path / "out", {"figures": {"paper.pdf": b"only copy"}})
    done = child.run(f"pulmo_jax.{verb}", *command(verb, world), cwd=tmp_path, status=2)
    assert done.stderr.startswith(f"error: {tmp_path}/out: holds files that are not results of pulmo_jax (figures)")
    assert done.stderr.count("\n") == 1
    assert tree(tmp_path) == {"out/figures/paper.pdf": b"only copy"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["figures"]


@pytest.mark.parametrize("verb", ["predict", "evaluate", "detect"])
def test_results_of_training_are_not_replaced(world, tmp_path, verb):
    shutil.copytree(world / "run", tmp_path / "out")
    before = tree(tmp_path)
    done = child.run(f"pulmo_jax.{verb}", *command(verb, world), cwd=tmp_path, status=2)
    assert "holds results of `train`" in done.stderr
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_second_call_replaces_its_own_files_and_no_others(tmp_path):
    arguments = [*DETECTION, "hydra.run.dir=out"]
    child.run("pulmo_jax.detect", *arguments, cwd=tmp_path)
    first = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")}
    (tmp_path / "out" / "figures" / "paper.pdf").write_text("mine")
    (tmp_path / "out" / "spectra.csv").write_text("mine")
    child.run("pulmo_jax.detect", *arguments, "data.synthetic.rotation_deg=50", cwd=tmp_path)
    again = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")}
    assert again - first == {Path("figures/paper.pdf"), Path("spectra.csv")}
    assert (tmp_path / "out" / "spectra.csv").read_text() == "mine"


@pytest.mark.slow
def test_run_of_an_older_version_has_no_record_and_is_resumed(world, tmp_path):
    shutil.copytree(world / "run", tmp_path / "out")
    (tmp_path / "out" / MARK).unlink()
    for figure in (tmp_path / "out" / "figures").glob("planted.*"):
        figure.unlink()  # those versions did not have it
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    done = child.run("pulmo_jax.train", *command("train", world), cwd=tmp_path, status=2)
    assert "already contains a run; resume=true continues it" in done.stderr
    assert tree(tmp_path) == before
    child.run("pulmo_jax.train", *command("train", world), "resume=true", cwd=tmp_path)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert "report.html" in (tmp_path / "out" / MARK).read_text()


@pytest.mark.slow
def test_input_among_the_outputs_is_refused(tmp_path):
    child.run("pulmo_jax.detect", *DETECTION, "hydra.run.dir=out", cwd=tmp_path)
    np.save(tmp_path / "out" / "cube.npy", np.ones((10, 41, 41), np.float32))
    np.save(tmp_path / "angles.npy", np.linspace(0, 60, 10))
    np.save(tmp_path / "psf.npy", np.ones((9, 9)))
    before = tree(tmp_path)
    done = child.run(
        "pulmo_jax.detect", "data.cube=out/cube.npy", "data.angles=angles.npy", "data.psf=psf.npy", "hydra.run.dir=out",
        cwd=tmp_path, status=2,
    )  # fmt: skip
    assert done.stderr.startswith("error: data.cube=out/cube.npy: lies in the output folder")
    assert tree(tmp_path) == before


# --- a result belongs to its image


def scores(output):
    summary = json.loads((output / "summary.json").read_text())
    return {image["filename"]: image["image_score"] for image in summary["images"]}


@pytest.mark.slow
def test_image_of_same_name_size_and_time_gets_its_own_result(world, tmp_path):
    for name, bright in (("a", False), ("b", True)):
        (tmp_path / name).mkdir()
        tifffile.imwrite(tmp_path / name / "slice.tif", picture(1, bright))
        os.utime(tmp_path / name / "slice.tif", (1.6e9, 1.6e9))
    found = []
    for name, output in (("a", "out"), ("b", "out"), ("b", "out"), ("b", "truth")):
        done = child.run("pulmo_jax.predict", f"run={world}/run", f"input={name}", f"output={output}", cwd=tmp_path)
        found.append((scores(tmp_path / output)["slice.tif"], "(1 of them earlier)" in done.stdout))
    assert found[0][0] != found[1][0]
    assert found[1:] == [(found[3][0], False), (found[3][0], True), (found[3][0], False)]


@pytest.mark.slow
def test_image_of_the_same_name_in_another_store_gets_its_own_result(world, tmp_path):
    found = []
    for name, bright in (("a", False), ("b", True)):
        (tmp_path / name).mkdir()
        tifffile.imwrite(tmp_path / name / "slice.tif", picture(1, bright))
        child.run("pulmo_jax.ingest", f"input={name}", f"output={name}.h5", cwd=tmp_path)
    for name, earlier in (("a", 0), ("a", 1), ("b", 0)):
        done = child.run("pulmo_jax.predict", f"run={world}/run", f"input={name}.h5", "output=out", cwd=tmp_path)
        assert f"({earlier} of them earlier)" in done.stdout
        found.append(scores(tmp_path / "out")["slice.tif"])
    assert found[0] == found[1] != found[2]


CLASHES = [
    "a.tif",
    "a.png",
    "a.png.tif",
    "A.tif",
    "a..tif",
    "deep/a.tif",
    "deep.tif/a.tif",
    "caf\u00e9.tif",
    "cafe\u0301.tif",
]


@pytest.mark.slow
def test_no_two_images_share_an_output_file(world, tmp_path):
    folder(tmp_path / "in", *CLASHES)
    tifffile.imwrite(tmp_path / "in" / "p.tif", np.stack([picture(i) for i in range(3)]), photometric="minisblack")
    folder(tmp_path / "in", "p_0001.tif")
    child.run("pulmo_jax.predict", f"run={world}/run", "input=in", "output=out", cwd=tmp_path)
    assert len(list((tmp_path / "out" / "maps").rglob("*_score.tif"))) == len(CLASHES) + 2
    assert len(list((tmp_path / "out" / "maps").rglob("*_overlay.png"))) == len(CLASHES) + 4
    records = [json.loads(path.read_text()) for path in (tmp_path / "out" / "records").rglob("*.json")]
    highest = {}
    for record in records:
        score = tifffile.imread(tmp_path / "out" / "maps" / f"{record['maps']}_score.tif")
        highest[record["images"][0]["filename"]] = float(np.nanmax(score))
    for name in ("a.png", "A.tif"):
        one, alone = tmp_path / f"one {name}", tmp_path / f"alone {name}"
        one.mkdir()
        shutil.copy(tmp_path / "in" / name, one)
        child.run("pulmo_jax.predict", f"run={world}/run", f"input='{one}'", f"output='{alone}'")
        [path] = (alone / "maps").glob("*_score.tif")
        assert float(np.nanmax(tifffile.imread(path))) == highest[name]


def test_name_that_is_too_long_for_its_results_ends_that_file_alone(world, tmp_path):
    folder(tmp_path / "in", "short.tif", f"{'x' * 250}.tif", f"{'y' * 200}/{'z' * 240}.tif")
    child.run("pulmo_jax.predict", f"run={world}/run", "input=in", "output=out", cwd=tmp_path)
    assert len(scores(tmp_path / "out")) == 3


# --- full places, two at once, leftovers


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "predict", "evaluate", "detect", "ingest"])
def test_limit_on_file_size_is_one_line(world, tmp_path, verb):
    limited = (
        "import resource, runpy, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_module(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, f"pulmo_jax.{verb}", *command(verb, world)], cwd=tmp_path, text=True,
        env=child.environment(), capture_output=True, timeout=child.PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "ResourceWarning" not in line and "ignored in" not in line]
    assert line.startswith("error: "), line
    assert "File too large" in line or "limit on the size of files" in line, line
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith(".writing")]


def test_second_prediction_into_the_same_folder_is_refused(world, tmp_path):
    from pulmo_jax.host.outputs import output_folder

    with output_folder(tmp_path / "out", "predict"):
        done = child.run("pulmo_jax.predict", *command("predict", world), cwd=tmp_path, status=2)
    assert done.stderr.startswith(f"error: {tmp_path}/out is in use by process {os.getpid()}")


def test_killed_ingestion_leaves_nothing_after_the_next_one(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(30):
        tifffile.imwrite(tmp_path / "in" / f"{i}.tif", rng.integers(0, 65535, (500, 500)).astype(np.uint16))
    kills = 0
    for _ in range(3):
        process = child.start("pulmo_jax.ingest", "input=in", "output=s.h5", log=tmp_path / "log", cwd=tmp_path)
        while process.poll() is None:
            if (tmp_path / ".s.h5.writing").exists():
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        process.wait()
    assert kills
    child.run("pulmo_jax.ingest", "input=in", "output=s.h5", cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "log", "s.h5", "s.h5.json"]


@pytest.mark.parametrize("name", ["s.h5.json", "s.h5.part", ".s.h5.writing", ".s.h5.lock", "s.h5"])
def test_file_beside_a_store_that_is_not_ours_is_not_touched(world, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    done = child.run("pulmo_jax.ingest", *command("ingest", world), cwd=tmp_path, status=2)
    assert done.stderr.startswith(f"error: out/{name}: ")
    assert tree(tmp_path) == {f"out/{name}": b"mine"}


def test_two_stores_in_one_folder_have_their_own_metadata(world, tmp_path):
    (tmp_path / "metadata.json").write_text("mine")
    for name, images in (("a", "new"), ("b", "normals")):
        child.run("pulmo_jax.ingest", f"input={world}/{images}", f"output={name}.h5", cwd=tmp_path)
    assert [len(json.loads((tmp_path / f"{n}.h5.json").read_text())["records"]) for n in "ab"] == [2, 8]
    assert (tmp_path / "metadata.json").read_text() == "mine"
