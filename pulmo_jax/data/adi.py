"""Angular differential imaging (ADI) data: image cubes with parallactic angles, PSFs and wavelengths."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from pulmo_jax.data.arrays import MAX_BYTES, read_array
from pulmo_jax.data.columns import ANGLES, WAVELENGTHS
from pulmo_jax.data.header_angles import FrameAngles, frame_angles
from pulmo_jax.data.instruments import NOT_OBSERVED, Observed, instrument_of, observed
from pulmo_jax.data.observation_header import Header, read_header
from pulmo_jax.data.psf_files import check_psf_is_another, read_stamp, read_stamps
from pulmo_jax.types import InputError

_CUBE = "an image cube (T, H, W)"
_ANGLES = "parallactic angles in degrees, one per frame"
_WAVELENGTHS = "wavelengths, one per channel"
_SPECTRUM = "one spectrum (L,) or several (M, L), one value per channel"
_MAX_LIST_BYTES = 16 * 2**20  # angles and wavelengths: two million values


@dataclass(frozen=True)
class RotatingStack:
    """A pupil-stabilised image sequence: the field rotates while the speckles stay fixed.

    Attributes:
        cube: Frames (T, H, W), float32 or float64, in detector units.
        angles_deg: Rotation of each frame in degrees. A source at theta = atan2(y - cy, x - cx) in the derotated map
            is at theta - angle in the frame.
        psf: Off-axis PSF (S, S) as stored, neither centred nor normalised.
        caveats: One sentence for each value that was changed or looks unusual.
    """

    cube: Float[np.ndarray, "T H W"]
    angles_deg: Float[np.ndarray, "T"]
    psf: Float[np.ndarray, "S S"]
    caveats: tuple[str, ...] = ()


@dataclass(frozen=True)
class SpectralStack:
    """A multi-wavelength ADI sequence: L simultaneous stacks of one field, one per spectral channel.

    Attributes:
        cube: Frames (L, T, H, W), float32 or float64, in detector units.
        angles_deg: Rotation of each frame in degrees, common to all channels.
        psf: Off-axis PSF of each channel (L, S, S), neither centred nor normalised.
        wavelengths: Ascending, in any unit (L,).
        spectra: Template spectra of the sources to detect (M, L), in any unit; None means flat.
        spectrum_names: Name of each of them; empty if they have none.
        caveats: One sentence for each value that was changed or looks unusual.
        observed: What the header of the cube says about the observation.
        header_angles: Angles that the file of the cube gives, with their offsets; None if it gives none.
    """

    cube: Float[np.ndarray, "L T H W"]
    angles_deg: Float[np.ndarray, "T"]
    psf: Float[np.ndarray, "L S S"]
    wavelengths: Float[np.ndarray, "L"]
    spectra: Float[np.ndarray, "M L"] | None = None
    caveats: tuple[str, ...] = ()
    observed: Observed = NOT_OBSERVED
    header_angles: FrameAngles | None = None
    spectrum_names: tuple[str, ...] = ()

    @classmethod
    def of_one(cls, stack: RotatingStack) -> "SpectralStack":
        """Wrap a single-channel stack."""
        return cls(stack.cube[None], stack.angles_deg, stack.psf[None], np.ones(1), None, stack.caveats)


def load_channels(
    cube: Path,
    angles: Path | None,
    psf: Path,
    wavelengths: Path | None = None,
    spectrum: Path | None = None,
    max_bytes: int = MAX_BYTES,
) -> SpectralStack:
    """Read a multi-wavelength stack and check that its files are consistent.

    Channels are sorted by wavelength, and the spectra with them.

    Args:
        cube: File with the cube (L, T, H, W), in any format of `read_array`.
        angles: File with the T rotation angles in degrees; None: from the file of the cube (`frame_angles`), without
            the offsets that the stack's `header_angles` gives.
        psf: File with one PSF (S, S) or one per channel (L, S, S).
        wavelengths: File with the L wavelengths; None: from the header of the cube, or without any there the cube is a
            single channel, as for `load_stack`.
        spectrum: File with template spectra (L,) or (M, L).
        max_bytes: Limit on the size of each array in memory.

    Returns:
        The stack, with a caveat for each value that was changed or looks unusual.

    Raises:
        InputError: A file cannot be used or does not match the others; the message names it.
    """
    header, named = read_header(cube, max_bytes), wavelengths or cube
    values = None if wavelengths is None else _wavelengths(wavelengths, max_bytes)
    array = _cube(cube, max_bytes)
    values, caveats = _with_header(named, cube, values, _declared_wavelengths(header, array, values))
    if values is None and spectrum is not None:
        raise InputError(
            f"{spectrum}: data.spectrum needs data.wavelengths, or wavelengths in the header of {cube}: one channel "
            "has no spectrum"
        )
    check_psf_is_another(psf, cube, array.shape, max_bytes)
    channels = _frames(cube, array)[None] if values is None else _channels(cube, named, len(values), array)
    angles_deg, given = _angles(angles, cube, header, channels.shape[1:], max_bytes)
    values = np.ones(1) if values is None else values
    stamps, more = read_stamps(psf, channels.shape[1:], values, max_bytes)
    caveats = [*more, *caveats, *_radians(angles or cube, angles_deg)]
    spectra = None if spectrum is None else load_spectra(spectrum, len(values), max_bytes)
    order = np.argsort(values)
    if (order != np.arange(len(order))).any():
        caveats.append(f"{named}: the channels were sorted by wavelength")
        channels, values, stamps = channels[order], values[order], stamps[order]
        spectra = None if spectra is None else spectra[:, order]
    return SpectralStack(channels, angles_deg, stamps, values, spectra, tuple(caveats), observed(header), given)


def load_spectra(path: Path, n_channels: int, max_bytes: int = MAX_BYTES) -> Float[np.ndarray, "M L"]:
    """Read one or several template spectra.

    Args:
        path: File with an array (L,) or (M, L), in any format of `read_array`.
        n_channels: Number of spectral channels L.
        max_bytes: Limit on the size of the array in memory.

    Returns:
        The spectra (M, L) in float64.

    Raises:
        InputError: The file cannot be read or its spectra have another number of channels.
    """
    array = read_array(path, (1, 2), description=_SPECTRUM, max_bytes=max_bytes).astype(np.float64)
    spectra = array.reshape(1, -1) if array.ndim == 1 or array.shape == (n_channels, 1) else array
    if spectra.shape[1] != n_channels:
        raise InputError(f"{path}: has shape {array.shape}, but the stack has {n_channels} channels; give {_SPECTRUM}")
    return spectra


def load_stack(cube: Path, angles: Path, psf: Path, max_bytes: int = MAX_BYTES) -> RotatingStack:
    """Read a single-channel stack and check that its files are consistent.

    Args:
        cube: File with the frames (T, H, W), in any format of `read_array`. Frames may contain NaN; integers become
            floating point of sufficient precision.
        angles: File with the T rotation angles in degrees.
        psf: File with the off-axis PSF (S, S), or with several exposures of it, which are averaged.
        max_bytes: Limit on the size of each array in memory.

    Returns:
        The stack, with a caveat for each value that was changed or looks unusual.

    Raises:
        InputError: A file cannot be used or does not match the others; the message names it.
    """
    frames = _frames(cube, _cube(cube, max_bytes))
    angles_deg = _angles_deg(angles, cube, frames.shape, max_bytes)
    stamp, caveats = read_stamp(psf, frames.shape, max_bytes)
    return RotatingStack(frames, angles_deg, stamp, (*caveats, *_radians(angles, angles_deg)))


def _wavelengths(path: Path, max_bytes: int) -> np.ndarray:
    limit = min(max_bytes, _MAX_LIST_BYTES)
    values = read_array(path, (1,), description=_WAVELENGTHS, max_bytes=limit, columns=WAVELENGTHS).astype(np.float64)
    if (bad := np.flatnonzero(~(np.isfinite(values) & (values > 0)))).size:
        raise InputError(
            f"{path}: {bad.size} of {len(values)} wavelengths are not positive and finite; the first is "
            f"{values[bad[0]]:g}, of channel {bad[0]} (counted from 0). Correct it or remove the channel."
        )
    ascending = np.sort(values)
    if (same := ascending[:-1][np.diff(ascending) == 0]).size:
        raise InputError(
            f"{path}: {int((values == same[0]).sum())} channels have the same wavelength, {same[0]:g}; wavelengths "
            "must be distinct: average these channels or correct the wavelengths"
        )
    return values


def _declared_wavelengths(header: Header, array: np.ndarray, given: np.ndarray | None) -> np.ndarray | None:
    """Wavelengths of the header, one per channel of a cube (L, T, H, W), or None."""
    if array.ndim != 4 or 1 in (array.shape[0], array.shape[-1]) or (given is not None and len(given) != len(array)):
        return None
    values = instrument_of(header).wavelengths(header, len(array))
    usable = values is not None and np.isfinite(values).all() and (values > 0).all() and len(set(values)) == len(values)
    return values if usable else None


def _with_header(
    named: Path, cube: Path, given: np.ndarray | None, declared: np.ndarray | None
) -> tuple[np.ndarray | None, list[str]]:
    """Wavelengths as given, or else of the header, and a caveat if they are the header's or contradict it."""
    if declared is None:
        return given, []
    if given is None:
        return declared, [f"{cube}: the wavelengths are those of its header, {_span(declared)}"]
    if np.allclose(_shape(given), _shape(declared), rtol=2e-3):
        return given, []
    return given, [
        f"{named}: the wavelengths, {_span(given)}, are not those of the header of {cube}, {_span(declared)}; "
        "data.wavelengths is used"
    ]


def _shape(wavelengths: np.ndarray) -> np.ndarray:
    """Wavelengths relative to their mean, which do not depend on the unit."""
    return wavelengths / wavelengths.mean()


def _span(wavelengths: np.ndarray) -> str:
    return f"{wavelengths.min():g} to {wavelengths.max():g}"


def _channels(path: Path, wavelengths: Path, n: int, array: np.ndarray) -> np.ndarray:
    """The cube (L, T, H, W) in floating point."""
    if array.ndim == 4 and array.shape[-1] == 1 != array.shape[0]:
        array = array[..., 0]
    channels = array[None] if array.ndim == 3 else array
    if len(channels) != n:
        layout = "one channel, (T, H, W)" if array.ndim == 3 else f"{len(channels)} channels, (L, T, H, W)"
        hint = ""
        if array.ndim == 4 and array.shape[1] == n:
            hint = ". Axis 1 of the cube has that length: its axes may be in another order; save it as (L, T, H, W)"
        raise InputError(
            f"{wavelengths}: has {n} wavelengths, but {path} of shape {array.shape} has {layout}; "
            f"give one wavelength per channel{hint}"
        )
    return channels.astype(np.result_type(channels.dtype, np.float32), copy=False)


def _radians(path: Path, angles_deg: np.ndarray) -> list[str]:
    if len(angles_deg) >= 10 and np.abs(angles_deg).max() < 2 * np.pi and 0 < np.ptp(angles_deg) < 2:
        return [
            f"{path}: the angles span only {np.ptp(angles_deg):.3g} degrees, from {angles_deg.min():.3g} to "
            f"{angles_deg.max():.3g}; if they are in radians, convert them to degrees"
        ]
    return []


def _cube(path: Path, max_bytes: int) -> np.ndarray:
    return read_array(path, (3, 4), description=_CUBE, max_bytes=max_bytes)


def _frames(path: Path, array: np.ndarray) -> np.ndarray:
    """The frames (T, H, W) of a single channel in floating point."""
    if array.ndim == 4 and 1 not in (array.shape[0], array.shape[-1]):
        raise InputError(
            f"{path}: has shape {array.shape}; give {_CUBE}. A multi-wavelength cube (L, T, H, W) also requires "
            "data.wavelengths=FILE, because its header has no wavelengths."
        )
    if array.ndim == 4:
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)


def _angles(
    path: Path | None, cube: Path, header: Header, shape: tuple[int, ...], max_bytes: int
) -> tuple[np.ndarray, FrameAngles | None]:
    """The angles of the file, or else of the header, and those of the header if it has any."""
    if path is None:
        given = frame_angles(cube, header, shape[0])
        return _finite(cube, given.angles_deg), given
    angles = _angles_deg(path, cube, shape, max_bytes)
    try:
        return angles, frame_angles(cube, header, shape[0])
    except InputError:
        return angles, None


def _angles_deg(path: Path, cube: Path, shape: tuple[int, ...], max_bytes: int) -> np.ndarray:
    limit = min(max_bytes, _MAX_LIST_BYTES)
    angles = read_array(path, (1,), description=_ANGLES, max_bytes=limit, columns=ANGLES).astype(np.float64)
    if len(angles) != shape[0]:
        hint = f"Give {_ANGLES}."
        if len(angles) in shape:
            axis = shape.index(len(angles))
            hint = f"Axis {axis} of the cube has that length: its axes may be in another order; save it as (T, H, W)."
        raise InputError(f"{path}: has {len(angles)} angles, but {cube} has {shape[0]} frames (shape {shape}). {hint}")
    return _finite(path, angles)


def _finite(path: Path, angles: np.ndarray) -> np.ndarray:
    if (bad := np.flatnonzero(~np.isfinite(angles))).size:
        raise InputError(
            f"{path}: {bad.size} of {len(angles)} angles are not finite; the first is {angles[bad[0]]}, of frame "
            f"{bad[0]} (counted from 0). Remove these frames from the cube and from the angles."
        )
    return angles
