"""A run directory of a landmark job: what training writes, opened for use.

config.yaml, landmarks.json, calibration.json, companions.npz and checkpoints/ are all that prediction and evaluation
read; finished.json, written last, says how they were (see `pulmo_jax.runs.directory`).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from pydantic import FiniteFloat, TypeAdapter, ValidationError

from pulmo_jax.config.nodes import build, build_function, check_model, check_node, find_target
from pulmo_jax.core.lung_frame import LungFrame, flipped, frame_of, lung_frame
from pulmo_jax.core.ppca import PPCA
from pulmo_jax.core.shape_model import ShapeModel, fit_shape_model
from pulmo_jax.data.letterbox import to_bytes
from pulmo_jax.data.one_image import ImageLike, one_image
from pulmo_jax.data.working_images import WorkingImages, working_image
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
from pulmo_jax.host.files import atomically, write_json
from pulmo_jax.inference.locate import Locate, Positions, in_batches, locator
from pulmo_jax.methods.landmark_baselines import Baselines, fit_baselines
from pulmo_jax.methods.landmark_net import mirror_permutation
from pulmo_jax.methods.located import ClosedForm, Found, Locator, Params, Trained
from pulmo_jax.runs.directory import digest_of_run, load_config, restore_sealed, sealed_step
from pulmo_jax.runs.place import formats_for
from pulmo_jax.tasks.landmarks.config import CHOICES, LandmarkConfig
from pulmo_jax.tasks.landmarks.data import Labelled
from pulmo_jax.tasks.landmarks.results import LandmarkResult
from pulmo_jax.training.state import averaged_state, fitted_state
from pulmo_jax.types import InputError

SEALED = ("landmarks.json", "calibration.json", "companions.npz")
TINY = 4  # times larger an image may be made for the method, before all of its landmarks are of low quality
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
class Companions:
    """What the training images say by themselves, and stands beside the learnt parameters.

    mirror: `mirror_permutation`. shapes: working px. look: of an image of a chest.
    """

    mirror: tuple[int, ...]
    shapes: ShapeModel
    frame: LungFrame
    look: SurpriseModel
    baselines: Baselines


@dataclass(frozen=True)
class LandmarkRun:
    """A finished run."""

    path: Path
    config: LandmarkConfig
    method: Locator
    params: Params
    step: int
    companions: Companions
    calibration: LandmarkCalibration
    locate: Locate

    @property
    def frame(self) -> LungFrame:
        return self.companions.frame

    @property
    def digest(self) -> str:
        """Changes when the run is trained again."""
        return digest_of_run(self.path)

    @property
    def n_landmarks(self) -> int:
        return len(self.companions.mirror)

    @property
    def size(self) -> int:
        """Side of the working images, px."""
        return self.method.size  # pyright: ignore[reportAttributeAccessIssue]

    def predict(self, image: ImageLike, page: int = 0) -> LandmarkResult:
        """The landmarks of one image, as `python -m pulmo_jax.predict` writes them.

        Args:
            image: Array (H, W) or (H, W, C), or a path.
            page: Of a file with several.

        Raises:
            InputError: The image cannot be read, or no landmarks can be found in it.
        """
        ref, pixels = one_image(image, page, self.config.data.max_image_mb, formats=formats_for(image, self.config))
        found = self.find(working_image(ref, pixels, self.size))
        if not (np.isfinite(found.points).all() and np.isfinite(found.std).all()):
            raise InputError(f"{ref.path}: no landmarks found, its values may be too large")
        return LandmarkResult(
            title=ref.title,
            image=to_bytes(pixels),
            points=found.points[0],
            std=found.std[0],
            covariance=found.covariance[0],
            quality=tuple("low" if low else "ok" for low in found.low[0]),
            surprise=float(found.surprise[0]),
        )

    def find(self, working: WorkingImages) -> Found:
        """The landmarks of images, with calibrated uncertainties and quality flags."""
        located, limits = self.locate(working.pixels), self.calibration
        unlike = surprises(self.companions.look, working.pixels)
        covariance = located.covariance * limits.covariance_factor
        low = low_quality(std_px(covariance), np.array(limits.std_limits), unlike, limits.surprise_limit)
        points, scales = working.to_images(located.points), working.scales
        last = np.array([ref.shape[:2] for ref in working.refs])[:, None] - 0.5
        covariance = covariance / (scales[:, None, :, None] * scales[:, None, None, :])
        outside = ((points < -0.5) | (points > last)).any(-1)
        tiny = np.array([max(ref.shape[:2]) * TINY < self.size for ref in working.refs])[:, None]
        low = low | outside | on_folds(points, self.frame) | tiny
        return Found(points, covariance, std_px(covariance), low, unlike)


def on_folds(points: Float[np.ndarray, "N K 2"], frame: LungFrame) -> Bool[np.ndarray, "N K"]:
    """Landmarks of a triangle of the frame's mesh that is turned over in the image: no chest lies so."""
    reversed_triangles = np.asarray(turned_over(jnp.asarray(points, jnp.float32), frame))
    corners = np.any(np.eye(frame.triangles.max() + 1)[frame.triangles] > 0, axis=1)  # (triangles, mesh points)
    return np.any(reversed_triangles[:, :, None] & corners[:, : points.shape[1]], axis=1)


turned_over = jax.jit(jax.vmap(flipped, (0, None)))


def check_nodes(config: LandmarkConfig) -> None:
    """Validates the nodes of the method and its model. Raises InputError."""
    target = find_target(config.method, "method", config.plugins)
    if not (isinstance(target, type) and (issubclass(target, ClosedForm) or issubclass(target, Trained))):
        raise InputError(
            f"method._target_={config.method['_target_']}: is no landmark method (it needs `locate` with `fit` or "
            f"`train_loss`); choose among: {', '.join(CHOICES['method'])}"
        )
    check_node(config.method, "method", config.plugins)
    check_model(config.model, config.method, config.plugins, ("n_landmarks", "channels", "rngs"))
    if "loss" in config.method:
        check_node(config.method["loss"], "method.loss", config.plugins, ("displacement", "covariance"))


def build_locator(config: LandmarkConfig, companions: Companions | None) -> Locator:
    """The method as the config describes it; without companions it only tells the size of the working images."""
    mirror, shapes = (companions.mirror, companions.shapes) if companions else ((0,), None)
    return build(
        config.method,
        "method",
        config.plugins,
        n_landmarks=len(mirror),
        mirror=mirror,
        shapes=shapes,
        network=config.model and build_function(config.model, "model", config.plugins),
        seed=config.seed,
    )


def working_size(config: LandmarkConfig) -> int:
    """Side of the working images, which the method's keys say alone."""
    return build_locator(config, None).size  # pyright: ignore[reportAttributeAccessIssue]


def fit_companions(config: LandmarkConfig, training: Labelled) -> Companions:
    """Raises InputError for landmarks or images of which they cannot be made."""
    images, points = training.working.pixels, training.square_points
    return Companions(
        mirror=tuple(mirror_permutation(points).tolist()),
        shapes=fit_shape_model(points),
        frame=lung_frame(training.points, config.frame_px),
        look=fit_surprise(jnp.asarray(images)),
        baselines=fit_baselines(images, points, config.seed, training.groups),
    )


def make_run(
    path: Path,
    config: LandmarkConfig,
    method: Locator,
    params: Params,
    step: int,
    companions: Companions,
    validation: Labelled,
) -> LandmarkRun:
    """The method as it was learnt, calibrated on the validation images."""
    locate = locator(method, params)
    unlike = surprises(companions.look, validation.working.pixels)
    calibration = calibrate(locate(validation.working.pixels), validation, unlike)
    return LandmarkRun(path, config, method, params, step, companions, calibration, locate)


def calibrate(located: Positions, validation: Labelled, unlike: Float[np.ndarray, "N"]) -> LandmarkCalibration:
    """By what was found in the validation images, in working px."""
    truth = validation.square_points
    seen = unlike[np.isfinite(unlike)]  # an image of one gray sets no limit
    if not seen.size:
        raise InputError(f"none of the {len(unlike)} validation images has any contrast; give other images")
    factor = scale_covariance(located.points, located.covariance, truth)
    return LandmarkCalibration(
        covariance_factor=float(factor),
        std_limits=tuple(threshold(std_px(located.covariance * factor), LOW_RATE).tolist()),
        surprise_limit=float(threshold(seen, LOW_RATE)),
        rate=attained_rate(len(truth), LOW_RATE),
        n_images=len(truth),
        held_out_coverage=held_out_coverage(located.points, located.covariance, truth, validation.groups),
    )


def surprises(look: SurpriseModel, images: Float[np.ndarray, "N S S"]) -> Float[np.ndarray, "N"]:
    return in_batches(lambda batch: surprise(look, batch), images)


# --- on disk


def save_run(run: LandmarkRun) -> None:
    """Writes what the run is opened from, beside the checkpoint."""
    facts = {
        "n_landmarks": run.n_landmarks,
        "mirror": run.companions.mirror,
        "frame_points": run.frame.points.tolist(),
        "frame_px": run.frame.size,
    }
    write_json(run.path / "landmarks.json", facts)
    write_json(run.path / "calibration.json", asdict(run.calibration))
    beside = run.companions
    arrays = {f"look.{name}": value for name, value in beside.look.distribution._asdict().items()}
    arrays["look.smoothing_px"] = beside.look.smoothing_px
    arrays |= {f"baselines.{name}": value for name, value in beside.baselines._asdict().items()}
    arrays |= {f"shapes.{name}": value for name, value in beside.shapes._asdict().items()}

    def write(path: Path) -> None:
        with path.open("wb") as file:  # savez would add a suffix to the temporary name
            np.savez(file, allow_pickle=False, **{name: np.asarray(value) for name, value in arrays.items()})

    atomically(run.path / "companions.npz", write)


def open_run(path: Path, plugins: tuple[str, ...] = ()) -> LandmarkRun:
    """Loads a finished run.

    Args:
        path: Run directory.
        plugins: Packages that may be imported for it; the run's own list is not trusted.

    Raises:
        InputError: It is not a finished landmark run, or not as training wrote it.
    """
    config, step = load_config(path, LandmarkConfig, plugins), sealed_step(path, SEALED)
    check_nodes(config)
    facts = json.loads((path / "landmarks.json").read_text())
    mirror = tuple(facts["mirror"])
    calibration = read_calibration(path / "calibration.json")
    with np.load(path / "companions.npz", allow_pickle=False) as arrays:
        of = {
            part: {n.partition(".")[2]: arrays[n] for n in arrays if n.startswith(part)}
            for part in ("look", "baselines", "shapes")
        }
    shapes = ShapeModel(**{name: jnp.asarray(value) for name, value in of["shapes"].items()})
    smoothing_px = float(of["look"].pop("smoothing_px"))
    distribution = PPCA(**{name: jnp.asarray(value) for name, value in of["look"].items()})
    frame = frame_of(np.array(facts["frame_points"]), facts["frame_px"])
    look = SurpriseModel(distribution, smoothing_px)
    companions = Companions(mirror, shapes, frame, look, Baselines(**of["baselines"]))
    method = build_locator(config, companions)
    params = restore(path, method, config, len(mirror), step)
    return LandmarkRun(path, config, method, params, step, companions, calibration, locator(method, params))


def restore(path: Path, method: Locator, config: LandmarkConfig, n_landmarks: int, step: int) -> Params:
    if isinstance(method, Trained):
        return restore_sealed(path, step, averaged_state(jax.eval_shape(method.init))).ema
    assert isinstance(method, ClosedForm)  # the config was checked
    return restore_sealed(path, step, fitted_state(method.skeleton(n_landmarks)), as_written=True).params


def read_calibration(path: Path) -> LandmarkCalibration:
    try:
        return TypeAdapter(LandmarkCalibration).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{path}: is not a valid landmark calibration; train again") from error
