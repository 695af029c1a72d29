"""Debiased fluxes of the sources of a combination, from the frames of its runs, which are read again."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import jax
import numpy as np
from astropy.io import fits
from jaxtyping import Float

from pulmo_jax.config.section import validate
from pulmo_jax.host.reading import open_regular, read_json, read_yaml
from pulmo_jax.inference.epoch_flux import Flux, fluxes_at, joint_flux
from pulmo_jax.inference.epochs import Track
from pulmo_jax.methods.paco import Settings
from pulmo_jax.methods.paco.channels import Channels
from pulmo_jax.methods.paco.spectral import Combination, as_spectra, independent
from pulmo_jax.tasks.point_sources.combination_report import Epoch
from pulmo_jax.tasks.point_sources.config import DetectConfig
from pulmo_jax.tasks.point_sources.inputs import require_unchanged
from pulmo_jax.tasks.point_sources.reading import load, observe, synthetic_stack
from pulmo_jax.tasks.point_sources.source_flux import SourceFlux
from pulmo_jax.types import InputError, Say


def debiased_fluxes(
    epochs: Sequence[Epoch], tracks: Sequence[Track], say: Say = lambda text: None
) -> tuple[list[SourceFlux], tuple[str, ...]]:
    """Measure the debiased flux of every source in every epoch, at the position of its track.

    One stack is in memory at a time.

    Args:
        epochs: Epochs of the combination.
        tracks: Sources.
        say: Called with a line of text before each epoch.

    Returns:
        Fluxes of each source, in the units of the combination, and a caveat for each epoch that has none.
    """
    if not tracks:
        return [], ()
    by_epoch, caveats = [], []
    for number, epoch in enumerate(epochs):
        say(f"debiased fluxes, {epoch.label}")
        try:
            by_epoch.append(epoch_fluxes(epoch, np.array([track.places[number] for track in tracks])))
        except InputError as error:
            caveats.append(f"{epoch.label} ({epoch.path}) has no debiased flux: {error}")
            by_epoch.append([Flux()] * len(tracks))
    each = zip(*by_epoch, strict=True)
    return [SourceFlux(tuple(fluxes), joint_flux(fluxes)) for fluxes in each], tuple(caveats)


def epoch_fluxes(epoch: Epoch, places: Float[np.ndarray, "N 2"]) -> list[Flux]:
    """Debiased fluxes in one epoch, in the units of the combination.

    Args:
        epoch: The epoch.
        places: Position (y, x) of each source in its map, px.

    Returns:
        Flux of each source.

    Raises:
        InputError: If the stack of the run cannot be read, or is not the one that the run was made from.
    """
    config = run_config(epoch)
    require_unchanged(epoch.path, config.data)
    with jax.enable_x64(config.method.precision == "float64"):
        data = config.data
        if data.cube is None:
            stack = synthetic_stack(config).stack
        else:
            data, stack = load(data)
        channels = observe(stack, data)
        if channels.shape != epoch.map.a.shape:
            raise InputError(f"its stack is {channels.shape} px, its maps {epoch.map.a.shape}; run detect again")
        names = {field.name for field in fields(Settings)}
        settings = Settings(**{k: v for k, v in config.method.model_dump().items() if k in names})
        spectra = as_spectra(stack.spectra, len(channels.kept))[:, channels.kept]
        found = fluxes_at(channels, settings, places, [combination_at(epoch, channels, spectra, at) for at in places])
    unit = epoch.flux_unit
    return [Flux(one.value / unit, one.std / unit, one.std_empirical / unit) for one in found]


def run_config(epoch: Epoch) -> DetectConfig:
    """Config of the stack of a run, without the keys that do not determine its maps."""
    values: Any = read_yaml(epoch.path / "config.yaml", inside=epoch.path)
    return validate(DetectConfig, {key: values[key] for key in ("data", "method", "seed")})


def combination_at(
    epoch: Epoch, channels: Channels, spectra: Float[np.ndarray, "M L"], place: Float[np.ndarray, "2"]
) -> Combination:
    """Combination of the channels with the spectrum that the run selected at a position.

    Args:
        epoch: The epoch.
        channels: Its observation.
        spectra: Candidate spectra of the run.
        place: Position (y, x), px.

    Returns:
        The combination, with one spectrum.

    Raises:
        InputError: If the run lacks the correlation of the channels or the map of spectra.
    """
    if len(channels.each) == 1:
        return independent(np.ones((1, 1)))
    try:
        measured = read_json(epoch.path / "metrics.json", inside=epoch.path)["spectral_correlation"]
        separation, r = (np.array(measured[key], float) for key in ("separation_px", "correlation"))
    except (OSError, KeyError, TypeError, ValueError):
        raise InputError("metrics.json has no correlation of the channels; run detect again") from None
    if r.shape != (len(separation), len(channels.each), len(channels.each)) or not np.isfinite(r).all():
        raise InputError(f"metrics.json has a correlation of shape {r.shape}; run detect again")
    return Combination(separation, r, spectra).only(template_at(epoch, len(spectra), place))


def template_at(epoch: Epoch, n_spectra: int, place: Float[np.ndarray, "2"]) -> int:
    """Index of the spectrum that the run selected at a position (y, x; px)."""
    if n_spectra == 1:
        return 0
    try:
        with open_regular(epoch.path / "template.fits", epoch.path) as file:
            image = np.asarray(fits.getdata(file), float)
        number = image[tuple(np.clip(np.round(place).astype(int), 0, np.array(image.shape) - 1))]
    except (OSError, ValueError, IndexError):
        raise InputError("template.fits, the map of the spectra, cannot be read; run detect again") from None
    if not 0 <= number < n_spectra:
        raise InputError(f"template.fits names no spectrum at {place.round(1)}; run detect again")
    return int(number)
