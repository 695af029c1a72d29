"""A finished run of anomaly detection: scorer, thresholds, and the files that store them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Shaped

from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.one_image import ImageLike, one_foreground, one_image
from pulmo_jax.data.transforms import Preprocessing, preprocess, same_scale
from pulmo_jax.evaluation.calibration import Calibration, Threshold
from pulmo_jax.evaluation.detection import find_detections
from pulmo_jax.inference.image_rating import image_statistic_of, rate_image
from pulmo_jax.inference.normal_level import NormalLevel
from pulmo_jax.inference.score import Scorer, Tiles
from pulmo_jax.methods.adapted import Adapted
from pulmo_jax.methods.base import Method, Params
from pulmo_jax.methods.ensemble import Ensemble
from pulmo_jax.methods.networks import unstacked
from pulmo_jax.runs.directory import digest_of_run, load_config, restore_sealed, sealed_step, shapes_of
from pulmo_jax.runs.place import formats_for
from pulmo_jax.tasks.anomalies.aligning import into_lung_frame
from pulmo_jax.tasks.anomalies.building import build_method
from pulmo_jax.tasks.anomalies.calibrated import load_calibrations, load_level, load_tuned, with_tuned
from pulmo_jax.tasks.anomalies.config import TrainConfig
from pulmo_jax.tasks.anomalies.results import AnomalyResult
from pulmo_jax.tasks.anomalies.units import stored_intensity
from pulmo_jax.training.state import TrainState, averaged_state, inference_state, learnt
from pulmo_jax.types import ImageStatistic, InputError

SEALED = ("preprocessing.json", "calibration.json", "baselines.json")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: Run directory.
        config: Typed config of the training.
        scorer: Computes the score map of an image.
        calibrations: Calibration of the method ("method") and of every baseline, by name.
        step: Step of the checkpoint.
    """

    path: Path
    config: TrainConfig
    scorer: Scorer
    calibrations: dict[str, Calibration]
    step: int

    @property
    def weights(self) -> list[Params]:
        """Parameters of each network of an ensemble; otherwise those of the method."""
        params = self.scorer.params
        return unstacked(params) if isinstance(self.scorer.method, Ensemble) else [params]

    def predict(self, image: ImageLike, foreground: ImageLike | None = None, page: int = 0) -> AnomalyResult:
        """Score one image and list its findings, as in `python -m pulmo_jax.predict`.

        Args:
            image: Array (H, W) or (H, W, C) in the units of the training images, or path of an image file.
            foreground: Pixels to score, an array (H, W) that is not 0 there or the path of a mask; None: for a path,
                the mask of that name in the run's folder; otherwise all.
            page: Page of a multi-page file, from 0.

        Returns:
            Maps and findings.

        Raises:
            InputError: If the image cannot be read, or differs from the training images in bands or depth.
        """
        data, formats = self.config.data, formats_for(image, self.config)
        ref, pixels = one_image(image, page, data.max_image_mb, data.foreground, formats)
        inside = one_foreground(foreground, ref, data.max_image_mb, formats)
        if data.align_run is not None:
            pixels, inside = into_lung_frame(self.config, self.scorer.how, ref, pixels, inside)
        if isinstance(image, Path | str):
            require_fit(ref, self.scorer.how)
        return self.map_pixels(ref.title, pixels, inside, ref.scale)

    def by_statistic(self, statistic: ImageStatistic) -> "Run":
        """Take another statistic of the score maps as the image score; the pixel scores stay.

        Args:
            statistic: A single statistic, such as "mean", or "combined".

        Returns:
            The run with threshold and p-values of this image score, from the same normal images.

        Raises:
            InputError: If an older version made the run, which stored only the scores by the statistic of the run.
        """
        calibration = self.calibrations["method"]
        if statistic == image_statistic_of(self.scorer.method, calibration):
            return self
        return replace(self, calibrations={**self.calibrations, "method": calibration.by_statistic(statistic)})

    def map_pixels(
        self,
        title: str,
        pixels: Shaped[np.ndarray, "H W C"],
        foreground: Bool[np.ndarray, "H W"] | None,
        scale: str = "",
    ) -> AnomalyResult:
        """Score the pixels of an image.

        Args:
            title: Name of the image.
            pixels: Pixels in the units of the training images.
            foreground: Pixels to score; None: all.
            scale: The dtype whose range the intensities have; "" for that of `pixels`.

        Returns:
            Maps and findings.
        """
        calibration, method = self.calibrations["method"], self.scorer.method
        score = self.scorer(pixels, foreground, scale)
        findings, mask = find_detections(score, calibration, min_area_px=self.config.calibration.min_area_px)
        rating = rate_image(method, calibration, score)
        return AnomalyResult(
            title=title,
            image=preprocess(pixels, None, self.scorer.how),
            score=score,
            p_value=calibration.pixel_p_value(score),
            mask=mask,
            findings=tuple(findings),
            image_score=rating.score,
            image_p_value=rating.p_value,
            statistic_p_values={**rating.p_values},
            anomalous=rating.anomalous,
            pixel_threshold=calibration.pixel_threshold.value,
            intensity=stored_intensity(self.scorer.how),
        )


def require_fit(ref: ImageRef, how: Preprocessing) -> None:
    """Raise InputError if an image differs from the training images in bands or depth."""
    if ref.shape[2] != how.channels or not same_scale(ref.scale, how.dtype):
        raise InputError(
            f"{ref.path}: {ref.shape[2]} bands of {ref.scale}, but the run was trained on {how.channels} of "
            f"{how.dtype}; convert the image"
        )


def open_run(path: Path | str, plugins: tuple[str, ...] = ()) -> Run:
    """Load model and thresholds of a finished run.

    Args:
        path: Run directory.
        plugins: Packages that may be imported. They replace the list in the run, which is not trusted.

    Returns:
        The opened run.

    Raises:
        InputError: If the run is not finished or has changed since training.
    """
    path = Path(path)
    config, how, method, state, step = load_run(path, plugins)
    params = learnt(method, state)
    params = with_tuned(params, load_tuned(path, method, params))
    scorer = make_scorer(config, method, params, how, load_level(path))
    return Run(path, config, scorer, load_calibrations(path), step)


def load_run(path: Path, plugins: tuple[str, ...] = ()) -> tuple[TrainConfig, Preprocessing, Method, TrainState, int]:
    """Load a finished run without its thresholds.

    Args:
        path: Run directory.
        plugins: Packages that may be imported.

    Returns:
        Config, preprocessing, method, state for inference, and step.

    Raises:
        InputError: If the run is not finished or has changed since training.
    """
    config, step = load_config(path, TrainConfig, plugins), sealed_step(path, SEALED)
    how = Preprocessing.load(path / "preprocessing.json")
    like = shapes_of(path, lambda: inference_state(build_method(config, how)))
    state, method = restore_sealed(path, step, like), build_method(config, how)
    if isinstance(method, Adapted):
        method, state = with_adapter(path, config, method, state)
    return config, how, method, state, step


def with_adapter(path: Path, config: TrainConfig, method: Adapted, state: TrainState) -> tuple[Method, TrainState]:
    """Merge the adapter of a run into the network of its base run.

    Args:
        path: Run directory.
        config: Config of the run.
        method: Its method.
        state: Its state for inference.

    Returns:
        Method of the base run, and state for inference with the merged parameters.

    Raises:
        InputError: If the base run is missing, or is not the one that the adapter was trained on.
    """
    base = Path(str(method.base_run))
    try:
        _, _, inner, before, _ = load_run(base, config.plugins)
    except InputError as error:
        raise InputError(f"{path}: contains adapters of the network of method.base_run={base}. {error}") from error
    if config.base is None or digest_of_run(base) != config.base.digest:
        raise InputError(
            f"{path}: its adapters belong to an earlier training of method.base_run={base}, which has been trained "
            "again; restore that run, or train the adapters again"
        )
    adapted = replace(method, base_params=learnt(inner, before))
    return inner, averaged_state(adapted.merged(learnt(method, state)))


def make_scorer(
    config: TrainConfig,
    method: Method,
    params: Params,
    how: Preprocessing,
    level: NormalLevel | None = None,
) -> Scorer:
    """Make the scorer of a method with the tiling of the config; see `Scorer.of`."""
    return Scorer.of(method, params, how, Tiles(config.tiles.overlap, config.tiles.batch_size), level)


def missing_masks(refs: Sequence[ImageRef], run: Run) -> str:
    """Warning for images without a foreground mask if the run was trained within masks; otherwise ""."""
    without = sum(ref.mask is None for ref in refs)
    if not without or run.config.data.foreground is None:
        return ""
    return (
        f"{without} of {len(refs)} images have no foreground mask and are scored completely, but the run was trained "
        "and calibrated within masks: pixels outside will be reported as abnormal. Give a folder of foreground masks."
    )


def thresholds(run: Run) -> tuple[Threshold, Threshold]:
    """Pixel and image threshold of a run."""
    calibration = run.calibrations["method"]
    return calibration.pixel_threshold, calibration.image_threshold
