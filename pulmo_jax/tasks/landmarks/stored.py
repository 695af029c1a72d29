"""The files of a run of landmarks. They may come from elsewhere, and are judged before arrays are made."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from pulmo_jax.core.lung_frame import LungFrame, frame_of
from pulmo_jax.core.ppca import PPCA
from pulmo_jax.core.shape_model import ShapeModel
from pulmo_jax.evaluation.landmark_doubt import Doubt
from pulmo_jax.evaluation.landmark_quality import SurpriseModel
from pulmo_jax.host.npz import read_npz
from pulmo_jax.host.reading import read_bytes
from pulmo_jax.methods.landmark_baselines import Baselines
from pulmo_jax.runs.directory import (
    SEALED_BYTES,
)
from pulmo_jax.types import InputError

FACTS_BYTES = 2**24  # largest landmarks.json and calibration.json
MAX_LANDMARKS = 1000  # the frame and the shape model take memory and time with the square and the cube of the number
MAX_SMOOTHING_PX = 1024
MAX_KNOTS = 1000  # of the additional variance


@dataclass(frozen=True)
class LandmarkCalibration:
    """Calibration of the uncertainties on validation images.

    Attributes:
        covariance_factor: Factor of the covariances by which the 95 % regions contain 95 % of the validation landmarks.
        std_limits: Standard deviation of each landmark, px of the resized image, above which its quality is low.
        surprise_limit: Dissimilarity of an image, nats, above which all of its landmarks are of low quality.
        rate: Upper bound of the rate at which each limit is exceeded on images like the validation images.
        n_images: Number of validation images.
        held_out_coverage: Coverage of the 95 % regions by five-fold cross-validation over the groups: each fifth with
            the factor of the others; None for fewer groups.
        doubt_surprise: Dissimilarities, nats, at which the additional variance is given (`landmark_doubt.Doubt`).
        doubt_variance: Additional variance of each coordinate at these, px^2 of the resized image; empty in runs of
            earlier versions, which add none.
    """

    covariance_factor: FiniteFloat
    std_limits: tuple[FiniteFloat, ...]
    surprise_limit: FiniteFloat
    rate: FiniteFloat
    n_images: int
    held_out_coverage: FiniteFloat | None
    doubt_surprise: Annotated[tuple[FiniteFloat, ...], Field(max_length=MAX_KNOTS)] = ()
    doubt_variance: Annotated[tuple[FiniteFloat, ...], Field(max_length=MAX_KNOTS)] = ()

    @property
    def doubt(self) -> Doubt:
        """Additional variance of the landmarks in images unlike the training images."""
        return Doubt(self.doubt_surprise, self.doubt_variance)


@dataclass(frozen=True)
class Companions:
    """Models fitted to the training images, in addition to the parameters of the method.

    Attributes:
        mirror: Index of the mirrored landmark for each landmark (`mirror_permutation`).
        shapes: Shape model, px of the resized images.
        frame: Lung frame.
        look: Appearance model, by which the dissimilarity of an image to the training images is measured.
        baselines: Baselines of the landmarks.
    """

    mirror: tuple[int, ...]
    shapes: ShapeModel
    frame: LungFrame
    look: SurpriseModel
    baselines: Baselines


@dataclass(frozen=True)
class Facts:
    """Content of landmarks.json.

    Attributes:
        n_landmarks: Number of landmarks K.
        mirror: Index of the mirrored landmark for each landmark.
        frame_points: Positions (y, x) of the landmarks in the lung frame, px.
        frame_px: Side length of the lung frame, px.
    """

    n_landmarks: Annotated[int, Field(ge=3, le=MAX_LANDMARKS)]
    mirror: Annotated[tuple[int, ...], Field(min_length=3, max_length=MAX_LANDMARKS)]
    frame_points: Annotated[tuple[tuple[FiniteFloat, FiniteFloat], ...], Field(max_length=MAX_LANDMARKS)]
    frame_px: Annotated[int, Field(ge=2, le=4096)]


def read_facts(path: Path) -> Facts:
    """Read landmarks.json. Raises InputError."""
    try:
        facts = TypeAdapter(Facts).validate_json(read_bytes(path, FACTS_BYTES, path.parent))
    except (OSError, ValidationError, InputError) as error:
        raise InputError(f"{path}: does not describe landmarks; train again") from error
    count = facts.n_landmarks
    if sorted(facts.mirror) != list(range(count)) or len(facts.frame_points) != count:
        raise InputError(f"{path}: does not describe {count} landmarks; train again")
    return facts


def read_companions(run: Path, facts: Facts) -> Companions:
    """Read companions.npz, and rebuild the lung frame.

    Args:
        run: Run directory.
        facts: Content of landmarks.json.

    Returns:
        Companion models.

    Raises:
        InputError: If the file cannot be read, or its arrays do not fit together.
    """
    path = run / "companions.npz"
    try:
        arrays = read_npz(path, SEALED_BYTES, run)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); train again") from error
    shapes = {name: array.shape for name, array in arrays.items() if array.dtype.kind == "f"}
    expected = shapes_of_companions(shapes, len(facts.mirror))
    names = set(arrays) | set(expected)
    if different := sorted(name for name in names if shapes.get(name) != expected.get(name)):
        raise InputError(f"{path}: its arrays do not fit together ({', '.join(different)[:200]}); train again")
    smoothing_px = float(arrays.pop("look.smoothing_px"))
    if not 0 < smoothing_px <= MAX_SMOOTHING_PX:
        raise InputError(f"{path}: look.smoothing_px is {smoothing_px}; train again")
    shape_model, look, baselines = (
        {name.partition(".")[2]: array for name, array in arrays.items() if name.startswith(part)}
        for part in ("shapes.", "look.", "baselines.")
    )
    return Companions(
        mirror=facts.mirror,
        shapes=ShapeModel(**{name: jnp.asarray(array) for name, array in shape_model.items()}),
        frame=frame_of(np.array(facts.frame_points), facts.frame_px),
        look=SurpriseModel(PPCA(**{name: jnp.asarray(array) for name, array in look.items()}), smoothing_px),
        baselines=Baselines(**baselines),
    )


def shapes_of_companions(shapes: Mapping[str, tuple[int, ...]], n_landmarks: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays in companions.npz.

    Args:
        shapes: Shapes that are there, for the numbers of components, images and pixels.
        n_landmarks: Number of landmarks K.

    Returns:
        Shapes that fit together.
    """
    d, side = 2 * n_landmarks, isqrt(sum(shapes.get("look.mean", ())))
    components, images, pixels = (
        sum(shapes.get(name, ())[:1]) for name in ("look.variance", "baselines.pixels", "baselines.ridge")
    )
    return {
        "look.mean": (side**2,),
        "look.components": (components, side**2),
        "look.variance": (components,),
        "look.noise": (),
        "look.smoothing_px": (),
        "baselines.mean": (n_landmarks, 2),
        "baselines.pixels": (images, pixels - 1),
        "baselines.ridge": (pixels, d),
        "baselines.width": (),
        "baselines.duals": (images, d),
        "shapes.mean": (n_landmarks, 2),
        "shapes.lower": (d, d),
        "shapes.modes": (d, d),
        "shapes.variances": (d,),
    }


def read_calibration(path: Path, n_landmarks: int) -> LandmarkCalibration:
    """Read calibration.json. Raises InputError."""
    try:
        calibration = TypeAdapter(LandmarkCalibration).validate_json(read_bytes(path, FACTS_BYTES, path.parent))
    except (OSError, ValidationError, InputError) as error:
        raise InputError(f"{path}: is not a valid landmark calibration; train again") from error
    if len(calibration.std_limits) != n_landmarks:
        raise InputError(f"{path}: is not a calibration of {n_landmarks} landmarks; train again")
    knots, variances = calibration.doubt
    ascending = all(list(values) == sorted(values) for values in (knots, variances))
    if len(knots) != len(variances) or not ascending or any(value < 0 for value in variances[:1]):
        raise InputError(f"{path}: its additional variances do not fit together; train again")
    return calibration
