"""Reading or simulation of the stack of a config, and preparation of angles and PSF."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from pulmo_jax.data.adi import SpectralStack, load_channels, load_spectra
from pulmo_jax.data.header_angles import FrameAngles
from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.data.spectral_library import fits_unit, spectral_library
from pulmo_jax.data.synthetic import SyntheticSpectralStack, spectral_stack
from pulmo_jax.methods.paco.channels import Channels, observe_channels
from pulmo_jax.tasks.point_sources.config import DetectConfig, StackConfig
from pulmo_jax.types import InputError

HEADER_TOLERANCE = 1e-3  # relative difference from the header that is worth a note
ANGLE_TOLERANCE_DEG = 0.5


def observe(stack: SpectralStack, data: StackConfig) -> Channels:
    """Prepare a stack: subtract the mean frame, locate the centre, normalise the PSF.

    Args:
        stack: The stack.
        data: Keys of the stack.

    Returns:
        The channels of the observation.

    Raises:
        InputError: If the arrays do not fit together; the message names the files.
    """
    with naming(data.psf):
        psfs = [prepare_psf(psf, data.psf_flux, data.psf_aperture_px) for psf in stack.psf]
    with naming(data.cube, data.angles):
        angles_deg = data.angle_sign * stack.angles_deg + (data.pupil_offset_deg or 0) + (data.true_north_deg or 0)
        return observe_channels(stack.cube, angles_deg, psfs, stack.wavelengths, data.centre, data.spectral_scaling)


@contextmanager
def naming(*files: Path | None) -> Iterator[None]:
    """Prefix error messages on arrays with the names of their files."""
    try:
        yield
    except InputError as error:
        named = ", ".join(str(file) for file in files if file is not None)
        raise InputError(f"{named}: {error}" if named else str(error)) from error


def load(data: StackConfig) -> tuple[StackConfig, SpectralStack]:
    """Read the stack, and complete the keys from the header of the cube.

    Args:
        data: Keys of the stack, with data.cube.

    Returns:
        The keys, with the values of the header for those that were null, and the stack.

    Raises:
        InputError: If a file cannot be used or does not match the others; the message names it.
    """
    if data.cube is None or data.psf is None:
        raise AssertionError("the config guarantees both or none")
    spectrum = data.spectrum if isinstance(data.spectrum, Path) else None
    stack = load_channels(data.cube, data.angles, data.psf, data.wavelengths, spectrum, data.max_image_mb * 2**20)
    completed, notes = with_header(data, stack)
    return completed, with_library(replace(stack, caveats=(*stack.caveats, *notes)), data)


def with_header(data: StackConfig, stack: SpectralStack) -> tuple[StackConfig, list[str]]:
    """Fill the keys that are null from the header of the cube.

    A key that is given wins over the header; a note says so where they differ.

    Args:
        data: Keys of the stack.
        stack: The stack, with what its header says.

    Returns:
        The keys, and notes on what was taken from the header and what contradicts it.
    """
    seen, given, notes = stack.observed, stack.header_angles, []
    named = f"{data.cube}: the header{f' ({seen.known})' if seen.known else ''}"
    found: dict[str, float | None] = {"pixel_scale": seen.pixel_scale}
    if given is not None and data.angles is None:
        found |= {"pupil_offset_deg": given.pupil_offset_deg, "true_north_deg": given.true_north_deg}
        notes.append(
            f"{data.cube}: the angles are {given.source}, plus data.pupil_offset_deg and data.true_north_deg; give "
            "data.angles=FILE if you have better ones"
        )
    update: dict[str, float] = {}
    for key, value in found.items():
        asked = getattr(data, key)
        if value is None:
            continue
        if asked is None:
            update[key] = value
            notes.append(f"{named} gives data.{key}={value:g}")
        elif abs(asked - value) > HEADER_TOLERANCE * abs(value):
            notes.append(f"{named} gives data.{key}={value:g}; {asked:g} is used, as data.{key} says")
    if seen.position is not None and data.star_ra_deg is None:
        update |= {"star_ra_deg": seen.position.ra_deg, "star_dec_deg": seen.position.dec_deg}
    if given is not None and data.angles is not None:
        notes += compared_angles(data, stack.angles_deg, given)
    return data.model_copy(update=update), notes


def compared_angles(data: StackConfig, angles_deg: Float[np.ndarray, "T"], given: FrameAngles) -> list[str]:
    """Notes on angles of a file that are not those of the header of the cube, or lack the instrument's offsets."""
    turn = np.exp(1j * np.deg2rad(angles_deg - given.angles_deg))
    mean = float(np.rad2deg(np.angle(turn.mean())))
    spread = float(np.rad2deg(np.abs(np.angle(turn / turn.mean())).max()))
    if spread > ANGLE_TOLERANCE_DEG:
        return [
            f"{data.angles}: the angles and those of the header of {data.cube} ({given.source}) differ by up to "
            f"{spread:.1f} degrees, a constant apart; data.angles is used"
        ]
    offset = given.pupil_offset_deg + given.true_north_deg
    bare = abs(mean) < ANGLE_TOLERANCE_DEG < abs(offset)
    if bare and data.pupil_offset_deg is None:
        return [
            f"{data.angles}: the angles are the parallactic angles of the header of {data.cube}; for position angles "
            f"also give data.pupil_offset_deg={given.pupil_offset_deg:g} data.true_north_deg={given.true_north_deg:g}"
        ]
    return []


def synthetic_stack(config: DetectConfig) -> SyntheticSpectralStack:
    """Simulate the stack; its candidate spectra are those of the config."""
    options, spectrum = config.data.synthetic, config.data.spectrum
    made = spectral_stack(
        config.seed, options.channels, options.frames, options.size, options.rotation_deg, options.planets
    )
    stack = made.stack
    if isinstance(spectrum, Path):
        stack = replace(stack, spectra=load_spectra(spectrum, options.channels, config.data.max_image_mb * 2**20))
    return replace(made, stack=with_library(stack, config.data))


def with_library(stack: SpectralStack, data: StackConfig) -> SpectralStack:
    """Add the library of spectra, unless the config gives a file or a flat spectrum.

    Args:
        stack: The stack.
        data: Keys of the stack.

    Returns:
        The stack with spectra and their names.

    Raises:
        InputError: If the wavelengths have no unit of length.
    """
    if isinstance(data.spectrum, Path):
        return stack
    if data.spectrum == "flat" or len(stack.wavelengths) == 1:
        return replace(stack, spectrum_names=("flat",))
    unit = data.wavelength_unit or (None if data.wavelengths is None else fits_unit(data.wavelengths))
    library = spectral_library(stack.wavelengths, unit, data.star_temperature_k)
    caveats = (*stack.caveats, *library.caveats)
    return replace(stack, spectra=library.spectra, spectrum_names=library.names, caveats=caveats)
