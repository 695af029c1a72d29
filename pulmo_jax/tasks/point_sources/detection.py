"""Detection of point sources: read the stack, search it, measure the limits, write maps, tables and the report."""

import time
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import jax
from rich.console import Console

from pulmo_jax.core.geometry import rotation_deg
from pulmo_jax.evaluation.contrast import contrast_curve
from pulmo_jax.host.console import tracker
from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.inference.point_sources import Search, find_sources
from pulmo_jax.methods.paco import Settings
from pulmo_jax.methods.paco.spectral import as_spectra
from pulmo_jax.runs.directory import provenance, save_config
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.point_sources.combination import combine_runs
from pulmo_jax.tasks.point_sources.config import DetectConfig, PacoConfig
from pulmo_jax.tasks.point_sources.reading import load, naming, observe, synthetic_stack
from pulmo_jax.tasks.point_sources.report import Result, counted, write_adi_report
from pulmo_jax.tasks.point_sources.results import (
    clear,
    contrast_csv,
    detections_csv,
    spectra_csv,
    summarise,
    write_maps,
)


def detect(config: DetectConfig, place: Place) -> int:
    """The whole job; returns the number of sources found."""
    if config.epochs.runs:
        return combine_runs(config, place)
    began = time.monotonic()
    with jax.enable_x64(config.method.precision == "float64"):
        result, search = search_stack(read(config, place), place)
    write(result, search, place, time.monotonic() - began)
    sources, seconds = counted(len(search.sources), "source"), time.monotonic() - began
    place.note(f"{sources}, {seconds:.0f} s; see {place.folder / 'report.html'}")
    return len(search.sources)


def read(config: DetectConfig, place: Place) -> Result:
    """The observation, before the search."""
    synthetic = synthetic_stack(config) if config.data.cube is None else None
    stack = synthetic.stack if synthetic else load(config.data)
    truth = (synthetic.planets, None, synthetic.spectrum) if synthetic else ((), None, None)
    result = Result(config, stack, observe(stack, config.data), *truth)
    describe(result, place)
    return result


def search_stack(result: Result, place: Place) -> tuple[Result, Search]:
    """Maps, sources and null; and the limits, by injection. Call it under the precision that the config asks for."""
    config, settings = result.config, settings_of(result.config.method)
    with naming(config.data.spectrum):
        spectra = as_spectra(result.stack.spectra, len(result.of.each))
    search = find_sources(
        result.of,
        settings,
        config.search.threshold,
        calibrated=config.search.snr == "calibrated",
        max_sources=config.search.max_sources,
        north_deg=config.data.north_deg,
        say=place.note,
        track=long_work(place.console, "mapping"),
        spectra=spectra,
    )
    for caveat in search.caveats[len(result.of.caveats) :]:
        place.note(f"note: {caveat}")
    if not config.contrast.rings:
        return result, search
    contrast = contrast_curve(
        search.residual,
        settings,
        config.search.threshold,
        config.contrast.directions,
        config.contrast.rings,
        search.profile if config.search.snr == "calibrated" else None,
        track=tracker(place.console, "injecting, ring by ring"),
        using=search.combination,
    )
    return replace(result, contrast=contrast), search


def write(result: Result, search: Search, place: Place, seconds: float) -> None:
    """Maps, tables, metrics and, last, the report."""
    config, folder = result.config, place.folder
    clear(folder)
    write_maps(result, search, folder)
    write_text(folder / "detections.csv", detections_csv(search.sources, config.data))
    if len(result.of.each) > 1:
        write_text(folder / "spectra.csv", spectra_csv(search.spectra))
    if result.contrast is not None:
        write_text(folder / "contrast.csv", contrast_csv(result.contrast, config.data))
    write_json(folder / "metrics.json", summarise(result, search, seconds))
    write_json(folder / "run.json", provenance())
    save_config(config, folder / "config.yaml")
    write_adi_report(result, search, folder, place.console)


def settings_of(config: PacoConfig) -> Settings:
    names = {field.name for field in fields(Settings)}
    return Settings(**{name: value for name, value in config.model_dump().items() if name in names})


def long_work(console: Console, label: str) -> Any:
    """A progress bar where people look and where there is more than one step."""

    def track(items: Iterable, total: int) -> Iterable:
        return tracker(console, label)(items, total) if total > 1 and console.is_terminal else items

    return track


def describe(result: Result, place: Place) -> None:
    """Prints what is searched, and its caveats."""
    of, (height, width), stack = result.of.reference, result.of.shape, result.stack
    source = result.config.data.cube or f"a synthetic stack with {len(result.truth)} planets, seed {result.config.seed}"
    channels = f"{len(result.of.each)} channels of " if len(stack.wavelengths) > 1 else ""
    place.note(
        f"{source}: {channels}{len(of.deviations)} frames of {height} x {width} px, rotating by "
        f"{rotation_deg(of.angles_deg):.1f} degrees; PSF {of.psf.fwhm_px:.2f} px wide"
    )
    for caveat in (*stack.caveats, *result.of.caveats):
        place.note(f"note: {caveat}")
