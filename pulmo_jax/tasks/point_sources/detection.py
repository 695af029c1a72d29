"""Detection of point sources: read a stack, search it, measure detection limits, write maps, tables and report."""

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from pulmo_jax.core.geometry import rotation_deg
from pulmo_jax.data.sources.missing import float_dtype, with_nan
from pulmo_jax.host.console import Console, tracker
from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.inference.contrast import Contrast, contrast_curve
from pulmo_jax.inference.point_sources import NORTH_DEG, Search, find_sources
from pulmo_jax.methods.paco import Settings
from pulmo_jax.methods.paco.spectral import as_spectra
from pulmo_jax.reporting.notebook import figure_html
from pulmo_jax.reporting.provenance import provenance
from pulmo_jax.runs.directory import save_config
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.point_sources.cells import in_px_and_mas
from pulmo_jax.tasks.point_sources.combination import combine_runs
from pulmo_jax.tasks.point_sources.config import DetectConfig, PacoConfig
from pulmo_jax.tasks.point_sources.drawing import Sky
from pulmo_jax.tasks.point_sources.figures import ONE_PASS_CONTRAST, detection_maps
from pulmo_jax.tasks.point_sources.geometry_check import geometry_caveats
from pulmo_jax.tasks.point_sources.inputs import input_digests
from pulmo_jax.tasks.point_sources.posterior import SourcePosterior, posterior_csv, sample_posteriors
from pulmo_jax.tasks.point_sources.reading import load, naming, observe, synthetic_stack
from pulmo_jax.tasks.point_sources.report import Result, counted, write_adi_report
from pulmo_jax.tasks.point_sources.results import (
    contrast_csv,
    detections_csv,
    likelihood_maps,
    spectra_csv,
    summarise,
    write_maps,
)
from pulmo_jax.tasks.point_sources.units import flux_caveats
from pulmo_jax.types import PointSource


def detect(config: DetectConfig, place: Place) -> int:
    """Search in the maps of several runs; write maps, tables and report.

    Args:
        config: Config of `detect` with `epochs.runs`.
        place: Output folder and console.

    Returns:
        Number of detected sources.

    Raises:
        InputError: If a run cannot be used.
    """
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
    """Read or simulate the stack.

    Args:
        config: Config of `detect`.
        place: Console for messages.

    Returns:
        The observation.

    Raises:
        InputError: If the files cannot be used.
    """
    synthetic = synthetic_stack(config) if config.data.cube is None else None
    data, stack = (config.data, synthetic.stack) if synthetic else load(config.data)
    config = config.model_copy(update={"data": data})
    truth = (synthetic.planets, None, synthetic.spectrum) if synthetic else ((), None, None)
    channels = observe(stack, config.data)
    stack = replace(stack, caveats=(*stack.caveats, *geometry_caveats(stack, channels, config.data)))
    result = Result(config, stack, channels, *truth)
    describe(result, place)
    return result


def search_stack(result: Result, place: Place) -> tuple[Result, Search]:
    """Search a stack, measure the limits and sample the posteriors; the caller sets the floating-point precision.

    Args:
        result: The observation.
        place: Console for progress.

    Returns:
        The observation with detection limits and posteriors, and the result of the search.
    """
    config, settings = result.config, settings_of(result.config.method)
    with naming(config.data.spectrum if isinstance(config.data.spectrum, Path) else None):
        spectra = as_spectra(result.stack.spectra, len(result.channels.each))
    search = find_sources(
        result.channels,
        settings,
        config.search.threshold,
        calibrated=config.search.snr == "calibrated",
        max_sources=config.search.max_sources,
        north_deg=config.data.north_deg,
        say=place.note,
        track=long_work(place.console, "mapping"),
        spectra=spectra,
    )
    for caveat in search.caveats[len(result.channels.caveats) :]:
        place.note(f"note: {caveat}")
    result = replace(result, posteriors=sample_posteriors(result, search, settings, place))
    if not config.contrast.rings:
        return result, search
    contrast = contrast_curve(
        search,
        settings,
        config.search.threshold,
        config.search.snr == "calibrated",
        config.contrast.directions,
        config.contrast.rings,
        tracker(place.console, "injecting, round by round"),
    )
    return replace(result, contrast=contrast), search


def write(result: Result, search: Search, place: Place, seconds: float) -> None:
    """Write maps, tables and metrics, then the report."""
    config, folder, star_mean = result.config, place.folder, result.fluxes.star_mean
    for caveat in flux_caveats(search.sources, result.fluxes):
        place.note(f"note: {caveat}")
    place.clear()
    write_maps(result, search, folder)
    write_text(folder / "detections.csv", detections_csv(search.sources, config.data, star_mean))
    if len(result.channels.each) > 1:
        write_text(folder / "spectra.csv", spectra_csv(search.spectra, result))
    if result.contrast is not None:
        write_text(folder / "contrast.csv", contrast_csv(result.contrast, config.data, star_mean))
    if config.search.posterior:
        samples = posterior_csv(result.posteriors, result.channels.centre, config.data.north_deg)
        write_text(folder / "posterior.csv", samples)
    write_json(folder / "metrics.json", summarise(result, search, seconds))
    write_json(folder / "run.json", provenance())
    write_json(folder / "inputs.json", input_digests(config.data))
    save_config(config, folder / "config.yaml")
    write_adi_report(result, search, folder, place.console)


def settings_of(config: PacoConfig) -> Settings:
    names = {field.name for field in fields(Settings)}
    return Settings(**{name: value for name, value in config.model_dump().items() if name in names})


def long_work(console: Console, label: str) -> Any:
    """Progress bar on a terminal, for more than one step."""

    def track(items: Iterable, total: int) -> Iterable:
        return tracker(console, label)(items, total) if total > 1 and console.is_terminal else items

    return track


def describe(result: Result, place: Place) -> None:
    """Print a summary of the stack and its warnings."""
    reference, (height, width), stack = result.channels.reference, result.channels.shape, result.stack
    source = result.config.data.cube or f"a synthetic stack with {len(result.truth)} planets, seed {result.config.seed}"
    channels = f"{len(result.channels.each)} channels of " if len(stack.wavelengths) > 1 else ""
    place.note(
        f"{source}: {channels}{len(reference.deviations)} frames of {height} x {width} px, field rotation "
        f"{rotation_deg(reference.angles_deg):.1f} degrees; PSF FWHM "
        f"{in_px_and_mas(reference.psf.fwhm_px, result.config.data.pixel_scale)}"
    )
    for caveat in (*stack.caveats, *result.channels.caveats):
        place.note(f"note: {caveat}")


@dataclass(frozen=True, eq=False)
class Detections:
    """Result of a search in a rotating stack.

    Attributes:
        sources: Detected sources, brightest first; coordinates (y, x) in px of the derotated map, fluxes in PSF units.
        maps: Images (H, W) by name: snr, snr_calibrated, flux and flux_std (units of the PSF), a, b, and those of the
            empirical null, snr_null, a_null, b_null.
        contrast: Detection limits by separation; None with contrast.rings=0.
        caveats: Warnings.
        centre: Position (y, x) of the star, px.
        pixel_scale: Pixel scale, arcsec per pixel, if known.
        north_deg: Direction of north in the maps, degrees from the x axis toward y.
        star_flux: Flux of the star in units of the PSF, if known: flux / star_flux is the contrast.
        posteriors: Posterior of position and flux of each source with search.posterior=true, otherwise ().
    """

    sources: tuple[PointSource, ...]
    maps: dict[str, Float[np.ndarray, "H W"]]
    contrast: Contrast | None
    caveats: tuple[str, ...]
    centre: tuple[float, float]
    pixel_scale: float | None
    north_deg: float = NORTH_DEG
    star_flux: float | None = None
    posteriors: tuple[SourcePosterior, ...] = ()

    def figure(self) -> Any:
        """Figure of the SNR and flux maps with the sources."""
        sky = Sky(self.centre, self.pixel_scale, self.north_deg)
        maps, calibrated = self.maps, self.maps["snr_calibrated"]
        if self.star_flux is None:
            return detection_maps(maps["snr"], maps["flux"], self.sources, sky, (), calibrated)
        return detection_maps(
            maps["snr"], maps["flux"] / self.star_flux, self.sources, sky, (), calibrated, ONE_PASS_CONTRAST
        )

    def _repr_html_(self) -> str:
        highest = np.nanmax(self.maps["snr"])
        caption = f"{counted(len(self.sources), 'source')} (circles); the highest theoretical SNR is {highest:.3g}."
        return figure_html(self.figure(), caption)


def detect_arrays(
    given: Mapping[str, Any], compose: Callable[[dict[str, str]], DetectConfig], console: Console
) -> Detections:
    """Search a stack given as arrays or files, with the same checks.

    Args:
        given: Arrays, paths or None, by name: cube, angles, psf, wavelengths.
        compose: Function that composes the config from the paths.
        console: For progress.

    Returns:
        Sources, maps and detection limits.

    Raises:
        InputError: If they do not fit together, or cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {f"data.{name}": as_file(value, Path(folder) / f"{name}.npy") for name, value in given.items()}
        config = compose({key: str(path) for key, path in paths.items() if path is not None})
        place = Place(Path(folder), Path(folder), console)
        with jax.enable_x64(config.method.precision == "float64"):
            result, search = search_stack(read(config, place), place)
        maps = likelihood_maps(result, search)
    caveats = (*result.stack.caveats, *search.caveats)
    return Detections(
        tuple(search.sources),
        maps,
        result.contrast,
        caveats,
        result.channels.centre,
        result.config.data.pixel_scale,
        result.config.data.north_deg,
        result.fluxes.star_mean,
        result.posteriors,
    )


def as_file(value: Any, path: Path) -> Path | None:
    """Path of an input; an array is written to a file, with NaN for the masked values of a masked array."""
    if value is None or isinstance(value, Path | str):
        return None if value is None else Path(value)
    array = np.asarray(value)
    if np.ma.isMaskedArray(value):
        array = with_nan(array, np.ma.getmaskarray(value), float_dtype(array.dtype))
    np.save(path, array, allow_pickle=False)
    return path
