"""python -m pulmo_jax.detect: point sources in a rotating image stack, with their uncertainties and the limits."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from pulmo_jax import __version__
from pulmo_jax.core.geometry import rotation_deg
from pulmo_jax.data.adi import SpectralStack, load_channels, load_spectra
from pulmo_jax.data.observing_date import observed_mjd
from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.data.synthetic import SyntheticSpectralStack, spectral_stack
from pulmo_jax.evaluation.contrast import Contrast, contrast_curve, throughput_map
from pulmo_jax.host.console import make_console, tracker
from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.inference.fits import flatten, write_fits
from pulmo_jax.inference.outputs import as_csv
from pulmo_jax.inference.point_sources import Search, SourceSpectrum, find_sources
from pulmo_jax.methods.paco import Settings
from pulmo_jax.methods.paco.channels import observe_channels
from pulmo_jax.methods.paco.spectral import as_spectra
from pulmo_jax.runs.directory import provenance, save_config, use_compile_cache
from pulmo_jax.shell import cli
from pulmo_jax.tasks.point_sources.combination import combine_runs
from pulmo_jax.tasks.point_sources.config import DetectConfig, PacoConfig, StackConfig
from pulmo_jax.tasks.point_sources.report import Result, counted, write_adi_report
from pulmo_jax.types import InputError, PointSource

EXAMPLES = """
Writes snr, flux, flux_std, a, b and other maps (.fits), detections.csv, contrast.csv, metrics.json, report.html and
figures/ into runs/NAME/TIME, or into hydra.run.dir=DIR; of several wavelengths spectra.csv too.

  python -m pulmo_jax.detect +experiment=adi                            a synthetic stack with three known planets
  python -m pulmo_jax.detect +experiment=adi data.cube=C.fits data.angles=A.fits data.psf=P.fits data.pixel_scale=0.027
  python -m pulmo_jax.detect +experiment=adi data.cube=C.fits ... data.wavelengths=W.fits data.spectrum=S.txt
  python -m pulmo_jax.detect +experiment=adi method.mode=fast method.shrinkage=cv search.snr=calibrated
  python -m pulmo_jax.detect +experiment=adi method.mode=robust         weighs every frame, place by place
  python -m pulmo_jax.detect +experiment=epochs epochs.runs=[RUN1,RUN2]  finished runs on one star, combined
  python -m pulmo_jax.detect -m +experiment=adi method.shrinkage=paco,oas,ledoit_wolf,cv seed=0,1,2
"""


def detect(config: DetectConfig, out_dir: Path) -> int:
    """The whole job; returns the number of sources found."""
    if config.epochs.runs:
        return combine_runs(config, out_dir)
    began, console = time.monotonic(), make_console()
    use_compile_cache(config.compile_cache)
    with jax.enable_x64(config.method.precision == "float64"):
        synthetic = synthetic_stack(config) if config.data.cube is None else None
        stack = synthetic.stack if synthetic else load(config.data)
        with naming(config.data.psf):
            psfs = [prepare_psf(psf, config.data.psf_flux, config.data.psf_aperture_px) for psf in stack.psf]
        with naming(config.data.spectrum):
            spectra = as_spectra(stack.spectra, len(psfs))
        with naming(config.data.cube, config.data.angles):
            angles_deg, scaled = config.data.angle_sign * stack.angles_deg, config.data.spectral_scaling
            of = observe_channels(stack.cube, angles_deg, psfs, stack.wavelengths, config.data.centre, scaled)
        truth = (synthetic.planets, None, synthetic.spectrum) if synthetic else ((), None, None)
        result = Result(config, stack, of, *truth)
        say(console, result)
        settings = settings_of(config.method)
        search = find_sources(
            of,
            settings,
            config.search.threshold,
            calibrated=config.search.snr == "calibrated",
            max_sources=config.search.max_sources,
            north_deg=config.data.north_deg,
            say=lambda text: console.print(text, highlight=False),
            track=long_work(console, "mapping"),
            spectra=spectra,
        )
        contrast = None
        if config.contrast.rings:
            contrast = contrast_curve(
                search.residual,
                settings,
                config.search.threshold,
                config.contrast.directions,
                config.contrast.rings,
                search.profile if config.search.snr == "calibrated" else None,
                track=tracker(console, "injecting, round by round"),
                using=search.combination,
            )
    result = replace(result, contrast=contrast)
    for caveat in search.caveats[len(of.caveats) :]:
        console.print(f"note: {caveat}", highlight=False)
    clear(out_dir)
    write_maps(result, search, out_dir)
    write_text(out_dir / "detections.csv", detections_csv(search.sources, config.data))
    if len(of.each) > 1:
        write_text(out_dir / "spectra.csv", spectra_csv(search.spectra))
    if contrast is not None:
        write_text(out_dir / "contrast.csv", contrast_csv(contrast, config.data))
    write_json(out_dir / "metrics.json", summarise(result, search, time.monotonic() - began))
    write_json(out_dir / "run.json", provenance())
    save_config(config, out_dir / "config.yaml")
    write_adi_report(result, search, out_dir, console)
    console.print(
        f"{counted(len(search.sources), 'source')}, {time.monotonic() - began:.0f} s; see {out_dir / 'report.html'}",
        highlight=False,
    )
    return len(search.sources)


@contextmanager
def naming(*files: Path | None) -> Iterator[None]:
    """What is wrong with arrays is said with the files that they came from."""
    try:
        yield
    except InputError as error:
        named = ", ".join(str(file) for file in files if file is not None)
        raise InputError(f"{named}: {error}" if named else str(error)) from error


def load(data: StackConfig) -> SpectralStack:
    cube, angles, psf = data.cube, data.angles, data.psf
    if cube is None or angles is None or psf is None:
        raise AssertionError("the config gives all three or none")
    return load_channels(cube, angles, psf, data.wavelengths, data.spectrum)


def synthetic_stack(config: DetectConfig) -> SyntheticSpectralStack:
    how, spectrum = config.data.synthetic, config.data.spectrum
    made = spectral_stack(config.seed, how.channels, how.frames, how.size, how.rotation_deg, how.planets)
    return (
        made
        if spectrum is None
        else replace(made, stack=replace(made.stack, spectra=load_spectra(spectrum, how.channels)))
    )


def settings_of(config: PacoConfig) -> Settings:
    names = {field.name for field in fields(Settings)}
    return Settings(**{name: value for name, value in config.model_dump().items() if name in names})


def long_work(console: Console, label: str) -> Any:
    """A progress bar where people look and where there is more than one step."""

    def track(items: Iterable, total: int) -> Iterable:
        return tracker(console, label)(items, total) if total > 1 and console.is_terminal else items

    return track


def clear(out_dir: Path) -> None:
    """Take away an earlier run's results, of which this one may not write all."""
    names = [f"{name}.fits" for name in MEANINGS]
    for name in (*names, "detections.csv", "spectra.csv", "contrast.csv", "metrics.json", "report.html"):
        (out_dir / name).unlink(missing_ok=True)
    for figure in (out_dir / "figures").glob("*"):
        figure.unlink()


def say(console: Console, result: Result) -> None:
    """What is about to be worked on, and what must be known of it."""
    of, (height, width), stack = result.of.reference, result.of.shape, result.stack
    source = result.config.data.cube or f"a synthetic stack with {len(result.truth)} planets, seed {result.config.seed}"
    channels = f"{len(result.of.each)} channels of " if len(stack.wavelengths) > 1 else ""
    console.print(
        f"{source}: {channels}{len(of.deviations)} frames of {height} x {width} px, rotating by "
        f"{rotation_deg(of.angles_deg):.1f} degrees; PSF {of.psf.fwhm_px:.2f} px wide",
        highlight=False,
    )
    for caveat in (*stack.caveats, *result.of.caveats):
        console.print(f"note: {caveat}", highlight=False)


def write_maps(result: Result, search: Search, out_dir: Path) -> None:
    """Every map as a FITS file with all that it was made with in its header."""
    of = result.of
    maps = {name: getattr(search.maps, name) for name in ("snr", "flux", "flux_std", "a", "b")}
    maps |= {"snr_calibrated": search.snr_calibrated, "snr_null": search.null.snr}
    maps |= {"a_null": search.null.a, "b_null": search.null.b}
    if result.contrast is not None and len(result.contrast.separation_px):
        maps["throughput"] = np.where(
            np.isfinite(search.maps.snr), throughput_map(result.contrast, of.shape, of.centre), np.nan
        )
    if len(search.combination.spectra) > 1:
        maps["template"] = np.where(search.template >= 0, search.template, np.nan)
    parameters = flatten(result.config.model_dump(mode="json"))
    for name, image in maps.items():
        write_fits(out_dir / f"{name}.fits", image, header(result, search, name), parameters)


MEANINGS = {
    "snr": ("b / sqrt(a)", ""),
    "flux": ("b / a, of one pass", "psf"),
    "flux_std": ("1 / sqrt(a)", "psf"),
    "a": ("sum of h' C^-1 h over the frames", "psf-2"),
    "b": ("sum of h' C^-1 (r - m) over the frames", "psf-1"),
    "snr_calibrated": ("snr over the spread of the empirical null", ""),
    "snr_null": ("snr with the angles reversed, sources taken out", ""),
    "a_null": ("a with the angles reversed, sources taken out", "psf-2"),
    "b_null": ("b with the angles reversed, sources taken out", "psf-1"),
    "throughput": ("share of an injected source's flux that is left", ""),
    "template": ("number of the spectrum that fits best, from 0", ""),
}


def header(result: Result, search: Search, name: str) -> dict[str, tuple[Any, str]]:
    """What the map is, and the observation's own numbers; the config comes on top."""
    of, maps, scale = result.of.reference, search.maps, result.config.data.pixel_scale
    centre, wavelengths = result.of.centre, result.of.wavelengths
    meaning, unit = MEANINGS[name]
    cards: dict[str, tuple[Any, str]] = {
        "OBJECT": (name, meaning),
        "CREATOR": (f"pulmo_jax {__version__}", "Flasseur et al. 2018, A&A 618, A138"),
        "CENTERY": (centre[0], "[px] centre of rotation, from 0"),
        "CENTERX": (centre[1], "[px] centre of rotation, from 0"),
        "CRPIX1": (centre[1] + 1, "[px] the same, from 1"),
        "CRPIX2": (centre[0] + 1, "[px] the same, from 1"),
        "NFRAMES": (len(of.deviations), "frames used"),
        "NDROPPED": (int((~of.kept).sum()), "frames left out"),
        "NMASKED": (int((~of.usable).sum()), "pixels left out"),
        "ROTATION": (rotation_deg(of.angles_deg), "[deg] of the field"),
        "NPATCH": (search.n_patch, "pixels of a patch"),
        "RHOMED": (float(np.nanmedian(maps.shrinkage)), "median weight of the diagonal"),
        "NSINGULR": (int(maps.singular.sum()), "locations with a singular covariance"),
        "PSFFWHM": (result.of.fwhm_px, "[px] of the PSF"),
        "PSFNORM": (of.psf.flux_kind, "what of the PSF is 1"),
        "PSFFLUX": (of.psf.flux, "what the PSF was divided by"),
        "PSFERR": (maps.psf_error, "largest relative error of its expansion"),
        "SNRERR": (maps.snr_error, "bound on what that adds to the noise of the SNR"),
    }
    if len(wavelengths) > 1:
        cards["NCHANNEL"] = (len(wavelengths), "wavelengths; what is said of frames is of the middle one")
        cards["WAVEMIN"], cards["WAVEMAX"] = (wavelengths[0], "the first"), (wavelengths[-1], "the last")
        cards["NSPECTRA"] = (len(search.combination.spectra), "spectra tried, each of mean 1")
    if unit:
        cards["BUNIT"] = (unit, "psf: flux of the normalised PSF")
    if scale is not None:
        cards["PIXSCALE"] = (scale, "[arcsec/px]")
    if result.config.data.cube is not None and (mjd := observed_mjd(result.config.data.cube)) is not None:
        cards["MJD-OBS"] = (mjd, "of the cube's header")
    return cards


def detections_csv(sources: list[PointSource], data: StackConfig) -> str:
    """One row a source; separations in arcsec and contrasts too where the config says how."""
    names = [field.name for field in fields(PointSource)]
    scaled = ["separation_arcsec", "separation_arcsec_std"] if data.pixel_scale else []
    contrasts = ["contrast", "contrast_std"] if data.star_flux else []
    rows = []
    for source in sources:
        row = asdict(source)
        if data.pixel_scale:
            row["separation_arcsec"] = source.separation_px * data.pixel_scale
            row["separation_arcsec_std"] = source.separation_px_std * data.pixel_scale
        if data.star_flux:
            row["contrast"] = source.flux_debiased / data.star_flux
            row["contrast_std"] = source.flux_debiased_std_empirical / data.star_flux
        rows.append(row)
    return as_csv([*names, *scaled, *contrasts], rows)


def spectra_csv(spectra: list[SourceSpectrum]) -> str:
    """One row a source and channel."""
    rows = [
        {"label": s.label, "channel": k, "wavelength": s.wavelengths[k], "flux": s.flux[k], "flux_std": s.flux_std[k]}
        | {"flux_std_empirical": s.flux_std_empirical[k], "template": s.template}
        | {"template_probability": s.template_probability}
        for s in spectra
        for k in range(len(s.flux))
    ]
    names = ["label", "channel", "wavelength", "flux", "flux_std", "flux_std_empirical"]
    names += ["template", "template_probability"]
    return as_csv(names, rows)


def contrast_csv(contrast: Contrast, data: StackConfig) -> str:
    columns = {field.name: getattr(contrast, field.name) for field in fields(Contrast)}
    if data.pixel_scale:
        columns = {"separation_arcsec": contrast.separation_px * data.pixel_scale} | columns
    if data.star_flux:
        columns["contrast"] = contrast.limit / data.star_flux
        columns["contrast_corrected"] = contrast.limit_corrected / data.star_flux
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return as_csv(list(columns), rows)


def summarise(result: Result, search: Search, seconds: float) -> dict[str, Any]:
    """metrics.json."""
    of, profile = result.of.reference, search.profile
    null = search.null.snr[np.isfinite(search.null.snr)]
    return {
        "sources": len(search.sources),
        "highest_snr": float(np.nanmax(search.maps.snr)),
        "frames": len(of.deviations),
        "frames_left_out": int((~of.kept).sum()),
        "rotation_deg": rotation_deg(of.angles_deg),
        "patch_pixels": search.n_patch,
        "shrinkage_median": float(np.nanmedian(search.maps.shrinkage)),
        "singular_locations": int(search.maps.singular.sum()),
        "psf_fwhm_px": result.of.fwhm_px,
        "psf_error": search.maps.psf_error,
        "snr_error": search.maps.snr_error if np.isfinite(search.maps.snr_error) else None,
        "wavelengths": result.of.wavelengths.tolist() if len(result.stack.wavelengths) > 1 else None,
        "spectral_correlation": {
            "separation_px": search.combination.separation_px.tolist(),
            "correlation": search.combination.correlation.tolist(),
        },
        "spectra_tried": len(search.combination.spectra),
        "null": {"mean": float(null.mean()), "std": float(null.std()), "highest": float(null.max())},
        "null_by_separation": {
            "separation_px": profile.separation_px.tolist(),
            "std": profile.std.tolist(),
        },
        "caveats": [*result.stack.caveats, *search.caveats],
        "seconds": seconds,
    }


if __name__ == "__main__":
    cli.main("detect", detect, EXAMPLES)
