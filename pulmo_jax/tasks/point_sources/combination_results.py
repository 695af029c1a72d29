"""Output files of a combination of epochs: FITS maps, tables of sources and orbits, and metrics."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pulmo_jax import __version__
from pulmo_jax.core.kepler import Orbit, period_days
from pulmo_jax.data.observation_header import Header, date_of
from pulmo_jax.evaluation.photometry import relative_photometry
from pulmo_jax.inference.epochs import Track
from pulmo_jax.inference.fits import flatten, write_fits
from pulmo_jax.inference.outputs import as_csv
from pulmo_jax.inference.sky_axes import sky_axes
from pulmo_jax.tasks.point_sources.combination_report import CombinedResult, Epoch
from pulmo_jax.tasks.point_sources.map_headers import observation_cards
from pulmo_jax.tasks.point_sources.source_flux import SourceFlux, unknown_flux
from pulmo_jax.tasks.point_sources.units import FLUX_UNIT

FULL_TURN = 360.0
PERCENTILES = (16, 50, 84)
NULLS = ("reversed_angles", "own_maps")


def write_maps(result: CombinedResult, out_dir: Path) -> None:
    combined, first = result.combined, result.epochs[0]
    meanings = {
        "criterion": "sum of max(b,0)^2 / a" if result.plan.flux == "free" else "max(sum b,0)^2 / sum a",
        "snr_combined": "sum b / sqrt(sum a)",
    }
    parameters = flatten(result.config.model_dump(mode="json"))
    for name, meaning in meanings.items():
        header: dict[str, Any] = {
            "EXTNAME": (name, meaning),
            "BUNIT": ("", "dimensionless"),
            "CREATOR": (f"pulmo_jax {__version__}", "Dallant et al. 2023, A&A 679, A38"),
            "CENTERY": (first.map.centre[0], "[px] star, from 0"),
            "CENTERX": (first.map.centre[1], "[px] star, from 0"),
            "NEPOCHS": (len(result.epochs), "combined"),
            "ORBITS": (result.config.epochs.orbits, "best orbit through each pixel at the first date"),
            "THRESHLD": (combined.threshold, "threshold of the criterion"),
        }
        header |= observation_cards(replace(first.observed, mjd=first.mjd, date=date_used(first)))
        if first.mjd is not None:
            header["MJD-OBS"] = (first.mjd, "date of the positions in this map")
        scale = first.map.scale if result.in_arcsec else None
        header |= sky_axes(first.map.centre, scale, float(np.rad2deg(first.map.north)), first.observed.position)
        write_fits(out_dir / f"{name}.fits", getattr(combined, name), header, parameters)


def date_used(epoch: Epoch) -> str | None:
    """Date of an epoch: that of its header, unless the user gave another."""
    given = {"MJD-OBS": epoch.mjd, "DATE-OBS": epoch.observed.date}
    return date_of(Header({keyword: value for keyword, value in given.items() if value is not None}))


def detections_csv(result: CombinedResult) -> str:
    """detections.csv: position at the first date, and SNR and flux in each epoch, of every source."""
    sources = zip(result.combined.found, result.fluxes, strict=True)
    rows = [detection_row(number + 1, found, flux, result) for number, (found, flux) in enumerate(sources)]
    columns = list(detection_row(1, result.combined.best, unknown_flux(len(result.epochs)), result))
    return as_csv(columns, rows)


def detection_row(label: int, track: Track, flux: SourceFlux, result: CombinedResult) -> dict[str, Any]:
    """Row of detections.csv."""
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
        "flux_debiased": flux.joint.flux.value,
        "flux_debiased_std": flux.joint.flux.std,
        "flux_debiased_std_empirical": flux.joint.flux.std_empirical,
        "flux_epochs": flux.joint.epochs,
        "constancy_chi2": flux.joint.chi2,
        "constancy_probability": flux.joint.probability,
        "flux_self_subtracted": track.flux,
        "flux_self_subtracted_std": track.flux_std,
        FLUX_UNIT: result.flux_code,
        "epochs": int((track.a > 0).sum()),
        "false_alarm_probability": result.combined.false_alarm(track.criterion),
        "false_alarm_gumbel": result.combined.extrapolated(track.criterion),
    }
    if result.relative:
        total = flux.joint.flux
        relative = relative_photometry(total.value, total.std_empirical, 1.0)
        row |= {name: float(value) for name, value in relative.items()}
    for i, one in enumerate(flux.each):
        biased = float(track.b[i] / track.a[i]) if track.a[i] > 0 else float("nan")
        row |= {f"y_{i + 1}": float(track.places[i, 0]), f"x_{i + 1}": float(track.places[i, 1])}
        row |= {f"snr_{i + 1}": float(track.snr[i]), f"flux_debiased_{i + 1}": one.value}
        row |= {f"flux_debiased_std_{i + 1}": one.std, f"flux_debiased_std_empirical_{i + 1}": one.std_empirical}
        row |= {f"flux_self_subtracted_{i + 1}": biased}
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
        "false_alarm_gumbel_floor": finite(combined.floor),
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
