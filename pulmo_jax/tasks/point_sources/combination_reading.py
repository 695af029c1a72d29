"""Reading of finished runs of `detect` as epochs in common units."""

from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from jaxtyping import Float

from pulmo_jax.data.arrays import read_array
from pulmo_jax.data.instruments import Observed
from pulmo_jax.data.observation_header import Header, Position
from pulmo_jax.evaluation.null_field import null_profile, separation_map
from pulmo_jax.host.reading import open_regular, read_yaml
from pulmo_jax.methods.paco.epochs import EpochMap
from pulmo_jax.tasks.point_sources.combination_report import Epoch
from pulmo_jax.tasks.point_sources.config import DetectConfig, EpochsConfig, StackConfig
from pulmo_jax.tasks.point_sources.units import CONTRAST, unit_code
from pulmo_jax.types import InputError

LAST = "report.html"  # written last by detect, so it marks a finished run
MAPS = ("a", "b", "a_null", "b_null")
SCALE_TOLERANCE = 1e-6
SKY_KEYS = ("pixel_scale", "north_deg", "psf_flux", "psf_aperture_px", "star_flux")


@dataclass(frozen=True)
class OpenedRun:
    """Contents of a finished run.

    Attributes:
        path: Run directory.
        data: Keys of the stack that define units and orientation.
        maps: Maps by name.
        centre: Position (y, x) of the star, px.
        fwhm_px: FWHM of the PSF.
        scale: Pixel scale, arcsec per pixel, if known.
        mjd: Modified Julian date, if known.
        star_flux: Flux of the star in units of the normalised PSF, if known.
        observed: What the header says about the observation.
        synthetic: Whether its stack is synthetic.
    """

    path: Path
    data: StackConfig
    maps: dict[str, Float[np.ndarray, "H W"]]
    centre: tuple[float, float]
    fwhm_px: float
    scale: float | None
    mjd: float | None
    star_flux: float | None
    observed: Observed
    synthetic: bool


def open_epochs(config: DetectConfig) -> list[Epoch]:
    """Open the runs, ordered by date if the dates are known.

    Args:
        config: Config of `detect` with `epochs.runs`.

    Returns:
        Epochs with maps in common units.

    Raises:
        InputError: If a run cannot be used.
    """
    options = config.epochs
    runs = [open_run(i, path, config.data.max_image_mb * 2**20) for i, path in enumerate(options.runs or ())]
    dates = dates_of(runs, options)
    scales = scales_of(runs, options)
    check_alike(runs)
    flux_units = [run.star_flux for run in runs]
    known = all(unit is not None for unit in flux_units)
    if config.contrast.unit in ("contrast", "magnitudes") and not known:
        raise InputError(
            f"contrast.unit={config.contrast.unit}: {runs[0].path} was made without data.star_flux, the flux of the "
            "star; run detect again with it for every epoch"
        )
    order = range(len(runs)) if dates is None else np.argsort(dates)
    epochs = []
    for i in order:
        run = runs[i]
        unit = float(flux_units[i] or 1.0) if known else 1.0
        calibrated = config.search.snr == "calibrated"
        days = 0.0 if dates is None else dates[i] - min(dates)
        epochs.append(
            Epoch(
                label=f"epoch {i + 1}" if dates is None else f"MJD {dates[i]:.10g}",
                path=run.path,
                mjd=None if dates is None else dates[i],
                fwhm_px=run.fwhm_px,
                map=as_epoch(run, scales[i], days, unit, calibrated, ""),
                null=as_epoch(run, scales[i], days, unit, calibrated, "_null"),
                synthetic=run.synthetic,
                flux_code=CONTRAST if known else unit_code(run.data),
                observed=run.observed,
                flux_unit=unit,
            )
        )
    return epochs


def open_run(i: int, path: Path, max_bytes: int) -> OpenedRun:
    where = f"epochs.runs.{i}={path}"
    missing = [name for name in (*(f"{m}.fits" for m in MAPS), "metrics.json", LAST) if not (path / name).is_file()]
    if "a.fits" in missing or "b.fits" in missing or LAST in missing or "metrics.json" in missing:
        raise InputError(
            f"{where}: no {missing[0]} there, so it is not a finished run of detect on a stack; give the run directory "
            "that detect printed, or wait until it has finished"
        )
    if missing:
        raise InputError(
            f"{where}: no {missing[0]} there; the run was made with an earlier version of pulmo_jax, run detect again"
        )
    data, synthetic = stack_config(path)
    maps = {name: read_map(path, name, max_bytes) for name in MAPS}
    for name, image in maps.items():
        if image.shape != maps["a"].shape:
            raise InputError(f"{path / name}.fits: {image.shape} px, a.fits {maps['a'].shape}; run detect again")
        if not np.isfinite(image).any():
            raise InputError(f"{path / name}.fits: all pixels are NaN; remove this run from the list")
    header = fits.getheader(path / "a.fits")
    try:
        centre, fwhm = (float(header["CENTERY"]), float(header["CENTERX"])), float(header["PSFFWHM"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path / 'a.fits'}: its header is incomplete ({error}); run detect again") from None
    sides = maps["a"].shape
    if not (0 < fwhm <= max(sides) and all(-side <= c <= 2 * side for c, side in zip(centre, sides, strict=True))):
        raise InputError(f"{path / 'a.fits'}: the star is at {centre} px, its FWHM {fwhm} px; run detect again")
    scale, mjd = data.pixel_scale, header.get("MJD-OBS")
    mjd = mjd if isinstance(mjd, float) and isfinite(mjd) else None
    star = header.get("STARFLUX") if data.star_flux == "psf" else data.star_flux
    if data.star_flux == "psf" and not (isinstance(star, float) and 0 < star < inf):
        raise InputError(f"{path / 'a.fits'}: its header has no flux of the star (STARFLUX); run detect again")
    star = None if star is None else float(star)
    seen = of_map(header)
    return OpenedRun(
        path, data, maps, centre, fwhm, None if scale is None else float(scale), mjd, star, seen, synthetic
    )


def of_map(cards: fits.Header) -> Observed:
    """What the header of a map says about the observation; the position is the reference point of its axes."""
    header = Header({card.keyword: card.value for card in cards.cards})
    ra, dec, equinox = (header.number(keyword) for keyword in ("CRVAL1", "CRVAL2", "EQUINOX"))
    position = None
    if header.text("CTYPE1") == "RA---TAN" and ra is not None and dec is not None:
        position = Position(ra, dec, header.text("RADESYS") or "ICRS", equinox or 2000.0)
    return Observed(
        target=header.text("OBJECT"),
        telescope=header.text("TELESCOP"),
        instrument=header.text("INSTRUME"),
        filter=header.text("FILTER"),
        date=header.text("DATE-OBS"),
        exposure_s=header.number("EXPTIME"),
        position=position,
    )


def read_map(path: Path, name: str, max_bytes: int) -> Float[np.ndarray, "H W"]:
    """Read a map of a run. Raises InputError if it is no image of at most `max_bytes`, or lies outside of the run."""
    file = path / f"{name}.fits"
    open_regular(file, path).close()
    return read_array(file, (2,), max_bytes=max_bytes, description=f"the map {name}").astype(float)


def stack_config(path: Path) -> tuple[StackConfig, bool]:
    """Keys of a run that define units and orientation of its maps, and whether its stack is synthetic.

    The input files need not exist any more.
    """
    try:
        values: Any = read_yaml(path / "config.yaml", inside=path)
        data = StackConfig.model_validate({key: values["data"][key] for key in SKY_KEYS})
        numbers = [getattr(data, key) for key in SKY_KEYS if isinstance(getattr(data, key), float)]
        if not all(map(isfinite, numbers)):
            raise ValueError("a number is not finite")
        synthetic = values["data"].get("cube") is None
    except Exception as error:
        first = str(error).partition("\n")[0][:300]
        raise InputError(
            f"{path / 'config.yaml'}: is not a valid config of detect ({first}); run detect again"
        ) from None
    return data, synthetic


def dates_of(runs: list[OpenedRun], options: EpochsConfig) -> list[float] | None:
    """Dates of the runs; None if not all are known, which is allowed for fixed positions."""
    known = options.dates if options.dates is not None else [run.mjd for run in runs]
    dates = [float(date) for date in known if date is not None]
    unknown = [run.path for run, date in zip(runs, known, strict=True) if date is None]
    if unknown and options.orbits == "keplerian":
        raise InputError(
            f"{unknown[0]}: the FITS header of its stack has no date (MJD-OBS, DATE-OBS); give "
            "epochs.dates=[MJD,...], one per run"
        )
    if options.orbits == "keplerian" and len(set(dates)) < len(dates):
        raise InputError("epochs.runs: two runs have the same date; combine the frames of one date into one stack")
    return None if unknown else dates


def scales_of(runs: list[OpenedRun], options: EpochsConfig) -> list[float]:
    """Pixel scales, arcsec per pixel; 1 if unknown for all runs, which is allowed for fixed positions."""
    unknown = [run for run in runs if run.scale is None]
    if not unknown:
        return [float(run.scale or 0) for run in runs]
    if len(unknown) < len(runs) or options.orbits == "keplerian":
        why = "orbits are in au" if len(unknown) == len(runs) else "other runs have one"
        raise InputError(
            f"{unknown[0].path}: was made without data.pixel_scale, but {why}; run detect again with data.pixel_scale"
        )
    return [1.0] * len(runs)


def check_alike(runs: list[OpenedRun]) -> None:
    """Check that the fluxes of all runs have the same units."""
    kinds = {run.data.psf_flux: run.path for run in runs}
    if len(kinds) > 1:
        found = ", ".join(f"{path}: {kind}" for kind, path in kinds.items())
        raise InputError(f"data.psf_flux differs between the runs ({found}); run detect again with one of them")
    given = [run.data.star_flux is not None for run in runs]
    if any(given) and not all(given):
        lacking = runs[given.index(False)].path
        raise InputError(
            f"{lacking}: was made without data.star_flux, unlike other runs; set it for all runs or for none"
        )


def as_epoch(run: OpenedRun, scale: float, days: float, unit: float, calibrated: bool, kind: str) -> EpochMap:
    """Convert the maps of a run to common units.

    Args:
        run: The run.
        scale: Pixel scale, arcsec per pixel.
        days: Time since the first epoch.
        unit: Flux of the star in units of the PSF, or 1.
        calibrated: Divide by the empirical standard deviation of the SNR.
        kind: "" for the maps, "_null" for the null maps.

    Returns:
        Maps of the epoch.
    """
    a, b = run.maps[f"a{kind}"] * unit**2, run.maps[f"b{kind}"] * unit
    if calibrated:
        null = run.maps["b_null"] / np.sqrt(run.maps["a_null"])
        spread = null_profile(null, run.centre, run.fwhm_px).std_at(separation_map(a.shape, run.centre))
        a, b = a / spread**2, b / spread**2
    return EpochMap(a, b, run.centre, float(np.deg2rad(run.data.north_deg)), scale, days)


def caveats_of(epochs: list[Epoch], config: DetectConfig) -> tuple[str, ...]:
    notes = []
    if len(epochs) == 1:
        notes.append(
            "one epoch: its maps cannot be rotated relative to others, so the threshold is that of a single map, "
            f"search.threshold squared ({config.search.threshold**2:g})"
        )
        if config.epochs.orbits == "keplerian":
            notes.append("a single epoch does not constrain the orbit")
    scales = [e.map.scale for e in epochs]
    if np.ptp(scales) > SCALE_TOLERANCE * max(scales):
        notes.append(
            f"pixel scales differ, {min(scales):g} to {max(scales):g} arcsec: positions are compared in arcsec"
        )
    if len(epochs) > 1 and config.search.snr == "theoretical":
        spreads = [np.nanstd(e.null.b / np.sqrt(e.null.a)) for e in epochs]
        if max(spreads) > 1.25 * min(spreads):
            notes.append(
                f"the standard deviations of the null maps differ, {min(spreads):.2f} to {max(spreads):.2f}: "
                "search.snr=calibrated would weight the epochs by them"
            )
    return tuple(notes)
