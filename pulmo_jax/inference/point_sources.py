"""From a stack to a list of its sources: the brightest is found, fitted and taken out, until none is left."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pulmo_jax.core import psf
from pulmo_jax.evaluation.null_field import NullProfile, field_false_alarm, null_profile, separation_map
from pulmo_jax.methods.paco import LikelihoodMaps, Observation, Settings, compute_maps
from pulmo_jax.methods.paco.maps import footprint
from pulmo_jax.methods.paco.tracks import Fit, Stack, characterise, positions, prepare
from pulmo_jax.types import PointSource

REFINEMENTS = 2  # rounds in which every source is fitted again with all others taken out
BLANKS = 24  # places at a source's separation on which the error of its flux is measured
MIN_BLANKS = 4
NORTH_DEG = 90.0  # angle theta of north, the direction of +y, in the derotated map

Track = Callable[[Iterable, int], Iterable]
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Search:
    """Everything that a search found.

    maps: of the stack as it is. fits: what `sources` are described from, fluxes in units of the deviations. residual:
    the stack without the sources. null: its SNR map with the angles reversed, which holds the noise and no source, and
    profile, its spread. snr_calibrated: maps.snr over that spread. n_patch: pixels of a patch.
    """

    maps: LikelihoodMaps
    sources: list[PointSource]
    fits: list[Fit]
    residual: Observation
    null: LikelihoodMaps
    profile: NullProfile
    snr_calibrated: Float[np.ndarray, "H W"]
    n_patch: int
    caveats: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """Where a peak was found, what the maps said there, and the fit."""

    pixel: tuple[int, int]
    snr: float
    flux: float
    flux_std: float
    fit: Fit


def find_sources(
    of: Observation,
    settings: Settings,
    threshold: float = 5.0,
    calibrated: bool = False,
    max_sources: int = 20,
    north_deg: float = NORTH_DEG,
    say: Say = lambda text: None,
    track: Track = lambda items, total: items,
) -> Search:
    """Find, characterise and remove sources, brightest first.

    threshold: of the SNR, or of the SNR over the empirical null's spread where `calibrated`. north_deg: the angle
    theta of north. Peaks closer than one FWHM to a source already found are taken to be its remains.
    """
    maps = compute_maps(of, settings, track=track)
    say("the empirical null, from reversed angles")
    null = compute_maps(of, settings, angles_deg=-of.angles_deg, track=track)
    profile = null_profile(null.snr, of.centre, of.psf.fwhm_px)
    spread = profile.std_at(separation_map(of.shape, of.centre)) if calibrated else np.ones(of.shape)

    found: list[Candidate] = []
    residual, current = of, maps
    free = np.ones(of.shape, bool)
    while len(found) < max_sources and (pixel := highest(current.snr / spread, free, threshold)) is not None:
        say(f"a source near (y, x) = {pixel}, SNR {current.snr[pixel]:.1f}")
        stack, patch = prepare(residual, settings)
        fit = first(characterise(stack, jnp.asarray([pixel], of.deviations.dtype), patch))
        found.append(Candidate(pixel, current.snr[pixel], current.flux[pixel], current.flux_std[pixel], fit))
        free &= separation_map(of.shape, (float(pixel[0]), float(pixel[1]))) > of.psf.fwhm_px
        residual = without(of, [c.fit for c in found])
        current = compute_maps(residual, settings, track=track)
    for _ in range(REFINEMENTS * (len(found) > 1)):
        found = [refine(of, settings, found, i) for i in range(len(found))]
    if found:
        residual = without(of, [c.fit for c in found])
        say("the empirical null again, without the sources")
        null = compute_maps(residual, settings, angles_deg=-of.angles_deg, track=track)
        profile = null_profile(null.snr, of.centre, of.psf.fwhm_px)
    std = profile.std_at(separation_map(of.shape, of.centre))
    field = np.where(np.isfinite(maps.snr), null.snr / std, np.nan)
    fits = [c.fit for c in found]
    sources = [describe(i + 1, c, of, residual, settings, profile, field, fits, north_deg) for i, c in enumerate(found)]
    caveats = maps.caveats
    if len(found) == max_sources:
        caveats += (f"the search stopped at {max_sources} sources; there may be more",)
    n_patch = len(footprint(of.psf, settings.patch_radius_px))
    return Search(maps, sources, fits, residual, null, profile, maps.snr / std, n_patch, caveats)


def highest(snr: Float[np.ndarray, "H W"], free: np.ndarray, threshold: float) -> tuple[int, int] | None:
    """The pixel of the highest value among the free ones, if it is above the threshold."""
    values = np.where(free & np.isfinite(snr), snr, -np.inf)
    y, x = np.unravel_index(values.argmax(), values.shape)
    return (int(y), int(x)) if values[y, x] >= threshold else None


def first(fits: Fit) -> Fit:
    return jax.tree.map(lambda values: values[0], fits)


def refine(of: Observation, settings: Settings, found: list[Candidate], i: int) -> Candidate:
    """Fit source i again, from where it is, with all others taken out."""
    stack, patch = prepare(without(of, [c.fit for k, c in enumerate(found) if k != i]), settings)
    start = jnp.stack([found[i].fit.y, found[i].fit.x])[None]
    return replace(found[i], fit=first(characterise(stack, start, patch)))


def without(of: Observation, fits: list[Fit]) -> Observation:
    """The observation with these sources taken out of every frame."""
    if not fits:
        return of
    usable, deviations = jnp.asarray(of.usable), of.deviations
    stamp, angles = (jnp.asarray(v, deviations.dtype) for v in (of.psf.stamp, of.angles_deg))
    for fit in fits:
        if not np.isfinite([fit.y, fit.x, fit.flux]).all():
            continue  # it would take everything with it
        place = jnp.stack([fit.y, fit.x])
        deviations = subtract(deviations, usable, stamp, angles, jnp.asarray(of.centre, stamp.dtype), place, fit.flux)
    return replace(of, deviations=deviations)


@jax.jit
def subtract(
    deviations: Float[Array, "T H W"],
    usable: Array,
    stamp: Array,
    angles_deg: Array,
    centre: Array,
    place: Array,
    flux: Array,
) -> Float[Array, "T H W"]:
    """The deviations less a source, zero mean again."""
    height, width = usable.shape
    unused = jnp.zeros(())
    stack = Stack(deviations, usable, usable, unused, stamp, angles_deg, centre)
    at = positions(stack, place)

    def without_source(frame: Array, at: Array) -> Array:
        y, x = jnp.arange(height) - at[0], jnp.arange(width) - at[1]
        half = len(stamp) / 2
        along_y, along_x = psf.sample_matrix(y, len(stamp)), psf.sample_matrix(x, len(stamp))
        near = (abs(y) < half)[:, None] & (abs(x) < half)
        return frame - flux * jnp.where(near & usable, along_y @ stamp @ along_x.T, 0)

    with jax.default_matmul_precision("highest"):
        left = jnp.asarray(jax.lax.map(lambda pair: without_source(*pair), (deviations, at), batch_size=16))
    return jnp.where(usable, left - left.mean(0), 0)


def describe(
    label: int,
    found: Candidate,
    of: Observation,
    residual: Observation,
    settings: Settings,
    profile: NullProfile,
    field: Float[np.ndarray, "H W"],
    fits: list[Fit],
    north_deg: float,
) -> PointSource:
    """A candidate with errors as they are, and not only as the likelihood has them.

    The likelihood knows nothing of noise that is correlated in time or learnt from few frames. So the flux is measured
    at blank places of the same separation too: their scatter over their formal error is the factor by which the errors
    of flux and place are wrong.
    """
    fit = found.fit
    y, x = float(fit.y), float(fit.x)
    dy, dx = y - of.centre[0], x - of.centre[1]
    separation = float(np.hypot(dy, dx))
    factor = error_factor(residual, settings, (y, x), fits)
    spread = np.asarray(fit.covariance, float)
    place_covariance = spread[:2, :2] * (factor if np.isfinite(factor) else 1.0) ** 2
    along = np.array([dy, dx]) / max(separation, 1e-9)
    across = np.array([along[1], -along[0]])
    radial, tangential = (float(np.sqrt(u @ place_covariance @ u)) for u in (along, across))
    calibrated = float(found.snr / profile.std_at(separation))
    flux_std = of.unit * float(np.sqrt(spread[2, 2]))
    return PointSource(
        label=label,
        y=y,
        x=x,
        y_std=float(np.sqrt(place_covariance[0, 0])),
        x_std=float(np.sqrt(place_covariance[1, 1])),
        separation_px=separation,
        separation_px_std=radial,
        position_angle_deg=float(np.mod(np.rad2deg(np.arctan2(dy, dx)) - north_deg, 360)),
        position_angle_deg_std=float(np.rad2deg(np.arctan2(tangential, separation))),
        snr=float(found.snr),
        snr_calibrated=calibrated,
        flux=float(found.flux),
        flux_std=float(found.flux_std),
        flux_debiased=of.unit * float(fit.flux),
        flux_debiased_std=flux_std,
        flux_debiased_std_empirical=flux_std * factor,
        false_alarm_probability=float(field_false_alarm(calibrated, field)),
    )


def error_factor(of: Observation, settings: Settings, place: tuple[float, float], fits: list[Fit]) -> float:
    """Scatter of the unbiased flux over its formal error, at blank places of the same separation.

    With the correction for few places (Mawet et al. 2014, ApJ 792:97). NaN where there are fewer than MIN_BLANKS.
    """
    dy, dx = place[0] - of.centre[0], place[1] - of.centre[1]
    separation, start = np.hypot(dy, dx), np.arctan2(dy, dx)
    n = int(min(BLANKS, 2 * np.pi * separation // of.psf.fwhm_px))
    directions = start + 2 * np.pi * (np.arange(n) + 0.5) / max(n, 1)
    blanks = np.array(of.centre) + separation * np.stack([np.sin(directions), np.cos(directions)], -1)
    taken = np.array([[float(f.y), float(f.x)] for f in fits]).reshape(-1, 2)
    apart = np.linalg.norm(blanks[:, None] - taken, axis=-1).min(1, initial=np.inf)
    blanks = blanks[apart > of.psf.fwhm_px]
    if len(blanks) < MIN_BLANKS:
        return float("nan")
    stack, patch = prepare(of, settings)
    at = jnp.asarray(blanks, of.deviations.dtype)
    blank_fits = [first(characterise(stack, at[i : i + 1], patch, move=False)) for i in range(len(at))]  # one program
    pulls = np.array([float(fit.flux * jnp.sqrt(fit.a)) for fit in blank_fits])
    pulls = pulls[np.isfinite(pulls)]
    return float(pulls.std(ddof=1) * np.sqrt(1 + 1 / len(pulls))) if len(pulls) >= MIN_BLANKS else float("nan")
