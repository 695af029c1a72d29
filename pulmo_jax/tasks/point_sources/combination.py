"""Combination of finished runs of `detect`: one search in the maps of all epochs, at fixed positions or along orbits.

The search uses a.fits and b.fits, and a_null.fits and b_null.fits for the noise, but not the detections of the runs.
The debiased fluxes of its sources come from the stacks of the runs, which are read again.
"""

import time

import jax
import numpy as np

from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.inference.epochs import Plan, combine
from pulmo_jax.methods.paco.epochs import Star
from pulmo_jax.reporting.provenance import provenance
from pulmo_jax.runs.directory import save_config
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.point_sources.combination_reading import LAST, caveats_of, open_epochs
from pulmo_jax.tasks.point_sources.combination_report import CombinedResult, write_combined_report
from pulmo_jax.tasks.point_sources.combination_results import detections_csv, orbits_csv, summarise, write_maps
from pulmo_jax.tasks.point_sources.config import DetectConfig
from pulmo_jax.tasks.point_sources.epoch_refit import debiased_fluxes


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
    console.print(f"{len(epochs)} epochs: " + ", ".join(e.label for e in epochs))
    caveats = caveats_of(epochs, config)
    for caveat in caveats:
        console.print(f"note: {caveat}")
    with jax.enable_x64(True):
        combined = combine(
            [e.map for e in epochs],
            [e.null for e in epochs],
            epochs[0].fwhm_px,
            plan,
            say=console.print,
        )
    fluxes, without_flux = debiased_fluxes(epochs, combined.found, console.print)
    for caveat in without_flux:
        console.print(f"note: {caveat}")
    caveats = (*caveats, *combined.caveats, *without_flux)
    with jax.enable_x64(True):
        result = CombinedResult(config, epochs, combined, plan, caveats, tuple(fluxes))
        place.clear()
        write_maps(result, out_dir)
        write_text(out_dir / "detections.csv", detections_csv(result))
        if plan.star is not None:
            write_text(out_dir / "orbits.csv", orbits_csv(result))
        write_json(out_dir / "metrics.json", summarise(result, time.monotonic() - began))
        write_json(out_dir / "run.json", provenance())
        save_config(config, out_dir / "config.yaml")
        write_combined_report(result, out_dir, console)
    n = len(combined.found)
    console.print(f"{n} source{'s' * (n != 1)}, {time.monotonic() - began:.0f} s; see {out_dir / LAST}")
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
