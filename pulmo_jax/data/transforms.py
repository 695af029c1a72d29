"""The preprocessing shared by training, calibration, evaluation and prediction."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped
from PIL import Image
from pydantic import ConfigDict, FiniteFloat, TypeAdapter, ValidationError

from pulmo_jax.data.sources.missing import float_dtype, with_nan
from pulmo_jax.host.files import write_json
from pulmo_jax.host.reading import read_bytes
from pulmo_jax.types import InputError

FILE_BYTES, MAX_SIDE = 2**22, 2**15
DTYPES = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)")


@dataclass(frozen=True)
class Preprocessing:
    """Conversion of pixels to network input, stored with a run as preprocessing.json.

    Attributes:
        channels: Number of bands.
        dtype: Data type of the image files.
        patch_size: Side of the network input in px.
        resize: Whether whole images are resized to this side, instead of being cut into patches.
        offset: Per band, in the unit of the files: normalised = (pixel - offset) / scale.
        scale: Per band, in the unit of the files.
        fill: Per band, normalised; replaces background pixels and pixels that are not finite.
        mean: Mean of the training foreground per band, in the unit of the files (for the z-score baseline).
        std: Standard deviation of the training foreground per band, in the unit of the files.
        clip: Limits of normalised values. They are wide enough to keep the contrast of anomalies, and prevent a dead
            pixel from dominating a patch.
        aligned_by: Digest of the landmark run in whose frame the images are; "" for images that are not aligned.
        percentiles: Percentiles of each image that are mapped to 0 and 1 (see `image_scale.for_image`), before
            offset and scale; None: offset and scale alone are used, the same for all images.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    channels: int
    dtype: str
    patch_size: int
    resize: bool
    offset: tuple[FiniteFloat, ...]
    scale: tuple[FiniteFloat, ...]
    fill: tuple[FiniteFloat, ...]
    mean: tuple[FiniteFloat, ...]
    std: tuple[FiniteFloat, ...]
    clip: tuple[FiniteFloat, FiniteFloat]
    aligned_by: str = ""
    percentiles: tuple[FiniteFloat, FiniteFloat] | None = None

    def save(self, path: Path) -> None:
        """Write the preprocessing as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Preprocessing":
        """Read what `save` wrote.

        Args:
            path: The JSON file.

        Raises:
            InputError: The file is missing or invalid.
        """
        try:
            how = TypeAdapter(cls).validate_json(read_bytes(path, FILE_BYTES, path.parent))
        except (OSError, ValidationError, InputError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{path}: is not a valid preprocessing file ({reason}); train again") from error
        if not how.is_consistent:
            raise InputError(f"{path}: is not a valid preprocessing file (its values do not fit together); train again")
        return how

    @property
    def is_consistent(self) -> bool:
        """Whether there is a value for every band, the scales are positive, and sizes and dtype are those of images."""
        bands = (self.offset, self.scale, self.fill, self.mean, self.std)
        return (
            1 <= self.patch_size <= MAX_SIDE
            and all(len(values) == self.channels for values in bands)
            and min(self.scale, default=0) > 0
            and self.clip[0] < self.clip[1]
            and (self.percentiles is None or 0 <= self.percentiles[0] < self.percentiles[1] <= 100)
            and DTYPES.fullmatch(self.dtype) is not None
        )


def as_pixels(image: Any) -> Shaped[np.ndarray, "H W C"]:
    """Convert an array to pixels.

    Args:
        image: Array (H, W) or (H, W, C) of integers or floats; masked pixels of a masked array are missing.

    Returns:
        Pixels (H, W, C); floats with NaN for missing pixels, if the array is masked.

    Raises:
        InputError: It has another number of dimensions, no pixels or another kind of values.
    """
    pixels = np.asarray(image)
    if pixels.ndim not in (2, 3) or not pixels.size:
        raise InputError(f"the image has shape {pixels.shape}; give an array (H, W) or (H, W, C)")
    if pixels.dtype.kind not in "biuf":
        raise InputError(f"the image is an array of {pixels.dtype}; give integers or floats")
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if not np.ma.isMaskedArray(image):
        return pixels
    missing = np.asarray(np.ma.getmaskarray(image).reshape(pixels.shape).any(axis=-1))
    return with_nan(pixels, missing, float_dtype(pixels.dtype))


def fitting(image: Any, preprocessing: Preprocessing, scale: str = "") -> Shaped[np.ndarray, "H W C"]:
    """Convert an array to pixels, and check that they are like the training images.

    Args:
        image: Array (H, W), if the training images have one band, or (H, W, C).
        preprocessing: Preprocessing of the run.
        scale: The dtype whose range the intensities have (see `ImageRef.scale`); "" for that of the array.

    Returns:
        Pixels (H, W, C).

    Raises:
        InputError: Bands or scale are others.
    """
    pixels = as_pixels(image)
    bands, scale = pixels.shape[2], scale or np.asarray(image).dtype.name
    if bands == preprocessing.channels and same_scale(scale, preprocessing.dtype):
        return pixels
    raise InputError(
        f"the image has {bands} bands of {scale}, but the run was trained on {preprocessing.channels} of "
        f"{preprocessing.dtype}; give the values of the files, as a masked array if pixels are missing"
    )


def same_scale(a: str, b: str) -> bool:
    """Whether two dtypes represent intensity on the same scale: they are equal, or both floating point."""
    return a == b or (np.issubdtype(a, np.floating) and np.issubdtype(b, np.floating))


def preprocess(
    pixels: Shaped[np.ndarray, "*grid C"], foreground: Bool[np.ndarray, "*grid"] | None, preprocessing: Preprocessing
) -> Float[np.ndarray, "*grid C"]:
    """Normalise pixels, and fill those that are background or not finite.

    Args:
        pixels: Images or patches (..., H, W, C) in the unit of the files.
        foreground: Foreground mask (..., H, W); None if all of it is foreground.
        preprocessing: The normalisation.

    Returns:
        Normalised pixels (..., H, W, C) in float32.
    """
    values = pixels.astype(np.float32, order="C")
    rows = values.reshape(*values.shape[:-2], -1)  # merging pixels and bands into one axis is faster
    width = rows.shape[-1] // preprocessing.channels
    offset, scale = (np.tile(np.asarray(v, np.float32), width) for v in (preprocessing.offset, preprocessing.scale))
    with np.errstate(over="ignore"):  # infinite values are clipped or filled below
        rows -= offset
        rows /= scale
    np.clip(rows, *preprocessing.clip, out=rows)
    valid = finite(pixels)
    if foreground is not None:
        valid &= foreground
    if not valid.all():
        values[~valid] = np.asarray(preprocessing.fill, np.float32)
    return values


def finite(pixels: Shaped[np.ndarray, "*grid C"]) -> Bool[np.ndarray, "*grid"]:
    """Find the pixels that are finite in every band.

    Args:
        pixels: Pixels (..., C) of any dtype.

    Returns:
        True for finite pixels (...); values beyond the range of float32, which some software uses to mark missing
        pixels, are treated as infinite.
    """
    if np.issubdtype(pixels.dtype, np.integer):
        return np.ones(pixels.shape[:-1], bool)
    with np.errstate(over="ignore"):
        return np.asarray(np.isfinite(pixels.astype(np.float32, copy=False)).all(axis=-1))


def brightness(pixels: Shaped[np.ndarray, "*grid C"]) -> Float[np.ndarray, "*grid"]:
    """Average the bands of pixels (..., C), in float32; non-finite if any band is."""
    with np.errstate(over="ignore", invalid="ignore"):
        return pixels.mean(axis=-1, dtype=np.float32)


def resize_bands(image: Float[np.ndarray, "H W C"], height: int, width: int) -> Float[np.ndarray, "h w C"]:
    """Resize an image by bilinear interpolation, with anti-aliasing when downsampling (as Pillow does).

    Args:
        image: Image (H, W, C).
        height: New height h in px.
        width: New width w in px.

    Returns:
        The resized image (h, w, C).
    """
    bands = (Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[2]))
    return np.stack([np.asarray(b.resize((width, height), Image.Resampling.BILINEAR)) for b in bands], axis=-1)


def flip_and_turn(patch: Shaped[np.ndarray, "P P *C"], code: int) -> Shaped[np.ndarray, "P P *C"]:
    """Apply one of the eight symmetries of the square.

    Args:
        patch: Square image (P, P) or (P, P, C).
        code: 0 to 3 for rotations by multiples of 90 degrees, 4 to 7 for the same followed by a reflection.

    Returns:
        View of the patch.
    """
    rotated = np.rot90(patch, code % 4)
    return rotated[:, ::-1] if code >= 4 else rotated
