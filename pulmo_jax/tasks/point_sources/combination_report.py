"""Report of a combination of epochs: tables and figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.table
from jaxtyping import Float

from pulmo_jax.core.kepler import Orbit, period_days, sky_position
from pulmo_jax.data.instruments import NOT_OBSERVED, Observed
from pulmo_jax.data.sample_facts import STACK, sample_line
from pulmo_jax.evaluation.field_threshold import FieldThreshold
from pulmo_jax.evaluation.photometry import relative_photometry
from pulmo_jax.host.console import Console
from pulmo_jax.inference.epoch_flux import Flux
from pulmo_jax.inference.epochs import Combined, Plan, Track
from pulmo_jax.methods.paco.epochs import EpochMap, Star
from pulmo_jax.reporting import figures
from pulmo_jax.reporting.report import CaptionedFigure, Section, captioned, write_report
from pulmo_jax.reporting.tables import Table
from pulmo_jax.runs.report import figure_sections
from pulmo_jax.tasks.point_sources import epoch_figures
from pulmo_jax.tasks.point_sources.captions import CAPTIONS
from pulmo_jax.tasks.point_sources.cells import MAS_PER_ARCSEC, measured
from pulmo_jax.tasks.point_sources.config import DetectConfig
from pulmo_jax.tasks.point_sources.drawing import THEORETICAL, Sky
from pulmo_jax.tasks.point_sources.source_flux import SourceFlux, flux_section, flux_text
from pulmo_jax.tasks.point_sources.units import CONTRAST

CITATIONS = [
    """Dallant, J., Langlois, M., Flasseur, O., Thiébaut, É. 2023. PACOME: Optimal multi-epoch combination of direct
imaging observations for joint exoplanet detection and orbit estimation. A&A 679, A38.""",
    """Blunt, S., et al. 2017. Orbits for the Impatient: A Bayesian Rejection-sampling Method for Quickly Fitting the
Orbits of Long-period Exoplanets. AJ 153, 229.""",
]
FLUX_TEXT = {
    True: "Contrast: one-pass flux over all epochs, divided by the flux of the star at each epoch.",
    False: "PSF units: the one-pass flux over all epochs is in units of the normalised PSF of the runs.",
}
PATH_POINTS = 200
SHOWN_ORBITS = 60
DAYS_PER_YEAR = 365.25


@dataclass(frozen=True)
class Epoch:
    """Maps of one run in common units.

    Attributes:
        label: Name for figures.
        path: Run directory.
        mjd: Modified Julian date, if known.
        fwhm_px: FWHM of the PSF.
        map: Maps of the epoch.
        null: Null maps of the epoch.
        synthetic: Whether the stack is synthetic.
        flux_code: Unit of the fluxes of all epochs: `units.CONTRAST`, or that of `units.unit_code`.
        observed: What the headers of its maps say about the observation.
        flux_unit: Divisor of the fluxes of the run in the combination: the star's flux if all runs have one, or 1.
    """

    label: str
    path: Path
    mjd: float | None
    fwhm_px: float
    map: EpochMap
    null: EpochMap
    synthetic: bool = False
    flux_code: str = "psf"
    observed: Observed = NOT_OBSERVED
    flux_unit: float = 1.0

    def sky(self, in_arcsec: bool) -> Sky:
        """Orientation of the map, and its scale if it is known."""
        return Sky(self.map.centre, self.map.scale if in_arcsec else None, float(np.rad2deg(self.map.north)))


@dataclass(frozen=True, eq=False)
class CombinedResult:
    """Result of a combination.

    Attributes:
        config: Config of `detect`.
        epochs: Epochs in the order of time.
        combined: Result of the search.
        plan: Settings of the search.
        caveats: Warnings.
        fluxes: Debiased flux of each source.
    """

    config: DetectConfig
    epochs: list[Epoch]
    combined: Combined
    plan: Plan
    caveats: tuple[str, ...]
    fluxes: tuple[SourceFlux, ...] = ()

    @property
    def flux_code(self) -> str:
        return self.epochs[0].flux_code

    @property
    def relative(self) -> bool:
        """Whether fluxes are in units of the star, because every run has its flux."""
        return self.flux_code == CONTRAST

    @property
    def in_arcsec(self) -> bool:
        """Whether positions are in arcsec; otherwise in px, because no run has a pixel scale."""
        return self.epochs[0].map.scale != 1.0


def write_combined_report(result: CombinedResult, out_dir: Path, console: Console) -> None:
    """Write figures and report, and print the table of sources.

    Args:
        result: Result of the search.
        out_dir: Output folder.
        console: For the table.
    """
    table, combined, labels = source_table(result), result.combined, [epoch.label for epoch in result.epochs]
    console.print(for_console(table))
    write_report(
        out_dir / "report.html",
        title=f"{result.epochs[0].observed.target or result.config.name}: {len(result.epochs)} epochs combined",
        summary=summary(result),
        sections=[
            source_section(result, table, out_dir),
            epoch_section(result, out_dir),
            *([flux_section(result.fluxes, labels, fluxes_of_maps(combined.found))] if result.fluxes else []),
            *orbit_sections(result, out_dir),
            noise_section(result, out_dir),
            *figure_sections(result.combined, result, result.config, out_dir),
        ],
        citations=CITATIONS if result.plan.star else CITATIONS[:1],
        warnings=list(result.caveats),
        sample=sample_line(STACK if any(epoch.synthetic for epoch in result.epochs) else ""),
    )


def source_section(result: CombinedResult, table: Table, out_dir: Path) -> Section:
    combined, free = result.combined, result.plan.flux == "free"
    name, kind = "criterion: sum of max(b,0)²/a" if free else "criterion: max(sum b,0)²/sum a", kind_of_snr(result)
    places = np.reshape([found.places[0] for found in combined.found], (-1, 2))
    figure = epoch_figures.combined_maps(
        combined.criterion, combined.snr_combined, combined.threshold, result.epochs[0].sky(result.in_arcsec), places,
        (name, f"{kind} of a constant flux"),
    )  # fmt: skip
    moving = "the best orbit through it" if result.plan.star else "the same position at every epoch"
    flux = "a free flux at every epoch" if free else "one flux at all epochs"
    text = (
        f"Criterion: twice the log-likelihood ratio of one source to no source, with {flux}, not negative. Each pixel "
        f"represents a source at that position at the first date ({result.epochs[0].label}), with {moving}. The table "
        f"lists the sources above the threshold {combined.threshold:.1f} (the mark on the scale), the highest first; "
        "pixels within one FWHM of a source are excluded in every epoch before the next source is searched. False "
        "alarm: the probability that noise alone reaches this criterion anywhere in the field. "
        f"{FLUX_TEXT[result.relative]}"
    )
    saved = figures.save(figure, out_dir / "figures", "combined_maps")
    counts = {"epochs": len(result.epochs), "sources": len(combined.found)}
    return Section("Sources", text, [captioned(saved, CAPTIONS, **counts)], [table])


def epoch_section(result: CombinedResult, out_dir: Path) -> Section:
    combined, folder = result.combined, out_dir / "figures"
    tracks = combined.found or [combined.best]
    labels = [epoch.label for epoch in result.epochs]
    kind = kind_of_snr(result)
    names = [f"source {i + 1}" for i in range(len(combined.found))] or ["highest track"]
    bars = epoch_figures.snr_by_epoch(
        np.array([t.snr for t in tracks]), labels, [float(np.sqrt(t.criterion)) for t in tracks], names, kind
    )
    maps = epoch_figures.epoch_maps(
        [snr_of(epoch.map) for epoch in result.epochs],
        labels,
        [epoch.sky(result.in_arcsec) for epoch in result.epochs],
        np.array([t.places for t in tracks]),
        f"{kind} of one epoch",
    )
    which = "each source" if combined.found else "the highest track, below the threshold"
    text = (
        f"SNR of each epoch along the track of {which}, with its standard error of 1; dashed: square root of the "
        "criterion. Tracks are selected for a high criterion, so noise has a positive SNR too: significance follows "
        "from the threshold, not from this figure."
    )
    saved = [figures.save(bars, folder, "snr_by_epoch"), figures.save(maps, folder, "epoch_maps")]
    counts = {"epochs": len(result.epochs), "tracks": len(tracks)}
    return Section("Epoch by epoch", text, [captioned(path, CAPTIONS, **counts) for path in saved])


def fluxes_of_maps(tracks: Sequence[Track]) -> Float[np.ndarray, "N E"]:
    """Self-subtracted flux b / a of each source in each epoch; NaN where the map has no value."""
    a, b = np.array([track.a for track in tracks]), np.array([track.b for track in tracks])
    return np.where(a > 0, b / np.where(a > 0, a, 1), np.nan)


def kind_of_snr(result: CombinedResult) -> str:
    """Name of the SNR of an epoch in figures."""
    calibrated = result.config.search.snr == "calibrated"
    return "calibrated SNR (empirical null)" if calibrated else THEORETICAL


def snr_of(epoch: EpochMap) -> Float[np.ndarray, "H W"]:
    return epoch.b / np.sqrt(epoch.a)


def orbit_sections(result: CombinedResult, out_dir: Path) -> list[Section]:
    star = result.plan.star
    if star is None:
        return []
    combined, sections = result.combined, []
    for i, found in enumerate(combined.found or [combined.best]):
        assert found.orbit is not None
        samples, orbits = np.zeros((0, PATH_POINTS, 2)), None
        places = np.zeros((0, len(result.epochs), 2))
        if found.samples is not None:
            orbits, places = found.samples.orbits, found.samples.sky
            every = max(1, len(places) // SHOWN_ORBITS)
            samples = path_of(jax.tree.map(lambda v, n=every: v[::n], orbits), star)
        path = path_of(jax.tree.map(np.atleast_1d, found.orbit), star)[0]
        labels = [epoch.label for epoch in result.epochs]
        figure = epoch_figures.tracks_on_sky(found.sky, labels, path, samples, places[:2000], "arcsec")
        saved = figures.save(figure, out_dir / "figures", f"orbit_{i + 1}")
        title = f"Orbit of source {i + 1}" if combined.found else "Orbit of the highest track, below the threshold"
        caption = CAPTIONS["orbit"].format(epochs=len(labels), orbits=len(places))
        drawn = [CaptionedFigure(saved, caption)]
        sections.append(Section(title, orbit_text(found, result), drawn, [orbit_table(found, result, star)]))
    return sections


def path_of(orbits: Orbit, star: Star) -> Float[np.ndarray, "M S 2"]:
    """Sky positions (north, east), arcsec, of S points along one revolution of each of M orbits."""
    period = period_days(jnp.asarray(orbits.semi_major_axis), star.mass)[:, None]
    days = jnp.linspace(0, 1, PATH_POINTS) * period
    columns = jax.tree.map(lambda v: jnp.asarray(v)[:, None], orbits)
    return np.stack(sky_position(columns, days, star.mass, star.parallax_mas), -1)


def orbit_text(track: Track, result: CombinedResult) -> str:
    dates = [epoch.mjd or 0.0 for epoch in result.epochs]
    years = np.ptp(dates) / DAYS_PER_YEAR
    if track.samples is None:
        return f"Best of all trial orbits; {len(dates)} epochs in {years:.2g} years."
    share = years / np.median(period_years(track.samples.orbits, result.plan))
    return (
        f"Median and 68 % interval of orbits drawn from the posterior: likelihood exp(criterion / 2), semi-major axis "
        "uniform in its logarithm, eccentricity uniform in its range, orientations isotropic. The dates span "
        f"{years:.2g} years, {share:.0%} of the median period: elements that such an arc does not constrain follow "
        "the prior, and many orbits fit as well as the best. omega and the node are determined up to 180 degrees. "
        f"The effective sample size is {track.samples.independent:.0f}."
    )


def period_years(orbits: Orbit, plan: Plan) -> Float[np.ndarray, "S"]:
    assert plan.star is not None
    return np.asarray(period_days(jnp.asarray(orbits.semi_major_axis), plan.star.mass) / DAYS_PER_YEAR)


def orbit_table(track: Track, result: CombinedResult, star: Star) -> Table:
    assert track.orbit is not None
    best = quantities(jax.tree.map(np.atleast_1d, track.orbit), result.plan)
    columns = ["", "best"] + (["median", "68 % interval"] if track.samples else [])
    spread = quantities(track.samples.orbits, result.plan) if track.samples else {}
    rows = []
    for name, value in best.items():
        row = [name, f"{value[0]:.4g}"]
        if track.samples:
            low, middle, high = np.percentile(spread[name], [16, 50, 84])
            row += [f"{middle:.4g}", f"{low:.4g} to {high:.4g}"]
        rows.append(row)
    note = f"Star: {star.mass:g} solar masses, parallax {star.parallax_mas:g} mas."
    return Table("Orbit", columns, rows, [note])


def quantities(orbit: Orbit, plan: Plan) -> dict[str, np.ndarray]:
    return {
        "semi-major axis (au)": np.asarray(orbit.semi_major_axis),
        "period (yr)": period_years(orbit, plan),
        "eccentricity": np.asarray(orbit.shape.eccentricity),
        "inclination (deg)": np.rad2deg(np.arccos(np.clip(np.asarray(orbit.shape.cos_inclination), -1, 1))),
        "node (deg, modulo 180)": np.rad2deg(np.asarray(orbit.node)) % 180,
    }


def noise_section(result: CombinedResult, out_dir: Path) -> Section:
    combined = result.combined
    if not combined.nulls:
        return Section("The threshold", f"One epoch: search.threshold squared, {combined.threshold:g}.")
    figure = epoch_figures.null_maxima(
        combined.nulls,
        ("reversed angles", "rotated maps"),
        combined.threshold,
        [found.criterion for found in combined.found or [combined.best]],
    )
    null = combined.nulls[0]
    text = (
        f"The same search in two sets of {len(null.maxima)} noise fields. In each field every epoch is rotated by a "
        "random angle about the star, so that noise coincides by chance only. The first set uses, for each epoch, the "
        "map with reversed angles, its negative, or the negative of the map itself, at random. These maps may be less "
        "noisy than the searched maps, so the second set uses the searched maps, with single-epoch detections "
        "removed. Each threshold is exceeded in a fraction of at most "
        f"{null.level:.3g} of its fields: {ranges(combined.nulls)}; the higher threshold is used. With 95 % "
        f"confidence, noise exceeds the highest field in less than {null.certified:.2g} of all cases; smaller "
        "probabilities are extrapolated with a Gumbel distribution, not below "
        f"{combined.floor:.1g}."
    )
    if len(combined.coverage):
        low, middle = np.percentile(combined.coverage, [10, 50])
        text += (
            f" Along the nearest of the {combined.n_tracks} trial tracks, before refinement, an orbit drawn from the "
            f"prior retains {middle:.0%} of its criterion (median; 10th percentile {low:.0%}); a larger epochs.shapes "
            "increases this."
        )
    saved = figures.save(figure, out_dir / "figures", "null_maxima")
    return Section("The threshold", text, [captioned(saved, CAPTIONS, fields=len(null.maxima))])


def ranges(nulls: Sequence[FieldThreshold]) -> str:
    """Each threshold with its 95 % interval."""
    parts = []
    for null in nulls:
        high = f"{null.high:.1f}" if np.isfinite(null.high) else "above the highest"
        parts.append(f"{null.value:.1f} (95 % interval {null.low:.1f} to {high})")
    return " and ".join(parts)


def source_table(result: CombinedResult) -> Table:
    unit, scale = ("mas", MAS_PER_ARCSEC) if result.in_arcsec else ("px", 1.0)
    columns = ["", f"north, east ({unit})", "criterion", "SNR, constant flux"]
    columns += ["contrast", "Δmag"] if result.relative else ["flux (PSF units)"]
    columns += ["self-subtracted", "false alarm", "Gumbel"]
    rows = []
    for i, found in enumerate(result.combined.found):
        north, east = (measured(*pair) for pair in zip(found.sky[0] * scale, found.start_std * scale, strict=True))
        rows.append([
            str(i + 1),
            f"{north}, {east}",
            f"{found.criterion:.1f}",
            f"{found.snr_combined:.1f}",
            *flux_cells(result.fluxes[i].joint.flux, result.relative),
            f"{found.flux:.3g}",
            f"≤ {result.combined.false_alarm(found.criterion):.2g}" if result.combined.nulls else "-",
            bounded(result.combined.extrapolated(found.criterion), result.combined.floor),
        ])  # fmt: skip
    best = result.combined.best
    notes = [] if rows else [
        f"No source above {result.combined.threshold:.1f}; the highest criterion is {best.criterion:.1f}."
    ]  # fmt: skip
    return Table(f"{len(rows)} source{'s' * (len(rows) != 1)}", columns, rows, notes)


def flux_cells(flux: Flux, relative: bool) -> list[str]:
    """Debiased flux of a source with its error; in units of the star, also as a magnitude difference."""
    if not relative:
        return [flux_text(flux)]
    magnitudes = relative_photometry(flux.value, flux.std_empirical, 1.0)
    magnitude = measured(float(magnitudes["delta_mag"]), float(magnitudes["delta_mag_std"]))
    return [flux_text(flux), magnitude if np.isfinite(flux.value) else "-"]


def bounded(probability: float, floor: float) -> str:
    """A probability, or its bound if it is not above the lowest one that the method supports; "-" if unknown."""
    if not np.isfinite(probability):
        return "-"
    return f"{probability:.1g}" if probability > floor else f"< {floor:.1g}"


def for_console(table: Table) -> rich.table.Table:
    """Table for the terminal, which has no room for the contrast beside the magnitude difference."""
    kept = [i for i, name in enumerate(table.columns) if name != "contrast"]
    grid = rich.table.Table(title=table.title, box=rich.box.SIMPLE, caption=" ".join(table.notes))
    for i in kept:
        grid.add_column(table.columns[i], no_wrap=True)
    for row in table.rows:
        grid.add_row(*(row[i] for i in kept))
    return grid


def summary(result: CombinedResult) -> dict[str, str]:
    moving = "Keplerian orbits" if result.plan.star else "fixed position"
    return {
        "runs": str(len(result.epochs)),
        "search": f"{moving}, {result.combined.n_tracks} tracks",
        "sources": str(len(result.combined.found)),
        "highest criterion": f"{result.combined.best.criterion:.1f}",
        "threshold": f"{result.combined.threshold:.1f}",
    }
