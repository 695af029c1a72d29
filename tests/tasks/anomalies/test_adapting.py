"""Low-rank adapters of a base run: what is trained and stored, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
import tifffile

from pulmo_jax.tasks.anomalies.building import build_method
from pulmo_jax.tasks.anomalies.run import load_run, open_run
from pulmo_jax.types import InputError

ADAPT = ("method=lora", "model=identity", "lora.rank=2", "lora.share=0.5")


@pytest.fixture(scope="module")
def base(go, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "base"
    go(run)
    return run


@pytest.fixture(scope="module")
def other_scanner(images, tmp_path_factory):
    """The images with another gray scale."""
    root = tmp_path_factory.mktemp("other")
    for path in images.rglob("*.tif"):
        target = root / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        image = tifffile.imread(path).astype(np.float32)
        tifffile.imwrite(target, (3 * (image - image.min()) ** 0.8 + 50).astype(np.uint16))
    return root


@pytest.fixture(scope="module")
def adapted(go, base, other_scanner, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "adapted"
    go(run, *adapting(base, other_scanner))
    return run


def adapting(base, scanner, *more):
    return [*ADAPT, f"method.base_run={base}", f"data.train={scanner}/train", f"data.val={scanner}/val", *more]


def named(run):
    (params,) = open_run(run).weights
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(params)}


def test_a_run_is_the_network_of_its_base_with_some_kernels_changed_by_a_low_rank(base, adapted):
    before, after = named(base), named(adapted)
    assert before.keys() == after.keys()
    assert type(open_run(adapted).scorer.method) is type(open_run(base).scorer.method)
    changed = {name: after[name] - before[name] for name in before if not np.array_equal(before[name], after[name])}
    assert 1 <= len(changed) < len(before)
    for name, change in changed.items():
        assert "kernel" in name
        assert np.linalg.matrix_rank(change.reshape(-1, change.shape[-1]), tol=1e-4 * np.abs(change).max()) <= 2


def test_the_adapters_alone_are_stored(base, adapted):
    config, how, _, _, step = load_run(adapted)
    factors = build_method(config, how).init()
    assert {pair.down.shape[1] for pair in factors.values()} == {2}
    manifest = (adapted / "checkpoints" / str(step) / "MANIFEST").read_bytes()
    stored = json.loads(manifest.partition(b"\n")[2])["arrays"]
    kept = [name.partition(".")[2] for name in stored]
    for part in ("params", "ema"):
        names = {f"{part}['{kernel}'].{factor}" for kernel in factors for factor in ("down", "up")}
        assert {name for name in kept if name.startswith(part)} == names
    whole = sum(leaf.size for leaf in named(base).values())
    assert 0 < sum(leaf.size for leaf in jax.tree.leaves(factors)) <= 0.5 * whole


def test_without_adapters_the_network_of_the_base_is_calibrated_anew(go, base, other_scanner, tmp_path):
    go(tmp_path / "run", *adapting(base, other_scanner, "lora.rank=0"))
    before, after = named(base), named(tmp_path / "run")
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)
    assert load_run(tmp_path / "run")[1].scale != load_run(base)[1].scale
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())["training"]
    assert (rows["steps"], rows["parameters"]) == (1, 0)


def test_intensities_are_normalised_anew(base, adapted):
    assert load_run(adapted)[1].offset != load_run(base)[1].offset
    assert load_run(adapted)[1].scale != load_run(base)[1].scale


def test_an_interrupted_training_continues_bit_for_bit(go, base, adapted, other_scanner, tmp_path):
    shutil.copytree(adapted, tmp_path / "run")
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step), ignore_errors=True)
    go(tmp_path / "run", *adapting(base, other_scanner, "resume=true"))
    for name, array in named(adapted).items():
        np.testing.assert_array_equal(array, named(tmp_path / "run")[name])


def test_without_its_base_or_with_another_training_of_it_a_run_is_not_opened(go, base, other_scanner, tmp_path):
    own = tmp_path / "base"
    shutil.copytree(base, own)
    go(tmp_path / "run", *adapting(own, other_scanner))
    open_run(tmp_path / "run")
    seal = own / "finished.json"
    seal.write_text(seal.read_text() + " ")
    with pytest.raises(InputError, match="its adapters belong to an earlier training of method.base_run"):
        open_run(tmp_path / "run")
    shutil.rmtree(own)
    with pytest.raises(InputError, match="contains adapters of the network of method.base_run"):
        open_run(tmp_path / "run")


def test_what_cannot_be_adapted_is_refused(go, base, other_scanner, images, tmp_path):
    for path in other_scanner.rglob("*.tif"):
        target = tmp_path / "bands" / path.relative_to(other_scanner)
        target.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(target, np.repeat(tifffile.imread(path)[..., None], 3, -1), photometric="rgb")
    with pytest.raises(InputError, match="3 bands, but method.base_run=.* was trained on images with 1"):
        go(tmp_path / "a", *adapting(base, tmp_path / "bands"))
    with pytest.raises(InputError, match="lora.share=1e-06"):
        go(tmp_path / "b", *adapting(base, other_scanner, "lora.share=1e-6"))
    with pytest.raises(InputError, match="method.base_run is null"):
        go(tmp_path / "c", *ADAPT)
    with pytest.raises(InputError, match=r"lora\.\* is for adapters alone"):
        go(tmp_path / "d", "lora.rank=2")
    assert not any((tmp_path / name / "images.json").exists() for name in "bcd")


VQ = ["method=vq_autoencoder", "method.n_codes=4", "model=vq_autoencoder", "model.width=8", "model.blocks=1"]
TOKENS = ["method=tokens", "model=token_transformer", "model.width=16", "model.layers=1", "model.heads=2"]
DIFFUSION = ["method=diffusion", "method.calls=2", "method.draws=2", "method.octaves=2", "model=image_unet"]
DIFFUSION += ["model.width=8", "model.depth=2", "model.heads=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ["method=uncertain_autoencoder", "model.bottleneck=spatial"],
        ["method=variational_autoencoder"],
        VQ,
        pytest.param(TOKENS, marks=pytest.mark.campaign),
        pytest.param(DIFFUSION, marks=pytest.mark.campaign),
    ],
    ids=lambda method: method[0].partition("=")[2],
)  # fmt: skip
def test_other_methods_are_adapted_in_their_kernels_alone(go, other_scanner, tmp_path, method):
    if method is TOKENS:
        go(tmp_path / "vq", *VQ)
        method = [*TOKENS, f"method.base_run={tmp_path / 'vq'}"]
    go(tmp_path / "base", *method)
    go(tmp_path / "run", *adapting(tmp_path / "base", other_scanner))
    before, after = named(tmp_path / "base"), named(tmp_path / "run")
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed
    assert all("kernel" in name or "tuned" in name for name in changed)
    assert not any("['base']" in name for name in changed)
    assert type(open_run(tmp_path / "run").scorer.method) is type(open_run(tmp_path / "base").scorer.method)
