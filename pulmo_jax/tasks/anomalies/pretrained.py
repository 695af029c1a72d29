"""What a run takes over from earlier ones: a trained network, and what other machines have counted."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from pulmo_jax.data.scan import Scan
from pulmo_jax.data.transforms import Preprocessing
from pulmo_jax.methods.base import Method, OnePass, Params
from pulmo_jax.methods.patch_gaussian import PatchGaussian, merged
from pulmo_jax.runs.directory import digest_of_run
from pulmo_jax.tasks.anomalies.config import TrainConfig
from pulmo_jax.tasks.anomalies.data import NormalData
from pulmo_jax.tasks.anomalies.run import load_config, load_run
from pulmo_jax.training.state import TrainState, learnt
from pulmo_jax.types import InputError

# Of the preprocessing, what decides the numbers inside the foreground.
SCALE = ("channels", "dtype", "patch_size", "resize", "offset", "scale", "clip")

# Of the method, what decides what is counted.
COUNTED = ("of", "locations", "window_px", "stride", "n_features")


@dataclass(frozen=True)
class Pretrained:
    """A finished run whose network another one builds on. digest: of all that decides what it computes."""

    path: Path
    config: TrainConfig
    how: Preprocessing
    network: Params
    digest: str


def open_base(config: TrainConfig) -> Pretrained | None:
    """The run that method.base_run names. Raises InputError if it is none, or not of a network."""
    name = config.method.get("base_run")
    if name is None:
        return None
    path = Path(name).absolute()
    before, how, method, state, _ = load_run(path, config.plugins)
    if isinstance(method, OnePass):
        raise InputError(f"method.base_run={path}: its method trains no network; give the run of an autoencoder")
    return Pretrained(path, before, how, learnt(method, state), digest_of_run(path))


def with_base(config: TrainConfig) -> TrainConfig:
    """With the network's own description and patches, which the config cannot choose anew."""
    name = config.method.get("base_run")
    if name is None:
        return config
    path = Path(name).absolute()
    base = load_config(path)
    data = {"patch_size": base.data.patch_size, "resize": base.data.resize}
    if config.data.stride is not None:
        data["stride"] = min(config.data.stride, base.data.patch_size)
    return config.model_copy(
        update={
            "model": base.model,
            "data": config.data.model_copy(update=data),
            "method": {**config.method, "base_run": str(path)},
        }
    )


def start_from(fresh: TrainState, method: Method, data: NormalData, base: Pretrained | None) -> TrainState:
    """The state before training, with the base's network and with what other runs have counted."""
    if not isinstance(method, PatchGaussian):
        return fresh
    if base is not None:
        require_unseen(data, base)
        fresh = fresh.replace(params={**fresh.params, "network": base.network})
    elif jax.tree.leaves(fresh.params["network"]):
        raise InputError(
            "method.base_run is null, and the model's parameters are random; give method.base_run=RUN, the run "
            "directory of a trained autoencoder, or model=identity for the pixels themselves"
        )
    require_fit_windows(method, data)
    once = {data_root(data.training).resolve(): {ref.title for ref in data.training.images}}
    for name in method.merge_runs:
        require_new(Path(name).absolute(), once)
        fresh = fresh.replace(params=merged(fresh.params, counted(Path(name), fresh.params, method, data)))
    return fresh


def require_fit_windows(method: PatchGaussian, data: NormalData) -> None:
    """Raises InputError where no image has room for a single window."""
    side, first = method.window_side, data.training.images[0]
    if not data.how.resize and all(min(ref.shape[:2]) < side for ref in data.training.images):
        raise InputError(
            f"{first.path}: {first.shape[0]}x{first.shape[1]} px; it and all other training images are smaller than "
            f"the windows of {side} px; give a smaller method.window_px, or larger images"
        )


def require_new(path: Path, counted_once: dict[Path, set[str]]) -> None:
    """Every image counts once. Adds the images of the run at `path` to `counted_once`. Raises InputError."""
    before, titles = load_config(path).data.train, set(json.loads((path / "images.json").read_text())["training"])
    assert before is not None  # a finished run has them
    twice = sorted(counted_once.get(before.resolve(), set()) & titles)
    if twice:
        raise InputError(
            f"method.merge_runs: {len(twice)} of the training images of {path} ({twice[0]}, …) are counted already, "
            "by this run or another run of the list; each image may be used once"
        )
    counted_once[before.resolve()] = counted_once.get(before.resolve(), set()) | titles


def require_unseen(data: NormalData, base: Pretrained) -> None:
    """Thresholds from images that the network was trained on would be too low."""
    trained = set(json.loads((base.path / "images.json").read_text())["training"])
    seen = sorted(trained & {ref.title for ref in data.validation.images})
    if seen and base.config.data.train == data_root(data.validation):
        raise InputError(
            f"method.base_run={base.path} was trained on {len(seen)} of the {len(data.validation.images)} validation "
            f"images ({seen[0]}, …); give the same seed, data.val_fraction and data.group_regex, or the same data.val"
        )


def data_root(scan: Scan) -> Path:
    """The folder that images come from."""
    ref = scan.images[0]
    return ref.path.parents[len(Path(ref.name).parts) - 1]


def counted(path: Path, like: Params, method: PatchGaussian, data: NormalData) -> Params:
    """What another run has counted. Raises InputError where it counted something else."""
    _, how, other, state, _ = load_run(path.absolute())
    if not isinstance(other, PatchGaussian):
        raise InputError(f"method.merge_runs: {path} is a run of another method; give runs of patch Gaussians")
    different = [name for name in COUNTED if getattr(other, name) != getattr(method, name)]
    if different:
        raise InputError(f"method.merge_runs: {path} differs in method.{', method.'.join(different)}")
    if any(getattr(how, name) != getattr(data.how, name) for name in SCALE):
        raise InputError(
            f"method.merge_runs: {path} has another normalisation; train all with data.normalize=fixed and the same "
            "data.value_range, or with the same method.base_run"
        )
    networks = [jax.tree.leaves(params["network"]) for params in (like, state.params)]
    if len(networks[0]) != len(networks[1]) or any(
        a.shape != b.shape or not np.array_equal(a, b) for a, b in zip(*networks, strict=True)
    ):
        raise InputError(f"method.merge_runs: {path} uses another network")
    return state.params
