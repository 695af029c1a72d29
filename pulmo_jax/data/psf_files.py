"""Off-axis PSFs from files: one stamp, several exposures, or one stamp for each channel."""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from pulmo_jax.data.arrays import read_array
from pulmo_jax.data.file_parts import same_file
from pulmo_jax.types import InputError

_PSF = "an off-axis PSF (S, S)"
_BROADBAND_RATIO = 1.05  # largest over smallest wavelength above which a single PSF deserves a warning


def read_stamp(path: Path, cube_shape: tuple[int, ...], max_bytes: int) -> tuple[Float[np.ndarray, "S S"], list[str]]:
    """Read one PSF; several exposures of it are averaged.

    Args:
        path: File with the PSF (S, S), or with exposures (E, S, S).
        cube_shape: Shape (T, H, W) of the cube; a larger PSF is cropped.
        max_bytes: Limit on the size of the array in memory.

    Returns:
        The PSF, and a caveat for each change.

    Raises:
        InputError: If the file holds no PSF.
    """
    array, caveats = _psf_file(path, max_bytes), []
    if array.ndim == 3:
        if len(array) > 1:
            caveats.append(f"{path}: {len(array)} PSF images were averaged without recentring")
        array = array.mean(axis=0)
    stamp, cut = _fitting_stamp(path, array, cube_shape)
    return stamp, caveats + cut


def read_stamps(
    path: Path, cube_shape: tuple[int, ...], wavelengths: Float[np.ndarray, "L"], max_bytes: int
) -> tuple[Float[np.ndarray, "L S S"], list[str]]:
    """Read the PSF of each channel.

    Args:
        path: File with one PSF (S, S) for all channels, or one for each (L, S, S).
        cube_shape: Shape (T, H, W) of a channel of the cube; larger PSFs are cropped.
        wavelengths: Wavelength of each channel.
        max_bytes: Limit on the size of the array in memory.

    Returns:
        The PSFs, and a caveat for each change.

    Raises:
        InputError: If the file holds no PSF, or another number of them.
    """
    n = len(wavelengths)
    if n == 1:
        stamp, caveats = read_stamp(path, cube_shape, max_bytes)
        return stamp[None], caveats
    array, caveats = _psf_file(path, max_bytes), []
    images = array[None] if array.ndim == 2 else array
    if len(images) not in (1, n):
        raise InputError(
            f"{path}: has {len(images)} PSF images (shape {array.shape}), but the cube has {n} channels; give one per "
            "channel, (L, S, S), or one for all, (S, S)"
        )
    if len(images) == 1 and wavelengths.max() > _BROADBAND_RATIO * wavelengths.min():
        caveats.append(
            f"{path}: one PSF is used for all {n} channels, although diffraction widens it by a factor of "
            f"{wavelengths.max() / wavelengths.min():.2f} from the first to the last; give one per channel"
        )
    cut = [_fitting_stamp(path, image, cube_shape) for image in images]
    return np.repeat(np.stack([stamp for stamp, _ in cut]), n // len(images), axis=0), caveats + cut[0][1]


def check_psf_is_another(psf: Path, cube: Path, shape: tuple[int, ...], max_bytes: int) -> None:
    """Refuse a PSF that is the same image of the same file as the cube.

    Args:
        psf: File of the PSF.
        cube: File of the cube.
        shape: Shape of the cube.
        max_bytes: Limit on the size of the array in memory.

    Raises:
        InputError: If it is.
    """
    if same_file(psf, cube) and read_array(psf, (2, 3, 4), description=_PSF, max_bytes=max_bytes).shape == shape:
        raise InputError(f"{psf}: is {cube} itself; data.psf must be an image of the star alone: name its extension")


def _psf_file(path: Path, max_bytes: int) -> np.ndarray:
    array = read_array(path, (2, 3), description=_PSF, max_bytes=max_bytes).astype(np.float64)
    if not np.isfinite(array).all():
        bad = np.sum(~np.isfinite(array))
        raise InputError(f"{path}: {bad} of {array.size} pixels of the PSF are not finite; replace them")
    return array


def _fitting_stamp(path: Path, array: np.ndarray, cube_shape: tuple[int, ...]) -> tuple[np.ndarray, list[str]]:
    """The PSF cropped to a square no larger than the frames, with a caveat if it was cropped."""
    caveats = []
    if array.max() <= 0 or array.sum() <= 0:
        raise InputError(
            f"{path}: the PSF has no positive flux (sum {array.sum():.3g}, maximum {array.max():.3g}); "
            "give an off-axis image of the star"
        )
    smaller = min(cube_shape[1:])
    if max(array.shape) > smaller or array.shape[0] != array.shape[1]:
        original, frame = "{} x {} px".format(*array.shape), "{} x {} px".format(*cube_shape[1:])
        side = min(*array.shape, smaller)
        array = _cut_square(array, side if side % 2 else max(side - 1, 1))
        caveats.append(
            f"{path}: the PSF of {original} was cropped to {len(array)} x {len(array)} px (frames are {frame})"
        )
    return array, caveats


def _cut_square(image: np.ndarray, side: int) -> np.ndarray:
    """A square of this side around the maximum, shifted where necessary to stay inside the image."""
    peak = np.unravel_index(image.argmax(), image.shape)
    start = [int(np.clip(p - side // 2, 0, size - side)) for p, size in zip(peak, image.shape, strict=True)]
    return image[start[0] : start[0] + side, start[1] : start[1] + side].copy()
