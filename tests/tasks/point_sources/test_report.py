"""What the report of `detect` says, from a search that was made by hand: numbers, truth, caveats and figures."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from pulmo_jax.config.section import validate
from pulmo_jax.core.geometry import frame_position
from pulmo_jax.data.adi import SpectralStack
from pulmo_jax.data.instruments import Observed
from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.data.synthetic import parallactic_angles, synthetic_psf
from pulmo_jax.evaluation.null_field import FALSE_ALARM_FLOOR, null_profile, separation_map
from pulmo_jax.host.console import Console
from pulmo_jax.inference.contrast import Contrast
from pulmo_jax.inference.point_sources import Search
from pulmo_jax.inference.search_noise import Noise
from pulmo_jax.inference.source_properties import SourceSpectrum
from pulmo_jax.methods.paco import LikelihoodMaps
from pulmo_jax.methods.paco.channels import observe_channels
from pulmo_jax.methods.paco.spectral import Combination, as_spectra
from pulmo_jax.tasks.point_sources import report as adi_report
from pulmo_jax.tasks.point_sources.config import DetectConfig
from pulmo_jax.tasks.point_sources.report import Result, known, source_table, summary, write_adi_report
from pulmo_jax.types import PointSource

FRAMES, HEIGHT, WIDTH = 12, 41, 47
CENTRE = (19.5, 22.0)
TRUTH = ((28.0, 30.0, 100.0), (10.0, 20.0, 50.0))


def source(label: int = 1, y: float = 28.1, x: float = 29.9, **changes: Any) -> PointSource:
    values: dict[str, Any] = {
        "label": label, "y": y, "x": x, "y_std": 0.11, "x_std": 0.12, "separation_px": 11.63,
        "separation_px_std": 0.13, "position_angle_deg": 317.4, "position_angle_deg_std": 0.6, "snr": 9.4,
        "snr_debiased": 22.7, "snr_calibrated": 12.3, "flux": 44.4, "flux_std": 4.7, "flux_debiased": 99.9,
        "flux_debiased_std": 4.4, "flux_debiased_std_empirical": 8.8, "flux_corrected": 99.9,
        "flux_corrected_std": 8.8, "near_threshold": False, "false_alarm_probability": FALSE_ALARM_FLOOR,
    }  # fmt: skip
    values |= changes
    return PointSource(**values)


def result(
    truth=TRUTH, contrast: Contrast | None = None, drop: int | None = None, channels: int = 1, **changes: Any
) -> Result:
    """`changes`: of the config's data section."""
    rng = np.random.default_rng(0)
    cube = rng.normal(size=(FRAMES, HEIGHT, WIDTH)).astype(np.float32) + 100
    if drop is not None:
        cube[drop] = np.nan
    angles = parallactic_angles(FRAMES, 60.0)
    cubes, stamps = (np.stack([part] * channels) for part in (cube, synthetic_psf()))
    wavelengths = 1 + 0.1 * np.arange(channels)
    stack = SpectralStack(cubes, angles, stamps, wavelengths, None, ("psf.fits: the PSF is <cut> & squared",))
    config = validate(DetectConfig, {"data": changes})
    psfs = [prepare_psf(stamp, flux="none") for stamp in stamps]
    of = observe_channels(cubes, angles, psfs, wavelengths, CENTRE)
    return Result(config, stack, of, truth, contrast, np.linspace(0.5, 1.5, channels) if channels > 1 else np.ones(1))


def search(
    made: Result, *sources: PointSource, caveats: tuple[str, ...] = (), templates: np.ndarray | None = None
) -> Search:
    rng = np.random.default_rng(1)
    shape = (HEIGHT, WIDTH)
    snr = rng.normal(size=shape)
    snr[:2] = np.nan
    a = np.where(np.isfinite(snr), 4.0, np.nan)
    b = 2 * snr
    shrinkage = np.where(np.isfinite(snr), 0.125, np.nan)
    shrinkage[20, 20] = 0.5
    maps = LikelihoodMaps(
        a, b, snr, b / a, 1 / np.sqrt(a), np.full(shape, FRAMES), shrinkage, np.zeros(shape, bool), 5e-4, 2e-3, ()
    )  # fmt: skip
    null = replace(maps, snr=0.8 * rng.permuted(snr))
    profile = null_profile(null.snr, CENTRE, 4.6)
    separation = separation_map(shape, CENTRE)
    noise = Noise(null, profile, null.snr / profile.std_at(separation), 1)
    n = len(made.channels.each)
    r = np.stack([np.eye(n) * (1 - share) + share for share in (0.625, 0.25)])
    combination = Combination(np.array([7.0, 15.0]), r, as_spectra(templates, n))
    level = np.linspace(40.0, 160.0, n)
    spectra = [
        SourceSpectrum(s.label, made.channels.wavelengths, level, level / 20, level / 10, 0, 0.5) for s in sources
    ]
    return Search(
        maps=maps, sources=list(sources), fits=[], residual=made.channels, null=null, profile=profile, noise=noise,
        snr_calibrated=noise.significance(snr, separation), n_patch=49, caveats=caveats, combination=combination,
        template=np.zeros(shape, int), spectra=spectra,
    )  # fmt: skip


def curve(n: int = 3) -> Contrast:
    """Limits that fall outwards; a source at the first separation is found in half of the directions only."""
    separation = np.linspace(5.0, 15.0, n)
    ones, half = np.ones(n), 100 / separation
    most = np.where(np.arange(n) == 0, np.nan, 1.4 * half)
    highest = 1e4 * half
    return Contrast(
        separation_px=separation, threshold=5 * ones, limit=40 / separation, half_low=half, half_high=highest,
        most_low=most, most_high=highest * (most / most), tested_high=highest, flux_throughput=0.5 * ones,
        flux_throughput_std=0.1 * ones, n=8 * ones,
    )  # fmt: skip


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made but not drawn, which takes a second for each."""

    def save(figure: Figure, folder: Path, name: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(b"png")
        return folder / f"{name}.png"

    monkeypatch.setattr(adi_report.figures, "save", save)


def written(made: Result, found: Search, folder) -> tuple[str, str]:
    """The report as text without tags, and what the console shows."""
    output = io.StringIO()
    write_adi_report(made, found, folder, Console(file=output, width=200))
    page = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    without_style = re.sub(r"<style.*?</style>", "", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", without_style).split()), output.getvalue()


# --- the table of sources


def test_source_is_told_with_all_of_its_errors():
    table = source_table([source()], result(truth=()))
    [row] = table.rows
    assert len(row) == len(table.columns)
    text = " | ".join(row)
    for words in ("28.10 ± 0.11, 29.90 ± 0.12", "11.63 ± 0.13", "317.40 ± 0.60", "9.4 | 12.3",
                  "99.9 ± 8.8 | 4.4 | 44.4", "≤ 1e-6"):  # fmt: skip
        assert words in text
    assert {"separation (px)", "theoretical SNR", "calibrated SNR", "flux (PSF units)"} < set(table.columns)
    assert not {"contrast", "Δmag", "truth (y, x; flux)"} & set(table.columns)
    assert table.notes[0].startswith("PSF units: the PSF has unit flux within one FWHM")
    assert "north is 90 degrees from the x axis" in table.notes[-1]


def test_separation_is_in_mas_where_the_scale_is_known():
    table = source_table([source()], result(truth=(), pixel_scale=0.1))
    assert table.rows[0][table.columns.index("separation (mas)")] == "1163 ± 13"


# --- units


def cells(made: Result, *sources: PointSource) -> list[dict[str, str]]:
    table = source_table(sources, made)
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_star_gives_contrast_and_magnitude_with_errors():
    made = result(truth=(), star_flux=1e6)
    bright, negative = cells(made, source(), source(2, flux_debiased=-5.0))
    assert bright["contrast"] == "(9.99 ± 0.88)e-05"
    assert bright["Δmag"] == "10.001 ± 0.096"
    assert negative["contrast"] == "(-5.0 ± 8.8)e-06"
    assert negative["Δmag"] == "-"


def test_star_flux_of_the_psf_image_is_its_divisor_times_the_exposure_ratio():
    stamp = 5000.0 * synthetic_psf()
    made = result(truth=(), star_flux="psf", exposure_ratio=20.0)
    psf = prepare_psf(stamp, flux="fwhm")
    made = replace(made, channels=replace(made.channels, each=(replace(made.channels.each[0], psf=psf),)))
    star = made.fluxes.star_mean
    assert star == pytest.approx(20 * psf.flux)
    # A source as bright as the image, in frames of 20 times its exposure, has a contrast of 1 / 20.
    assert cells(made, source(flux_debiased=psf.flux))[0]["Δmag"].startswith("3.25")


def test_each_channel_has_the_flux_of_its_own_psf():
    made = result(channels=3, star_flux="psf")
    each = tuple(
        replace(one, psf=replace(one.psf, flux=flux))
        for one, flux in zip(made.channels.each, (10.0, 20.0, 60.0), strict=True)
    )
    made = replace(made, channels=replace(made.channels, each=each))
    assert made.fluxes.star is not None
    np.testing.assert_allclose(made.fluxes.star, [10, 20, 60])
    assert made.fluxes.star_mean == pytest.approx(30)


@pytest.mark.parametrize(
    ("unit", "star", "name", "divisor", "magnitudes"),
    [
        ("auto", None, "flux (PSF units)", 1.0, False),
        ("auto", 1e6, "contrast (source / star)", 1e6, False),
        ("psf", 1e6, "flux (PSF units)", 1.0, False),
        ("contrast", 1e6, "contrast (source / star)", 1e6, False),
        ("magnitudes", 1e6, "contrast (source / star)", 1e6, True),
    ],
)
def test_unit_of_the_figures_is_the_one_asked_for(unit, star, name, divisor, magnitudes):
    made = result(star_flux=star)
    config = validate(DetectConfig, {"data": {"star_flux": star}, "contrast": {"unit": unit}})
    fluxes = replace(made, config=config).fluxes
    assert (fluxes.name, fluxes.divisor, fluxes.magnitudes) == (name, divisor, magnitudes)


def test_source_brighter_than_its_star_is_doubted(tmp_path, undrawn):
    made = result(truth=(), star_flux=80.0)
    text, _ = written(made, search(made, source()), tmp_path)
    assert "source 1 is brighter than the star (80 PSF units): check data.star_flux" in text
    made = result(truth=(), star_flux=1e6)
    text, _ = written(made, search(made, source()), tmp_path)
    assert "brighter than the star" not in text
    assert "Star: 1e+06 PSF units (data.star_flux)" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Axes: pixels from 0"),
        ({"pixel_scale": 0.05}, "ΔRA = Δα cos δ"),
        ({"pixel_scale": 0.05, "north_deg": 10.0}, "along the pixel axes of the map"),
    ],
)
def test_caption_of_the_maps_explains_their_axes(changes, words, tmp_path, undrawn):
    made = result(**changes)
    section = adi_report.source_section(made, search(made), source_table([], made), tmp_path)
    assert words in section.figures[0].caption
    assert "north (N) and east (E)" in section.figures[0].caption
    assert "true north" in section.text


def test_page_has_every_cell_in_one_of_two_tables():
    made = result(star_flux=1e6)
    whole = source_table([source(), source(2, 35.0, 5.0)], made)
    places, photometry = adi_report.on_page(whole)
    assert (places.title, photometry.title) == ("2 sources", "Photometry")
    assert sorted([*places.columns, *photometry.columns[1:]]) == sorted(whole.columns)
    assert photometry.columns == ["", *adi_report.PHOTOMETRY]
    for number, row in enumerate(whole.rows):
        cells = dict(zip(whole.columns, row, strict=True))
        for part in (places, photometry):
            assert part.rows[number] == [cells[name] for name in part.columns]
    assert places.notes + photometry.notes == whole.notes
    nothing = source_table([], made)
    assert adi_report.on_page(nothing) == [nothing]


def test_tables_for_the_terminal_fit_120_columns():
    named = {"separation (mas)": False, "y, x (px)": True, "flux (PSF units)": True}
    for made, has in (
        (result(star_flux=1e6), named),
        (result(truth=(), star_flux=1e6, pixel_scale=0.05), {"separation (mas)": True, "y, x (px)": False}),
    ):
        output = io.StringIO()
        table = source_table([source(), source(2, 35.0, 5.0)], made)
        Console(file=output, width=120).print(adi_report.for_console(table))
        assert "…" not in output.getvalue()
        for name, there in has.items():
            assert (name.rpartition(" (")[0] in output.getvalue()) == there


def test_truth_stands_beside_what_was_found_and_what_was_missed_below():
    table = source_table([source(), source(2, 35.0, 5.0)], result())
    assert table.columns[-1] == "truth (y, x; flux)"
    assert [row[-1] for row in table.rows] == ["28.00, 30.00; 100", "none (false alarm)"]
    assert table.notes[:-2] == ["Not detected: the source of flux 50 at (y, x) = (10.0, 20.0)."]


def test_flux_near_the_threshold_is_noted_with_its_correction(tmp_path, undrawn):
    made = result(truth=())
    near = source(2, 35.0, 5.0, near_threshold=True, flux_corrected=31.4, flux_corrected_std=9.2)
    notes = source_table([source(), near], made).notes
    note = "Source 2 is near the threshold, so that its flux is biased high: corrected for selection, it is 31.4 ± 9.2."
    assert [words for words in notes if "biased high" in words] == [note]
    text, console = written(made, search(made, source(), near), tmp_path)
    assert note in text
    assert note in " ".join(console.split())
    assert not any("biased high" in words for words in source_table([source()], made).notes)


@pytest.mark.parametrize(
    ("probability", "shown"), [(1e-6, "≤ 1e-6"), (1.6e-6, "2e-06"), (2.4e-4, "0.0002"), (0.31, "0.3")]
)
def test_false_alarm_probabilities_end_at_the_bound(probability, shown, tmp_path, undrawn):
    made = result(truth=())
    found = source(false_alarm_probability=probability)
    assert cells(made, found)[0]["false alarm"] == shown
    text, console = written(made, search(made, found), tmp_path)
    assert shown in text
    assert shown in console


def test_nothing_found_is_said():
    assert source_table([], result(truth=())).notes == ["No peak exceeds the threshold."]
    assert len(source_table([], result()).notes) == len(TRUTH)


@pytest.mark.parametrize(("offset", "same"), [(4.5, True), (4.7, False)])
def test_source_is_the_known_one_within_one_fwhm(offset, same):
    made = result(truth=TRUTH[:1])
    assert made.channels.fwhm_px == pytest.approx(4.6, abs=0.05)
    assert (known(source(y=28.0 + offset, x=30.0), made) != "none (false alarm)") == same


def test_nearest_of_the_known_ones_is_named():
    assert known(source(y=10.5, x=20.5), result()) == "10.00, 20.00; 50"


# --- summary and page


def test_summary_names_stack_frames_and_method(tmp_path):
    made = result()
    found = search(made, source())
    told = summary(made, found)
    assert told["stack"] == "synthetic, seed 0"
    assert told["frames"] == f"{FRAMES} of {HEIGHT} x {WIDTH} px"
    assert told["method"] == "PACO, exact, shrinkage paco"
    assert told["sources"] == "1"
    assert told["field rotation"] == "60.0 degrees"
    assert told["star"] == "(y, x) = (19.50, 22.00) px"
    assert "mas" not in told["PSF FWHM"]
    scaled = summary(result(pixel_scale=0.01225), found)
    assert scaled["pixel scale"] == "12.25 mas/px"
    assert scaled["PSF FWHM"].endswith(f" px = {12.25 * made.channels.fwhm_px:.1f} mas")
    assert told["highest theoretical SNR"] == f"{np.nanmax(found.maps.snr):.2f}"
    assert told["highest calibrated SNR"] == f"{np.nanmax(found.snr_calibrated):.2f}"
    for name in ("c", "a", "p"):
        (tmp_path / name).write_bytes(b"x")
    files: dict[str, Any] = {key: str(tmp_path / key[0]) for key in ("cube", "angles", "psf")}
    assert summary(result(**files), found)["stack"] == str(tmp_path / "c")


def test_object_instrument_and_unit_of_the_header_are_told(tmp_path, undrawn):
    made = result(truth=())
    seen = Observed("* bet Pic", "ESO-VLT-U4", "NACO", "L_prime", "2013-02-01T00:41:05", unit="adu")
    made = replace(made, stack=replace(made.stack, observed=seen))
    text, console = written(made, search(made, source()), tmp_path)
    for words in (
        "* bet Pic: point sources",
        "ESO-VLT-U4, NACO, L_prime",
        "2013-02-01T00:41:05",
        "the cube (adu) over",
    ):
        assert words in text
    assert "the cube (adu) over" in " ".join(console.split())
    assert not {"object", "observed with", "observed on"} & set(summary(result(), search(made)))


@pytest.mark.slow
def test_page_holds_numbers_caveats_and_figures(tmp_path):
    made = result(drop=3, contrast=curve(), pixel_scale=0.05)
    text, console = written(made, search(made, source(), caveats=("12 frames are few",)), tmp_path)
    for words in (
        "11 of 12", "60.0 degrees", "median 0.125, 0.125 to 0.500", "4.6", "5.0e-04", "2.0e-03", "12 frames are few",
        "the PSF is &lt;cut&gt; &amp; squared", "A&amp;A 618", "injections in 8 directions", "99.9 ± 8.8", "ΔRA",
    ):  # fmt: skip
        assert words in text
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == {
        "detection_maps", "null_distribution", "null_by_radius", "contrast_curve", "frames",
    }  # fmt: skip
    assert "99.9 ± 8.8" in console
    assert "Not detected: the source of flux 50" in console


def test_null_is_judged_outside_of_one_fwhm(tmp_path, undrawn):
    """Its spread and highest value are those of the map where the field rotates out of itself."""
    made = result(truth=())
    found = search(made)
    y, x = np.indices((HEIGHT, WIDTH))
    outside = np.hypot(y - CENTRE[0], x - CENTRE[1]) > made.channels.fwhm_px
    snr = np.where(outside, found.null.snr, 77.0)
    values = snr[outside & np.isfinite(snr)]
    section = adi_report.null_section(made, replace(found, null=replace(found.null, snr=snr)), tmp_path)
    assert f"standard deviation of its theoretical SNR is {values.std():.2f}" in section.text
    assert f"the highest values are {values.max():.2f} and" in section.text
    assert f"P(> 3) is {np.mean(values > 3):.2g} for the theoretical" in section.text


def test_no_ring_is_said_and_no_curve_is_left_out(tmp_path, undrawn):
    made = result()
    found = search(made)
    empty = adi_report.contrast_section(made, found, curve(0), tmp_path)
    assert "too small for a contrast curve" in empty.text
    assert list(empty.figures) == []
    text, _ = written(made, found, tmp_path)
    assert "Limits" not in text
    assert not (tmp_path / "figures" / "contrast_curve.png").exists()


def test_limits_name_their_criterion_and_range(tmp_path, undrawn):
    made = result()
    found = search(made, source())
    text = adi_report.contrast_section(made, found, curve(), tmp_path).text
    n = found.profile.n
    for words in (
        "The threshold of 5 applies to the calibrated SNR",
        f"{n.min():.0f} (near the star) to {n.max():.0f} independent values (Student's t, Mawet et al. 2014)",
        "10000 times the limit",
    ):
        assert words in text
    made = replace(made, config=validate(DetectConfig, {"search": {"snr": "theoretical", "threshold": 4}}))
    text = adi_report.contrast_section(made, found, curve(), tmp_path).text
    assert "The threshold of 4 applies to the theoretical SNR, b / sqrt(a)." in text
    assert "Student" not in text


@pytest.mark.parametrize("kind", ["theoretical", "calibrated"])
def test_both_snrs_are_drawn_and_the_one_that_decides_is_named(kind, tmp_path, undrawn):
    made = result()
    made = replace(made, config=validate(DetectConfig, {"search": {"snr": kind, "threshold": 4}}))
    found = search(made, source())
    shown = []
    original = adi_report.adi_figures.detection_maps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            adi_report.adi_figures, "detection_maps",
            lambda *arguments: shown.append((arguments[0], arguments[5])) or original(*arguments),
        )  # fmt: skip
        section = adi_report.source_section(made, found, source_table([], made), tmp_path)
    np.testing.assert_array_equal(shown[0][0], found.maps.snr)
    np.testing.assert_array_equal(shown[0][1], found.snr_calibrated)
    assert f"Peaks with a {kind} SNR of at least 4;" in section.text
    assert f"a {kind} SNR of at least 4" in section.figures[0].caption


def test_circle_follows_the_source_through_the_frames(tmp_path, monkeypatch, undrawn):
    """The place in a frame is core.geometry's, of the frames that are left."""
    made = result(drop=0)
    seen = []
    monkeypatch.setattr(adi_report.adi_figures, "frames_strip", lambda *arguments: seen.append(arguments))
    adi_report.stack_section(made, search(made, source()), tmp_path)
    cube, angles, centre, places, n = seen[0]
    assert len(cube) == len(angles) == FRAMES - 1
    assert centre == CENTRE
    shown = adi_report.adi_figures.shown_frames(len(angles), n)
    y, x = frame_position(*(jnp.asarray(v) for v in (28.1, 29.9, angles[shown], CENTRE)))
    np.testing.assert_allclose(places, np.stack([y, x], -1), atol=1e-4)


# --- several wavelengths


def test_page_of_several_wavelengths_tells_how_they_are_combined(tmp_path, undrawn):
    made = result(channels=3)
    text, _ = written(made, search(made, source()), tmp_path)
    for words in (
        "Spectra", "combine 3 channels", "with a flat spectrum", "0.62 at 7 px", "0.25 at 15 px", "A&amp;A 637, A9",
        "3 of 3, 1 to 1.2", "middle channel, 1.1",
    ):  # fmt: skip
        assert words in text
    assert "trials" not in text
    assert (tmp_path / "figures" / "spectra.png").exists()


def test_page_of_one_wavelength_says_nothing_of_spectra(tmp_path, undrawn):
    made = result()
    text, _ = written(made, search(made, source()), tmp_path)
    for words in ("Spectra", "neighbouring channels", "A&amp;A 637"):
        assert words not in text
    assert not (tmp_path / "figures" / "spectra.png").exists()


def test_trials_of_a_set_of_spectra_are_told(tmp_path, undrawn):
    made = result(channels=3)
    templates = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    found = search(made, source(), templates=templates)
    text, _ = written(made, replace(found, noise=replace(found.noise, trials=1.8)), tmp_path)
    assert "They count as 1.8 independent trials, so the threshold is raised from 5 to 5.11" in text
    assert "the best of 2 spectra at every pixel" in text
    assert "with one of 2 spectra" in text


def test_a_source_of_another_spectrum_is_told(tmp_path, undrawn):
    made = result(channels=3)
    found = search(made, source(), source(2, 35.0, 5.0))
    text, _ = written(made, found, tmp_path)
    assert "does not have the assumed spectrum" not in text
    found.spectra[1] = replace(found.spectra[1], template_probability=1e-4)
    text, console = written(made, found, tmp_path)
    assert "Source 2 does not have the assumed spectrum" in text
    assert "The flux of source 2 assumes the spectrum" in " ".join(console.split())


def test_known_spectrum_is_that_of_the_injected_source_nearby():
    made = result(channels=3)
    known_one, none = adi_report.known_spectra([source(), source(2, 35.0, 5.0)], made)
    assert known_one is not None
    np.testing.assert_allclose(known_one, [50.0, 100.0, 150.0])
    assert none is None
    assert adi_report.known_spectra([source()], replace(made, spectrum=None)) == [None]
