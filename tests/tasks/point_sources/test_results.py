"""Tables of a search: columns, units, empty cells, and the bound of the false-alarm probability."""

import csv
import io
from dataclasses import fields, replace

import numpy as np
import pytest
from references.drawn import point_source

from pulmo_jax.config.section import validate
from pulmo_jax.evaluation.null_field import FALSE_ALARM_FLOOR, null_profile
from pulmo_jax.inference.contrast import Contrast
from pulmo_jax.inference.search_noise import Noise
from pulmo_jax.methods.paco import LikelihoodMaps
from pulmo_jax.tasks.point_sources.config import DetectConfig, StackConfig
from pulmo_jax.tasks.point_sources.results import contrast_csv, detections_csv
from pulmo_jax.types import PointSource

STAR = 2e5
NAN = float("nan")
CONTRAST = Contrast(
    separation_px=np.array([4.6, 9.2, 13.8]), threshold=np.array([7.1, 5.5, 5.2]), limit=np.array([20.0, 10.0, 8.0]),
    half_low=np.array([NAN, 15.0, 9.0]), half_high=np.array([NAN, 150.0, 9e4]), most_low=np.array([NAN, NAN, 11.0]),
    most_high=np.array([NAN, NAN, 9e4]), tested_high=np.array([2e5, 1.5e5, 9e4]),
    flux_throughput=np.array([0.05, 0.4, 0.8]), flux_throughput_std=np.array([0.02, 0.1, 0.05]),
    n=np.array([8.0, 8.0, 7.0]),
)  # fmt: skip


def data(**keys) -> StackConfig:
    return validate(DetectConfig, {"data": keys}).data


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def numbers(rows: list[dict[str, str]], name: str) -> np.ndarray:
    """A column as a reader sees it: empty cells are NaN."""
    return np.array([float(row[name] or "nan") for row in rows])


# --- limits


def test_limits_have_every_column_and_empty_cells_where_nothing_is_detected():
    rows = read(contrast_csv(CONTRAST, data(), None))
    names = [field.name for field in fields(Contrast)]
    assert list(rows[0]) == [*names, "limit_corrected", "flux_unit"]
    for name in names:
        np.testing.assert_allclose(numbers(rows, name), getattr(CONTRAST, name))
    np.testing.assert_array_equal(numbers(rows, "limit_corrected"), CONTRAST.half_low)
    assert [row["half_low"] for row in rows] == ["", "15", "9"]
    assert {row["flux_unit"] for row in rows} == {"psf_fwhm"}


def test_limits_as_contrasts_and_magnitudes():
    rows = read(contrast_csv(CONTRAST, data(pixel_scale=0.02), STAR))
    np.testing.assert_allclose(numbers(rows, "separation_arcsec"), 0.02 * CONTRAST.separation_px)
    for suffix, flux in (("", CONTRAST.limit), ("_half", CONTRAST.half_low), ("_95", CONTRAST.most_low)):
        np.testing.assert_allclose(numbers(rows, f"contrast{suffix}"), flux / STAR)
        np.testing.assert_allclose(numbers(rows, f"delta_mag{suffix}"), -2.5 * np.log10(flux / STAR), rtol=1e-6)
    assert rows[0]["contrast_half"] == rows[0]["delta_mag_half"] == ""


def test_no_ring_leaves_the_header_alone():
    empty = Contrast(*(np.zeros(0) for _ in fields(Contrast)))
    assert read(contrast_csv(empty, data(), STAR)) == []
    assert contrast_csv(empty, data(), STAR).startswith("separation_px,threshold,")


# --- sources


def test_sources_have_every_column():
    near = point_source(flux_corrected=7.5, flux_corrected_std=3.5, near_threshold=True)
    rows = read(detections_csv([near, point_source(2)], data(pixel_scale=0.02), STAR))
    more = ["separation_arcsec", "separation_arcsec_std", "contrast", "contrast_std", "delta_mag", "delta_mag_std"]
    assert list(rows[0]) == [*(field.name for field in fields(PointSource)), "flux_unit", *more]
    assert [row["near_threshold"] for row in rows] == ["True", "False"]
    assert (rows[0]["flux_corrected"], rows[0]["flux_corrected_std"]) == ("7.5", "3.5")
    # Contrasts are those of the measured flux.
    np.testing.assert_allclose(numbers(rows, "contrast"), [10 / STAR, 10 / STAR])
    np.testing.assert_allclose(numbers(rows, "contrast_std"), [2.5 / STAR, 2.5 / STAR])


@pytest.fixture(scope="module")
def noise() -> Noise:
    snr = np.random.default_rng(0).normal(size=(40, 40))
    ones = np.ones((40, 40))
    null = LikelihoodMaps(ones, snr, snr, snr, ones, ones.astype(int), ones, ones > 2, 0.0, 0.0, ())
    profile = null_profile(snr, (20.0, 20.0), 4.6)
    return Noise(null, profile, snr, 1)


@pytest.mark.parametrize("value", [6.9, 9.0, 37.0, 1e4])
@pytest.mark.parametrize("trials", [1, 7])
def test_no_false_alarm_probability_is_below_the_bound(noise, value, trials):
    probability = replace(noise, trials=trials).false_alarm(value)
    assert probability == FALSE_ALARM_FLOOR == 1e-6
    [row] = read(detections_csv([point_source(false_alarm_probability=probability)], data(), None))
    assert row["false_alarm_probability"] == "1e-06"


def test_false_alarm_probabilities_above_the_bound_fall_with_the_significance(noise):
    found = [noise.false_alarm(value) for value in (3.0, 4.0, 5.0)]
    assert found[0] > found[1] > found[2] > FALSE_ALARM_FLOOR
