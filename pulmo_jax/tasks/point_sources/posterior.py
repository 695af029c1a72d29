"""Posterior of position and flux of every detected source: samples, figures and a section of the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pulmo_jax.inference.outputs import as_csv
from pulmo_jax.inference.point_sources import Search
from pulmo_jax.methods.paco import Posterior, Settings, sample_posterior
from pulmo_jax.methods.paco.posterior import NoMaximumError
from pulmo_jax.methods.paco.removal import without_sources
from pulmo_jax.reporting import figures
from pulmo_jax.reporting.report import Section, captioned
from pulmo_jax.reporting.tables import Table
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.point_sources.captions import CAPTIONS
from pulmo_jax.tasks.point_sources.posterior_figures import corner
from pulmo_jax.types import PointSource

if TYPE_CHECKING:
    from pulmo_jax.tasks.point_sources.report import Result

MOST_SHOWN = 12  # maximum number of sources in the report
WORST_R_HAT = 1.01  # Vehtari et al. 2021


@dataclass(frozen=True, eq=False)
class SourcePosterior:
    """Posterior of position and flux of a source.

    Attributes:
        source: The source.
        posterior: Its samples; None if the likelihood has no maximum at its position.
    """

    source: PointSource
    posterior: Posterior | None


def sample_posteriors(
    result: "Result", search: Search, settings: Settings, place: Place
) -> tuple[SourcePosterior, ...]:
    """Sample the posterior of every source, if `search.posterior` is set; the caller sets the precision.

    Args:
        result: The observation.
        search: Result of the search.
        settings: Settings of the noise model.
        place: Console for messages.

    Returns:
        The sources with their samples; () without `search.posterior`.
    """
    if not result.config.search.posterior:
        return ()
    found = tuple(sample_source(result, search, number, settings) for number in range(len(search.sources)))
    for each in found:
        if each.posterior is None:
            label = each.source.label
            place.note(f"note: source {label} has no posterior: no maximum of the likelihood at its position")
        elif (worst := each.posterior.r_hat.max()) > WORST_R_HAT:
            place.note(f"note: the chains of the posterior of source {each.source.label} disagree: R-hat {worst:.3f}")
    return found


def sample_source(result: "Result", search: Search, number: int, settings: Settings) -> SourcePosterior:
    """Sample the posterior of one source, with all others removed and with its empirical error."""
    source = search.sources[number]
    others = [fit for k, fit in enumerate(search.fits) if k != number]
    flux_std = source.flux_debiased_std_empirical
    try:
        posterior = sample_posterior(
            without_sources(result.channels, others), source.y, source.x, source.flux_debiased,
            flux_std=flux_std if np.isfinite(flux_std) else None,
            spectrum=search.combination.spectra[search.spectra[number].template],
            seed=result.config.seed, settings=settings,
        )  # fmt: skip
    except NoMaximumError:
        posterior = None
    return SourcePosterior(source, posterior)


def posterior_csv(found: Sequence[SourcePosterior], centre: tuple[float, float], north_deg: float) -> str:
    """posterior.csv: one sample per row."""
    rows = []
    for each in found:
        if each.posterior is None:
            continue
        for chain, samples in enumerate(each.posterior.samples):
            for draw, (y, x, flux) in enumerate(samples):
                offset = (y - centre[0], x - centre[1])
                rows.append({
                    "label": each.source.label, "chain": chain, "draw": draw, "y": y, "x": x, "flux": flux,
                    "separation_px": np.hypot(*offset),
                    "position_angle_deg": np.mod(np.rad2deg(np.arctan2(*offset)) - north_deg, 360),
                })  # fmt: skip
    names = ["label", "chain", "draw", "y", "x", "flux", "separation_px", "position_angle_deg"]
    return as_csv(names, rows)


def posterior_sections(found: Sequence[SourcePosterior], out_dir: Path) -> list[Section]:
    """Section of the report with the table and the figures of all posteriors; [] if there are none."""
    sampled = [(each.source, each.posterior) for each in found if each.posterior is not None]
    if not sampled:
        return []
    columns = ["", "y (px)", "x (px)", "flux", "68 % of the flux", "R-hat", "samples", "divergences"]
    rows = []
    for source, posterior in sampled:
        low, high = posterior.interval(0.6827)
        errors = (
            f"{source.y_std:.2g}", f"{source.x_std:.2g}",
            f"{source.flux_debiased_std:.2g}; {source.flux_debiased_std_empirical:.2g}",
        )  # fmt: skip
        pairs = zip(posterior.mean, posterior.std, errors, strict=True)
        rows.append([
            str(source.label),
            *(f"{mean:.4g} ± {std:.2g} ({given})" for mean, std, given in pairs),
            f"{low[2]:.4g} to {high[2]:.4g}",
            f"{posterior.r_hat.max():.3f}",
            f"{posterior.ess.min():.0f} of {len(posterior.flat)}",
            str(posterior.divergences),
        ])  # fmt: skip
    text = (
        "Samples of position and flux by the No-U-Turn Sampler, with flat priors; mean ± standard deviation, in "
        "parentheses the errors of detections.csv (of the flux: likelihood; empirical). The likelihood is widened so "
        "that the standard deviation of the flux is the empirical one, where that is known. R-hat and the effective "
        "number of samples are the worst of the three parameters (Vehtari et al. 2021): the chains agree if R-hat is "
        f"at most {WORST_R_HAT}."
    )
    shown = []
    for source, posterior in sampled[:MOST_SHOWN]:
        saved = figures.save(corner(posterior, source), out_dir / "figures", f"posterior_{source.label}")
        captions = {saved.stem: CAPTIONS["posterior"]}
        shown.append(captioned(saved, captions, label=source.label, samples=len(posterior.flat)))
    return [Section("Posterior", text, shown, [Table("Posterior of position and flux", columns, rows, [])])]
