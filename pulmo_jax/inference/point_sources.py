"""From a stack to a list of its sources: the brightest is found, fitted and taken out, until none is left.

A stack has channels, of one wavelength each; angular differential imaging is the case of one (`methods.paco.channels`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.stats import chi2

from pulmo_jax.core import psf
from pulmo_jax.evaluation.null_field import (
    NullProfile,
    correlation_area,
    field_false_alarm,
    null_profile,
    separation_map,
)
from pulmo_jax.methods.paco import LikelihoodMaps, Observation, Settings
from pulmo_jax.methods.paco.channels import Channels, as_channels, channel_maps
from pulmo_jax.methods.paco.joint import SourceFit, fit_source
from pulmo_jax.methods.paco.maps import footprint
from pulmo_jax.methods.paco.spectral import (
    Combination,
    as_spectra,
    combine,
    combine_maps,
    correlation_by_separation,
)
from pulmo_jax.methods.paco.tracks import Fit, Stack, characterise, positions, prepare
from pulmo_jax.types import PointSource

REFINEMENTS = 2  # rounds in which every source is fitted again with all others taken out
BLANKS = 24  # places at a source's separation on which the error of its flux is measured
MIN_BLANKS = 4
NORTH_DEG = 90.0  # angle theta of north, the direction of +y, in the derotated map

Track = Callable[[Iterable, int], Iterable]
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class SourceSpectrum:
    """A source's unbiased flux in every channel, in units of its PSF (Algorithm 3).

    flux_std: the likelihood's error; flux_std_empirical: as blank places of the same separation show it, NaN where
    there are too few. template: number of the spectrum that the source was found with; template_probability: of fluxes
    that are as far from it, if it is the source's own; where that is small the flux of all channels together, which
    supposes it, means little. NaN where it cannot be told.
    """

    label: int
    wavelengths: Float[np.ndarray, "L"]
    flux: Float[np.ndarray, "L"]
    flux_std: Float[np.ndarray, "L"]
    flux_std_empirical: Float[np.ndarray, "L"]
    template: int
    template_probability: float


@dataclass(frozen=True, eq=False)
class Search:
    """Everything that a search found.

    maps: of the stack as it is, its channels combined. fits: what `sources` are described from. residual: the stack
    without the sources. null: its SNR map with the angles reversed, which holds the noise and no source, computed in
    the same way, and profile, its spread. snr_calibrated: maps.snr over that spread. n_patch: pixels of a patch.
    combination: how the channels were. template: number of the spectrum that is the best at every pixel. spectra: of
    every source.
    """

    maps: LikelihoodMaps
    sources: list[PointSource]
    fits: list[SourceFit]
    residual: Channels
    null: LikelihoodMaps
    profile: NullProfile
    snr_calibrated: Float[np.ndarray, "H W"]
    n_patch: int
    caveats: tuple[str, ...]
    combination: Combination
    template: Int[np.ndarray, "H W"]
    spectra: list[SourceSpectrum]


@dataclass(frozen=True)
class Candidate:
    """Where a peak was found, what the maps said there, with which spectrum, and the fit."""

    pixel: tuple[int, int]
    snr: float
    flux: float
    flux_std: float
    template: int
    fit: SourceFit


@dataclass(frozen=True, eq=False)
class Noise:
    """What is known of it: the null's map, of the best spectrum; its spread and its field of unit variance, of one
    spectrum alone, as theory has them; and how many were tried."""

    null: LikelihoodMaps
    profile: NullProfile
    field: Float[np.ndarray, "H W"]
    trials: int

    def false_alarm(self, snr: float) -> float:
        """The probability that noise alone has a calibrated peak as high anywhere, with any of the spectra."""
        of_one = np.minimum(field_false_alarm(snr, self.field), 1 - 1e-16)
        return float(-np.expm1(self.trials * np.log1p(-of_one)))


def find_sources(
    of: Observation | Channels,
    settings: Settings,
    threshold: float = 5.0,
    calibrated: bool = False,
    max_sources: int = 20,
    north_deg: float = NORTH_DEG,
    say: Say = lambda text: None,
    track: Track = lambda items, total: items,
    spectra: Float[np.ndarray, "M L"] | None = None,
) -> Search:
    """Find, characterise and remove sources, brightest first.

    threshold: of the SNR, or of the SNR over the empirical null's spread where `calibrated`. north_deg: the angle
    theta of north. Peaks closer than one FWHM to a source already found are taken to be its remains. spectra: of the
    sources, one or several to choose the best from, for each of the channels given; None: flat.
    """
    channels = as_channels(of)
    shape, centre, fwhm_px = channels.shape, channels.centre, channels.fwhm_px
    spectra = as_spectra(spectra, len(channels.kept))[:, channels.kept]
    each = channel_maps(channels, settings, track=track)
    say("the empirical null, from reversed angles")
    nulls = channel_maps(channels, settings, reversed_angles=True, track=track)
    annuli, correlation = correlation_of(nulls, channels)
    using = Combination(annuli, correlation, spectra)
    noise = noise_of(nulls, channels, using)
    separation = separation_map(shape, centre)
    spread = noise.profile.std_at(separation) if calibrated else np.ones(shape)

    found: list[Candidate] = []
    residual = channels
    current, template = combine_maps(each, separation, using)
    free = np.ones(shape, bool)
    while len(found) < max_sources and (pixel := highest(current.snr / spread, free, threshold)) is not None:
        say(f"a source near (y, x) = {pixel}, SNR {current.snr[pixel]:.1f}")
        fit = fit_source(residual, settings, np.array(pixel, float))
        snr, flux, flux_std = (float(values[pixel]) for values in (current.snr, current.flux, current.flux_std))
        found.append(Candidate(pixel, snr, flux, flux_std, int(template[pixel]), fit))
        free &= separation_map(shape, (float(pixel[0]), float(pixel[1]))) > fwhm_px
        residual = without_sources(channels, [c.fit for c in found])
        current, template = combine_maps(channel_maps(residual, settings, track=track), separation, using)
    for _ in range(REFINEMENTS * (len(found) > 1)):
        found = [refine(channels, settings, found, i) for i in range(len(found))]
    if found:
        residual = without_sources(channels, [c.fit for c in found])
        say("the empirical null again, without the sources")
        nulls = channel_maps(residual, settings, reversed_angles=True, track=track)
        noise = noise_of(nulls, channels, using)
    maps, template = combine_maps(each, separation, using)
    std = noise.profile.std_at(separation)
    described = [
        describe(i + 1, c, channels, residual, settings, noise, using, [c.fit for c in found], north_deg)
        for i, c in enumerate(found)
    ]
    caveats = (*channels.caveats, *(c for c in maps.caveats if c not in channels.caveats))
    if len(found) == max_sources:
        caveats += (f"the search stopped at {max_sources} sources; there may be more",)
    return Search(
        maps=maps,
        sources=[source for source, _ in described],
        fits=[c.fit for c in found],
        residual=residual,
        null=noise.null,
        profile=noise.profile,
        snr_calibrated=maps.snr / std,
        n_patch=max(len(footprint(of.psf, settings.patch_radius_px)) for of in channels.each),
        caveats=caveats,
        combination=using,
        template=template,
        spectra=[spectrum for _, spectrum in described],
    )


def correlation_of(
    nulls: Sequence[LikelihoodMaps], channels: Channels
) -> tuple[Float[np.ndarray, "K"], Float[np.ndarray, "K L L"]]:
    """R by separation from the channels' nulls, from one FWHM outward, where all of them have a value."""
    snr, separation = np.stack([null.snr for null in nulls]), separation_map(channels.shape, channels.centre)
    there = np.isfinite(snr).all(0) & (separation > channels.fwhm_px)
    if len(snr) == 1 or not there.any():
        return np.zeros(1), np.eye(len(snr))[None]
    area = np.mean([correlation_area(np.where(there, values, np.nan)) for values in snr])
    return correlation_by_separation(snr[:, there], separation[there], float(area))


def noise_of(nulls: Sequence[LikelihoodMaps], channels: Channels, using: Combination) -> Noise:
    """From the channels' nulls. The best of several spectra is not of unit variance, and its tail is not a normal one's
    of its own variance; so the spread is that of the spectrum whose null spreads the most."""
    n_spectra, separation = len(using.spectra), separation_map(channels.shape, channels.centre)
    together, _ = combine_maps(nulls, separation, using)
    alone = [together.snr]
    if n_spectra > 1:
        alone = [combine_maps(nulls, separation, using.only(k))[0].snr for k in range(n_spectra)]
    profiles = [null_profile(snr, channels.centre, channels.fwhm_px) for snr in alone]
    widest = int(np.argmax([profile.std.mean() for profile in profiles]))
    std = profiles[widest].std_at(separation)
    return Noise(together, profiles[widest], alone[widest] / std, n_spectra)


def highest(snr: Float[np.ndarray, "H W"], free: np.ndarray, threshold: float) -> tuple[int, int] | None:
    """The pixel of the highest value among the free ones, if it is above the threshold."""
    values = np.where(free & np.isfinite(snr), snr, -np.inf)
    y, x = np.unravel_index(values.argmax(), values.shape)
    return (int(y), int(x)) if values[y, x] >= threshold else None


def first(fits: Fit) -> Fit:
    return jax.tree.map(lambda values: values[0], fits)


def refine(channels: Channels, settings: Settings, found: list[Candidate], i: int) -> Candidate:
    """Fit source i again, from where it is, with all others taken out."""
    others = without_sources(channels, [c.fit for k, c in enumerate(found) if k != i])
    return replace(found[i], fit=fit_source(others, settings, found[i].fit.place))


def without_sources(channels: Channels, fits: Sequence[SourceFit]) -> Channels:
    """The channels with sources taken out of every frame."""
    return channels.but_with([without(of, [fit.each[k] for fit in fits]) for k, of in enumerate(channels.each)])


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
    channels: Channels,
    residual: Channels,
    settings: Settings,
    noise: Noise,
    using: Combination,
    fits: Sequence[SourceFit],
    north_deg: float,
) -> tuple[PointSource, SourceSpectrum]:
    """A candidate with errors as they are, and not only as the likelihood has them.

    The likelihood knows nothing of noise that is correlated in time or learnt from few frames. So the flux is measured
    at blank places of the same separation too: their scatter over their formal error is the factor by which the errors
    of flux and place are wrong.
    """
    fit, using = found.fit, using.only(found.template)
    offset = fit.place - np.array(channels.centre)
    separation = float(np.hypot(*offset))
    blanks = blank_places(channels, fit.place, [other.place for other in fits])
    a, b = blank_terms(residual, settings, blanks)
    together = combine(a, b, np.full(a.shape[1], separation), using)
    factor, *factors = (scatter(pulls) for pulls in (together.b / np.sqrt(together.a), *(b / np.sqrt(a))))
    total = combine(fit.flux_std**-2, fit.flux * fit.flux_std**-2, np.array(separation), using)
    place_covariance = (
        fit.place_covariance * excess(fit, using.at(separation)) * (factor if np.isfinite(factor) else 1.0) ** 2
    )
    along = offset / max(separation, 1e-9)
    across = np.array([along[1], -along[0]])
    radial, tangential = (float(np.sqrt(u @ place_covariance @ u)) for u in (along, across))
    calibrated = float(found.snr / noise.profile.std_at(separation))
    flux_std = float(1 / np.sqrt(total.a))
    source = PointSource(
        label=label,
        y=float(fit.place[0]),
        x=float(fit.place[1]),
        y_std=float(np.sqrt(place_covariance[0, 0])),
        x_std=float(np.sqrt(place_covariance[1, 1])),
        separation_px=separation,
        separation_px_std=radial,
        position_angle_deg=float(np.mod(np.rad2deg(np.arctan2(*offset)) - north_deg, 360)),
        position_angle_deg_std=float(np.rad2deg(np.arctan2(tangential, separation))),
        snr=found.snr,
        snr_calibrated=calibrated,
        flux=found.flux,
        flux_std=found.flux_std,
        flux_debiased=float(total.b / total.a),
        flux_debiased_std=flux_std,
        flux_debiased_std_empirical=flux_std * factor,
        false_alarm_probability=noise.false_alarm(calibrated),
    )
    empirical = fit.flux_std * np.array(factors)
    misfit = fit.flux - source.flux_debiased * using.spectra[0]
    agreement = probability_of(misfit / empirical, using.at(separation))
    spectrum = SourceSpectrum(label, channels.wavelengths, fit.flux, fit.flux_std, empirical, found.template, agreement)
    return source, spectrum


def probability_of(misfit: Float[np.ndarray, "L"], correlation: Float[np.ndarray, "L L"]) -> float:
    """Of a misfit r as large, one parameter having been fitted: of r' R^-1 r, chi-squared with L - 1 degrees."""
    seen = np.isfinite(misfit)
    r = misfit[seen]
    if len(r) < 2:
        return float("nan")
    return float(chi2.sf(r @ np.linalg.solve(correlation[np.ix_(seen, seen)], r), len(r) - 1))


def excess(fit: SourceFit, correlation: Float[np.ndarray, "L L"]) -> float:
    """By how much the variance of the place, a sum over channels, is larger for noise that they share: each weighs in
    as its SNR u, so u' R u / u' u."""
    u = np.nan_to_num(fit.flux / fit.flux_std)
    return float(u @ correlation @ u / (u @ u)) if u.any() else 1.0


def blank_places(
    channels: Channels, place: Float[np.ndarray, "2"], taken: Sequence[Float[np.ndarray, "2"]]
) -> Float[np.ndarray, "N 2"]:
    """Places on the sky at the separation of `place`, more than one FWHM from those taken."""
    dy, dx = place - np.array(channels.centre)
    separation, start = np.hypot(dy, dx), np.arctan2(dy, dx)
    n = int(min(BLANKS, 2 * np.pi * separation // channels.fwhm_px))
    directions = start + 2 * np.pi * (np.arange(n) + 0.5) / max(n, 1)
    blanks = np.array(channels.centre) + separation * np.stack([np.sin(directions), np.cos(directions)], -1)
    apart = np.linalg.norm(blanks[:, None] - np.reshape(taken, (-1, 2)), axis=-1).min(1, initial=np.inf)
    return blanks[apart > channels.fwhm_px]


def blank_terms(
    channels: Channels, settings: Settings, places: Float[np.ndarray, "N 2"]
) -> tuple[Float[np.ndarray, "L M"], Float[np.ndarray, "L M"]]:
    """a and b of the unbiased flux b / a at every place, in every channel; none where there are too few places."""
    if len(places) < MIN_BLANKS:
        return np.ones((len(channels.each), 0)), np.ones((len(channels.each), 0))
    rows = []
    for number, of in enumerate(channels.each):
        stack, patch = prepare(of, settings)
        at = jnp.asarray(channels.in_channel(number, places), of.deviations.dtype)
        fits = [first(characterise(stack, at[i : i + 1], patch, move=False)) for i in range(len(at))]  # one program
        a, flux = (np.array([float(v) for v in values]) for values in zip(*((f.a, f.flux) for f in fits), strict=True))
        rows.append((a / of.unit**2, a * flux / of.unit))
    a, b = np.moveaxis(np.array(rows), 1, 0)
    return a, b


def scatter(pulls: Float[np.ndarray, "N"]) -> float:
    """Of values that theory has at 1, with the correction for few places (Mawet et al. 2014, ApJ 792:97); NaN where
    there are fewer than MIN_BLANKS."""
    pulls = pulls[np.isfinite(pulls)]
    return float(pulls.std(ddof=1) * np.sqrt(1 + 1 / len(pulls))) if len(pulls) >= MIN_BLANKS else float("nan")


def error_factor(of: Observation, settings: Settings, place: tuple[float, float], fits: list[Fit]) -> float:
    """Scatter of the unbiased flux over its formal error, at blank places of the same separation.

    With the correction for few places (Mawet et al. 2014, ApJ 792:97). NaN where there are fewer than MIN_BLANKS.
    """
    channels = as_channels(of)
    taken = [np.array([float(f.y), float(f.x)]) for f in fits]
    a, b = blank_terms(channels, settings, blank_places(channels, np.array(place), taken))
    return scatter((b / np.sqrt(a))[0])
