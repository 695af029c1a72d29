"""Files of a prepared stack: cube, angles, PSF, map of bad pixels and table of frames."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from astropy.io import fits
from jaxtyping import Bool, Float, Int

from pulmo_jax import __version__
from pulmo_jax.data.preparation.frame_selection import Scores
from pulmo_jax.evaluation.halo_centre import HaloCentre
from pulmo_jax.host.calls import CALL
from pulmo_jax.host.files import atomically, write_json, write_text
from pulmo_jax.inference.outputs import as_csv
from pulmo_jax.reporting.provenance import provenance
from pulmo_jax.runs.directory import save_config
from pulmo_jax.tasks.point_sources.config import PrepareConfig
from pulmo_jax.tasks.point_sources.preparation_reading import RawStack
from pulmo_jax.tasks.point_sources.preparation_shifts import Shifts

COLUMNS = ["channel", "frame", "kept", "reason", "angle_deg", "shift_y", "shift_x", "correlation", "flux", "spread",
           "replaced_pixels"]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prepared stack and how it was made.

    Attributes:
        stack: The stack; its cube has been changed in place.
        cube: Prepared frames, kept or not (L, T, h, w).
        centre: Position of the star in them (y, x), px.
        kept: Frames that are written (T,).
        shifts: Shifts that were applied.
        scores: Scores of the frames, mean over the channels.
        reasons: Frames that are left out, by reason (T,).
        annulus_px: Radii of the scored annulus, px.
        replaced: Number of frames in which each pixel was replaced (L, H, W).
        per_frame: Number of pixels that were replaced in each frame alone (L, T).
        permanent: Pixels that were replaced in all frames (L, H, W).
        before: Median frames of the input (L, H, W).
        after: Median frames of the prepared stack (L, h, w).
        halo: Centre of the halo of the prepared stack, if it has one.
        caveats: Warnings.
    """

    stack: RawStack
    cube: Float[np.ndarray, "L T h w"] = field(repr=False)
    centre: tuple[float, float]
    kept: Bool[np.ndarray, "T"]
    shifts: Shifts
    scores: Scores
    reasons: dict[str, Bool[np.ndarray, "T"]]
    annulus_px: tuple[float, float]
    replaced: Int[np.ndarray, "L H W"] = field(repr=False)
    per_frame: Int[np.ndarray, "L T"] = field(repr=False)
    permanent: Bool[np.ndarray, "L H W"] = field(repr=False)
    before: Float[np.ndarray, "L H W"] = field(repr=False)
    after: Float[np.ndarray, "L h w"] = field(repr=False)
    halo: HaloCentre | None
    caveats: tuple[str, ...]


def write_prepared(prepared: Prepared, config: PrepareConfig, folder: Path, seconds: float) -> None:
    """Write all files but the report.

    Args:
        prepared: The prepared stack.
        config: Config of `prepare`.
        folder: Output folder.
        seconds: Time of the computation, s.
    """
    stack, kept = prepared.stack, prepared.kept
    atomically(folder / "cube.fits", lambda target: stream_cube(target, prepared, cube_header(prepared, config)))
    if stack.angles_deg is not None:
        write_array(folder / "angles.fits", stack.angles_deg[kept], fits.Header({"BUNIT": "deg"}))
    if stack.wavelengths is not None:
        write_array(folder / "wavelengths.fits", stack.wavelengths, fits.Header())
    if stack.psfs is not None:
        stamps = np.stack([psf.stamp for psf in stack.psfs])
        write_array(folder / "psf.fits", stamps if len(stamps) > 1 else stamps[0], fits.Header())
    counts = prepared.replaced if len(prepared.replaced) > 1 else prepared.replaced[0]
    write_array(folder / "bad_pixels.fits", counts, fits.Header({"BUNIT": "frames"}))
    write_text(folder / "frames.csv", as_csv(COLUMNS, frame_rows(prepared)))
    write_json(folder / "metrics.json", summarise(prepared) | {"seconds": seconds})
    write_json(folder / "run.json", {**provenance(), "seconds": round(CALL.get().seconds, 1)})
    save_config(config, folder / "config.yaml")


def write_array(path: Path, array: np.ndarray, header: fits.Header) -> None:
    """Write an array as a FITS file with checksums."""
    hdu = fits.PrimaryHDU(np.ascontiguousarray(array), header)
    atomically(path, lambda target: hdu.writeto(target, output_verify="silentfix", checksum=True))


def stream_cube(path: Path, prepared: Prepared, header: fits.Header) -> None:
    """Write the kept frames one by one, without a copy of the cube; the first axis is left out without wavelengths."""
    cube, kept = prepared.cube, np.flatnonzero(prepared.kept)
    channels = () if prepared.stack.wavelengths is None else (len(cube),)
    axes = {f"NAXIS{k + 1}": n for k, n in enumerate((*channels, len(kept), *cube.shape[2:])[::-1])}
    whole = fits.Header({"SIMPLE": True, "BITPIX": -8 * cube.itemsize, "NAXIS": len(axes)} | axes)
    whole.extend(header, unique=True)
    stream = fits.StreamingHDU(str(path), whole)
    for channel in cube:
        for number in kept:
            stream.write(np.ascontiguousarray(channel[number]))
    stream.close()


def cube_header(prepared: Prepared, config: PrepareConfig) -> fits.Header:
    """Cards of the input that still hold, and those of the preparation."""
    header, kept = prepared.stack.header.copy(), prepared.kept
    header["CREATOR"] = (f"pulmo_jax {__version__}", "prepare")
    header["CENTERY"] = (float(prepared.centre[0]), "[px] position of the star, from 0")
    header["CENTERX"] = (float(prepared.centre[1]), "[px] position of the star, from 0")
    header["NFRAMES"] = (int(kept.sum()), "frames kept")
    header["NDROPPED"] = (int((~kept).sum()), "frames left out")
    header["RECENTRE"] = (config.recentre.method, "method of recentring")
    if config.pixel_scale is not None:
        header["PIXSCALE"] = (config.pixel_scale, "[arcsec/px]")
    return header


def frame_rows(prepared: Prepared) -> list[dict[str, object]]:
    """Rows of frames.csv: one for each frame of each channel."""
    channels, frames = prepared.per_frame.shape
    angles, scores = prepared.stack.angles_deg, prepared.scores
    return [
        {
            "channel": channel,
            "frame": frame,
            "kept": int(prepared.kept[frame]),
            "reason": " ".join(name for name, mask in prepared.reasons.items() if mask[frame]),
            "angle_deg": np.nan if angles is None else float(angles[frame]),
            "shift_y": float(prepared.shifts.applied[channel, frame, 0]),
            "shift_x": float(prepared.shifts.applied[channel, frame, 1]),
            "correlation": float(scores.correlation[frame]),
            "flux": float(scores.flux[frame]),
            "spread": float(scores.spread[frame]),
            "replaced_pixels": int(prepared.per_frame[channel, frame]),
        }
        for channel in range(channels)
        for frame in range(frames)
    ]


def summarise(prepared: Prepared) -> dict[str, object]:
    """Content of metrics.json."""
    halo = prepared.halo
    return {
        "frames": len(prepared.kept),
        "frames_kept": int(prepared.kept.sum()),
        "frames_left_out": {name: np.flatnonzero(mask).tolist() for name, mask in prepared.reasons.items()},
        "bad_pixels_permanent": prepared.permanent.sum(axis=(1, 2)).tolist(),
        "bad_pixels_of_single_frames": int(prepared.per_frame.sum()),
        "centre": list(prepared.centre),
        "halo_centre": None if halo is None else {"y": halo.y, "x": halo.x, "y_std": halo.y_std, "x_std": halo.x_std},
        "psf_fwhm_px": None if prepared.stack.psfs is None else [psf.fwhm_px for psf in prepared.stack.psfs],
        "caveats": list(prepared.caveats),
    }


def command(prepared: Prepared, config: PrepareConfig, folder: Path) -> str:
    """Command that searches the prepared stack; files that were not given are placeholders."""
    stack, (height, width) = prepared.stack, prepared.cube.shape[2:]
    given = {"cube": True, "angles": stack.angles_deg is not None, "psf": stack.psfs is not None}
    files = [f"data.{name}={shlex.quote(str(folder / f'{name}.fits')) if there else f'{name.upper()}.fits'}"
             for name, there in given.items()]  # fmt: skip
    if stack.wavelengths is not None:
        files.append(f"data.wavelengths={shlex.quote(str(folder / 'wavelengths.fits'))}")
    if config.pixel_scale is not None:
        files.append(f"data.pixel_scale={config.pixel_scale:g}")
    if prepared.centre != (height // 2, width // 2):
        files.append(f"data.centre=[{prepared.centre[0]:g},{prepared.centre[1]:g}]")
    return " ".join(["python -m pulmo_jax.detect +experiment=adi", *files])
