"""A run directory of a landmark job: what training writes, opened for use.

config.yaml, landmarks.json, calibration.json, companions.npz and checkpoints/ are all that prediction and evaluation
read; finished.json, written last, says how they were (see `pulmo_jax.run`).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from pydantic import FiniteFloat, TypeAdapter, ValidationError

from pulmo_jax.config import validate
from pulmo_jax.core.lung_frame import LungFrame, frame_of, lung_frame
from pulmo_jax.core.ppca import PPCA
from pulmo_jax.core.shape_model import ShapeModel
from pulmo_jax.evaluation.landmark_metrics import held_out_coverage, scale_covariance
from pulmo_jax.evaluation.landmark_quality import (
    SurpriseModel,
    attained_rate,
    fit_surprise,
    low_quality,
    std_px,
    surprise,
    threshold,
)
from pulmo_jax.inference.locate import Locate, Positions, in_batches, locator
from pulmo_jax.inference.outputs import atomically, write_json
from pulmo_jax.landmark_config import LandmarkConfig, check_landmark_nodes
from pulmo_jax.landmark_data import Labelled, LandmarkSets, WorkingImages
from pulmo_jax.methods.landmark_baselines import Baselines, fit_baselines
from pulmo_jax.methods.landmark_net import mirror_permutation
from pulmo_jax.methods.located import Descended, Fitted, Locator, Params
from pulmo_jax.nodes import GIVEN, build, find_target
from pulmo_jax.run import build_optimizer, finish, finished_step, load_values
from pulmo_jax.training.checkpoint import Checkpoints, DamagedError
from pulmo_jax.training.state import TrainState, init_state
from pulmo_jax.types import InputError

SEALED = ("landmarks.json", "calibration.json", "companions.npz")
LOW_RATE = 0.02  # of the validation's landmarks, and of its images, that are called of low quality


@dataclass(frozen=True)
class LandmarkCalibration:
    """What validation images say of the method's own uncertainty.

    covariance_factor: makes the region of 95 % hold 95 % of the landmarks. std_limits: working px, of each landmark;
    surprise_limit: of an image, nats: what lies above is of low quality. rate: that both keep on images like those.
    held_out_coverage: of the region of 95 %, each fifth of the groups by the factor of the others; None with fewer.
    """

    covariance_factor: FiniteFloat
    std_limits: tuple[FiniteFloat, ...]
    surprise_limit: FiniteFloat
    rate: FiniteFloat
    n_images: int
    held_out_coverage: FiniteFloat | None


@dataclass(frozen=True)
class Found:
    """Landmarks of images, in px of each: points (N, K, 2), covariance (N, K, 2, 2), std (N, K), low (N, K), surprise
    (N,)."""

    points: Float[np.ndarray, "N K 2"]
    covariance: Float[np.ndarray, "N K 2 2"]
    std: Float[np.ndarray, "N K"]
    low: Bool[np.ndarray, "N K"]
    surprise: Float[np.ndarray, "N"]


@dataclass(frozen=True)
class LandmarkRun:
    """A finished run."""

    path: Path
    config: LandmarkConfig
    method: Locator
    params: Params
    step: int
    mirror: tuple[int, ...]
    shapes: ShapeModel
    frame: LungFrame
    calibration: LandmarkCalibration
    look: SurpriseModel
    baselines: Baselines
    locate: Locate

    @property
    def size(self) -> int:
        """Side of the working images, px."""
        return self.method.size  # pyright: ignore[reportAttributeAccessIssue]

    def find(self, working: WorkingImages) -> Found:
        """The landmarks of images, with calibrated uncertainties and quality flags."""
        located, limits = self.locate(working.pixels), self.calibration
        unlike = surprises(self.look, working.pixels)
        covariance = located.covariance * limits.covariance_factor
        low = low_quality(std_px(covariance), np.array(limits.std_limits), unlike, limits.surprise_limit)
        points, scales = working.to_images(located.points), working.scales
        last = np.array([ref.shape[:2] for ref in working.refs])[:, None] - 0.5
        covariance = covariance / (scales[:, None, :, None] * scales[:, None, None, :])
        outside = ((points < -0.5) | (points > last)).any(-1)
        return Found(points, covariance, std_px(covariance), low | outside, unlike)


def build_locator(
    config: LandmarkConfig, n_landmarks: int, mirror: tuple[int, ...], shapes: ShapeModel | None
) -> Locator:
    """The method as the config describes it; of what the program gives it takes what its signature names."""
    target = find_target(config.method, "method", config.plugins)
    given = {"n_landmarks": n_landmarks, "mirror": mirror, "shapes": shapes, "seed": config.seed}
    taken = {name: value for name, value in given.items() if name in target.__init__.__annotations__}
    assert set(given) <= set(GIVEN["method"])
    return build(config.method, "method", config.plugins, **taken)


def working_size(config: LandmarkConfig) -> int:
    """Side of the working images, which the method's keys say alone."""
    return build_locator(config, 1, (0,), None).size  # pyright: ignore[reportAttributeAccessIssue]


def mirror_of(points: Float[np.ndarray, "N K 2"]) -> tuple[int, ...]:
    return tuple(mirror_permutation(points).tolist())


def make_run(
    path: Path,
    config: LandmarkConfig,
    method: Locator,
    params: Params,
    step: int,
    mirror: tuple[int, ...],
    shapes: ShapeModel,
    sets: LandmarkSets,
) -> LandmarkRun:
    """What stands beside the learnt parameters: the frame, baselines, what an image looks like, and the calibration."""
    training, validation = sets.training, sets.validation
    images, points = training.working.pixels, training.square_points
    frame = lung_frame(training.points, config.frame_px)
    look = fit_surprise(jnp.asarray(images))
    locate = locator(method, params)
    calibration = calibrate(locate(validation.working.pixels), validation, surprises(look, validation.working.pixels))
    baselines = fit_baselines(images, points, config.seed)
    return LandmarkRun(path, config, method, params, step, mirror, shapes, frame, calibration, look, baselines, locate)


def calibrate(located: Positions, validation: Labelled, unlike: Float[np.ndarray, "N"]) -> LandmarkCalibration:
    """By what was found in the validation images, in working px."""
    truth = validation.square_points
    factor = scale_covariance(located.points, located.covariance, truth)
    return LandmarkCalibration(
        covariance_factor=float(factor),
        std_limits=tuple(threshold(std_px(located.covariance * factor), LOW_RATE).tolist()),
        surprise_limit=float(threshold(unlike, LOW_RATE)),
        rate=attained_rate(len(truth), LOW_RATE),
        n_images=len(truth),
        held_out_coverage=held_out_coverage(located.points, located.covariance, truth, validation.groups),
    )


def surprises(look: SurpriseModel, images: Float[np.ndarray, "N S S"]) -> Float[np.ndarray, "N"]:
    return in_batches(lambda batch: surprise(look, batch), images)


# --- on disk


def save_run(run: LandmarkRun) -> None:
    """All but the checkpoint, which is there; then the run is open for use."""
    facts = {
        "n_landmarks": len(run.mirror),
        "mirror": run.mirror,
        "frame_points": run.frame.points.tolist(),
        "frame_px": run.frame.size,
    }
    write_json(run.path / "landmarks.json", facts)
    write_json(run.path / "calibration.json", asdict(run.calibration))
    arrays = {f"look.{name}": value for name, value in run.look.distribution._asdict().items()}
    arrays["look.smoothing_px"] = run.look.smoothing_px
    arrays |= {f"baselines.{name}": value for name, value in run.baselines._asdict().items()}
    arrays |= {f"shapes.{name}": value for name, value in run.shapes._asdict().items()}

    def write(path: Path) -> None:
        with path.open("wb") as file:  # savez would add a suffix to the temporary name
            np.savez(file, allow_pickle=False, **{name: np.asarray(value) for name, value in arrays.items()})

    atomically(run.path / "companions.npz", write)
    finish(run.path, run.step, SEALED)


def open_landmark_run(path: Path, plugins: tuple[str, ...] = ()) -> LandmarkRun:
    """Load a finished run. Raises InputError if it is not one, or not as training wrote it.

    plugins: packages that may be imported for it. The run's own list is not trusted.
    """
    step = finished_step(path, SEALED)
    config = validate(LandmarkConfig, load_values(path) | {"plugins": plugins})
    check_landmark_nodes(config)
    facts = json.loads((path / "landmarks.json").read_text())
    mirror = tuple(facts["mirror"])
    calibration = read_calibration(path / "calibration.json")
    with np.load(path / "companions.npz", allow_pickle=False) as arrays:
        of = {
            part: {n.partition(".")[2]: arrays[n] for n in arrays if n.startswith(part)}
            for part in ("look", "baselines", "shapes")
        }
    shapes = ShapeModel(**{name: jnp.asarray(value) for name, value in of["shapes"].items()})
    method = build_locator(config, facts["n_landmarks"], mirror, shapes)
    params = restore(path, method, config, len(mirror), step)
    smoothing_px = float(of["look"].pop("smoothing_px"))
    distribution = PPCA(**{name: jnp.asarray(value) for name, value in of["look"].items()})
    frame = frame_of(np.array(facts["frame_points"]), facts["frame_px"])
    return LandmarkRun(
        path, config, method, params, step, mirror, shapes, frame, calibration,
        SurpriseModel(distribution, smoothing_px), Baselines(**of["baselines"]), locator(method, params),
    )  # fmt: skip


def restore(path: Path, method: Locator, config: LandmarkConfig, n_landmarks: int, step: int) -> Params:
    try:
        with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
            if isinstance(method, Fitted):
                return checkpoints.restore(step, fitted_state(method.skeleton(n_landmarks)), as_written=True).params
            assert isinstance(method, Descended)  # the config was judged
            return checkpoints.restore(step, init_state(method, build_optimizer(config))).ema
    except DamagedError as error:
        raise InputError(
            f"{error}\nThe calibration is for that checkpoint alone; train resume=true hydra.run.dir={path} goes on "
            "from one that is whole, and calibrates anew"
        ) from error


def fitted_state(params: Params) -> TrainState:
    """Of what was learnt in one go: one step, no average, no optimizer."""
    return TrainState(jnp.ones((), jnp.int32), params, (), ())


def read_calibration(path: Path) -> LandmarkCalibration:
    try:
        return TypeAdapter(LandmarkCalibration).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{path}: cannot be read as a calibration of landmarks; train again") from error
