"""A store in the place of a folder, through the verbs."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from references import child

CROP = Path(__file__).parent / "lung_crop"


def call(*arguments, status=0):
    """Run a verb; returns what it printed."""
    done = child.run(*arguments, status=status, env={"COLUMNS": 200})
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name, pages in (("train", range(8)), ("val", range(8, 12)), ("new", range(12, 15))):
        (root / name).mkdir()
        for page in pages:
            tifffile.imwrite(root / name / f"slice_{page:02d}.tif", tifffile.imread(CROP / "ct.tif", key=page))
    return root


def train(run, folder, *more):
    small = [
        "data.patch_size=32",
        "model.width=8",
        "trainer.steps=6",
        "trainer.validate_every=3",
        "trainer.log_every=1",
    ]
    call("pulmo_jax.train", "+experiment=lung", f"data.train={folder}", *small, f"hydra.run.dir={run}", *more)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_training_from_a_store_is_training_from_its_folder(folders, tmp_path):
    """Loss by loss, and map by map."""
    runs = {}
    for kind in ("folders", "stores"):
        of = {name: folders / name for name in ("train", "val", "new")}
        if kind == "stores":
            for name in of:
                text = call("pulmo_jax.ingest", f"input={of[name]}", f"output={tmp_path / name}.h5")
                of[name] = tmp_path / f"{name}.h5"
            assert "3 images decoded, 0 already present or duplicates" in text
        rows = train(tmp_path / kind, of["train"], f"data.val={of['val']}")
        out = tmp_path / f"{kind}_out"
        call("pulmo_jax.predict", f"run={tmp_path / kind}", f"input={of['new']}", f"output={out}")
        scores = [tifffile.imread(out / "maps" / f"slice_{page}_score.tif") for page in (12, 13, 14)]
        runs[kind] = [row["train/loss"] for row in rows if "train/loss" in row], scores
    assert runs["folders"][0] == runs["stores"][0]
    np.testing.assert_array_equal(runs["folders"][1], runs["stores"][1])
    again = call("pulmo_jax.predict", f"run={tmp_path / 'stores'}", f"input={tmp_path / 'new.h5'}",
                 f"output={tmp_path / 'stores_out'}")  # fmt: skip
    assert "3 images finished (3 of them earlier)" in again


def test_ingest_tells_what_it_did_and_what_is_wrong(folders, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tif").write_bytes((folders / "train" / "slice_00.tif").read_bytes())
    (tmp_path / "in" / "b.tif").write_bytes((folders / "train" / "slice_00.tif").read_bytes())
    (tmp_path / "in" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    store = tmp_path / "sub" / "s.h5"
    text = call("pulmo_jax.ingest", f"input={tmp_path / 'in'}", f"output={store}", status=3)
    assert (
        "1 images decoded, 1 already present or duplicates, 1 failed; the store contains 2 images in 1 groups" in text
    )
    assert "cut.png" in text
    assert sorted(path.name for path in store.parent.iterdir()) == ["s.h5", "s.h5.json"]
    assert "2 of 2 images are intact" in call("pulmo_jax.ingest", f"output={store}", "verify=true")
    assert "input must be given" in call("pulmo_jax.ingest", f"output={store}", status=2)
    (tmp_path / "text.h5").write_text("nothing")
    text = call("pulmo_jax.train", "+experiment=lung", f"data.train={tmp_path / 'text.h5'}", status=2)
    assert "is a file; give a folder of images or a store" in text
