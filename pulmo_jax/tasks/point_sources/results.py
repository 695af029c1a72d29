"""Output files of a search: FITS maps, tables of sources, spectra and limits, and metrics."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from pulmo_jax.core.geometry import rotation_deg
from pulmo_jax.evaluation.photometry import delta_magnitude, relative_photometry
from pulmo_jax.inference.contrast import Contrast, throughput_map
from pulmo_jax.inference.fits import flatten, write_fits
from pulmo_jax.inference.outputs import as_csv
from pulmo_jax.inference.point_sources import Search, SourceSpectrum
from pulmo_jax.inference.spectral_trials import trials_threshold
from pulmo_jax.tasks.point_sources.config import StackConfig
from pulmo_jax.tasks.point_sources.map_headers import header
from pulmo_jax.tasks.point_sources.report import Result, line_of
from pulmo_jax.tasks.point_sources.units import FLUX_UNIT, RELATIVE, unit_code
from pulmo_jax.types import PointSource


def likelihood_maps(result: Result, search: Search) -> dict[str, np.ndarray]:
    """All maps of a search.

    Args:
        result: The observation, with detection limits.
        search: Result of the search.

    Returns:
        Maps (H, W) by name.
    """
    observation = result.channels
    maps = {name: getattr(search.maps, name) for name in ("snr", "flux", "flux_std", "a", "b")}
    maps |= {"snr_calibrated": search.snr_calibrated, "snr_null": search.null.snr}
    maps |= {"a_null": search.null.a, "b_null": search.null.b}
    if result.contrast is not None and len(result.contrast.separation_px):
        maps["throughput"] = np.where(
            np.isfinite(search.maps.snr), throughput_map(result.contrast, observation.shape, observation.centre), np.nan
        )
    if len(search.combination.spectra) > 1:
        maps["template"] = np.where(search.template >= 0, search.template, np.nan)
    return {name: np.asarray(image) for name, image in maps.items()}


def write_maps(result: Result, search: Search, out_dir: Path) -> None:
    """Write every map as a FITS file, with the config and the observation in its header.

    Args:
        result: The observation, with detection limits.
        search: Result of the search.
        out_dir: Output folder.
    """
    parameters = flatten(result.config.model_dump(mode="json"))
    for name, image in likelihood_maps(result, search).items():
        write_fits(out_dir / f"{name}.fits", image, header(result, search, name), parameters)


def detections_csv(sources: list[PointSource], data: StackConfig, star_flux: float | None) -> str:
    """detections.csv, with separations in arcsec, contrasts and magnitudes where they are known.

    Args:
        sources: Detected sources.
        data: Keys of the stack.
        star_flux: Flux of the star in units of the normalised PSF, if known.

    Returns:
        Content of the file.
    """
    names = [field.name for field in fields(PointSource)] + [FLUX_UNIT]
    scaled = ["separation_arcsec", "separation_arcsec_std"] if data.pixel_scale else []
    rows = []
    for source in sources:
        row = asdict(source) | {FLUX_UNIT: unit_code(data)}
        if data.pixel_scale:
            row["separation_arcsec"] = source.separation_px * data.pixel_scale
            row["separation_arcsec_std"] = source.separation_px_std * data.pixel_scale
        if star_flux is not None:
            relative = relative_photometry(source.flux_debiased, source.flux_debiased_std_empirical, star_flux)
            row |= {name: float(value) for name, value in relative.items()}
        rows.append(row)
    return as_csv([*names, *scaled, *(RELATIVE if star_flux is not None else ())], rows)


def spectra_csv(spectra: list[SourceSpectrum], result: Result) -> str:
    """spectra.csv: flux and template of every source in every channel, with contrasts if the star's flux is known."""
    data, star_flux = result.config.data, result.fluxes.star
    rows = []
    for s in spectra:
        relative = {} if star_flux is None else relative_photometry(s.flux, s.flux_std_empirical, star_flux)
        for k in range(len(s.flux)):
            row = {"label": s.label, "channel": k, "wavelength": s.wavelengths[k], "flux": s.flux[k]}
            row |= {
                "flux_std": s.flux_std[k],
                "flux_std_empirical": s.flux_std_empirical[k],
                FLUX_UNIT: unit_code(data),
            }
            row |= {"template": s.template, "spectrum": result.name_of_spectrum(s.template)}
            row |= {"template_probability": s.template_probability}
            rows.append(row | {name: values[k] for name, values in relative.items()})
    names = ["label", "channel", "wavelength", "flux", "flux_std", "flux_std_empirical", FLUX_UNIT]
    names += ["template", "spectrum", "template_probability"]
    return as_csv([*names, *(RELATIVE if star_flux is not None else ())], rows)


def contrast_csv(contrast: Contrast, data: StackConfig, star_flux: float | None) -> str:
    """contrast.csv: detected fluxes by separation, with contrasts and magnitudes if the star's flux is known.

    Args:
        contrast: Fluxes that are detected.
        data: Keys of the stack.
        star_flux: Flux of the star in units of the normalised PSF, if known.

    Returns:
        Content of the file. `limit_corrected` is `half_low` by its earlier name.
    """
    columns: dict[str, Any] = {field.name: getattr(contrast, field.name) for field in fields(Contrast)}
    columns |= {"limit_corrected": contrast.half_low, FLUX_UNIT: [unit_code(data)] * len(contrast.n)}
    if data.pixel_scale:
        columns = {"separation_arcsec": contrast.separation_px * data.pixel_scale} | columns
    if star_flux is not None:
        limits = {"": contrast.limit, "_half": contrast.half_low, "_95": contrast.most_low}
        columns |= {f"contrast{name}": flux / star_flux for name, flux in limits.items()}
        columns |= {f"delta_mag{name}": delta_magnitude(flux / star_flux) for name, flux in limits.items()}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return as_csv(list(columns), rows)


def summarise(result: Result, search: Search, seconds: float) -> dict[str, Any]:
    """Content of metrics.json."""
    observation, profile = result.channels.reference, search.profile
    null = search.null.snr[np.isfinite(search.null.snr)]
    return {
        "sources": len(search.sources),
        "highest_snr": float(np.nanmax(search.maps.snr)),
        "frames": len(observation.deviations),
        "frames_left_out": int((~observation.kept).sum()),
        "rotation_deg": rotation_deg(observation.angles_deg),
        "patch_pixels": search.n_patch,
        "shrinkage_median": float(np.nanmedian(search.maps.shrinkage)),
        "singular_locations": int(search.maps.singular.sum()),
        "psf_fwhm_px": result.channels.fwhm_px,
        "flux_unit": unit_code(result.config.data),
        "star_flux": result.fluxes.star_mean,
        "psf_error": search.maps.psf_error,
        "snr_error": search.maps.snr_error if np.isfinite(search.maps.snr_error) else None,
        "wavelengths": result.channels.wavelengths.tolist() if len(result.stack.wavelengths) > 1 else None,
        "spectral_correlation": {
            "separation_px": search.combination.separation_px.tolist(),
            "correlation": search.combination.correlation.tolist(),
        },
        "spectra_tried": len(search.combination.spectra),
        "spectra": [result.name_of_spectrum(number) for number in range(len(search.combination.spectra))],
        "effective_trials": search.noise.trials,
        "threshold": trials_threshold(result.config.search.threshold, search.noise.trials),
        "null": {"mean": float(null.mean()), "std": float(null.std()), "highest": float(null.max())},
        "null_by_separation": {
            "separation_px": profile.separation_px.tolist(),
            "std": profile.std.tolist(),
            "independent": profile.n.tolist(),
        },
        "refit_gain": search.noise.refit_gain,
        "caveats": [*result.stack.caveats, *search.caveats],
        "seconds": seconds,
        **({"sample": sample} if (sample := line_of(result)) else {}),
    }
