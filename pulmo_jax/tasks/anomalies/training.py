"""Training of anomaly detection: model of normal images, thresholds on held-out normal images, test."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pulmo_jax.config.nodes import GIVEN, check_node, find_target, parameters_of_node
from pulmo_jax.config.signatures import REQUIRED
from pulmo_jax.data import lung_ct
from pulmo_jax.data.pipeline import evenly_spaced
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.samples import fetch_lung_ct
from pulmo_jax.data.split_folders import check_one_part
from pulmo_jax.data.transforms import Preprocessing
from pulmo_jax.host.cache import require_writable
from pulmo_jax.host.console import tracker
from pulmo_jax.inference.assess import calibrate
from pulmo_jax.inference.normal_level import normal_level
from pulmo_jax.methods.adapted import Adapted
from pulmo_jax.methods.base import Accumulated, Condensed, Method, ShapesNetwork
from pulmo_jax.methods.ensemble import tuned
from pulmo_jax.runs.directory import build_optimizer, load_config
from pulmo_jax.runs.paths import check_paths
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.report import Findings
from pulmo_jax.runs.training import Learned, Learning
from pulmo_jax.runs.weights import cite_weights, start_pretrained
from pulmo_jax.tasks.anomalies.aligning import align_data, open_frame
from pulmo_jax.tasks.anomalies.assessment import assess_training, labelled_images
from pulmo_jax.tasks.anomalies.building import build_method
from pulmo_jax.tasks.anomalies.calibrated import save_calibrations, with_tuned
from pulmo_jax.tasks.anomalies.config import ADAPTED, DataConfig, EvaluateDataConfig, TrainConfig
from pulmo_jax.tasks.anomalies.data import (
    NormalData,
    describe_images,
    files_of_batch,
    patch_reader,
    read_normal_images,
    shuffled,
    single_pass,
    validation_patches,
)
from pulmo_jax.tasks.anomalies.monitoring import (
    make_validation,
    reconstructions,
    require_scoring_memory,
    scoring_cost,
)
from pulmo_jax.tasks.anomalies.pretrained import (
    Pretrained,
    is_accumulated,
    open_base,
    require_bands,
    start_from,
    with_base,
    with_features,
)
from pulmo_jax.tasks.anomalies.run import Run, make_scorer
from pulmo_jax.training import devices
from pulmo_jax.training.program import compile_step, ending
from pulmo_jax.training.state import init_state, learnt, make_condensation, make_pass, make_step
from pulmo_jax.types import InputError

LEVEL_IMAGES = 512  # training images that determine the normal level of a location
EXAMPLE_PATCHES = 8  # in the figures during training
FOLDERS = ("train", "val", "test", "test_masks", "foreground")


@dataclass(frozen=True)
class AnomalyData:
    """Data of a training.

    Attributes:
        normal: Normal images, split into training and validation.
        base: Run whose network is reused, if any.
        test: Labelled test images, if any.
        reader: Reader of all images.
    """

    normal: NormalData
    base: Pretrained | None
    test: EvaluateDataConfig | None
    reader: Reader


def check(config: TrainConfig) -> None:
    """Validate the nodes of the method and its model, and the cache folder. Raises InputError."""
    require_writable(config.data.cache, "data.cache")
    check_node(config.method, "method", config.plugins, ("network",))
    target = find_target(config.method, "method", config.plugins)
    shape = target.NETWORK if isinstance(target, ShapesNetwork) else ()
    check_node(config.model, "model", config.plugins, ("patch_size", "channels", "rngs", *shape))
    require_supplied(config, shape)
    if config.trainer.members > 1 and is_accumulated(config):
        raise InputError(
            f"trainer.members={config.trainer.members}: {config.method['_target_']} is fitted in one pass, without "
            "random numbers; give trainer.members=1, or a method.base_run that is an ensemble"
        )
    if "loss" in config.method:
        check_node(config.method["loss"], "method.loss", config.plugins, ("image", "reconstruction"))


def require_supplied(config: TrainConfig, shape: Iterable[str]) -> None:
    """Raise InputError if the model needs arguments that this method does not determine."""
    supplied = {"patch_size", "channels", "rngs", *shape}
    known = parameters_of_node(config.model, "model", config.plugins)
    needed = [name for name in GIVEN["model"] if name in known and known[name].default is REQUIRED]
    if missing := [name for name in needed if name not in supplied]:
        raise InputError(
            f"model._target_={config.model['_target_']}: needs {' and '.join(missing)}, which "
            f"{config.method['_target_'].rpartition('.')[2]} does not determine; choose another model or method"
        )


def prepare(config: TrainConfig, place: Place) -> tuple[TrainConfig, str]:
    """Complete the image folders and the base run in the config; see `with_images` and `with_base`.

    Args:
        config: Typed config of `train`.
        place: Output folder and console.

    Returns:
        Completed config, and the citation of the data or "".

    Raises:
        InputError: If folders are missing, or the base run is not a finished run.
    """
    config, citation = with_images(config, place)
    config = with_base(with_features(config))
    if config.method["_target_"] == ADAPTED and config.lora.rank == 0:  # there is nothing to train
        config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"steps": 1})})
    return config, cite_weights(config.model, config.data.cache, citation, place)


def with_images(config: TrainConfig, place: Place) -> tuple[TrainConfig, str]:
    """Complete the image folders. The default is those of the resumed run, otherwise those of the sample lung CT."""
    if config.resume and config.data.train is None and (place.run_dir / "config.yaml").is_file():
        before = load_config(place.run_dir, TrainConfig, config.plugins).data
        folders = {key: getattr(before, key) for key in FOLDERS}
        given = {key: getattr(config.data, key) for key in folders if getattr(config.data, key) is not None}
        config = config.model_copy(update={"data": config.data.model_copy(update=folders | given)})
        check_paths(config)
    data = config.data
    if data.train is not None:
        absolute = {k: v.absolute() for k, v in data if isinstance(v, Path)}
        cited = lung_ct.CITATION if (data.train.parent / "sample.json").is_file() else ""
        return config.model_copy(update={"data": data.model_copy(update=absolute)}), cited
    if data.val is not None:
        raise InputError(f"data.val={data.val} is given without data.train; give both, or none for the sample")
    if data.align_run is not None:
        raise InputError(f"data.align_run={data.align_run}: the sample has no chest X-rays; give data.train=DIR")
    sample = fetch_lung_ct(data.cache, place.console)
    folders = {name: sample / name for name in FOLDERS}
    given = {name: getattr(data, name) for name in ("test", "test_masks") if data.test is not None}
    place.note(
        f"sample lung CT, one patient: a demonstration, not evidence of accuracy. Please cite:\n{lung_ct.CITATION}"
    )
    return config.model_copy(update={"data": data.model_copy(update=folders | given)}), lung_ct.CITATION


def read(config: TrainConfig, place: Place) -> AnomalyData:
    """Align the images if configured, scan every image once, and validate the test images before training.

    Args:
        config: Completed config.
        place: Output folder and console.

    Returns:
        Data of the training.

    Raises:
        InputError: If images, the landmark run or the base run cannot be used, or data.train holds a whole split.
    """
    base, frame, data = open_base(config), "", config.data
    assert data.train is not None  # set by `prepare`
    check_one_part(data.train, data.normal_name)
    if data.align_run is not None:
        landmarks = open_frame(data.align_run, config.plugins)
        frame = landmarks.digest
        data = align_data(landmarks, data, place.folder / "aligned", data.max_image_mb, place.console, place.formats)
    reader = Reader(data.max_image_mb, place.formats)
    require_one_frame(config)
    require_locations(config)
    stride = data.patch_size // (1 if is_accumulated(config) else 2)
    scaled = None if config.method["_target_"] == ADAPTED else base  # adapters are for images of another scale
    normal = read_normal_images(data, config.seed, reader, place.console, stride, scaled.how if scaled else None)
    if base is not None:
        require_bands(base, normal)
    normal = replace(normal, how=replace(normal.how, aligned_by=frame))
    if (test := labelled_data(data)) is not None:
        labelled_images(config, normal.how, test, reader)
    place.note(
        f"{len(normal.training.images)} training images with {len(normal.training.cells)} patches of "
        f"{normal.how.patch_size} px, {len(normal.validation.images)} validation images"
    )
    return AnomalyData(normal, base, test, reader)


def learning(config: TrainConfig, data: AnomalyData, place: Place) -> Learning:
    """Build the training input: gradient descent on shuffled patches, or a single pass that accumulates sums.

    Args:
        config: Completed config.
        data: Data of the training.
        place: Output folder and console.

    Returns:
        Input of the training loop.
    """
    normal, trainer, mesh = data.normal, config.trainer, devices.all_devices(config.trainer.batch_size)
    method, optimizer = method_of(config, data), build_optimizer(config)
    read_patches = patch_reader(config.data, normal, data.reader, place.console)
    everywhere = devices.everywhere(mesh)
    once = isinstance(method, Accumulated)
    if once:
        step, batches = make_pass(method, everywhere), single_pass(config, normal, read_patches)
    else:
        step = make_step(method, optimizer, trainer.ema_decay, config.seed, everywhere)
        batches = shuffled(config, normal, read_patches)
    compile = partial(compile_step, step)
    if isinstance(method, Condensed):
        compile = ending(compile, len(batches), make_condensation(method, everywhere))
    state = start_from(init_state(method, optimizer), method, normal, data.base)
    patches = validation_patches(config, normal, data.reader)
    require_scoring_memory(method, normal.how, config.tiles.batch_size)
    return Learning(
        state=start_pretrained(state, method, config.data.cache, place),
        compile=compile,
        batch=describe_batch(trainer.batch_size, normal.how, once),
        batches=batches,
        steps=len(batches) if once else trainer.steps,
        validate=make_validation(method, patches, trainer.batch_size, config.seed, mesh),
        validate_every=len(batches) if once else None,
        identity=identify(config, normal, data.base),
        files_of=lambda number: files_of_batch(config, normal, once, number - 1),
        examples_per_step=trainer.batch_size,
        unit="patches",
        remedy=less_memory(config),
        reading={"threads": config.data.threads, "prefetch": config.data.prefetch, "workers": config.data.workers},
        mesh=mesh,
        draw=reconstructions(method, evenly_spaced(patches, EXAMPLE_PATCHES)),
        as_written=isinstance(method, Condensed),
    )


def method_of(config: TrainConfig, data: AnomalyData) -> Method:
    """Build the method; one of adapters has the parameters of the base run."""
    method = build_method(config, data.normal.how)
    if isinstance(method, Adapted) and data.base is not None:
        return replace(method, base_params=data.base.params)
    return method


def describe_batch(size: int, how: Preprocessing, once: bool) -> Any:
    """Shapes and dtypes of a batch of patches; for a single pass, also of their foreground masks."""
    shape = (size, how.patch_size, how.patch_size, how.channels)
    patches, inside = jax.ShapeDtypeStruct(shape, np.float32), jax.ShapeDtypeStruct(shape[:3], bool)
    return (patches, inside) if once else patches


def records(config: TrainConfig, data: AnomalyData) -> Mapping[str, Any]:
    """Content of preprocessing.json and images.json."""
    return {"preprocessing.json": asdict(data.normal.how), "images.json": describe_images(data.normal)}


def finish(config: TrainConfig, data: AnomalyData, learned: Learned, place: Place) -> Run:
    """Set the thresholds on the normal validation images only.

    Args:
        config: Completed config.
        data: Data of the training.
        learned: Outcome of the training loop.
        place: Output folder and console.

    Returns:
        Calibrated run.

    Raises:
        InputError: If the method has accumulated too little data.
    """
    method = method_of(config, data)
    caveats_of(method, learned)  # raises if the method has accumulated too little data
    params = learnt(method, learned.state)
    if isinstance(method, Adapted):
        method, params = method.base, method.merged(params)
    patches = validation_patches(config, data.normal, data.reader)
    numbers = tuned(method, params, jnp.asarray(patches))
    scorer = make_scorer(config, method, with_tuned(params, numbers), data.normal.how)
    level = None
    if by_location(config):
        known = data.normal.training.images
        images = [known[i] for i in evenly_spaced(np.arange(len(known)), LEVEL_IMAGES)]
        level = normal_level(scorer, images, data.reader, tracker(place.console, "scoring training images"))
        scorer = make_scorer(config, method, scorer.params, data.normal.how, level)
    calibrations = calibrate(
        scorer,
        data.normal.validation.images,
        data.reader,
        config.calibration.pixel_rate,
        config.calibration.image_rate,
        config.seed,
        tracker(place.console, "calibrating"),
    )
    save_calibrations(place.run_dir, calibrations, numbers, level)
    return Run(place.run_dir, config, scorer, calibrations, learned.step)


def assess(run: Run, data: AnomalyData, learned: Learned, place: Place) -> Findings:
    """Assess the calibrated run on the validation images and, if given, the labelled test images."""
    normal = data.normal
    facts = {
        "training_images": len(normal.training.images),
        "validation_images": len(normal.validation.images),
        "skipped_images": len(normal.skipped),
        **learned.facts,
        **scoring_cost(run.scorer, place),
    }
    caveats = caveats_of(run.scorer.method, learned)
    return assess_training(run, data.test, normal.validation.images, facts, caveats, place)


def caveats_of(method: Method, learned: Learned) -> tuple[str, ...]:
    """Warnings of an accumulated method, such as too little data; none for other methods."""
    return method.caveats(learned.state.params) if isinstance(method, Accumulated) else ()


def identify(config: TrainConfig, data: NormalData, base: Pretrained | None) -> dict[str, Any]:
    """Description of config and data, which must be equal on resuming."""
    cells = hashlib.sha256(data.training.cells.tobytes())
    for ref in data.training.images:
        cells.update(ref.title.encode())
    return {
        "seed": config.seed,
        "trainer.batch_size": config.trainer.batch_size,
        "trainer.ema_decay": config.trainer.ema_decay,
        "data.augment": config.data.augment,
        "model": config.model,
        "method": config.method,
        "optimizer": config.optimizer,
        "training patches": cells.hexdigest(),
        "preprocessing": hashlib.sha256(repr(data.how).encode()).hexdigest(),
        **({"method.base_run": base.digest} if base else {}),
    }


def require_one_frame(config: TrainConfig) -> None:
    """Raise InputError for one Gaussian per location without resizing, which requires aligned images of equal size."""
    if config.method.get("locations") == "each" and not config.data.resize:
        raise InputError(
            "method.locations=each needs data.resize=true: it models one Gaussian per location of aligned "
            "images, resized to data.patch_size; for images that are not aligned use method.locations=pooled"
        )


def by_location(config: TrainConfig) -> bool:
    """Whether scores are relative to those of normal images at the same location."""
    locations = config.calibration.locations
    return config.data.align_run is not None if locations is None else locations == "each"


def require_locations(config: TrainConfig) -> None:
    """Raise InputError if scores are to be compared by location in images that have no common frame."""
    if config.calibration.locations == "each" and not config.data.resize and config.data.align_run is None:
        raise InputError(
            "calibration.locations=each needs images that show the same place at the same location: give "
            "data.align_run or data.resize=true, or calibration.locations=pooled"
        )


def less_memory(config: TrainConfig) -> str:
    """Advice if memory is insufficient."""
    return (
        f"lower trainer.batch_size (now {config.trainer.batch_size}), data.prefetch (now {config.data.prefetch}) or "
        f"data.patch_size (now {config.data.patch_size})"
    )


def labelled_data(data: DataConfig) -> EvaluateDataConfig | None:
    """Config of the labelled test images; None if there are none."""
    if data.test is None:
        return None
    return EvaluateDataConfig(
        test=data.test,
        test_masks=data.test_masks,
        foreground=data.foreground,
        normal_name=data.normal_name,
        group_regex=data.group_regex,
    )
