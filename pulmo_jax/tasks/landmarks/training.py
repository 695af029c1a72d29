"""python -m pulmo_jax.train with landmarks: learn where the points are, measure how sure, test, report."""

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from pulmo_jax.data import radiographs
from pulmo_jax.data.landmark_batches import rows_of_batch, shuffled_batches
from pulmo_jax.data.samples import fetch_radiographs
from pulmo_jax.evaluation.landmark_metrics import radial_errors
from pulmo_jax.host.console import make_console
from pulmo_jax.host.files import write_json
from pulmo_jax.host.lock import claim
from pulmo_jax.inference.locate import in_batches
from pulmo_jax.methods.located import Descended, Fitted, Locator, Params
from pulmo_jax.runs.directory import build_optimizer, load_values, provenance, save_config, unfinish, use_compile_cache
from pulmo_jax.runs.training import descend as stepwise
from pulmo_jax.runs.training import refuse_another, refuse_or_resume
from pulmo_jax.tasks.landmarks.assessment import assess_landmarks
from pulmo_jax.tasks.landmarks.config import LandmarkConfig
from pulmo_jax.tasks.landmarks.data import LandmarkSets, describe_sets, read_sets
from pulmo_jax.tasks.landmarks.run import build_locator, fit_companions, fitted_state, make_run, save_run, working_size
from pulmo_jax.training import devices
from pulmo_jax.training.checkpoint import Checkpoints
from pulmo_jax.training.state import init_state, make_step
from pulmo_jax.types import InputError

TABLES = ("train", "val", "test")
PREFETCH = 4  # batches read ahead


@dataclass(frozen=True)
class Learnt:
    """Parameters, the step of their checkpoint, and the mean error on the validation images, working px."""

    params: Params
    step: int
    val_error: float
    facts: dict[str, Any]


def train_landmarks(config: LandmarkConfig, run_dir: Path) -> float:
    """The whole job; returns the mean error on the validation images in % of the working image's side."""
    began, console = time.monotonic(), make_console()
    use_compile_cache(config.trainer.compile_cache)
    with claim(run_dir):
        config, citation = with_sample(config, run_dir, console)
        refuse_or_resume(run_dir, config.resume)
        size = working_size(config)
        sets = read_sets(config.data, size, config.seed, console)
        identity = identify(config, sets)
        refuse_another(run_dir / "checkpoints", identity)
        with console.status("looking at the training images"):
            companions = fit_companions(config, sets.training)
        method = build_locator(config, companions)
        write_records(run_dir, config, sets, citation)
        say(console, sets, run_dir)
        if isinstance(method, Fitted):
            learnt = fit_at_once(method, sets, identity, run_dir, console)
        else:
            assert isinstance(method, Descended)  # the config was judged
            learnt = descend(method, config, sets, identity, run_dir, console)
        run = make_run(run_dir, config, method, learnt.params, learnt.step, companions, sets.validation)
        save_run(run)
        facts = {
            "training_images": len(sets.training.refs),
            "validation_images": len(sets.validation.refs),
            "landmarks": sets.training.points.shape[1],
            "step": learnt.step,
            **learnt.facts,
            "training_s": round(time.monotonic() - began, 1),
        }
        assess_landmarks(run, sets.test or sets.validation, run_dir, console, training=facts, notes=sets.notes,
                         chosen_on=sets.test is None)  # fmt: skip
        console.print(f"done in {time.monotonic() - began:.0f} s; open {run_dir / 'report.html'}", highlight=False)
    return 100 * learnt.val_error / size


def with_sample(config: LandmarkConfig, run_dir: Path, console: Console) -> tuple[LandmarkConfig, str]:
    """(config, citation): with no images named, a resumed run takes its own, and any other the sample radiographs."""
    data, citation = config.data, ""
    if data.images is None and config.resume and (run_dir / "config.yaml").is_file():
        before = load_values(run_dir)["data"]
        if "images" not in before:
            raise InputError(f"resume=true: {run_dir} is no landmark run; give another hydra.run.dir")
        data = data.model_copy(update={key: before[key] and Path(before[key]) for key in ("images", *TABLES)})
    if data.images is None:
        sample = fetch_radiographs(data.cache, console)
        tables = {key: sample / f"landmarks_{key}.csv" for key in TABLES}
        data = data.model_copy(update={"images": sample / "images", **tables})
    assert data.images is not None
    if (data.images.parent / "sample.json").is_file():
        citation = radiographs.CITATION
        console.print(
            f"sample radiographs of one patient: a demonstration, no claim. Please cite:\n{citation}", highlight=False
        )
    absolute = {key: value.absolute() for key, value in data if isinstance(value, Path)}
    return config.model_copy(update={"data": data.model_copy(update=absolute)}), citation


def write_records(run_dir: Path, config: LandmarkConfig, sets: LandmarkSets, citation: str) -> None:
    """What the run is made with; it is open for prediction again when it is finished again."""
    unfinish(run_dir)
    save_config(config, run_dir / "config.yaml")
    write_json(run_dir / "images.json", describe_sets(sets))
    write_json(run_dir / "run.json", {"citation": citation, **provenance()})


def say(console: Console, sets: LandmarkSets, run_dir: Path) -> None:
    console.print(
        f"{len(sets.training.refs)} training and {len(sets.validation.refs)} validation images with "
        f"{sets.training.points.shape[1]} landmarks, on {jax.devices()[0].device_kind}\nrun directory {run_dir}",
        highlight=False,
    )


def identify(config: LandmarkConfig, sets: LandmarkSets) -> dict[str, Any]:
    """What a resumed run must share with the run that it goes on with, in comparable form."""
    table = hashlib.sha256(sets.training.points.tobytes())
    for title in (*sets.training.titles, *sets.validation.titles):
        table.update(title.encode())
    return {
        "seed": config.seed,
        "trainer.batch_size": config.trainer.batch_size,
        "trainer.ema_decay": config.trainer.ema_decay,
        "method": config.method,
        "optimizer": config.optimizer,
        "landmarks": table.hexdigest(),
    }


def fit_at_once(
    method: Fitted, sets: LandmarkSets, identity: dict[str, Any], run_dir: Path, console: Console
) -> Learnt:
    """What a method learns without steps, kept in a checkpoint as any other's."""
    began, training = time.monotonic(), sets.training
    with console.status("fitting"):
        params = method.fit(np.asarray(training.working.pixels), training.square_points, training.groups)
    error = validation_error(method, sets)(params)
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        for step in checkpoints.steps():  # resumed: what is there was fitted to the same
            shutil.rmtree(run_dir / "checkpoints" / str(step))
        checkpoints.save(fitted_state(params), error, identity, [error])
    return Learnt(params, 1, error, {"fitting_s": round(time.monotonic() - began, 1)})


def descend(
    method: Descended,
    config: LandmarkConfig,
    sets: LandmarkSets,
    identity: dict[str, Any],
    run_dir: Path,
    console: Console,
) -> Learnt:
    """Step by step; the best checkpoint on the validation images is the one that is used."""
    optimizer, trainer, training = build_optimizer(config), config.trainer, sets.training
    mesh, error = devices.all_devices(trainer.batch_size), validation_error(method, sets)

    def files_of(step: int) -> list[str]:
        rows = rows_of_batch(len(training.refs), trainer.batch_size, config.seed, step)
        return [training.titles[row] for row in rows]

    best, record, facts = stepwise(
        init_state(method, optimizer),
        make_step(method, optimizer, trainer.ema_decay, config.seed, devices.everywhere(mesh)),
        shuffled_batches(training.working.pixels, training.square_points, trainer.batch_size, config.seed),
        lambda state: error(state.ema),
        config,
        run_dir,
        console,
        mesh=mesh,
        identity=identity,
        files_of=files_of,
        images_in_batch=trainer.batch_size,
        threads=config.data.threads,
        prefetch=PREFETCH,
        remedy=f"lower trainer.batch_size (now {trainer.batch_size}), method.members or method.size",
    )
    assert record.val_loss is not None
    return Learnt(best.ema, record.step, record.val_loss, facts)


def validation_error(method: Locator, sets: LandmarkSets) -> Callable[[Params], float]:
    """The mean error over all landmarks of the validation images, working px."""
    pixels, truth, locate = sets.validation.working.pixels, sets.validation.square_points, jax.jit(method.locate)

    def error(params: Params) -> float:
        found = in_batches(lambda batch: locate(params, batch), pixels)
        return float(radial_errors(found.points, truth).mean())

    return error
