"""Which landmark evaluations have the same ground truth."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pulmo_jax.host.console import Console
from pulmo_jax.runs.comparison import STORED, describe_evaluation, read_matched
from pulmo_jax.tasks.landmarks.comparison import images_of
from pulmo_jax.tasks.landmarks.config import LandmarkDataConfig
from pulmo_jax.tasks.landmarks.data import read_sets
from pulmo_jax.types import InputError

HEIGHT, WIDTH, N = 301, 457, 8


@pytest.fixture
def tables(tmp_path):
    """tables(points, units) gives the labelled images of a table of (N, K, 2) points (y, x), px."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(N):
        picture = rng.integers(0, 255, (HEIGHT, WIDTH)).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "images" / f"{i:02d}.png")

    def read(points, units):
        shares = 100 * (points + 0.5) / (HEIGHT, WIDTH)
        percent = units == "percent"
        texts = [f"{v:.5f}" if percent else repr(v) for v in (shares if percent else points).ravel().tolist()]
        values = np.array(texts).reshape(N, -1, 2)[..., ::-1].reshape(N, -1)
        rows = [f"{i:02d}.png,{','.join(row)}" for i, row in enumerate(values)]
        path = tmp_path / "table.csv"
        path.write_text("\n".join(["filename,x1,y1,x2,y2,x3,y3", *rows]))
        options = LandmarkDataConfig(images=tmp_path / "images", train=path, val_fraction=0.3, units=units)
        return read_sets(options, 32, 0, Console(quiet=True)).training

    return read


def stored(folder, images):
    folder.mkdir()
    run = SimpleNamespace(config=SimpleNamespace(task="landmarks", name="net"), path=folder)
    (folder / STORED).write_text(json.dumps(describe_evaluation(run, images, {}, 0.5).as_json()))
    return folder


def test_the_same_points_in_px_and_in_percent_are_the_same_ground_truth(tables, tmp_path):
    """At the edges of any rounding, too."""
    rng = np.random.default_rng(1)
    points = rng.uniform(1, 300, (N, 3, 2))
    points[:, 0] = rng.integers(1, 3000, (N, 2)) / 10 + 0.005
    px, percent = (images_of(tables(points, units)) for units in ("px", "percent"))
    assert all(a.truth != b.truth for a, b in zip(px, percent, strict=True))
    folders = [stored(tmp_path / name, images) for name, images in (("a", px), ("b", percent))]
    matched = read_matched(folders, "same")
    assert matched.notes == []
    assert all(rows.tolist() == list(range(len(px))) for rows in matched.rows)


def test_points_elsewhere_are_another_ground_truth(tables, tmp_path):
    points = np.random.default_rng(1).uniform(1, 300, (N, 3, 2))
    moved = points.copy()
    moved[:, 1, 0] += 0.1
    a, b = (stored(tmp_path / n, images_of(tables(p, "px"))) for n, p in (("a", points), ("b", moved)))
    with pytest.raises(InputError, match="of other ground truth"):
        read_matched([a, b], "same")


def test_files_of_older_versions_are_compared_by_their_digests(tables, tmp_path):
    images = images_of(tables(np.random.default_rng(1).uniform(1, 300, (N, 3, 2)), "px"))
    older = stored(tmp_path / "older", [replace(image, points=()) for image in images])
    content = json.loads((older / STORED).read_text())
    for image in content["images"]:
        del image["points"]
    (older / STORED).write_text(json.dumps(content))
    assert read_matched([stored(tmp_path / "now", images), older], "same").notes == []
