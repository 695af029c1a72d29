"""Report of a search for point sources: tables and figures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rich.box
import rich.table

from pulmo_jax.core.geometry import rotation_deg
from pulmo_jax.data.adi import SpectralStack
from pulmo_jax.data.instruments import Observed
from pulmo_jax.data.sample_facts import STACK, sample_line
from pulmo_jax.evaluation.null_field import FALSE_ALARM_FLOOR, null_values, separation_map
from pulmo_jax.evaluation.photometry import relative_photometry
from pulmo_jax.host.console import Console
from pulmo_jax.inference.contrast import MULTIPLES, Contrast
from pulmo_jax.inference.point_sources import Search, SourceSpectrum
from pulmo_jax.inference.spectral_trials import trials_threshold
from pulmo_jax.methods.paco.channels import Channels
from pulmo_jax.reporting import figures
from pulmo_jax.reporting.report import Section, captioned, write_report
from pulmo_jax.reporting.tables import Table
from pulmo_jax.runs.report import figure_sections
from pulmo_jax.tasks.point_sources import contrast_figure, null_figures, spectral_figures
from pulmo_jax.tasks.point_sources import figures as adi_figures
from pulmo_jax.tasks.point_sources.captions import CAPTIONS
from pulmo_jax.tasks.point_sources.cells import MAS_PER_ARCSEC, in_px_and_mas, measured, separation
from pulmo_jax.tasks.point_sources.config import DetectConfig
from pulmo_jax.tasks.point_sources.drawing import Sky
from pulmo_jax.tasks.point_sources.posterior import SourcePosterior, posterior_sections
from pulmo_jax.tasks.point_sources.units import FluxScale, flux_caveats, flux_scale
from pulmo_jax.types import PointSource

CITATION = """Flasseur, O., Denis, L., Thiébaut, É., Langlois, M. 2018. Exoplanet detection in angular differential
imaging by statistical learning of the nonstationary patch covariances. The PACO algorithm. A&A 618, A138."""
ROBUST_CITATION = """Flasseur, O., Denis, L., Thiébaut, É., Langlois, M. 2020. Robustness to bad frames in angular
differential imaging: a local weighting approach. A&A 634, A2."""
SPECTRAL_CITATION = """Flasseur, O., Denis, L., Thiébaut, É., Langlois, M. 2020. PACO ASDI: an algorithm for exoplanet
detection and characterization in direct imaging with integral field spectrographs. A&A 637, A9."""

POSTERIOR_CITATION = """Hoffman, M. D., Gelman, A. 2014. The No-U-Turn Sampler: adaptively setting path lengths in
Hamiltonian Monte Carlo. JMLR 15, 1593."""

UNLIKE = 1e-2  # probability below which a source is reported to have another spectrum than assumed
PHOTOMETRY = ("flux (PSF units)", "likelihood error", "one pass", "contrast", "Δmag")
ON_SKY = ("separation (px)", "separation (mas)", "PA (deg)")
TRUTH = "truth (y, x; flux)"  # column of a synthetic stack
WIDE = ("likelihood error", "one pass", "contrast")  # columns that the terminal has no room for


@dataclass(frozen=True, eq=False)
class Result:
    """An observation and its detection limits.

    Attributes:
        config: Config of `detect`.
        stack: The stack.
        channels: Channels of the prepared observation.
        truth: Sources (y, x, flux) of a synthetic stack; the flux is the mean over channels.
        contrast: Detection limits, if measured.
        spectrum: Spectrum of the known sources, mean 1, if known.
        posteriors: Posterior of each source, if sampled.
    """

    config: DetectConfig
    stack: SpectralStack
    channels: Channels
    truth: Sequence[tuple[float, float, float]]
    contrast: Contrast | None = None
    spectrum: np.ndarray | None = None
    posteriors: tuple[SourcePosterior, ...] = ()

    @property
    def spectral(self) -> bool:
        return len(self.channels.each) > 1

    @property
    def fluxes(self) -> FluxScale:
        return flux_scale(self.config, self.channels, self.stack.observed.unit)

    @property
    def sky(self) -> Sky:
        return Sky(self.channels.centre, self.config.data.pixel_scale, self.config.data.north_deg)

    def name_of_spectrum(self, number: int) -> str:
        """Name of a candidate spectrum; its index, from 0, if it comes from a file."""
        names = self.stack.spectrum_names
        return names[number] if names else str(number)


def line_of(result: Result) -> str:
    """First line of the report if the stack is synthetic, otherwise empty."""
    return sample_line(STACK if result.config.data.cube is None else "")


def write_adi_report(result: Result, search: Search, out_dir: Path, console: Console) -> None:
    """Write figures and report, and print the table of sources.

    Args:
        result: Result of the search.
        out_dir: Output folder.
        console: For the table.
    """
    table = source_table(search.sources, result, search.spectra if result.spectral else ())
    console.print(for_console(table))
    write_report(
        out_dir / "report.html",
        title=f"{result.stack.observed.target or result.config.name}: point sources",
        summary=summary(result, search),
        sections=[
            source_section(result, search, table, out_dir),
            *([spectra_section(result, search, out_dir)] if result.spectral else []),
            *posterior_sections(result.posteriors, out_dir),
            null_section(result, search, out_dir),
            *([contrast_section(result, search, result.contrast, out_dir)] if result.contrast is not None else []),
            stack_section(result, search, out_dir),
            *figure_sections(search, result, result.config, out_dir),
        ],
        citations=[
            CITATION,
            *([ROBUST_CITATION] if result.config.method.mode == "robust" else []),
            *([SPECTRAL_CITATION] if result.spectral else []),
            *([POSTERIOR_CITATION] if result.posteriors else []),
        ],
        warnings=[*result.stack.caveats, *search.caveats, *flux_caveats(search.sources, result.fluxes)],
        sample=line_of(result),
    )


def source_section(result: Result, search: Search, table: Table, out_dir: Path) -> Section:
    config, fluxes = result.config, result.fluxes
    figure = adi_figures.detection_maps(
        search.maps.snr,
        search.maps.flux / fluxes.divisor,
        search.sources,
        result.sky,
        result.truth,
        search.snr_calibrated,
        adi_figures.ONE_PASS_CONTRAST if fluxes.relative else adi_figures.ONE_PASS_FLUX,
    )
    kind = "calibrated" if config.search.snr == "calibrated" else "theoretical"
    text = (
        f"Peaks with a {kind} SNR of at least {config.search.threshold:g}; each source is subtracted before the next "
        "is searched. Theoretical SNR: b / sqrt(a), standard normal if the noise were as modelled. Calibrated SNR: "
        "Gaussian significance in the empirical null of this stack at the same separation (Student's t); that of a "
        "source is the higher one of its SNR in the map and of its flux over its error, with the source excluded from "
        "its noise model. Flux: corrected for self-subtraction (Algorithm 3); its error is that of the likelihood "
        "times the spread of the null; the error of the likelihood alone, and the flux of one pass, which is biased "
        "low, are given for comparison. False-alarm probability: of a peak at least as high anywhere in the field, "
        "from the calibrated SNR. The errors of separation and PA are those of the fit; the uncertainties of the pixel "
        "scale, of true north and of the position of the star are not included."
    )
    if fluxes.star_mean is not None:
        text += (
            f" Star: {fluxes.star_mean:.5g} PSF units ({star_source(result)}); its error is not included in those of "
            "the contrast and of the magnitude difference, which are symmetric (first order)."
        )
    counts = {
        "frames": len(result.channels.reference.deviations),
        "channels": counted(len(result.channels.each), "channel"),
        "snr": kind,
        "threshold": config.search.threshold,
        "sources": len(search.sources),
    }
    saved = figures.save(figure, out_dir / "figures", "detection_maps")
    return Section("Sources", text, [captioned(saved, CAPTIONS, axes=axes_caption(result), **counts)], on_page(table))


def star_source(result: Result) -> str:
    data = result.config.data
    mean = ", mean of the channels" if result.spectral else ""
    if data.star_flux == "psf":
        return f"flux of the PSF image times data.exposure_ratio = {data.exposure_ratio:g}{mean}"
    return "data.star_flux"


def axes_caption(result: Result) -> str:
    """Caption of the axes of maps."""
    sky, north = result.sky, "arrows: north (N) and east (E)"
    if sky.pixel_scale is None:
        return f"Axes: pixels from 0; {north}"
    if sky.north_up:
        return f"Axes: offset from the star, ΔRA = Δα cos δ and ΔDec; {north}"
    return f"Axes: offset from the star along the pixel axes of the map, which is not rotated to north; {north}"


def spectra_section(result: Result, search: Search, out_dir: Path) -> Section:
    using, n_spectra = search.combination, len(search.combination.spectra)
    neighbours = [float(np.median(np.diag(r, 1))) for r in using.correlation]
    looked_for = "a flat spectrum" if n_spectra == 1 and np.ptp(using.spectra) == 0 else "a given spectrum"
    if n_spectra > 1:
        looked_for = f"one of {n_spectra} spectra"
    text = (
        f"Maps, SNR and flux combine {len(result.channels.each)} channels for a source with {looked_for}; the flux is "
        "the mean over the channels, if the source has this spectrum. The correlation of the noise between "
        "neighbouring channels, "
        f"{neighbours[0]:.2f} at {using.separation_px[0]:.0f} px from the centre and {neighbours[-1]:.2f} at "
        f"{using.separation_px[-1]:.0f} px, is taken into account. "
    )
    if n_spectra > 1:
        threshold = result.config.search.threshold
        text += (
            "At every pixel the spectrum with the highest SNR is used, relative to the spread of the null of each "
            f"spectrum: {', '.join(result.name_of_spectrum(k) for k in range(n_spectra))}. They count as "
            f"{search.noise.trials:.1f} independent trials, so the threshold is raised from {threshold:g} to "
            f"{trials_threshold(threshold, search.noise.trials):.2f}, which keeps the rate of false "
            "alarms, and the false-alarm probabilities include the trials. Detection limits are those for the first "
            "spectrum. "
        )
    if not search.spectra:
        return Section("Spectra", text)
    star = result.fluxes.star if result.fluxes.relative else None
    names = [result.name_of_spectrum(s.template) for s in search.spectra]
    figure = spectral_figures.spectra(search.spectra, known_spectra(search.sources, result), star, names)
    text += (
        "The figure shows the debiased flux of every source in every channel, "
        f"{'divided by that of the star' if star is not None else 'in units of the PSF of the channel'}. Thick "
        "bars: error of the likelihood; thin bars: the same times the spread of the null at that separation."
    )
    if unlike := [str(s.label) for s in search.spectra if s.template_probability < UNLIKE]:
        text += (
            f" Source {', '.join(unlike)} does not have the assumed spectrum: use the fluxes of the channels instead "
            "of the combined flux, or search again with another data.spectrum."
        )
    saved = figures.save(figure, out_dir / "figures", "spectra")
    counts = {"sources": len(search.spectra), "channels": len(result.channels.each), "flux": result.fluxes.name}
    return Section("Spectra", text, [captioned(saved, CAPTIONS, **counts)], [])


def known_spectra(sources: Sequence[PointSource], result: Result) -> list[np.ndarray | None]:
    """True spectrum of each source, if it is an injected one."""
    shares = None if result.spectrum is None else result.spectrum[result.channels.kept]
    truth = [None if shares is None else nearest_known(source, result) for source in sources]
    return [None if shares is None or t is None else t[2] * shares for t in truth]


def null_section(result: Result, search: Search, out_dir: Path) -> Section:
    observation, null, profile = result.channels, search.null.snr, search.profile
    values, n_independent = null_values(null, observation.centre, observation.fwhm_px)
    calibrated, _ = null_values(calibrated_null(result, search), observation.centre, observation.fwhm_px)
    folder = out_dir / "figures"
    radial = null_figures.null_by_radius(
        profile.separation_px, profile.std, profile.low, profile.high, result.config.data.pixel_scale
    )
    text = (
        "The null map is computed with reversed angles after subtraction of the sources: it contains the noise of the "
        f"stack and no source. The standard deviation of its theoretical SNR is {values.std():.2f}, where theory "
        "predicts 1. Below 1 this SNR is conservative (with little field rotation, noise is subtracted too), above 1 "
        "it overstates the significance. The calibrated SNR has a standard deviation of "
        f"{calibrated.std():.2f}, near 1 by construction, because the same null calibrates it. P(> 3) is "
        f"{np.mean(values > 3):.2g} for the theoretical and {np.mean(calibrated > 3):.2g} for the calibrated SNR, "
        f"nominally 0.00135; the highest values are {values.max():.2f} and {calibrated.max():.2f}, of about "
        f"{n_independent} independent ones."
    )
    if (n_spectra := len(search.combination.spectra)) > 1:
        text += (
            f" It takes the best of {n_spectra} spectra at every pixel, so its mean is above 0 and its spread is "
            "smaller than that of a single spectrum, which calibrates the SNR and is shown by separation."
        )
    distribution = figures.save(
        null_figures.null_distribution(values, None, "", n_independent, calibrated), folder, "null_distribution"
    )
    by_radius = figures.save(radial, folder, "null_by_radius")
    saved = [
        captioned(distribution, CAPTIONS, positions=len(values), independent=n_independent),
        captioned(by_radius, CAPTIONS, rings=len(profile.separation_px)),
    ]
    return Section("Noise", text, saved, [])


def calibrated_null(result: Result, search: Search) -> np.ndarray:
    """Calibrated SNR of the null map."""
    separation = separation_map(result.channels.shape, result.channels.centre)
    return search.noise.significance(search.null.snr, separation)


def contrast_section(result: Result, search: Search, contrast: Contrast, out_dir: Path) -> Section:
    if not len(contrast.separation_px):
        return Section("Limits", "The field is too small for a contrast curve.")
    config = result.config
    figure = contrast_figure.contrast_curve(
        contrast,
        search.sources,
        result.fluxes,
        config.data.pixel_scale,
        config.search.threshold,
        config.search.snr == "calibrated",
    )
    text = (
        f"Fluxes of sources that this search detects, from injections in {int(contrast.n.max())} directions at each "
        "separation into the stack without its sources: the criterion of the search is applied to each. The range "
        f"starts at the limit and ends at the highest flux tested, {MULTIPLES[-1]:g} times the limit, or below the "
        "first flux that is not detected in as many directions. Where no flux is detected, there is no limit. Dotted: "
        "the threshold divided by sqrt(a), valid for a source that does not contribute to its own noise statistics. "
        + threshold_text(result, search)
    )
    saved = figures.save(figure, out_dir / "figures", "contrast_curve")
    counts = {"separations": len(contrast.separation_px), "directions": int(contrast.n.max())}
    return Section("Limits", text, [captioned(saved, CAPTIONS, sources=len(search.sources), **counts)], [])


def threshold_text(result: Result, search: Search) -> str:
    """What the threshold of the search is compared with."""
    threshold = f"{result.config.search.threshold:g}"
    if result.config.search.snr == "theoretical":
        return f"The threshold of {threshold} applies to the theoretical SNR, b / sqrt(a)."
    n = search.profile.n
    return (
        f"The threshold of {threshold} applies to the calibrated SNR: the Gaussian significance of the SNR divided by "
        "its standard deviation in the null, which is known from "
        f"{n.min():.0f} (near the star) to {n.max():.0f} independent values (Student's t, Mawet et al. 2014)."
    )


def stack_section(result: Result, search: Search, out_dir: Path) -> Section:
    observation, centre = result.channels.reference, result.channels.centre
    channel = np.flatnonzero(result.channels.kept)[len(result.channels.each) // 2]
    cube, angles = result.stack.cube[channel][observation.kept], observation.angles_deg
    shown = adi_figures.shown_frames(len(angles), result.config.frames_shown)
    places = None
    if search.sources:
        dy, dx = (v - c for v, c in zip((search.sources[0].y, search.sources[0].x), centre, strict=True))
        theta = np.arctan2(dy, dx) - np.deg2rad(angles[shown])
        places = np.array(centre) + np.hypot(dy, dx) * np.stack([np.sin(theta), np.cos(theta)], -1)
    figure = adi_figures.frames_strip(cube, angles, centre, places, result.config.frames_shown)
    maps, psf = search.maps, observation.psf
    rho = maps.shrinkage[np.isfinite(maps.shrinkage)]
    rows = [
        ["frames used", f"{len(angles)} of {len(observation.kept)}"],
        ["rotation", f"{rotation_deg(angles):.1f} degrees"],
        ["excluded pixels", str(int((~observation.usable).sum()))],
        ["pixels per patch", str(search.n_patch)],
        ["PSF", f"{psf.fwhm_px:.2f} px FWHM, divided by {psf.flux:.4g} ({psf.flux_kind})"],
        ["weight of the diagonal (rho)", f"median {np.median(rho):.3f}, {rho.min():.3f} to {rho.max():.3f}"],
        ["locations with a singular covariance", str(int(maps.singular.sum()))],
        ["error of the PSF expansion", f"{maps.psf_error:.1e}, at most {maps.snr_error:.1e} of the noise"],
    ]
    text = ""
    if result.spectral:
        first, last = result.channels.wavelengths[[0, -1]]
        rows.insert(
            0, ["channels", f"{len(result.channels.each)} of {len(result.channels.kept)}, {first:g} to {last:g}"]
        )
        text = f"Frames, PSF and pixel numbers refer to the middle channel, {result.stack.wavelengths[channel]:g}."
    table = Table("Parameters of the stack", ["", ""], rows, [])
    saved = figures.save(figure, out_dir / "figures", "frames")
    numbers = ", ".join(map(str, shown))
    return Section("The stack", text, [captioned(saved, CAPTIONS, shown=numbers, frames=len(angles))], [table])


def unlike_note(spectrum: SourceSpectrum, result: Result) -> str:
    """Note on a source whose fluxes do not have the spectrum that its flux assumes."""
    name = result.name_of_spectrum(spectrum.template)
    return (
        f"The flux of source {spectrum.label} assumes the spectrum '{name}', which its fluxes in the "
        f"channels exclude (probability {spectrum.template_probability:.0e}): use spectra.csv."
    )


def source_table(sources: Sequence[PointSource], result: Result, spectra: Sequence[SourceSpectrum] = ()) -> Table:
    """Table of the sources, with contrasts and magnitudes if the flux of the star is known."""
    data, star = result.config.data, result.fluxes.star_mean
    columns = ["", "y, x (px)", f"separation ({'mas' if data.pixel_scale else 'px'})", "PA (deg)", "theoretical SNR"]
    columns += ["calibrated SNR", "flux (PSF units)", "likelihood error", "one pass"]
    columns += ["contrast", "Δmag"] if star is not None else []
    columns += ["false alarm", *([TRUTH] if result.truth else [])]
    rows = [source_row(source, result, star) for source in sources]
    missed = [
        t for t in result.truth if all(np.hypot(t[0] - s.y, t[1] - s.x) > result.channels.fwhm_px for s in sources)
    ]
    notes = [f"Not detected: the source of flux {flux:g} at (y, x) = ({y:.1f}, {x:.1f})." for y, x, flux in missed]
    notes += [unlike_note(s, result) for s in spectra if s.template_probability < UNLIKE]
    if not sources and not missed:
        notes = ["No peak exceeds the threshold."]
    notes += [
        f"Source {s.label} is near the threshold, so that its flux is biased high: corrected for selection, it is "
        f"{measured(s.flux_corrected, s.flux_corrected_std)}."
        for s in sources
        if s.near_threshold
    ]
    if sources:
        notes.append(f"PSF units: {result.fluxes.definition}.")
        notes.append(
            f"PA: position angle from north through east; north is {data.north_deg:g} degrees from the x axis toward y "
            "(data.north_deg)."
        )
    return Table(counted(len(sources), "source"), columns, rows, notes)


def source_row(source: PointSource, result: Result, star: float | None) -> list[str]:
    """Cells of `source_table`."""
    s, rare = source, source.false_alarm_probability <= FALSE_ALARM_FLOOR
    row = [
        str(s.label),
        f"{s.y:.2f} ± {s.y_std:.2f}, {s.x:.2f} ± {s.x_std:.2f}",
        separation(s.separation_px, s.separation_px_std, result.config.data.pixel_scale),
        measured(s.position_angle_deg, s.position_angle_deg_std),
        f"{s.snr:.1f}",
        f"{s.snr_calibrated:.1f}",
        measured(s.flux_debiased, s.flux_debiased_std_empirical),
        f"{s.flux_debiased_std:.2g}",
        f"{s.flux:.3g}",
    ]
    if star is not None:
        flux = relative_photometry(s.flux_debiased, s.flux_debiased_std_empirical, star)
        for name in ("contrast", "delta_mag"):
            row.append(measured(float(flux[name]), float(flux[f"{name}_std"])))
    row.append(f"≤ {FALSE_ALARM_FLOOR:g}".replace("e-0", "e-") if rare else f"{s.false_alarm_probability:.1g}")
    return [*row, known(s, result)] if result.truth else row


def counted(n: int, thing: str) -> str:
    return f"{n} {thing}{'s' * (n != 1)}"


def known(source: PointSource, result: Result) -> str:
    """Table cell: the injected source at this position, if any."""
    truth = nearest_known(source, result)
    return "none (false alarm)" if truth is None else f"{truth[0]:.2f}, {truth[1]:.2f}; {truth[2]:g}"


def nearest_known(source: PointSource, result: Result) -> tuple[float, float, float] | None:
    def distance(known: tuple[float, float, float]) -> float:
        return float(np.hypot(known[0] - source.y, known[1] - source.x))

    nearest = min(result.truth, key=distance, default=None)
    return nearest if nearest is not None and distance(nearest) <= result.channels.fwhm_px else None


def on_page(table: Table) -> list[Table]:
    """Tables for the report, which has no room for all columns: positions and significance, and photometry."""
    if not table.rows:
        return [table]
    flux = [i for i, name in enumerate(table.columns) if i == 0 or name in PHOTOMETRY]
    rest = [i for i, name in enumerate(table.columns) if name not in PHOTOMETRY]
    parts = [
        ([table.columns[i] for i in kept], [[row[i] for i in kept] for row in table.rows]) for kept in (rest, flux)
    ]
    return [Table(table.title, *parts[0], []), Table("Photometry", *parts[1], table.notes)]


def for_console(table: Table) -> rich.table.Table:
    """Table for the terminal: without the columns of `WIDE`, and with one kind of position."""
    if TRUTH in table.columns:  # in px and PSF units
        left_out = {*WIDE, *ON_SKY, "Δmag"}
    else:
        left_out = {*WIDE, *(("y, x (px)",) if "separation (mas)" in table.columns else ON_SKY)}
    kept = [i for i, name in enumerate(table.columns) if name not in left_out]
    grid = rich.table.Table(box=rich.box.SIMPLE, title=table.title, caption=" ".join(table.notes))
    for i in kept:
        grid.add_column(re.sub(r" (?=SNR|\(|alarm)", "\n", table.columns[i], count=1), no_wrap=True)
    for row in table.rows:
        grid.add_row(*(row[i] for i in kept))
    return grid


def observed_facts(seen: Observed) -> dict[str, str]:
    """What the header of the cube says about the observation, for the summary."""
    with_what = ", ".join(part for part in (seen.telescope, seen.instrument, seen.filter) if part)
    facts = {"object": seen.target, "observed with": with_what, "observed on": seen.date}
    return {name: value for name, value in facts.items() if value}


def summary(result: Result, search: Search) -> dict[str, str]:
    config, (height, width) = result.config, result.channels.shape
    (y, x), scale = result.channels.centre, config.data.pixel_scale
    return observed_facts(result.stack.observed) | {
        "stack": str(config.data.cube or f"synthetic, seed {config.seed}"),
        "frames": f"{len(result.channels.reference.deviations)} of {height} x {width} px",
        **({"channels": str(len(result.channels.each))} if result.spectral else {}),
        "field rotation": f"{rotation_deg(result.channels.reference.angles_deg):.1f} degrees",
        "PSF FWHM": in_px_and_mas(result.channels.reference.psf.fwhm_px, scale),
        "pixel scale": "unknown (data.pixel_scale)" if scale is None else f"{scale * MAS_PER_ARCSEC:.5g} mas/px",
        "star": f"(y, x) = ({y:.2f}, {x:.2f}) px",
        "method": f"PACO, {config.method.mode}, shrinkage {config.method.shrinkage}",
        "sources": str(len(search.sources)),
        "highest theoretical SNR": f"{np.nanmax(search.maps.snr):.2f}",
        "highest calibrated SNR": f"{np.nanmax(search.snr_calibrated):.2f}",
    }
