"""Reading or simulation of the stack of a config, and preparation of angles and PSF."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pulmo_jax.data.adi import SpectralStack, load_channels, load_spectra
from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.data.synthetic import SyntheticSpectralStack, spectral_stack
from pulmo_jax.methods.paco.channels import Channels, observe_channels
from pulmo_jax.tasks.point_sources.config import DetectConfig, StackConfig
from pulmo_jax.types import InputError


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
        angles_deg = data.angle_sign * stack.angles_deg
        return observe_channels(stack.cube, angles_deg, psfs, stack.wavelengths, data.centre, data.spectral_scaling)


@contextmanager
def naming(*files: Path | None) -> Iterator[None]:
    """Prefix error messages on arrays with the names of their files."""
    try:
        yield
    except InputError as error:
        named = ", ".join(str(file) for file in files if file is not None)
        raise InputError(f"{named}: {error}" if named else str(error)) from error


def load(data: StackConfig) -> SpectralStack:
    cube, angles, psf = data.cube, data.angles, data.psf
    if cube is None or angles is None or psf is None:
        raise AssertionError("the config guarantees all three or none")
    return load_channels(cube, angles, psf, data.wavelengths, data.spectrum, data.max_image_mb * 2**20)


def synthetic_stack(config: DetectConfig) -> SyntheticSpectralStack:
    options, spectrum = config.data.synthetic, config.data.spectrum
    made = spectral_stack(
        config.seed, options.channels, options.frames, options.size, options.rotation_deg, options.planets
    )
    return (
        made
        if spectrum is None
        else replace(
            made,
            stack=replace(
                made.stack, spectra=load_spectra(spectrum, options.channels, config.data.max_image_mb * 2**20)
            ),
        )
    )
