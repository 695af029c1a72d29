"""What differential imaging starts from: rotating image stacks, their angles, PSFs, wavelengths; loaded and checked."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from pulmo_jax.data.arrays import read_array
from pulmo_jax.types import InputError

_CUBE = "the cube of frames (T, H, W)"
_ANGLES = "the angles, one number for each frame in degrees"
_PSF = "the PSF, an image (S, S) of the star without coronagraph"
_WAVELENGTHS = "the wavelengths, one number for each channel"
_SPECTRUM = "a spectrum (L,) or several (M, L), one number for each channel"
_WIDE = 1.05  # ratio of wavelengths from which one PSF for all is worth a remark


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


@dataclass(frozen=True)
class SpectralStack:
    """L rotating stacks of one field at one time, a channel of wavelength each; a `RotatingStack` is one channel.

    wavelengths: ascending. psf: of each channel. spectra: of the sources looked for, in any unit; None: flat.
    """

    cube: Float[np.ndarray, "L T H W"]
    angles_deg: Float[np.ndarray, "T"]
    psf: Float[np.ndarray, "L S S"]
    wavelengths: Float[np.ndarray, "L"]
    spectra: Float[np.ndarray, "M L"] | None = None
    caveats: tuple[str, ...] = ()

    @classmethod
    def of_one(cls, stack: RotatingStack) -> "SpectralStack":
        return cls(stack.cube[None], stack.angles_deg, stack.psf[None], np.ones(1), None, stack.caveats)


def load_channels(
    cube: Path, angles: Path, psf: Path, wavelengths: Path | None = None, spectrum: Path | None = None
) -> SpectralStack:
    """Reads and checks a cube (L, T, H, W) with its angles, PSF (S, S) or (L, S, S), wavelengths and spectra.

    Channels in another order than their wavelengths are sorted, spectra with them. Without wavelengths it is
    `load_stack`. Raises InputError naming the file for what does not fit together or cannot be used.
    """
    if wavelengths is None:
        return SpectralStack.of_one(load_stack(cube, angles, psf))
    values = _wavelengths(wavelengths)
    channels = _channels(cube, wavelengths, len(values))
    angles_deg = _angles_deg(angles, cube, channels.shape[1:])
    stamps, caveats = _stamps(psf, channels.shape[1:], values)
    caveats += _radians(angles, angles_deg)
    spectra = None if spectrum is None else load_spectra(spectrum, len(values))
    order = np.argsort(values)
    if (order != np.arange(len(order))).any():
        caveats.append(f"{wavelengths}: the channels are put into the order of their wavelengths")
        channels, values, stamps = channels[order], values[order], stamps[order]
        spectra = None if spectra is None else spectra[:, order]
    return SpectralStack(channels, angles_deg, stamps, values, spectra, tuple(caveats))


def load_spectra(path: Path, n_channels: int) -> Float[np.ndarray, "M L"]:
    """One spectrum or a set of them; raises InputError naming the file for another length."""
    array = read_array(path, (1, 2), what=_SPECTRUM).astype(np.float64)
    spectra = array.reshape(1, -1) if array.ndim == 1 or array.shape == (n_channels, 1) else array
    if spectra.shape[1] != n_channels:
        raise InputError(
            f"{path}: holds an array of shape {array.shape}, the stack has {n_channels} channels; {_SPECTRUM} is needed"
        )
    return spectra


def load_stack(cube: Path, angles: Path, psf: Path) -> RotatingStack:
    """Reads and checks the three files, in any format of `read_array`; integers become floats that hold them.

    Frames may hold NaN. Raises InputError naming the file for what does not fit together or cannot be used.
    """
    frames = _frames(cube)
    angles_deg = _angles_deg(angles, cube, frames.shape)
    stamp, caveats = _stamp(psf, frames.shape)
    return RotatingStack(frames, angles_deg, stamp, (*caveats, *_radians(angles, angles_deg)))


def _wavelengths(path: Path) -> np.ndarray:
    values = read_array(path, (1,), what=_WAVELENGTHS).astype(np.float64)
    if (bad := np.flatnonzero(~(np.isfinite(values) & (values > 0)))).size:
        raise InputError(
            f"{path}: {bad.size} of {len(values)} wavelengths are not above 0 and finite, the first is "
            f"{values[bad[0]]:g} of channel {bad[0]} (counted from 0); correct it or leave the channel out"
        )
    ascending = np.sort(values)
    if (same := ascending[:-1][np.diff(ascending) == 0]).size:
        raise InputError(
            f"{path}: {int((values == same[0]).sum())} channels have the wavelength {same[0]:g}; each needs its own: "
            "average such channels, or correct the wavelengths"
        )
    return values


def _channels(path: Path, wavelengths: Path, n: int) -> np.ndarray:
    """(L, T, H, W)."""
    array = read_array(path, (3, 4), what=_CUBE)
    if array.ndim == 4 and array.shape[-1] == 1 != array.shape[0]:
        array = array[..., 0]
    channels = array[None] if array.ndim == 3 else array
    if len(channels) != n:
        found = "one channel, (T, H, W)" if array.ndim == 3 else f"{len(channels)} channels, (L, T, H, W)"
        hint = ""
        if array.ndim == 4 and array.shape[1] == n:
            hint = ". Axis 1 of the cube is that long: its axes seem to be in another order; save it as (L, T, H, W)"
        raise InputError(
            f"{wavelengths}: holds {n} wavelengths, {path} of shape {array.shape} has {found}; give one for each{hint}"
        )
    return channels.astype(np.result_type(channels.dtype, np.float32), copy=False)


def _radians(path: Path, angles_deg: np.ndarray) -> list[str]:
    if len(angles_deg) >= 10 and np.abs(angles_deg).max() < 2 * np.pi and 0 < np.ptp(angles_deg) < 2:
        return [
            f"{path}: the angles span {np.ptp(angles_deg):.3g} degrees, from {angles_deg.min():.3g} to "
            f"{angles_deg.max():.3g}; if they are in radians, convert them to degrees"
        ]
    return []


def _frames(path: Path) -> np.ndarray:
    array = read_array(path, (3, 4), what=_CUBE)
    if array.ndim == 4 and 1 not in (array.shape[0], array.shape[-1]):
        raise InputError(
            f"{path}: holds an array of shape {array.shape}; {_CUBE} is needed. A multi-wavelength cube (L, T, H, W) "
            "needs its wavelengths too: data.wavelengths"
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
    array, caveats = _psf_file(path), []
    if array.ndim == 3:
        if len(array) > 1:
            caveats.append(f"{path}: the mean of {len(array)} images of the PSF is used, as they are centred")
        array = array.mean(axis=0)
    stamp, cut = _fitting_stamp(path, array, cube_shape)
    return stamp, caveats + cut


def _stamps(path: Path, cube_shape: tuple[int, ...], wavelengths: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(L, S, S), and what was done to them."""
    n = len(wavelengths)
    if n == 1:
        stamp, caveats = _stamp(path, cube_shape)
        return stamp[None], caveats
    array, caveats = _psf_file(path), []
    images = array[None] if array.ndim == 2 else array
    if len(images) not in (1, n):
        raise InputError(
            f"{path}: holds {len(images)} images of the PSF (shape {array.shape}), the cube has {n} channels; give one "
            "for each channel, (L, S, S), or one for all, (S, S)"
        )
    if len(images) == 1 and wavelengths.max() > _WIDE * wavelengths.min():
        caveats.append(
            f"{path}: one PSF is used for all {n} channels, as it is, though diffraction widens it by "
            f"{wavelengths.max() / wavelengths.min():.2f} from the first to the last; give one for each"
        )
    cut = [_fitting_stamp(path, image, cube_shape) for image in images]
    return np.repeat(np.stack([stamp for stamp, _ in cut]), n // len(images), axis=0), caveats + cut[0][1]


def _psf_file(path: Path) -> np.ndarray:
    array = read_array(path, (2, 3), what=_PSF).astype(np.float64)
    if not np.isfinite(array).all():
        raise InputError(f"{path}: {np.sum(~np.isfinite(array))} of {array.size} pixels of the PSF are not finite")
    return array


def _fitting_stamp(path: Path, array: np.ndarray, cube_shape: tuple[int, ...]) -> tuple[np.ndarray, list[str]]:
    """Square, not larger than the frames, with a caveat if it was cut for that."""
    caveats = []
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
