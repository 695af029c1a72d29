"""Drawn images: files in the units of the training images, comparison with real patches, refusals."""

import json
import tracemalloc
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
from references.anomaly_run import run_on
from references.linear_method import LinearMethod
from references.pages import require_captions
from references.preprocessing import preprocessing

from pulmo_jax.config.nodes import find_target
from pulmo_jax.config.verbs import SampleConfig
from pulmo_jax.data.pipeline import MIRROR, UNCHANGED
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.transforms import flip_and_turn
from pulmo_jax.methods.ensemble import Ensemble, networks
from pulmo_jax.runs.place import workplace
from pulmo_jax.sample import sample as verb
from pulmo_jax.shell.composing import compose_config
from pulmo_jax.tasks.anomalies import real_patches
from pulmo_jax.tasks.anomalies.real_patches import read_real_patches
from pulmo_jax.tasks.anomalies.sampling import ABLE, draw, in_file_units, sample, write_and_compare
from pulmo_jax.tasks.anomalies.sampling_report import SHOWN, nearest_training_patch
from pulmo_jax.types import InputError


@dataclass(frozen=True)
class Drawing(LinearMethod):
    """Draws patches of one grey value each, uniform from 0 to 0.5 plus an offset."""

    sampling_calls: int = 3

    def sample(self, params, key, count):
        return params["offset"] + 0.5 * jax.random.uniform(key, (count, 1, 1, 1)) * jnp.ones((1, 8, 8, 1))


@pytest.fixture
def run(tmp_path):
    """A run that can draw, with images of noise as its training and validation images."""
    rng, folder = np.random.default_rng(0), tmp_path / "run"
    titles = {"training": [], "validation": []}
    for i in range(6):
        kind = "training" if i < 4 else "validation"
        path = tmp_path / "images" / f"{i}.tif"
        path.parent.mkdir(exist_ok=True)
        tifffile.imwrite(path, rng.integers(0, 255, (24, 24), np.uint8))
        titles[kind].append(path.name)
    folder.mkdir()
    (folder / "config.yaml").write_text("task: anomalies\n")
    (folder / "run.json").write_text("{}")
    (folder / "images.json").write_text(json.dumps(titles))
    made = run_on(folder, "uint8")
    data = made.config.data.model_copy(update={"train": tmp_path / "images", "patch_size": 8})
    scorer = replace(made.scorer, method=Drawing(), params=Drawing().init())
    return replace(made, config=made.config.model_copy(update={"data": data}), scorer=scorer)


def go(run, output, **options):
    config = SampleConfig(run=run.path, output=output, **options)
    with workplace(output, "sample", config) as place:
        sample(run, config, place)
    return json.loads((output / "summary.json").read_text())


def read(output):
    return np.stack([tifffile.imread(path) for path in sorted((output / "samples").iterdir())])


def test_images_have_the_units_and_the_dtype_of_the_training_images(run, tmp_path):
    summary = go(run, tmp_path / "out", n=5, batch_size=2)
    names = sorted(path.name for path in (tmp_path / "out" / "samples").iterdir())
    assert names == ["000.tif", "001.tif", "002.tif", "003.tif", "004.tif"]
    images = read(tmp_path / "out")
    assert (images.dtype, images.shape) == (np.uint8, (5, 8, 8))
    batches = [run.scorer.method.sample(run.scorer.params, draw_key(b), 2) for b in range(3)]
    expected = np.rint(255 * np.concatenate(batches)[:5, ..., 0])
    np.testing.assert_array_equal(images, expected)
    assert (summary["images"], summary["network_calls_per_image"], summary["method"]) == (5, 3, "Drawing")
    assert summary["seconds_per_image"] > 0


def draw_key(batch):
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), batch)


@pytest.mark.draws
def test_images_are_compared_with_the_patches_of_the_run(run, tmp_path, capsys):
    near = go(run, tmp_path / "out", n=3)["nearest_training_patch"]
    assert (near["training_patches"], near["validation_patches"]) == (4 * 25, 2 * 25)
    assert len(near["rms_difference"]) == 3
    assert near["copies"] == 0
    patches = np.stack([tifffile.imread(run.config.data.train / f"{i}.tif") for i in range(4)]) / 255
    windows = np.lib.stride_tricks.sliding_window_view(patches, (8, 8), (1, 2))[:, ::4, ::4].reshape(-1, 8, 8)
    first = read(tmp_path / "out")[0].mean() / 255
    assert near["rms_difference"][0] == pytest.approx(np.sqrt(((windows - first) ** 2).mean((1, 2))).min(), abs=2e-3)
    assert "copies" not in capsys.readouterr().out
    require_captions(tmp_path / "out" / "report.html")
    assert (tmp_path / "out" / "samples.png").stat().st_size > 1000


def test_copies_of_training_patches_are_reported(run, tmp_path, capsys):
    copied = tifffile.imread(run.config.data.train / "2.tif")[4:12, 8:16] / np.float32(255)

    class Copying(Drawing):
        def sample(self, params, key, count):
            return jnp.broadcast_to(copied[::-1, :, None], (count, 8, 8, 1))  # mirrored, as training mirrors

    run = replace(run, scorer=replace(run.scorer, method=Copying()))
    summary = go(run, tmp_path / "out", n=2)
    assert summary["nearest_training_patch"]["copies"] == 2
    assert summary["nearest_training_patch"]["rms_difference"] == pytest.approx([0, 0], abs=1e-6)
    assert "warning: 2 of 2 images are nearly copies of training patches" in " ".join(capsys.readouterr().out.split())


def test_whole_images_are_compared_as_they_are_and_mirrored_alone(run):
    whole = run.config.data.model_copy(update={"resize": True})
    fixed = run.config.data.model_copy(update={"augment": False})
    codes = [read_patches(with_data(run, data)).codes for data in (run.config.data, whole, fixed)]
    assert codes == [tuple(range(8)), MIRROR, UNCHANGED]
    real = read_patches(with_data(run, whole))
    mirrored, turned = (flip_and_turn(real.training[3], code)[None] for code in (4, 1))
    assert nearest_training_patch(mirrored, real).distance[0] == 0
    assert nearest_training_patch(turned, real).distance[0] > 0.1


def with_data(run, data):
    return replace(run, config=run.config.model_copy(update={"data": data}))


def read_patches(run):
    return read_real_patches(run, Reader(100), 2048)


def test_a_few_equal_real_patches_hide_no_copies(run, tmp_path):
    """One validation patch in 50 equals a training patch; the smallest distance is 0, its 5 % quantile is not."""
    shared = tifffile.imread(run.config.data.train / "1.tif")[:8, :8]
    overwrite(run, "4.tif", slice(0, 8), slice(0, 8), shared)

    class Copying(Drawing):
        def sample(self, params, key, count):
            return jnp.broadcast_to(shared[..., None] / np.float32(255), (count, 8, 8, 1))

    near = go(replace(run, scorer=replace(run.scorer, method=Copying())), tmp_path / "out", n=2)[
        "nearest_training_patch"
    ]
    assert near["rms_difference_of_validation_patches"]["smallest"] == 0
    assert near["copy_limit"] == pytest.approx(near["rms_difference_of_validation_patches"]["5 %"] / 2)
    assert near["copies"] == 2


def test_many_equal_real_patches_make_the_search_for_copies_impossible(run, tmp_path):
    for name in ("0.tif", "4.tif"):
        overwrite(run, name, slice(None), slice(None), 0)
    summary = go(run, tmp_path / "out", n=2)
    assert (summary["nearest_training_patch"]["copy_limit"], summary["nearest_training_patch"]["copies"]) == (0, 0)
    assert "copies of training patches cannot be found" in summary["warnings"][0]
    assert summary["warnings"][0] in (tmp_path / "out" / "report.html").read_text()


def overwrite(run, name, rows, columns, values):
    pixels = tifffile.imread(run.config.data.train / name)
    pixels[rows, columns] = values
    tifffile.imwrite(run.config.data.train / name, pixels)


def test_patches_are_of_evenly_spaced_images(run, monkeypatch):
    """Of 7 images 4 are read, the first and the last among them."""
    monkeypatch.setattr(real_patches, "IMAGES", 4)
    for i in range(7):
        tifffile.imwrite(run.config.data.train / f"{i}.tif", np.full((24, 24), 30 * i, np.uint8))
    titles = [f"{i}.tif" for i in range(7)]
    patches, first = real_patches.patches_of(run.config.data.train, titles, 100, run, run.config.data, Reader(100))
    assert np.unique(np.rint(255 * patches / 30)).tolist() == [0, 2, 4, 6]
    assert first.title == "0.tif"


def test_memory_does_not_grow_with_the_number_of_images(run, tmp_path):
    """Every image is 64 KiB; those of the figure are kept, and a batch."""
    rng = np.random.default_rng(0)
    patches = rng.random((4, 128, 128, 1), np.float32)
    real = replace(read_patches(run), training=patches, validation=patches[:2] + np.float32(0.1))

    def peak(n_batches):
        batches = ((rng.random((16, 128, 128, 1), np.float32), 0.5) for _ in range(n_batches))
        tracemalloc.start()
        drawn = write_and_compare(batches, run.scorer.how, tmp_path / str(n_batches), 3, real)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (len(drawn.shown), len(drawn.comparison.nearest)) == (SHOWN, SHOWN)
        assert (len(drawn.comparison.distance), drawn.seconds) == (16 * n_batches, 0.5 * n_batches)
        return found

    few, many = peak(2), peak(12)
    assert many < few + 2 * 2**20  # ten further batches are 10 MiB


def test_networks_share_one_program_that_runs_once_for_each_batch(run):
    traced, ran = [], []

    class Counting(Drawing):
        def sample(self, params, key, count):
            traced.append(count)
            jax.debug.callback(lambda: ran.append(count))
            return super().sample(params, key, count)

    models = networks(Ensemble((Counting(), Counting())), {"gain": jnp.zeros((2, 1)), "offset": jnp.zeros(2)})
    config = SampleConfig(run=run.path, output=run.path, n=7, batch_size=2)
    assert [len(images) for images, _ in draw(models, config)] == [2, 2, 2, 1]
    jax.effects_barrier()
    assert (traced, ran) == ([2], [2, 2, 2, 2])


def test_without_the_images_of_the_run_the_report_says_why(run, tmp_path, capsys):
    (run.config.data.train / "3.tif").unlink()
    summary = go(run, tmp_path / "out", n=2)
    assert summary["nearest_training_patch"] is None
    reason = "1 of the 4 images of the run are missing"
    assert reason in summary["warnings"][0]
    assert reason in " ".join(capsys.readouterr().out.split())
    assert reason in (tmp_path / "out" / "report.html").read_text()
    assert len(read(tmp_path / "out")) == 2


def test_networks_of_an_ensemble_draw_in_turn(run, tmp_path):
    ensemble = Ensemble((Drawing(), Drawing()))
    params = {"gain": jnp.zeros((2, 1)), "offset": jnp.array([0.0, 0.5])}  # the second one draws brighter images
    run = replace(run, scorer=replace(run.scorer, method=ensemble, params=params))
    go(run, tmp_path / "out", n=5, batch_size=2)
    bright = read(tmp_path / "out").mean((1, 2)) > 127
    assert bright.tolist() == [False, False, False, True, True]


@pytest.mark.slow
def test_a_repeated_call_replaces_the_images(run, tmp_path):
    go(run, tmp_path / "out", n=5)
    before = read(tmp_path / "out")
    go(run, tmp_path / "out", n=3, seed=1)
    assert len(read(tmp_path / "out")) == 3
    assert (read(tmp_path / "out") != before[:3]).any()
    go(run, tmp_path / "out", n=5)
    np.testing.assert_array_equal(read(tmp_path / "out"), before)


def test_first_images_do_not_depend_on_their_number(run):
    models = [(run.scorer.method, run.scorer.params)]

    def first(n):
        config = SampleConfig(run=run.path, output=run.path, n=n, batch_size=4)
        return np.concatenate([images for images, _ in draw(models, config)])

    assert len(first(9)) == 9
    np.testing.assert_array_equal(first(9)[:4], first(4))


def test_a_method_that_cannot_draw_is_refused_before_anything_is_written(run, tmp_path):
    run = replace(run, scorer=replace(run.scorer, method=LinearMethod()))
    with pytest.raises(InputError, match="LinearMethod models no distribution .* a run of lung_vae, lung_tokens, lung"):
        go(run, tmp_path / "out")
    assert not (tmp_path / "out" / "samples").exists()


@pytest.mark.parametrize("experiment", ABLE)
def test_experiments_that_the_refusal_names_can_draw(experiment):
    node = compose_config("train", experiment, {}).method
    target = find_target(node, "method", ())
    assert {"sample", "sampling_calls"} <= set(dir(target))


DIFFUSION = ["method=diffusion", "method/loss=l1", "model=image_unet", "model.width=8", "model.depth=2"]
DRAWING = {"vae": ["method=variational_autoencoder"], "diffusion": DIFFUSION}


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWING)
def test_the_verb_draws_from_a_trained_run(go, tmp_path, name):
    go(tmp_path / "run", *DRAWING[name])
    verb(SampleConfig(run=tmp_path / "run", output=tmp_path / "out", n=3), tmp_path)
    assert (read(tmp_path / "out").dtype, read(tmp_path / "out").shape) == (np.uint16, (3, 16, 16))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["nearest_training_patch"]["training_patches"] == 8 * 16


@pytest.mark.slow
def test_the_verb_refuses_a_run_that_cannot_draw(go, tmp_path):
    go(tmp_path / "run")
    with pytest.raises(InputError, match="^run=.*run: Autoencoder models no distribution of images"):
        verb(SampleConfig(run=tmp_path / "run", output=tmp_path / "out"), tmp_path)


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        ("uint8", [-1.0, 0.5, 2.0], [0, 128, 255]),
        ("int16", [-1.0, 0.501, 2.0], [-255, 128, 510]),
        ("float32", [-3.0, 0.5, 3.0], [-255, 127.5, 510]),  # limited to the range of normalised values
    ],
)
def test_normalisation_is_inverted(dtype, values, expected):
    how = preprocessing(8, 1, dtype=dtype, scale=(255.0,), clip=(-1.0, 2.0))
    pixels = in_file_units(np.array(values, np.float32)[:, None, None], how)
    assert pixels.dtype == np.dtype(dtype)
    np.testing.assert_allclose(pixels.ravel(), expected)
