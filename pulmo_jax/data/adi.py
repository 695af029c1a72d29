"""What angular differential imaging starts from: a rotating image stack, its angles and the PSF, loaded and checked."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from pulmo_jax.data.arrays import read_array
from pulmo_jax.types import InputError

_CUBE = "the cube of frames (T, H, W)"
_ANGLES = "the angles, one number for each frame in degrees"
_PSF = "the PSF, an image (S, S) of the star without coronagraph"


@dataclass(frozen=True)
class RotatingStack:
    """Frames in which the field rotates and the speckles stand.

    cube: float32 or float64. angles_deg: of each frame; a source at theta = atan2(y - cy, x - cx) in the derotated map
    stands at theta - angle in the frame. psf: as in its file, neither centred nor normalised. caveats: what was changed
    or looks unusual, a sentence each.
    """

    cube: Float[np.ndarray, "T H W"]
    angles_deg: Float[np.ndarray, "T"]
    psf: Float[np.ndarray, "S S"]
    caveats: tuple[str, ...] = ()


def load_stack(cube: Path, angles: Path, psf: Path) -> RotatingStack:
    """Reads and checks the three files, in any format of `read_array`; integers become floats that hold them.

    Frames may hold NaN. Raises InputError naming the file for what does not fit together or cannot be used.
    """
    frames = _frames(cube)
    angles_deg = _angles_deg(angles, cube, frames.shape)
    stamp, caveats = _stamp(psf, frames.shape)
    if len(angles_deg) >= 10 and np.abs(angles_deg).max() < 2 * np.pi and 0 < np.ptp(angles_deg) < 2:
        caveats.append(
            f"{angles}: the angles span {np.ptp(angles_deg):.3g} degrees, from {angles_deg.min():.3g} to "
            f"{angles_deg.max():.3g}; if they are in radians, convert them to degrees"
        )
    return RotatingStack(frames, angles_deg, stamp, tuple(caveats))


def _frames(path: Path) -> np.ndarray:
    array = read_array(path, (3, 4), what=_CUBE)
    if array.ndim == 4 and 1 not in (array.shape[0], array.shape[-1]):
        raise InputError(
            f"{path}: holds an array of shape {array.shape}; {_CUBE} is needed. Multi-wavelength cubes (L, T, H, W) "
            "are not supported yet: save one wavelength"
        )
    if array.ndim == 4:
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)


def _angles_deg(path: Path, cube: Path, shape: tuple[int, ...]) -> np.ndarray:
    angles = read_array(path, (1,), what=_ANGLES).astype(np.float64)
    if len(angles) != shape[0]:
        hint = f"Save {_ANGLES}."
        if len(angles) in shape:
            axis = shape.index(len(angles))
            hint = f"Axis {axis} of the cube is that long: its axes seem to be in another order; save it as (T, H, W)."
        raise InputError(f"{path}: holds {len(angles)} angles, {cube} has {shape[0]} frames (shape {shape}). {hint}")
    if (bad := np.flatnonzero(~np.isfinite(angles))).size:
        raise InputError(
            f"{path}: {bad.size} of {len(angles)} angles are not finite, the first is {angles[bad[0]]} of frame "
            f"{bad[0]} (counted from 0); leave such frames out of the cube and of the angles"
        )
    return angles


def _stamp(path: Path, cube_shape: tuple[int, ...]) -> tuple[np.ndarray, list[str]]:
    """(S, S), and what was done to it."""
    array = read_array(path, (2, 3), what=_PSF).astype(np.float64)
    if not np.isfinite(array).all():
        raise InputError(f"{path}: {np.sum(~np.isfinite(array))} of {array.size} pixels of the PSF are not finite")
    caveats = []
    if array.ndim == 3:
        if len(array) > 1:
            caveats.append(f"{path}: the mean of {len(array)} images of the PSF is used, as they are centred")
        array = array.mean(axis=0)
    if array.max() <= 0 or array.sum() <= 0:
        raise InputError(f"{path}: the PSF has no positive flux (sum {array.sum():.3g}, maximum {array.max():.3g})")
    smaller = min(cube_shape[1:])
    if max(array.shape) > smaller or array.shape[0] != array.shape[1]:
        found, frame = "{} x {} px".format(*array.shape), "{} x {} px".format(*cube_shape[1:])
        side = min(*array.shape, smaller)
        array = _cut_square(array, side if side % 2 else max(side - 1, 1))
        caveats.append(f"{path}: the PSF of {found} is cut to {len(array)} x {len(array)} px (frames are {frame})")
    return array, caveats


def _cut_square(image: np.ndarray, side: int) -> np.ndarray:
    """The square of this side about the maximum, as far as the image reaches."""
    peak = np.unravel_index(image.argmax(), image.shape)
    start = [int(np.clip(p - side // 2, 0, size - side)) for p, size in zip(peak, image.shape, strict=True)]
    return image[start[0] : start[0] + side, start[1] : start[1] + side].copy()
