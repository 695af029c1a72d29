"""Reuse of earlier runs: a trained method (`method.base_run`) and fitted statistics (`method.merge_runs`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pulmo_jax.config.nodes import find_target
from pulmo_jax.data.scan import Scan
from pulmo_jax.data.transforms import Preprocessing
from pulmo_jax.host.reading import read_json
from pulmo_jax.methods.adapted import Adapted
from pulmo_jax.methods.base import Accumulated, Method, NeedsBase, Params
from pulmo_jax.methods.ensemble import Ensemble
from pulmo_jax.methods.patch_gaussian import PatchGaussian, merged
from pulmo_jax.methods.windows import OfWindows
from pulmo_jax.models.on_encoder import OnEncoder
from pulmo_jax.runs.directory import digest_of_run, load_config, sealed_step
from pulmo_jax.runs.older import naming_version
from pulmo_jax.runs.paths import check_paths, runs_at_home
from pulmo_jax.tasks.anomalies.building import parts_of
from pulmo_jax.tasks.anomalies.calibrated import load_tuned, with_tuned
from pulmo_jax.tasks.anomalies.config import DataConfig, TrainConfig
from pulmo_jax.tasks.anomalies.data import NormalData
from pulmo_jax.tasks.anomalies.run import SEALED, load_run
from pulmo_jax.training.state import TrainState, learnt
from pulmo_jax.types import InputError

IDENTITY = {"_target_": "pulmo_jax.models.identity.Identity"}  # model of a method that uses that of the base run

FEATURES = {"efficientnet_lite0": "pulmo_jax.models.encoder_networks.efficientnet_lite0_features"}

# Fields of the preprocessing that determine the values in the foreground.
SCALE = ("channels", "dtype", "patch_size", "resize", "offset", "scale", "clip")

# Fields of the method that determine its statistics.
COUNTED = ("input", "locations", "window_px", "stride", "pool_px", "n_features")


@dataclass(frozen=True)
class Pretrained:
    """A finished run whose method is reused.

    Attributes:
        path: Run directory.
        config: Its config.
        how: Its preprocessing.
        params: Parameters of its method.
        digest: Digest of the run.
    """

    path: Path
    config: TrainConfig
    how: Preprocessing
    params: Params
    digest: str


def open_base(config: TrainConfig) -> Pretrained | None:
    """Open the run method.base_run, if any.

    Args:
        config: Config of the new run.

    Returns:
        The base run; None if the config has none.

    Raises:
        InputError: If it is not a finished run, or its method is not of the kind that the new method needs.
    """
    name = config.method.get("base_run")
    if name is None:
        return None
    path = Path(name).absolute()
    with naming_version(path):
        before, how, method, state, _ = load_run(path, config.plugins)
    require_kind(config, method, path)
    params = learnt(method, state)
    return Pretrained(path, before, how, with_tuned(params, load_tuned(path, method, params)), digest_of_run(path))


def with_base(config: TrainConfig) -> TrainConfig:
    """Copy method, model and patch size of the base run to the config.

    Args:
        config: Config of the new run.

    Returns:
        The config with `base`, and with the patch size and resizing of the base run.

    Raises:
        InputError: If it is not a finished run, or has no trained network.
    """
    name = config.method.get("base_run")
    if config.base is not None:
        raise InputError("base is set by the program; leave it out, and give method.base_run=RUN")
    if name is None:
        require_base_run(config)
        return config
    path = Path(name).absolute()
    sealed_step(path, SEALED)  # raises if there is no finished run
    with naming_version(path):
        base = load_config(path, TrainConfig, config.plugins)
    if is_accumulated(base):
        raise InputError(f"method.base_run={path}: its method trains no network; give the run of an autoencoder")
    if config.data.patch_size not in (base.data.patch_size, DataConfig().patch_size):
        raise InputError(
            f"data.patch_size={config.data.patch_size}: method.base_run={path} was trained on patches of "
            f"{base.data.patch_size} px; leave data.patch_size out"
        )
    data = {"patch_size": base.data.patch_size, "resize": base.data.resize}
    if config.data.stride is not None:
        data["stride"] = min(config.data.stride, base.data.patch_size)
    return config.model_copy(
        update={
            "base": parts_of(base).model_copy(update={"digest": digest_of_run(path)}),
            "model": IDENTITY if is_accumulated(config) else config.model,
            "data": config.data.model_copy(update=data),
            "method": {**config.method, "base_run": str(path)},
        }
    )


def require_bands(base: Pretrained, data: NormalData) -> None:
    """Check that the images have as many bands as those of the base run. Raises InputError."""
    if data.how.channels != base.how.channels:
        first = data.training.images[0]
        raise InputError(
            f"{first.path}: {data.how.channels} bands, but method.base_run={base.path} was trained on images with "
            f"{base.how.channels}; give images with as many bands, or train a network on these"
        )


def with_features(config: TrainConfig) -> TrainConfig:
    """Put the network that method.features names in the place of the base run or of the model.

    Args:
        config: Config of the new run.

    Returns:
        The config, in which method.features is null or the name of the pretrained network of the model.

    Raises:
        InputError: If it names a pretrained network and the model is another one, or two runs are named.
    """
    target = find_target(config.method, "method", config.plugins)
    name, before = config.method.get("features"), config.method.get("base_run")
    if name is None or not (isinstance(target, type) and issubclass(target, OfWindows)):
        return config
    if name not in FEATURES:
        if before is not None:
            raise InputError(
                f"method.features={name} and method.base_run={before} name two runs; leave one of them out"
            )
        method = runs_at_home({**config.method, "features": None, "base_run": name})
        config = config.model_copy(update={"method": method})
        check_paths(config)
        return config
    if before is not None:
        raise InputError(f"method.base_run={before} with method.features={name}; give method.features=null as well")
    if config.model is None or config.model["_target_"] != FEATURES[name]:
        raise InputError(f"method.features={name} needs its network; give model={name}_features")
    return config


def is_accumulated(config: TrainConfig) -> bool:
    """Whether the method reads each patch once, in a single pass, and trains no network."""
    target = find_target(config.method, "method", config.plugins)
    return isinstance(target, type) and issubclass(target, Accumulated)


def require_base_run(config: TrainConfig) -> None:
    """Raise InputError if the method needs a base run of a certain kind, and the config names none."""
    target = find_target(config.method, "method", config.plugins)
    if isinstance(target, NeedsBase) and target.BASE_NAMES:
        raise InputError(f"method.base_run is null; give method.base_run=RUN, a finished run of {kinds(target)}")


def require_kind(config: TrainConfig, found: Method, path: Path) -> None:
    """Check that the method of a base run implements the protocol that the new method needs.

    Args:
        config: Config of the new run.
        found: Method of the base run.
        path: Run directory of the base run.

    Raises:
        InputError: If it does not.
    """
    target = find_target(config.method, "method", config.plugins)
    if not isinstance(target, NeedsBase) or isinstance(found, target.BASE):
        return
    name, remedy = f"a run of {type(found).__name__}", f"give a run of {kinds(target)}"
    if isinstance(found, Ensemble):
        name, remedy = f"an ensemble of {found.count} networks", f"{remedy} with trainer.members=1"
    raise InputError(f"method.base_run={path}: is {name}; {remedy}")


def kinds(target: NeedsBase) -> str:
    """Names of the methods that a base run may have, for messages."""
    return " or ".join(target.BASE_NAMES)


def start_from(fresh: TrainState, method: Method, data: NormalData, base: Pretrained | None) -> TrainState:
    """Initialise a training state with the parameters of a base run and the statistics of merged runs.

    Args:
        fresh: Initial state of the method.
        method: The method, which may be an ensemble.
        data: Normal images of the run.
        base: Base run, if any.

    Returns:
        The state before training.

    Raises:
        InputError: If the runs do not fit the method or the data.
    """
    if base is not None:
        require_unseen(data, base)
        fresh = fresh if isinstance(method, Adapted) else with_base_params(fresh, base.params)
    if not isinstance(method, OfWindows):
        return fresh
    if base is None and jax.tree.leaves(fresh.params["network"]) and not begins_pretrained(method.network):
        raise InputError(
            "method.base_run is null, and the model's parameters are random; give method.base_run=RUN, the run "
            "directory of a trained autoencoder, or model=identity for the pixels themselves"
        )
    if base is None and method.input == "residual":
        raise InputError(
            "method.base_run is null, and without a trained network there is no residual; give method.base_run=RUN, "
            "the run directory of a trained autoencoder, or method.input=features for the pixels themselves"
        )
    require_fit_windows(method, data)
    if not isinstance(method, PatchGaussian):
        return fresh
    once = {data_root(data.training).resolve(): {ref.title for ref in data.training.images}}
    for name in method.merge_runs:
        require_new(Path(name).absolute(), once)
        fresh = fresh.replace(params=merged(fresh.params, counted(Path(name), fresh.params, method, data)))
    return fresh


def begins_pretrained(network: Any) -> bool:
    """Whether a network has an encoder with pretrained weights."""
    return isinstance(network, OnEncoder) and network.encoder.weights is not None


def with_base_params(fresh: TrainState, base: Params) -> TrainState:
    """Set the parameters of the base in an initial state, for each network of an ensemble.

    Args:
        fresh: Initial state of the method.
        base: Parameters of the base run.

    Returns:
        The state.
    """

    def filled(params: Params) -> Params:
        return {**params, "base": jax.tree.map(lambda p, like: jnp.broadcast_to(p, like.shape), base, params["base"])}

    return fresh.replace(params=filled(fresh.params), ema=filled(fresh.ema) if fresh.ema else fresh.ema)


def require_fit_windows(method: OfWindows, data: NormalData) -> None:
    """Check that at least one image is as large as a window.

    Args:
        method: The method.
        data: Normal images of the run.

    Raises:
        InputError: If all images are smaller.
    """
    side, first = method.window_side, data.training.images[0]
    if not data.how.resize and all(min(ref.shape[:2]) < side for ref in data.training.images):
        raise InputError(
            f"{first.path}: {first.shape[0]}x{first.shape[1]} px; it and all other training images are smaller than "
            f"the windows of {side} px; give a smaller method.window_px, or larger images"
        )


def require_new(path: Path, used: dict[Path, set[str]]) -> None:
    """Check that no image is used twice.

    Args:
        path: A run to merge.
        used: Images used so far by folder; the images of the run are added.

    Raises:
        InputError: If the run shares images with an earlier one.
    """
    before = load_config(path, TrainConfig, ()).data.train
    titles = training_titles(path)
    if before is None:
        raise InputError(f"method.merge_runs: the config of {path} names no training images; train it again")
    twice = sorted(used.get(before.resolve(), set()) & titles)
    if twice:
        raise InputError(
            f"method.merge_runs: {len(twice)} of the training images of {path} ({twice[0]}, …) are also used "
            "by this run or another run of the list; each image may be used once"
        )
    used[before.resolve()] = used.get(before.resolve(), set()) | titles


def require_unseen(data: NormalData, base: Pretrained) -> None:
    """Check that the base network was not trained on the validation images, which would bias the thresholds.

    Args:
        data: Normal images of the run.
        base: Base run.

    Raises:
        InputError: If it was.
    """
    trained = training_titles(base.path)
    seen = sorted(trained & {ref.title for ref in data.validation.images})
    if seen and base.config.data.train == data_root(data.validation):
        raise InputError(
            f"method.base_run={base.path} was trained on {len(seen)} of the {len(data.validation.images)} validation "
            f"images ({seen[0]}, …); give the same seed, data.val_fraction and data.group_regex, or the same data.val"
        )


def training_titles(run: Path) -> set[str]:
    """Titles of the training images of a run. Raises InputError if its images.json is not valid."""
    path = run / "images.json"
    try:
        content = read_json(path, inside=run)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); train the run again") from error
    titles = content.get("training") if isinstance(content, dict) else None
    if not isinstance(titles, list) or not all(isinstance(title, str) for title in titles):
        raise InputError(f"{path}: does not list the training images; train the run again")
    return set(titles)


def data_root(scan: Scan) -> Path:
    """Folder of the images of a scan."""
    ref = scan.images[0]
    return ref.path.parents[len(Path(ref.name).parts) - 1]


def counted(path: Path, like: Params, method: PatchGaussian, data: NormalData) -> Params:
    """Statistics of another run.

    Args:
        path: Run to merge.
        like: Parameters of the new run.
        method: Method of the new run.
        data: Normal images of the new run.

    Returns:
        Parameters of the other run.

    Raises:
        InputError: If its method, normalisation or network differs.
    """
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
    networks = [jax.tree.leaves((params["network"], params.get("base"))) for params in (like, state.params)]
    if len(networks[0]) != len(networks[1]) or any(
        a.shape != b.shape or not np.array_equal(a, b) for a, b in zip(*networks, strict=True)
    ):
        raise InputError(f"method.merge_runs: {path} uses another network")
    return state.params
