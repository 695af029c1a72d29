"""The stack that a config names, read or simulated, and observed: centred, angles signed, PSF normalised."""

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
    """The stack with its geometry and PSFs. Raises InputError naming the files that its arrays come from."""
    with naming(data.psf):
        psfs = [prepare_psf(psf, data.psf_flux, data.psf_aperture_px) for psf in stack.psf]
    with naming(data.cube, data.angles):
        angles_deg = data.angle_sign * stack.angles_deg
        return observe_channels(stack.cube, angles_deg, psfs, stack.wavelengths, data.centre, data.spectral_scaling)


@contextmanager
def naming(*files: Path | None) -> Iterator[None]:
    """What is wrong with arrays is said with the files that they came from."""
    try:
        yield
    except InputError as error:
        named = ", ".join(str(file) for file in files if file is not None)
        raise InputError(f"{named}: {error}" if named else str(error)) from error


def load(data: StackConfig) -> SpectralStack:
    cube, angles, psf = data.cube, data.angles, data.psf
    if cube is None or angles is None or psf is None:
        raise AssertionError("the config gives all three or none")
    return load_channels(cube, angles, psf, data.wavelengths, data.spectrum)


def synthetic_stack(config: DetectConfig) -> SyntheticSpectralStack:
    how, spectrum = config.data.synthetic, config.data.spectrum
    made = spectral_stack(config.seed, how.channels, how.frames, how.size, how.rotation_deg, how.planets)
    return (
        made
        if spectrum is None
        else replace(made, stack=replace(made.stack, spectra=load_spectra(spectrum, how.channels)))
    )
