"""python -m pulmo_jax.train: learn the normal, set the threshold, test, report."""

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from pulmo_jax.config.nodes import find_target
from pulmo_jax.config.verbs import EvaluateDataConfig
from pulmo_jax.data import lung_ct
from pulmo_jax.data.images import Reader
from pulmo_jax.data.pipeline import evenly, iterate
from pulmo_jax.data.samples import fetch_lung_ct
from pulmo_jax.data.transforms import Preprocessing
from pulmo_jax.host.console import make_console, tracker
from pulmo_jax.host.files import write_json
from pulmo_jax.host.lock import claim
from pulmo_jax.host.resources import require, running_out_names
from pulmo_jax.inference.assess import calibrate
from pulmo_jax.methods.base import Method, OnePass
from pulmo_jax.runs.directory import (
    Run,
    build_method,
    build_optimizer,
    finish,
    load_config,
    make_scorer,
    provenance,
    save_calibrations,
    save_config,
    unfinish,
    use_compile_cache,
)
from pulmo_jax.runs.paths import check_paths
from pulmo_jax.runs.training import build_callbacks, refuse_or_resume, restore_last, stop_if_interrupted, tell_damage
from pulmo_jax.shell import cli
from pulmo_jax.tasks.anomalies.aligning import align_data, open_frame
from pulmo_jax.tasks.anomalies.assessment import assess_and_report, labelled_images
from pulmo_jax.tasks.anomalies.config import DataConfig, TrainConfig
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
from pulmo_jax.tasks.anomalies.pretrained import Pretrained, open_base, start_from, with_base
from pulmo_jax.tasks.classification.config import ClassifierConfig
from pulmo_jax.tasks.classification.training import train_classes
from pulmo_jax.tasks.landmarks.config import LandmarkConfig
from pulmo_jax.tasks.landmarks.training import train_landmarks
from pulmo_jax.training import devices
from pulmo_jax.training.callbacks import Start
from pulmo_jax.training.checkpoint import Checkpoints
from pulmo_jax.training.loop import fit
from pulmo_jax.training.state import Metrics, TrainState, init_state, learnt, make_pass, make_step
from pulmo_jax.types import InputError

EXAMPLE_PATCHES = 8  # that the figures of a run in progress show

EXAMPLES = """
Trains on normal images alone, sets thresholds on held-out normal ones, tests where there is something to test on, and
writes RUN/report.html.

  python -m pulmo_jax.train +experiment=lung                            the sample lung CT, no data of your own
  python -m pulmo_jax.train +experiment=lung data.train=DIR             your own normal images
  python -m pulmo_jax.train +experiment=lung data.train=DIR data.test=DIR2 data.test_masks=DIR3
  python -m pulmo_jax.train +experiment=lung hydra.run.dir=RUN resume=true
  python -m pulmo_jax.train -m +experiment=lung model.latent=16,64 seed=0,1,2
  python -m pulmo_jax.train +experiment=landmarks                       landmarks; with --help: the keys of these jobs
  python -m pulmo_jax.train +experiment=brain_mri data.root=DIR         classes, cross-validated; DIR/yes and DIR/no
"""


def train(config: TrainConfig | LandmarkConfig | ClassifierConfig, run_dir: Path) -> float:
    """The whole job; returns the best validation loss, which a sweep may minimise."""
    if isinstance(config, LandmarkConfig):
        return train_landmarks(config, run_dir)
    if isinstance(config, ClassifierConfig):
        return train_classes(config, run_dir)
    began = time.monotonic()
    devices.connect(config.cluster.coordinator, config.cluster.processes, config.cluster.process)
    use_compile_cache(config.trainer.compile_cache)
    with workplace(run_dir) as (folder, console):
        config, citation = with_images(config, run_dir, console)
        refuse_or_resume(run_dir, config.resume)
        base = open_base(config)
        config = with_base(config, base)
        as_given = config
        config, frame = with_alignment(config, folder, console)
        callbacks = build_callbacks(config.callbacks, config.plugins)
        mesh = devices.all_devices(config.trainer.batch_size)
        reader = Reader(config.data.max_image_mb)
        require_one_frame(config)
        stride = config.data.patch_size // (1 if sees_once(config) else 2)
        data = read_normal_images(config.data, config.seed, reader, console, stride, base.how if base else None)
        data = replace(data, how=replace(data.how, aligned_by=frame))
        if (test := labelled_data(config.data)) is not None:
            labelled_images(config, data.how, test, reader)  # what is wrong with them is said before training
        method, optimizer = build_method(config, data.how), build_optimizer(config)
        one_pass = isinstance(method, OnePass)
        identity = identify(config, data, base)
        fresh = start_from(init_state(method, optimizer), method, data, base)
        state, before = restore_last(run_dir / "checkpoints", fresh, identity, console)
        write_records(folder, as_given, data, citation)
        say(console, data, run_dir)
        patches = validation_patches(config, data, reader)
        read = patch_reader(config.data, data, reader, console)
        batches = (single_pass if one_pass else shuffled)(config, data, read)
        steps = len(batches) if one_pass else config.trainer.steps
        ready = time.monotonic()

        remedy = less_memory(config)
        with (
            Checkpoints(folder / "checkpoints", read_only=not devices.is_first()) as checkpoints,
            closing(iterate(batches, int(state.step), **how_to_read(config.data))) as rows,
            running_out_names("training", remedy),
        ):
            start = Start(
                run_dir=folder,
                step=int(state.step),
                steps=int(state.step) if before.stopped else steps,
                batch_size=config.trainer.batch_size,
                console=console,
                checkpoints=checkpoints,
                identity=identity,
                examples=patches[:: max(1, len(patches) // EXAMPLE_PATCHES)][:EXAMPLE_PATCHES],
                reconstruct=reconstruction(method),
                val_losses=before.val_losses,
                files_of=lambda step: files_of_batch(config, data, one_pass, step - 1),
            )
            state = devices.on_all(state, mesh)
            compiled = compile_step(method, optimizer, state, config, data.how, mesh, remedy)
            begins = time.monotonic()
            outcome = fit(
                state,
                compiled,
                (devices.divided(share, mesh) for share in rows),
                make_validation(method, patches, config.trainer.batch_size, config.seed, mesh),
                callbacks,
                start,
                log_every=config.trainer.log_every,
                validate_every=steps if one_pass else config.trainer.validate_every,
                agreed=devices.agreed,
            )
            stop_if_interrupted(outcome, run_dir, console)
            devices.disconnect()
            if not devices.is_first():
                return math.nan  # the first process alone knows the best
            best, record, damaged = checkpoints.restore_best(devices.here(outcome.state))
        tell_damage(damaged, console)
        caveats = method.caveats(best.params) if isinstance(method, OnePass) else ()
        assert record.val_loss is not None  # the best of those that have one
        trained = time.monotonic()

        scorer = make_scorer(config, method, learnt(method, best), data.how)
        calibrations = calibrate(
            scorer,
            data.validation.images,
            reader,
            config.calibration.pixel_rate,
            config.calibration.image_rate,
            config.seed,
            tracker(console, "calibrating"),
        )
        save_calibrations(run_dir, calibrations)
        finish(run_dir, record.step)
        facts = {
            "steps": int(outcome.state.step),
            "stopped_early": before.stopped or outcome.stopped or "no",
            "best_step": record.step,
            "best_val_loss": record.val_loss,
            "training_images": len(data.training.images),
            "validation_images": len(data.validation.images),
            "skipped_images": len(data.skipped),
            "training_s": round(trained - began, 1),
            "seconds": {"reading images": ready - began, "compiling": begins - ready, **outcome.seconds},
        }
        run = Run(run_dir, config, scorer, calibrations, record.step)
        assess_and_report(
            run,
            test,
            config.evaluation,
            config.seed,
            run_dir,
            console,
            training=facts,
            validation=data.validation.images,
            caveats=caveats,
        )
        console.print(f"done in {time.monotonic() - began:.0f} s; open {run_dir / 'report.html'}", highlight=False)
    return record.val_loss


@contextmanager
def workplace(run_dir: Path) -> Iterator[tuple[Path, Console]]:
    """The run directory, held against other runs; to the helpers of the first process, a folder that is thrown away."""
    if devices.is_first():
        with claim(run_dir):
            yield run_dir, make_console()
    else:
        with tempfile.TemporaryDirectory() as own, open(os.devnull, "w") as nowhere:
            yield Path(own), Console(file=nowhere)


def with_images(config: TrainConfig, run_dir: Path, console: Console) -> tuple[TrainConfig, str]:
    """(config, citation): with no images named, a resumed run takes its own, and any other the sample lung CT."""
    if config.resume and config.data.train is None and (run_dir / "config.yaml").is_file():
        before = load_config(run_dir).data
        folders = {key: getattr(before, key) for key in ("train", "val", "test", "test_masks", "foreground")}
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
        raise InputError(f"data.align_run={data.align_run}: the sample holds no chest X-rays; give data.train=DIR")
    sample = fetch_lung_ct(data.cache, console)
    folders = {name: sample / name for name in ("train", "val", "test", "test_masks", "foreground")}
    given = {name: getattr(data, name) for name in ("test", "test_masks") if data.test is not None}
    console.print(
        f"sample lung CT, one patient: a demonstration, no claim. Please cite:\n{lung_ct.CITATION}",
        highlight=False,
    )
    return config.model_copy(update={"data": data.model_copy(update=folders | given)}), lung_ct.CITATION


def with_alignment(config: TrainConfig, folder: Path, console: Console) -> tuple[TrainConfig, str]:
    """With data.align_run the folders of images and masks are those of their copies in the lung frame; and the digest
    of the landmark run, "" without one."""
    if config.data.align_run is None:
        return config, ""
    run = open_frame(config.data.align_run, config.plugins)
    aligned = align_data(run, config.data, folder / "aligned", config.data.max_image_mb, console)
    return config.model_copy(update={"data": aligned}), run.digest


def say(console: Console, data: NormalData, run_dir: Path) -> None:
    console.print(
        f"{len(data.training.images)} training images with {len(data.training.cells)} patches of "
        f"{data.how.patch_size} px, {len(data.validation.images)} validation images, on "
        f"{jax.devices()[0].device_kind}\nrun directory {run_dir}",
        highlight=False,
    )


def identify(config: TrainConfig, data: NormalData, base: Pretrained | None) -> dict[str, Any]:
    """What a resumed run must share with the run that it goes on with, in comparable form."""
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


def write_records(folder: Path, config: TrainConfig, data: NormalData, citation: str) -> None:
    """What the run is made with; it is open for prediction again when it is finished again."""
    unfinish(folder)
    save_config(config, folder / "config.yaml")
    write_json(folder / "preprocessing.json", asdict(data.how))
    write_json(folder / "images.json", describe_images(data))
    write_json(folder / "run.json", {"citation": citation, **provenance()})


def require_one_frame(config: TrainConfig) -> None:
    """A Gaussian at each place needs the same places in every image."""
    if config.method.get("locations") == "each" and not config.data.resize:
        raise InputError(
            "method.locations=each needs data.resize=true: aligned images are then shrunk to data.patch_size, whatever "
            "their size, and a place is the same in all; for images that are not aligned take method.locations=pooled"
        )


def sees_once(config: TrainConfig) -> bool:
    """Whether the method counts every patch once: patches then need not overlap."""
    target = find_target(config.method, "method", config.plugins)
    return isinstance(target, type) and issubclass(target, OnePass)


def less_memory(config: TrainConfig) -> str:
    return (
        f"lower trainer.batch_size (now {config.trainer.batch_size}), data.prefetch (now {config.data.prefetch}) or "
        f"data.patch_size (now {config.data.patch_size})"
    )


def compile_step(
    method: Method, optimizer: Any, state: TrainState, config: TrainConfig, how: Preprocessing, mesh: Mesh, remedy: str
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The program of the step. Raises InputError where it and the batches read ahead do not fit into memory."""
    shape = (config.trainer.batch_size, how.patch_size, how.patch_size, how.channels)
    batch: Any = jax.ShapeDtypeStruct(shape, np.float32, sharding=devices.rows(mesh))
    if isinstance(method, OnePass):
        step: Any = make_pass(method, devices.everywhere(mesh))
        batch = batch, jax.ShapeDtypeStruct(shape[:3], bool, sharding=devices.rows(mesh))
    else:
        step = make_step(method, optimizer, config.trainer.ema_decay, config.seed, devices.everywhere(mesh))
    program = step.lower(state, batch).compile()
    analysis = program.memory_analysis()
    on_host = math.prod(shape) * 4 // jax.process_count() * (config.data.prefetch + 2)
    needed = analysis.temp_size_in_bytes + on_host if analysis else on_host
    require(needed, f"a step of {shape[0]} patches of {shape[1]}x{shape[2]}x{shape[3]}", remedy)
    return program


def how_to_read(loading: DataConfig) -> dict[str, int]:
    return {"threads": loading.threads, "prefetch": loading.prefetch, "workers": loading.workers}


def reconstruction(method: Method) -> Callable[[TrainState, np.ndarray], np.ndarray]:
    """Of patches that one process looks at by itself."""
    reconstruct = jax.jit(lambda state, patches: method.reconstruct(learnt(method, state), patches))
    return lambda state, patches: np.asarray(reconstruct(devices.here(state), patches))


def make_validation(
    method: Method, patches: np.ndarray, batch_size: int, seed: int, mesh: Mesh
) -> Callable[[TrainState], float]:
    """The mean loss of the averaged parameters, with the same noise every time."""
    size = min(batch_size, len(patches))
    whole = evenly(patches, len(patches) // size * size)  # batches of one shape: one compilation
    batches = devices.on_all(whole.reshape(-1, size, *patches.shape[1:]), mesh)

    @jax.jit
    def mean_loss(state: TrainState, batches: jax.Array) -> jax.Array:
        params, keys = learnt(method, state), jax.random.split(jax.random.key(seed), len(batches))
        return jax.lax.map(lambda item: method.train_loss(params, *item), (batches, keys)).mean()

    return lambda state: float(mean_loss(state, batches))


def labelled_data(data: DataConfig) -> EvaluateDataConfig | None:
    if data.test is None:
        return None
    return EvaluateDataConfig(
        test=data.test,
        test_masks=data.test_masks,
        foreground=data.foreground,
        normal_name=data.normal_name,
        group_regex=data.group_regex,
    )


if __name__ == "__main__":
    cli.main("train", train, EXAMPLES)
