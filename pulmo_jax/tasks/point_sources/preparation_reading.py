"""Reading of a raw stack for `prepare`: cube, angles, PSF, wavelengths and FITS header."""

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from jaxtyping import Bool, Float

from pulmo_jax.data.arrays import read_array
from pulmo_jax.data.preparation.bad_pixels import fill_image
from pulmo_jax.data.psf import Psf, prepare_psf
from pulmo_jax.tasks.point_sources.config import PrepareConfig
from pulmo_jax.types import InputError

# Cards that are wrong after shifting, cropping and leaving out frames, or that astropy writes itself
OUTDATED = re.compile(
    r"CRPIX|CRVAL|CDELT|CTYPE|CUNIT|CROTA|CD\d|PC\d|B(SCALE|ZERO|LANK)|CHECKSUM|DATASUM|EXTEND|EXTNAME|DATAM|.*PARANG"
)


@dataclass(frozen=True, eq=False)
class RawStack:
    """A stack as it is read.

    Attributes:
        cube: Frames (L, T, H, W), float32 or float64; changed in place by the preparation.
        angles_deg: Rotation of each frame, degrees, if given (T,).
        psfs: Recentred PSF of each channel, or one for all, not normalised; None if not given.
        wavelengths: Wavelength of each channel, if given (L,).
        header: Cards of the input that still hold.
    """

    cube: Float[np.ndarray, "L T H W"] = field(repr=False)
    angles_deg: Float[np.ndarray, "T"] | None
    psfs: tuple[Psf, ...] | None
    wavelengths: Float[np.ndarray, "L"] | None
    header: fits.Header = field(repr=False)

    def fwhm_px(self, channel: int) -> float | None:
        """Full width at half maximum of the PSF of a channel, px, if known."""
        return None if self.psfs is None else self.psfs[min(channel, len(self.psfs) - 1)].fwhm_px


def read_stack(config: PrepareConfig) -> RawStack:
    """Read the files of a stack and check that they fit together.

    Args:
        config: Config of `prepare`.

    Returns:
        The stack.

    Raises:
        InputError: A file cannot be used or does not match the others; the message names it.
    """
    limit = config.max_image_mb * 2**20
    angles = None if config.angles is None else read_list(config.angles, "parallactic angles in degrees, one per frame")
    wavelengths = None if config.wavelengths is None else read_list(config.wavelengths, "wavelengths, one per channel")
    cube = read_cube(config.cube, wavelengths is not None, limit)
    channels, frames, height, width = cube.shape
    if angles is not None and len(angles) != frames:
        raise InputError(f"{config.angles}: has {len(angles)} angles, but {config.cube} has {frames} frames")
    if wavelengths is not None and len(wavelengths) != channels:
        raise InputError(
            f"{config.wavelengths}: has {len(wavelengths)} wavelengths, but {config.cube} has {channels} channels"
        )
    if config.centre is not None and not (0 <= config.centre[0] < height and 0 <= config.centre[1] < width):
        raise InputError(f"centre={list(config.centre)}: lies outside the frames of {height} x {width} px")
    psfs = None if config.psf is None else read_psfs(config.psf, channels, config.psf_crop_px, limit)
    return RawStack(cube, angles, psfs, wavelengths, copied_header(config.cube))


def read_cube(path: Path, spectral: bool, limit: int) -> Float[np.ndarray, "L T H W"]:
    """Read a cube in floating point; without wavelengths it has one channel. Raises InputError."""
    description = "an image cube (T, H, W)"
    try:
        array = read_array(path, (3, 4), description=description, max_bytes=limit)
    except InputError as error:
        raise InputError(str(error).replace("data.max_image_mb", "max_image_mb")) from None
    if array.ndim == 4 and not spectral and 1 not in (array.shape[0], array.shape[-1]):
        raise InputError(f"{path}: has shape {array.shape}; a cube (L, T, H, W) also needs wavelengths=FILE")
    if array.ndim == 4 and array.shape[-1] == 1 != array.shape[0]:
        array = array[..., 0]
    cube = array[None] if array.ndim == 3 else array
    if cube.shape[1] < 2:
        raise InputError(f"{path}: has {cube.shape[1]} frame; a stack has at least 2")
    return np.require(cube, np.result_type(cube.dtype, np.float32), ["C", "W"])


def read_list(path: Path, description: str) -> Float[np.ndarray, "n"]:
    """Read finite numbers. Raises InputError."""
    values = read_array(path, (1,), description=description).astype(np.float64)
    if (bad := np.flatnonzero(~np.isfinite(values))).size:
        raise InputError(f"{path}: value {bad[0]} (counted from 0) is {values[bad[0]]}; give {description}")
    return values


def read_mask(path: Path, shape: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """Read known bad pixels, which are not 0. Raises InputError."""
    mask = read_array(path, (2,), description="bad pixels (H, W)")
    if mask.shape != shape:
        raise InputError(f"{path}: has shape {mask.shape}, but the frames have {shape}")
    return mask != 0  # NaN is bad, too


def read_psfs(path: Path, channels: int, side: int | None, limit: int) -> tuple[Psf, ...]:
    """Read PSFs, one per channel or one for all; several exposures of one channel are recentred and averaged.

    Args:
        path: The file.
        channels: Number of channels.
        side: Largest side of the stamps, px; None: no limit.
        limit: Limit on the size of the array, bytes.

    Returns:
        Recentred PSFs on odd squares, not normalised.

    Raises:
        InputError: The file shows no PSF, or their number does not match.
    """
    array = read_array(path, (2, 3), description="an off-axis PSF (S, S)", max_bytes=limit).astype(float)
    images = array[None] if array.ndim == 2 else array
    if channels > 1 and len(images) not in (1, channels):
        raise InputError(
            f"{path}: has {len(images)} PSF images, but the cube has {channels} channels; give one for each"
        )
    try:
        psfs = [prepare_psf(square_about_peak(image), flux="none") for image in images]
        size = min([len(psf.stamp) for psf in psfs] + ([side - 1 + side % 2] if side else []))
        stamps = [cropped(psf.stamp, size) for psf in psfs]
        stamps = [np.mean(stamps, axis=0)] if channels == 1 else stamps
        return tuple(prepare_psf(stamp, flux="none") for stamp in stamps)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def square_about_peak(image: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "S S"]:
    """Largest odd square about the maximum that lies inside the image; NaN are replaced from their neighbours."""
    filled = np.nan_to_num(fill_image(image, ~np.isfinite(image)))
    y, x = np.unravel_index(filled.argmax(), filled.shape)
    half = min(y, x, filled.shape[0] - 1 - y, filled.shape[1] - 1 - x)
    if half < 2:
        raise InputError(f"the maximum of the PSF, at (y, x) = ({y}, {x}), is at the edge; give a larger image")
    return filled[y - half : y + half + 1, x - half : x + half + 1]


def cropped(stamp: Float[np.ndarray, "S S"], side: int) -> Float[np.ndarray, "R R"]:
    """Central odd square of an odd square."""
    cut = (len(stamp) - side) // 2
    return stamp[cut : cut + side, cut : cut + side]


def copied_header(path: Path) -> fits.Header:
    """Cards of the first image of a FITS file, and of its primary header, that hold for the prepared stack, too."""
    found = fits.Header()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fits.open(path) as units:
                every: list[Any] = list(units)
                images = [unit for unit in every if unit.is_image and len(unit.shape) >= 3]
                for unit in [*images[:1], every[0]]:
                    found.extend(unit.header.copy(strip=True), unique=True)
    except (OSError, ValueError, TypeError, fits.VerifyError):  # no FITS file
        return fits.Header()
    for keyword in [keyword for keyword in found if OUTDATED.match(keyword)]:
        found.remove(keyword, ignore_missing=True, remove_all=True)
    return found
