"""A finished run of landmarks: method, companion models, calibration, and the files that store them.

Prediction and evaluation read config.yaml, landmarks.json, calibration.json, companions.npz and checkpoints/.
finished.json, which training writes last, contains their SHA-256 (see `pulmo_jax.runs.directory`).
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from pulmo_jax.config.nodes import build, build_function, check_model, check_node, find_target
from pulmo_jax.core.lung_frame import LungFrame, flipped, lung_frame
from pulmo_jax.core.shape_model import fit_shape_model
from pulmo_jax.data.letterbox import to_bytes
from pulmo_jax.data.one_image import ImageLike, one_image
from pulmo_jax.data.working_images import WorkingImages, working_image
from pulmo_jax.evaluation.landmark_doubt import added_variance
from pulmo_jax.evaluation.landmark_quality import (
    fit_surprise,
    low_quality,
    std_px,
)
from pulmo_jax.host.files import atomically, write_json
from pulmo_jax.inference.locate import Locate, locator
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.landmark_baselines import fit_baselines
from pulmo_jax.methods.landmark_net import LandmarkNet, mirror_permutation
from pulmo_jax.methods.located import ClosedForm, Found, Locator, Trained
from pulmo_jax.methods.networks import unstacked
from pulmo_jax.runs.directory import (
    built,
    digest_of_run,
    load_config,
    restore_sealed,
    sealed_step,
    shapes_of,
)
from pulmo_jax.runs.place import formats_for
from pulmo_jax.tasks.landmarks.calibration import at_least, calibrate, doubt_of, surprises
from pulmo_jax.tasks.landmarks.config import CHOICES, LandmarkConfig
from pulmo_jax.tasks.landmarks.data import Labelled
from pulmo_jax.tasks.landmarks.results import LandmarkResult
from pulmo_jax.tasks.landmarks.stored import (
    Companions,
    LandmarkCalibration,
    read_calibration,
    read_companions,
    read_facts,
)
from pulmo_jax.training.state import averaged_state, fitted_state
from pulmo_jax.types import InputError

SEALED = ("landmarks.json", "calibration.json", "companions.npz")
TINY = 4  # enlargement to the method's input size above which all landmarks of an image are of low quality


@dataclass(frozen=True)
class LandmarkRun:
    """A finished run.

    Attributes:
        path: Run directory.
        config: Typed config of the training.
        method: Method of the run.
        params: Its parameters.
        step: Step of the checkpoint.
        companions: Models fitted to the training images.
        calibration: Calibration of the uncertainties.
        locate: Compiled localisation in resized images.
    """

    path: Path
    config: LandmarkConfig
    method: Locator
    params: Params
    step: int
    companions: Companions
    calibration: LandmarkCalibration
    locate: Locate

    @property
    def weights(self) -> list[Params]:
        """Parameters of each network of an ensemble; otherwise those of the method."""
        return unstacked(self.params) if isinstance(self.method, LandmarkNet) else [self.params]

    @property
    def frame(self) -> LungFrame:
        """Lung frame."""
        return self.companions.frame

    @property
    def digest(self) -> str:
        """Digest of the run, which changes when it is trained again."""
        return digest_of_run(self.path)

    @property
    def n_landmarks(self) -> int:
        """Number of landmarks K."""
        return len(self.companions.mirror)

    @property
    def size(self) -> int:
        """Side length of the resized images, px."""
        return self.method.size  # pyright: ignore[reportAttributeAccessIssue]

    def predict(self, image: ImageLike, page: int = 0) -> LandmarkResult:
        """Localise the landmarks of one image, as in `python -m pulmo_jax.predict`.

        Args:
            image: Array (H, W) or (H, W, C), or path of an image file.
            page: Page of a multi-page file, from 0.

        Returns:
            Landmarks with uncertainties and quality.

        Raises:
            InputError: If the image cannot be read, or no landmarks are found.
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
        """Localise the landmarks of images, with calibrated uncertainties and quality flags.

        A landmark is of low quality if its standard deviation or the dissimilarity of its image exceeds the calibrated
        limit, if it lies outside the image or on a folded triangle of the mesh, or if the image is much smaller than
        the method's input. Its standard deviation is then at least that limit, and in an image unlike the training
        images larger, by the errors on such images (`landmark_doubt`).

        Args:
            working: Resized images.

        Returns:
            Landmarks in px of the original images.
        """
        located, limits = self.locate(working.pixels), self.calibration
        unlike = surprises(self.companions.look, working.pixels)
        covariance = located.covariance * limits.covariance_factor
        low = low_quality(std_px(covariance), np.array(limits.std_limits), unlike, limits.surprise_limit)
        points, scales = working.to_images(located.points), working.scales
        last = np.array([ref.shape[:2] for ref in working.refs])[:, None] - 0.5
        outside = ((points < -0.5) | (points > last)).any(-1)
        tiny = np.array([max(ref.shape[:2]) * TINY < self.size for ref in working.refs])[:, None]
        low = low | outside | on_folds(points, self.frame) | tiny
        covariance = covariance + added_variance(limits.doubt, unlike)[:, None, None, None] * np.eye(2)
        covariance = at_least(covariance, np.array(limits.std_limits), low)
        covariance = covariance / (scales[:, None, :, None] * scales[:, None, None, :])
        return Found(points, covariance, std_px(covariance), low, unlike)


def on_folds(points: Float[np.ndarray, "N K 2"], frame: LungFrame) -> Bool[np.ndarray, "N K"]:
    """Whether a landmark is a corner of a mesh triangle reversed in the image, which is anatomically impossible."""
    reversed_triangles = np.asarray(turned_over(jnp.asarray(points, jnp.float32), frame))
    corners = np.any(np.eye(frame.triangles.max() + 1)[frame.triangles] > 0, axis=1)  # (triangles, mesh points)
    return np.any(reversed_triangles[:, :, None] & corners[:, : points.shape[1]], axis=1)


turned_over = jax.jit(jax.vmap(flipped, (0, None)))


def check_nodes(config: LandmarkConfig) -> None:
    """Validate the nodes of the method and its model. Raises InputError."""
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
    """Build the method from the config; without companions, only the size of its resized images is valid."""
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
    """Side length of the resized images, px, which depends on the options of the method only."""
    return build_locator(config, None).size  # pyright: ignore[reportAttributeAccessIssue]


def fit_companions(config: LandmarkConfig, training: Labelled) -> Companions:
    """Fit the companion models to the training images. Raises InputError if images or landmarks do not suffice."""
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
    """Calibrate a trained method on the validation images.

    Args:
        path: Run directory.
        config: Typed config of the training.
        method: Method of the run.
        params: Its parameters.
        step: Step of the checkpoint.
        companions: Models fitted to the training images.
        validation: Validation images.

    Returns:
        Calibrated run.

    Raises:
        InputError: If no validation image has contrast.
    """
    locate = locator(method, params)
    unlike = surprises(companions.look, validation.working.pixels)
    calibration = calibrate(locate(validation.working.pixels), validation, unlike)
    doubt = doubt_of(locate, companions.look, validation, unlike, calibration.covariance_factor, config.seed)
    calibration = replace(calibration, doubt_surprise=doubt.surprise, doubt_variance=doubt.variance)
    return LandmarkRun(path, config, method, params, step, companions, calibration, locate)


# --- on disk


def save_run(run: LandmarkRun) -> None:
    """Write the files from which the run is opened, except the checkpoint."""
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


def open_run(path: Path | str, plugins: tuple[str, ...] = ()) -> LandmarkRun:
    """Load a finished run.

    Args:
        path: Run directory.
        plugins: Packages that may be imported. They replace the list in the run, which is not trusted.

    Returns:
        The opened run.

    Raises:
        InputError: If it is not a finished landmark run, or has changed since training.
    """
    path = Path(path)
    config, step = load_config(path, LandmarkConfig, plugins), sealed_step(path, SEALED)
    check_nodes(config)
    facts = read_facts(path / "landmarks.json")
    calibration = read_calibration(path / "calibration.json", len(facts.mirror))
    companions = read_companions(path, facts)
    method = build_locator(config, companions)
    params = restore(path, method, config, len(facts.mirror), step)
    locate = built(path, lambda: locator(method, params, trace=not isinstance(method, Trained)))
    return LandmarkRun(path, config, method, params, step, companions, calibration, locate)


def restore(path: Path, method: Locator, config: LandmarkConfig, n_landmarks: int, step: int) -> Params:
    """Restore the parameters for inference. Raises InputError."""
    if isinstance(method, Trained):
        return restore_sealed(path, step, averaged_state(shapes_of(path, method.init))).ema
    assert isinstance(method, ClosedForm)  # the config was checked
    return restore_sealed(path, step, fitted_state(method.skeleton(n_landmarks)), as_written=True).params
