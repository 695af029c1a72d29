"""Combination of finished runs of `detect`: one search in the maps of all epochs, at fixed positions or along orbits.

Only a.fits and b.fits are used, and a_null.fits and b_null.fits for the noise; the detections of the runs are ignored.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from astropy.io import fits
from jaxtyping import Float
from omegaconf import OmegaConf

from pulmo_jax import __version__
from pulmo_jax.core.kepler import Orbit, period_days
from pulmo_jax.data.arrays import read_array
from pulmo_jax.evaluation.null_field import null_profile, separation_map
from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.inference.epochs import Plan, Track, combine
from pulmo_jax.inference.fits import flatten, write_fits
from pulmo_jax.inference.outputs import as_csv
from pulmo_jax.methods.paco.epochs import EpochMap, Star
from pulmo_jax.runs.directory import provenance, save_config
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.point_sources.combination_report import CombinedResult, Epoch, write_combined_report
from pulmo_jax.tasks.point_sources.config import DetectConfig, EpochsConfig, StackConfig
from pulmo_jax.types import InputError

LAST = "report.html"  # written last by detect, so it marks a finished run
MAPS = ("a", "b", "a_null", "b_null")
OUTPUTS = ("criterion.fits", "snr_combined.fits", "detections.csv", "orbits.csv", "metrics.json", LAST)
SCALE_TOLERANCE = 1e-6
FULL_TURN = 360.0
PERCENTILES = (16, 50, 84)
SKY_KEYS = ("pixel_scale", "north_deg", "psf_flux", "psf_aperture_px", "star_flux")
NULLS = ("reversed_angles", "own_maps")


def combine_runs(config: DetectConfig, place: Place) -> int:
    """Search in the maps of several runs; write maps, tables and report.

    Args:
        config: Config of `detect` with `epochs.runs`.
        place: Output folder and console.

    Returns:
        Number of detected sources.

    Raises:
        InputError: If a run cannot be used.
    """
    began, console, out_dir = time.monotonic(), place.console, place.folder
    epochs = open_epochs(config)
    plan = plan_of(config)
    console.print(f"{len(epochs)} epochs: " + ", ".join(e.label for e in epochs), highlight=False)
    caveats = caveats_of(epochs, config)
    for caveat in caveats:
        console.print(f"note: {caveat}", highlight=False)
    with jax.enable_x64(True):
        combined = combine(
            [e.map for e in epochs],
            [e.null for e in epochs],
            epochs[0].fwhm_px,
            plan,
            say=lambda text: console.print(text, highlight=False),
        )
        result = CombinedResult(config, epochs, combined, plan, (*caveats, *combined.caveats))
        clear(out_dir)
        write_maps(result, out_dir)
        write_text(out_dir / "detections.csv", detections_csv(result))
        if plan.star is not None:
            write_text(out_dir / "orbits.csv", orbits_csv(result))
        write_json(out_dir / "metrics.json", summarise(result, time.monotonic() - began))
        write_json(out_dir / "run.json", provenance())
        save_config(config, out_dir / "config.yaml")
        write_combined_report(result, out_dir, console)
    n = len(combined.found)
    console.print(
        f"{n} source{'s' * (n != 1)}, {time.monotonic() - began:.0f} s; see {out_dir / LAST}", highlight=False
    )
    return n


def plan_of(config: DetectConfig) -> Plan:
    options = config.epochs
    star = None
    if options.orbits == "keplerian":
        assert options.star_mass is not None
        assert options.parallax_mas is not None
        low, high = options.semi_major_axis_au or (0.0, np.inf)
        star = Star(
            float(options.star_mass),
            float(options.parallax_mas),
            (float(low), float(high)),
            (float(options.eccentricity[0]), float(options.eccentricity[1])),
        )
    return Plan(
        star=star,
        flux=options.flux,
        shapes=options.shapes,
        fields=options.null_fields,
        level=float(options.false_alarm),
        single_threshold=float(config.search.threshold),
        max_sources=config.search.max_sources,
        seed=config.seed,
    )


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
    """

    path: Path
    data: StackConfig
    maps: dict[str, Float[np.ndarray, "H W"]]
    centre: tuple[float, float]
    fwhm_px: float
    scale: float | None
    mjd: float | None


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
    runs = [open_run(i, path) for i, path in enumerate(options.runs or ())]
    dates = dates_of(runs, options)
    scales = scales_of(runs, options)
    check_alike(runs)
    flux_units = [run.data.star_flux for run in runs]
    known = all(unit is not None for unit in flux_units)
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
            )
        )
    return epochs


def open_run(i: int, path: Path) -> OpenedRun:
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
    data = stack_config(path)
    maps = {name: read_array(path / f"{name}.fits", (2,), description=f"the map {name}").astype(float) for name in MAPS}
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
    scale, mjd = data.pixel_scale, header.get("MJD-OBS")
    return OpenedRun(
        path, data, maps, centre, fwhm, None if scale is None else float(scale), mjd if isinstance(mjd, float) else None
    )


def stack_config(path: Path) -> StackConfig:
    """Keys of a run that define units and orientation of its maps; its input files need not exist any more."""
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"), resolve=False)
        return StackConfig.model_validate({key: values["data"][key] for key in SKY_KEYS})
    except Exception as error:
        first = str(error).splitlines()[0]
        raise InputError(
            f"{path / 'config.yaml'}: is not a valid config of detect ({first}); run detect again"
        ) from None


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


def clear(out_dir: Path) -> None:
    for name in OUTPUTS:
        (out_dir / name).unlink(missing_ok=True)
    for figure in (out_dir / "figures").glob("*"):
        figure.unlink()


def write_maps(result: CombinedResult, out_dir: Path) -> None:
    combined, first = result.combined, result.epochs[0]
    meanings = {
        "criterion": "sum of max(b,0)^2 / a" if result.plan.flux == "free" else "max(sum b,0)^2 / sum a",
        "snr_combined": "sum b / sqrt(sum a)",
    }
    parameters = flatten(result.config.model_dump(mode="json"))
    for name, meaning in meanings.items():
        header: dict[str, Any] = {
            "OBJECT": (name, meaning),
            "CREATOR": (f"pulmo_jax {__version__}", "Dallant et al. 2023, A&A 679, A38"),
            "CENTERY": (first.map.centre[0], "[px] star, from 0"),
            "CENTERX": (first.map.centre[1], "[px] star, from 0"),
            "NEPOCHS": (len(result.epochs), "combined"),
            "ORBITS": (result.config.epochs.orbits, "best orbit through each pixel at the first date"),
            "THRESHLD": (combined.threshold, "threshold of the criterion"),
        }
        if first.mjd is not None:
            header["MJD-OBS"] = (first.mjd, "date of the positions in this map")
        write_fits(out_dir / f"{name}.fits", getattr(combined, name), header, parameters)


def detections_csv(result: CombinedResult) -> str:
    """detections.csv: position at the first date, and SNR and flux in each epoch, of every source."""
    rows = [detection_row(label + 1, found, result) for label, found in enumerate(result.combined.found)]
    columns = list(detection_row(1, result.combined.best, result))
    return as_csv(columns, rows)


def detection_row(label: int, track: Track, result: CombinedResult) -> dict[str, Any]:
    north, east = track.sky[0]
    separation = float(np.hypot(north, east))
    unit = "arcsec" if result.in_arcsec else "px"
    row: dict[str, Any] = {
        "label": label,
        "y": float(track.places[0, 0]),
        "x": float(track.places[0, 1]),
        f"north_{unit}": float(north),
        f"north_{unit}_std": float(track.start_std[0]),
        f"east_{unit}": float(east),
        f"east_{unit}_std": float(track.start_std[1]),
        f"separation_{unit}": separation,
        "position_angle_deg": float(np.mod(np.rad2deg(np.arctan2(east, north)), FULL_TURN)),
        "criterion": track.criterion,
        "snr_combined": track.snr_combined,
        "flux_combined": track.flux,
        "flux_combined_std": track.flux_std,
        "epochs": int((track.a > 0).sum()),
        "false_alarm_probability": result.combined.false_alarm(track.criterion),
        "false_alarm_gumbel": result.combined.extrapolated(track.criterion),
    }
    for i in range(len(result.epochs)):
        flux = float(track.b[i] / track.a[i]) if track.a[i] > 0 else float("nan")
        row |= {f"y_{i + 1}": float(track.places[i, 0]), f"x_{i + 1}": float(track.places[i, 1])}
        row |= {f"snr_{i + 1}": float(track.snr[i]), f"flux_{i + 1}": flux}
    return row


def orbits_csv(result: CombinedResult) -> str:
    """orbits.csv: best orbit and posterior samples of each source; without a source, of the highest track (label 0)."""
    rows = []
    for label, found in enumerate(result.combined.found or [result.combined.best]):
        assert found.orbit is not None
        detected = label + 1 if result.combined.found else 0
        best = {"label": detected, "kind": "best"} | elements(found.orbit, result)
        rows.append(best | {"criterion": found.criterion})
        if found.samples is not None:
            columns = elements(found.samples.orbits, result) | {"criterion": found.samples.criterion}
            for values in zip(*columns.values(), strict=True):
                numbers = {name: float(value) for name, value in zip(columns, values, strict=True)}
                rows.append({"label": detected, "kind": "sample"} | numbers)
    return as_csv(list(rows[0]), rows)


def elements(orbit: Orbit, result: CombinedResult) -> dict[str, Any]:
    """In the units of tables; the node in [0, 180), because omega and node together may turn by half a turn."""
    star, first = result.plan.star, result.epochs[0].mjd
    assert star is not None
    period = np.asarray(period_days(jnp.asarray(orbit.semi_major_axis), star.mass))
    node = np.rad2deg(np.asarray(orbit.node)) % FULL_TURN
    turned = node >= FULL_TURN / 2
    omega = np.rad2deg(np.asarray(orbit.shape.omega)) + np.where(turned, FULL_TURN / 2, 0)
    mean = np.mod(np.asarray(orbit.shape.mean_anomaly), 2 * np.pi)
    found = {
        "semi_major_axis_au": orbit.semi_major_axis,
        "eccentricity": orbit.shape.eccentricity,
        "inclination_deg": np.rad2deg(np.arccos(np.clip(orbit.shape.cos_inclination, -1, 1))),
        "omega_deg": omega % FULL_TURN,
        "node_deg": node - np.where(turned, FULL_TURN / 2, 0),
        "periastron_mjd": (first or 0.0) - mean / (2 * np.pi) * period,
        "period_yr": period / 365.25,
    }
    return {name: np.asarray(value, float) if np.ndim(value) else float(value) for name, value in found.items()}


def summarise(result: CombinedResult, seconds: float) -> dict[str, Any]:
    """Content of metrics.json."""
    combined = result.combined
    metrics: dict[str, Any] = {
        "sources": len(combined.found),
        "highest_criterion": combined.best.criterion,
        "highest_snr_combined": finite(combined.best.snr_combined),
        "snr_by_epoch": [finite(v) for v in combined.best.snr],
        "epochs": [{"run": str(e.path), "mjd": e.mjd} for e in result.epochs],
        "false_alarm_probability": finite(combined.false_alarm(combined.best.criterion)),
        "false_alarm_gumbel": finite(combined.extrapolated(combined.best.criterion)),
        "threshold": combined.threshold,
        "tracks_tried": combined.n_tracks,
    }
    for name, null in zip(NULLS, combined.nulls, strict=False):
        metrics[f"null_{name}"] = {
            "fields": len(null.maxima),
            "level": null.level,
            "threshold": null.value,
            "threshold_low": finite(null.low),
            "threshold_high": finite(null.high),
            "certified_level": null.certified,
            "mean": float(null.maxima.mean()),
            "highest": float(null.maxima[-1]),
        }
    if len(combined.coverage):
        low, middle = np.percentile(combined.coverage, [10, 50])
        metrics["coverage"] = {"median": float(middle), "percentile_10": float(low), "orbits": len(combined.coverage)}
    metrics["orbits"] = [orbit_summary(found, result) for found in combined.found if found.samples is not None]
    return metrics | {"caveats": list(result.caveats), "seconds": seconds}


def orbit_summary(track: Track, result: CombinedResult) -> dict[str, Any]:
    """Percentiles (16, 50, 84) of the posterior samples of an orbit."""
    assert track.samples is not None
    columns = elements(track.samples.orbits, result)
    spread = {name: [float(v) for v in np.percentile(values, PERCENTILES)] for name, values in columns.items()}
    independent = track.samples.independent
    return {"percentiles_16_50_84": spread, "independent_samples": independent, "accepted": track.samples.accepted}


def finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
