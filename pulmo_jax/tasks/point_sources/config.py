"""Typed configs of `detect` and `prepare`: sources in a rotating image stack, and the stack itself."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pulmo_jax.config.choices import Frames, Mode, ShrinkageName
from pulmo_jax.config.section import Bool, Float, Int, Node, Pair, PathLike, Section, at_home
from pulmo_jax.data.file_parts import is_part, same_file, split_part
from pulmo_jax.host.extras import find_package
from pulmo_jax.types import InputError


def _is_file(path: PathLike) -> PathLike:
    if not split_part(path).file.is_file():
        raise ValueError(f"{'is a folder' if path.is_dir() else 'does not exist'}; give a file, or FILE[EXTENSION]")
    return path


def _is_star_flux(value: object) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    if not (number or value is None or value == "psf"):
        raise ValueError("must be a number greater than 0, psf, or null")
    return value


def _name_or_file(value: Any) -> str | Path:
    if value in ("library", "flat"):
        return value
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("give library, flat or a file")
    return _is_file(at_home(Path(value)))


def _can_sample(wanted: bool) -> bool:
    if wanted:
        try:
            find_package("blackjax", "posterior", "search.posterior=true")
        except InputError as error:
            raise ValueError(str(error)) from error
    return wanted


DataFile = Annotated[PathLike, AfterValidator(_is_file)]
Spectrum = Annotated[str | Path, BeforeValidator(_name_or_file)]
StarFlux = Annotated[float | str | None, BeforeValidator(_is_star_flux)]
Sampled = Annotated[Bool, AfterValidator(_can_sample)]
Triple = tuple[Float, Float, Float]


class SyntheticConfig(Section):
    """Synthetic image stack, used if data.cube is null."""

    frames: Int = Field(default=60, ge=2, description="number of frames")
    size: Int = Field(default=100, ge=32, description="side of the frames, px")
    channels: Int = Field(
        default=1, ge=1, description="number of wavelengths; the sources' spectrum rises from half its mean"
    )
    rotation_deg: Float = Field(default=60.0, gt=0, lt=360, description="total field rotation")
    planets: tuple[Triple, ...] | None = Field(
        default=None, description="[[y,x,flux],...] in the derotated frame; null: three planets"
    )

    @model_validator(mode="after")
    def _inside(self) -> "SyntheticConfig":
        for y, x, _ in self.planets or ():
            if not (0 <= y <= self.size - 1 and 0 <= x <= self.size - 1):
                raise ValueError(f"data.synthetic.planets: ({y:g}, {x:g}) lies outside frames of {self.size} px")
        return self


class StackConfig(Section):
    """Image stack. A source at position angle theta in the derotated map is at theta - angle in a frame."""

    cube: DataFile | None = Field(
        default=None,
        description="image stack (T,H,W) or (L,T,H,W), FITS (also FILE[EXT]), TIFF or .npy; null: synthetic, with "
        "known planets",
    )
    angles: DataFile | None = Field(
        default=None,
        description="parallactic angle of each frame, degrees: FITS image or table, text, CSV or .npy; null: from the "
        "file of the cube",
    )
    psf: DataFile | None = Field(
        default=None, description="PSF image (off-axis, unsaturated star), (H,W) or (L,H,W): FITS, TIFF or .npy"
    )
    wavelengths: DataFile | None = Field(
        default=None,
        description="wavelength of each channel of an (L,T,H,W) stack, any unit: FITS, text, CSV or .npy; null: from "
        "the header of the cube",
    )
    wavelength_unit: Literal["um", "nm", "m", "angstrom"] | None = Field(
        default=None, description="unit of the wavelengths; null: from the FITS header or their magnitude"
    )
    spectrum: Spectrum | None = Field(
        default=None,
        description="spectrum of the sources, (L,), or candidate spectra, (M,L), in units of the normalised PSF; "
        "null or library: flat, blackbodies, L-, T- and Y-like, each channel alone; flat: equal flux in all channels",
    )
    star_temperature_k: Float | None = Field(
        default=None, gt=0, description="temperature of the star for the library's contrasts, K; null: infinite"
    )
    spectral_scaling: Bool = Field(
        default=False,
        description="scale the frames to align the speckles; no benefit here, because statistics are per channel",
    )
    pixel_scale: Float | None = Field(
        default=None, gt=0, description="pixel scale, arcsec per pixel; null: from the header of the cube, or unknown"
    )
    centre: Pair | None = Field(default=None, description="centre of rotation [y,x], px from 0; null: [H//2,W//2]")
    angle_sign: Literal[1, -1] = Field(default=1, description="-1 if the field rotates the other way")
    pupil_offset_deg: Float | None = Field(
        default=None,
        description="offset of the pupil on the detector, added to every angle; null: 0, or the instrument's if the "
        "angles are from the header",
    )
    true_north_deg: Float | None = Field(
        default=None,
        description="correction for true north, added to every angle; null: 0, or the instrument's if the angles are "
        "from the header",
    )
    star_ra_deg: Float | None = Field(
        default=None, ge=0, le=360, description="right ascension of the star (ICRS), degrees; null: from the header"
    )
    star_dec_deg: Float | None = Field(
        default=None, ge=-90, le=90, description="declination of the star (ICRS), degrees; null: from the header"
    )
    north_deg: Float = Field(default=90.0, description="angle of north in the derotated map, from the x axis toward y")
    psf_flux: Literal["fwhm", "aperture", "peak", "none"] = Field(
        default="fwhm",
        description="normalisation of the PSF: unit flux within one FWHM or an aperture, unit peak, or none",
    )
    psf_aperture_px: Float | None = Field(default=None, gt=0, description="aperture radius for psf_flux=aperture")
    star_flux: StarFlux = Field(
        default=None,
        description="flux of the star in units of the normalised PSF, for contrasts and magnitudes; psf: the flux of "
        "data.psf times data.exposure_ratio; null: unknown",
    )
    exposure_ratio: Float = Field(
        default=1.0,
        gt=0,
        description="for star_flux=psf: (exposure x filter transmission) of a frame of the cube / the same of data.psf",
    )
    max_image_mb: Int = Field(
        default=32768, ge=1, description="largest accepted array of a file, MiB; it must also fit into the free memory"
    )
    synthetic: SyntheticConfig = SyntheticConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "StackConfig":
        given = {key: getattr(self, key) is not None for key in ("cube", "angles", "psf")}
        if any(given.values()) and not (given["cube"] and given["psf"]):
            missing = ", ".join(f"data.{key}" for key, there in given.items() if not there)
            raise ValueError(f"{missing} must be given too: a stack is a cube, its angles and a PSF")
        files = [path for path in (self.cube, self.psf) if path is not None and not is_part(path)]
        if len(files) > 1 and same_file(*files):
            raise ValueError(
                f"data.cube and data.psf are both {self.cube}; data.psf must be an image of the star alone, or its "
                "extension, FILE[EXT]"
            )
        if self.wavelengths is not None and self.cube is None:
            raise ValueError("data.wavelengths belongs to a data.cube; a synthetic stack has data.synthetic.channels")
        if (self.star_ra_deg is None) != (self.star_dec_deg is None):
            raise ValueError("data.star_ra_deg and data.star_dec_deg belong together")
        if (self.psf_flux == "aperture") != (self.psf_aperture_px is not None):
            raise ValueError("data.psf_flux=aperture and data.psf_aperture_px=RADIUS belong together")
        if self.exposure_ratio != 1 and self.star_flux != "psf":
            raise ValueError(
                f"data.exposure_ratio={self.exposure_ratio:g} and data.star_flux=psf belong together; a star_flux in "
                "numbers is that of the star in a frame of the cube"
            )
        return self


class PacoConfig(Section):
    """Patch covariances (Flasseur et al. 2018)."""

    mode: Mode = Field(
        default="exact",
        description="exact: sub-pixel PSF in each frame; fast: interpolated maps; robust: exact, weighted frames, "
        "for bad frames in noise that is white in time; it loses 1 to 4 % of the SNR in clean stacks",
    )
    shrinkage: ShrinkageName = Field(default="paco", description="estimator of the weight of the diagonal (shrinkage)")
    rho: Float | None = Field(default=None, ge=0, le=1, description="weight of the diagonal for shrinkage=fixed")
    frames: Frames = Field(
        default="all",
        description="frames counted by the paco and oas estimators: all, or the effective number",
    )
    patch_radius_px: Float | None = Field(
        default=None, ge=1, description="radius of the circular patches; null: 0.9 FWHM"
    )
    psf_error: Float = Field(
        default=1e-3, gt=0, lt=0.1, description="relative error of the PSF expansion in exact and robust mode"
    )
    weights_error: Float = Field(
        default=1e-3, gt=0, lt=1, description="convergence tolerance of the frame weights in robust mode"
    )
    usable_share: Float = Field(default=0.5, gt=0, le=1, description="minimum fraction of usable pixels in a patch")
    precision: Literal["float32", "float64"] = Field(default="float32", description="floating-point precision")
    memory_mb: Int = Field(default=256, ge=16, description="memory for working arrays, in addition to the stack, MiB")

    @model_validator(mode="after")
    def _consistent(self) -> "PacoConfig":
        if (self.shrinkage == "fixed") != (self.rho is not None):
            raise ValueError("method.shrinkage=fixed and method.rho=SHARE belong together")
        return self


class SearchConfig(Section):
    """Selection of the detected sources."""

    threshold: Float = Field(default=5.0, gt=0, description="detection threshold, standard deviations of a Gaussian")
    snr: Literal["theoretical", "calibrated"] = Field(
        default="calibrated",
        description="quantity compared with the threshold: the significance in the empirical noise at the same "
        "separation (Student's t), or the theoretical SNR b/sqrt(a)",
    )
    max_sources: Int = Field(default=20, ge=0, description="maximum number of sources")
    posterior: Sampled = Field(default=False, description="sample the posterior of position and flux of each source")


class ContrastConfig(Section):
    """Injected sources for throughput and detection limits."""

    rings: Int = Field(default=12, ge=0, description="maximum number of separations; 0: no contrast curve")
    directions: Int = Field(default=8, ge=2, description="number of injections at each separation")
    unit: Literal["auto", "psf", "contrast", "magnitudes"] = Field(
        default="auto",
        description="unit of fluxes in figures: psf (flux of the normalised PSF), contrast, or magnitudes (maps and "
        "spectra then in contrast); auto: contrast if data.star_flux is given, else psf",
    )


def _is_detect_run(path: PathLike) -> PathLike:
    if not (path / "config.yaml").is_file():
        raise ValueError("no config.yaml there; give the run directory of a finished detect")
    return path


class EpochsConfig(Section):
    """Combination of finished runs of detect on one star, instead of searching a stack."""

    runs: tuple[Annotated[PathLike, AfterValidator(_is_detect_run)], ...] | None = Field(
        default=None, description="run directories to combine; null: search a stack"
    )
    dates: tuple[Float, ...] | None = Field(
        default=None, description="modified Julian date of each run; null: from the FITS headers"
    )
    orbits: Literal["fixed", "keplerian"] = Field(default="fixed", description="motion of a source between the epochs")
    flux: Literal["free", "constant"] = Field(
        default="free", description="flux of a source: free at every epoch (PACOME), or constant"
    )
    star_mass: Float | None = Field(
        default=None, gt=0, description="mass of the star, solar masses, for orbits=keplerian"
    )
    parallax_mas: Float | None = Field(default=None, gt=0, description="parallax, milliarcsec, for orbits=keplerian")
    semi_major_axis_au: Pair | None = Field(
        default=None, description="range [low,high] of semi-major axes; null: unlimited"
    )
    eccentricity: Pair = Field(default=(0.0, 0.5), description="range [low,high] of eccentricities")
    shapes: Int = Field(
        default=1024, ge=1, description="number of trial orbits through each position at the first date"
    )
    false_alarm: Float = Field(
        default=0.05, gt=0, lt=1, description="probability of at least one false detection in the field"
    )
    null_fields: Int = Field(default=200, ge=2, description="number of simulated noise fields that set the threshold")

    @model_validator(mode="after")
    def _consistent(self) -> "EpochsConfig":
        if self.runs is None and not self.dates and self.orbits == "fixed":
            return self
        if not self.runs:
            raise ValueError("epochs.runs=[RUN1,RUN2,...] is missing: give the run directories of detect to combine")
        folders = [run.resolve() for run in self.runs]
        if twice := next((run for i, run in enumerate(folders) if run in folders[:i]), None):
            raise ValueError(f"epochs.runs: {twice} is given twice; give every run once")
        if self.dates is not None and len(self.dates) != len(self.runs):
            raise ValueError(f"epochs.dates has {len(self.dates)} dates for {len(self.runs)} runs; give one per run")
        if self.dates is not None and len(set(self.dates)) < len(self.dates):
            raise ValueError("epochs.dates: two are equal; combine the frames of one date into one stack, or "
                             "give the times too (60000.25 is six hours after 60000)")  # fmt: skip
        missing = [f"epochs.{key}" for key in ("star_mass", "parallax_mas") if getattr(self, key) is None]
        if self.orbits == "keplerian" and missing:
            raise ValueError(f"epochs.orbits=keplerian needs {' and '.join(missing)}: they determine the orbital speed")
        low, high = self.eccentricity
        if not 0 <= low <= high <= 0.95:
            raise ValueError(f"epochs.eccentricity=[{low:g},{high:g}]: must be [LOW,HIGH] within 0 and 0.95")
        if self.semi_major_axis_au is not None and not 0 <= self.semi_major_axis_au[0] < self.semi_major_axis_au[1]:
            raise ValueError("epochs.semi_major_axis_au: must be [LOW,HIGH], ascending, from 0")
        return self


class DetectConfig(Section):
    """python -m pulmo_jax.detect"""

    name: str = Field(default="adi", description="title of the run")
    seed: Int = Field(default=0, ge=0, lt=2**31, description="random seed of the synthetic stack")
    resume: Bool = Field(default=False, description="in a sweep: skip the finished jobs in hydra.sweep.dir")
    task: Literal["point_sources"] = Field(
        default="point_sources", description="name of the task, set by the experiment"
    )
    plugins: tuple[str, ...] = Field(default=(), description="your packages that _target_ nodes may import")
    figures: dict[str, Node] = Field(default={}, description="nodes of your own report figures; figures=NAME chooses")
    data: StackConfig = StackConfig()
    method: PacoConfig = PacoConfig()
    search: SearchConfig = SearchConfig()
    contrast: ContrastConfig = ContrastConfig()
    epochs: EpochsConfig = EpochsConfig()
    frames_shown: Int = Field(default=4, ge=1, le=12, description="number of frames in the report")
    compile_cache: PathLike | None = Field(
        default=None, description="folder of the XLA compilation cache; null: in the user's cache folder"
    )

    @model_validator(mode="after")
    def _one_job(self) -> "DetectConfig":
        if self.epochs.runs and self.data.cube is not None:
            raise ValueError("data.cube and epochs.runs exclude each other: search the stack first, then combine runs")
        if self.epochs.runs and self.search.posterior:
            raise ValueError(
                "search.posterior=true and epochs.runs exclude each other: the posterior is that of the sources of one "
                "stack; set search.posterior=true in the run of each epoch"
            )
        if self.contrast.unit in ("contrast", "magnitudes") and self.data.star_flux is None and not self.epochs.runs:
            raise ValueError(
                f"contrast.unit={self.contrast.unit} needs data.star_flux: the flux of the star in a frame of the cube "
                "without coronagraph, measured as that of the PSF (data.psf_flux). If data.psf is an image of this "
                "star, give data.star_flux=psf and data.exposure_ratio=(exposure x transmission of a frame) / (those "
                "of the PSF image)"
            )
        return self


class BadPixelsConfig(Section):
    """Bad pixels, which are replaced from other frames and from their neighbours."""

    enabled: Bool = Field(default=True, description="find and replace bad pixels")
    sigma: Float = Field(
        default=6.0, gt=0, description="threshold in standard deviations; only structures sharper than the PSF count"
    )
    mask: DataFile | None = Field(
        default=None, description="known bad pixels, (H,W), not 0 where bad: FITS, TIFF or .npy"
    )


class RecentreConfig(Section):
    """Shifts of the frames, by splines of degree 5, that bring the star to [H//2,W//2]."""

    method: Literal["none", "peak", "cross_correlation", "satellite_spots"] = Field(
        default="none",
        description="none: frames stay; peak: an unsaturated star; cross_correlation: with the mean frame, where the "
        "star is at centre, or, if null, in the middle of frame or halo; satellite_spots: crossing of their diagonals",
    )
    spots: tuple[Pair, ...] | None = Field(
        default=None, description="[[y,x],...] of the four satellite spots, px from 0, at the shortest wavelength"
    )
    radius_px: Int | None = Field(
        default=None,
        ge=2,
        description="search radius of star or spots, or half the side of the correlated square; null: 10, 6 and all",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "RecentreConfig":
        if (self.method == "satellite_spots") != (self.spots is not None):
            raise ValueError("recentre.method=satellite_spots and recentre.spots=[[Y,X],...] belong together")
        if self.spots is not None and len(self.spots) != 4:
            raise ValueError(f"recentre.spots has {len(self.spots)} positions; give the four spots about the star")
        return self


class SelectionConfig(Section):
    """Frames that are left out, because they are unlike the others."""

    enabled: Bool = Field(default=True, description="leave out frames with outlying scores; false: scores alone")
    sigma: Float = Field(
        default=5.0, gt=0, description="threshold in robust standard deviations of correlation, flux, spread and shift"
    )
    annulus: Pair | None = Field(
        default=None, description="inner and outer radius of the scored annulus, px; null: 2 FWHM to the nearest edge"
    )


class PrepareConfig(Section):
    """python -m pulmo_jax.prepare"""

    cube: DataFile = Field(description="image stack (T,H,W) or (L,T,H,W): FITS, TIFF or .npy")
    angles: DataFile | None = Field(
        default=None, description="parallactic angle of each frame, degrees; those of the kept frames are written"
    )
    psf: DataFile | None = Field(
        default=None, description="PSF image, or one per channel; exposures of one channel are recentred and averaged"
    )
    wavelengths: DataFile | None = Field(default=None, description="wavelength of each channel of an (L,T,H,W) stack")
    output: PathLike = Field(description="folder for the prepared stack, its report and tables")
    task: Literal["point_sources"] = Field(default="point_sources", description="name of the task")
    plugins: tuple[str, ...] = Field(default=(), description="your package with the task")
    centre: Pair | None = Field(
        default=None, description="position of the star [y,x], px from 0, approximate if recentring; null: [H//2,W//2]"
    )
    crop_px: Int | None = Field(default=None, ge=16, description="side of the prepared frames, px; null: as they are")
    psf_crop_px: Int | None = Field(
        default=None, ge=5, description="side of the prepared PSF, px, made odd; null: as large as possible"
    )
    pixel_scale: Float | None = Field(default=None, gt=0, description="pixel scale, arcsec per pixel; null: unknown")
    bad_pixels: BadPixelsConfig = BadPixelsConfig()
    recentre: RecentreConfig = RecentreConfig()
    selection: SelectionConfig = SelectionConfig()
    max_image_mb: Int = Field(
        default=32768, ge=1, description="largest accepted array of a file, MiB; it must also fit into the free memory"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "PrepareConfig":
        for key in ("angles", "psf", "wavelengths"):
            if (path := getattr(self, key)) is not None and path.samefile(self.cube):
                raise ValueError(f"cube and {key} are both {path}; they must be different files")
        if self.psf_crop_px is not None and self.psf is None:
            raise ValueError("psf_crop_px needs psf=FILE")
        return self


SECTIONS: Mapping[str, type[Section]] = {"detect": DetectConfig, "prepare": PrepareConfig}
CHOICES: Mapping[str, Sequence[str]] = {}
