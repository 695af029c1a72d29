"""Preparation of stacks: bad pixels, shifts, positions of stars and spots, frame scores; against known truths."""

import numpy as np
import pytest
from scipy.special import j1

from pulmo_jax.data.preparation.bad_pixels import fill_image, find_hits, learn_normal, replace_bad, sharpness
from pulmo_jax.data.preparation.frame_selection import Scores, annulus, outliers, score_frames
from pulmo_jax.data.preparation.registration import make_target, register
from pulmo_jax.data.preparation.shifting import shift_frames
from pulmo_jax.data.preparation.star_position import crossing, peak_position, spot_position
from pulmo_jax.data.preparation.time_median import median_frame
from pulmo_jax.data.psf import shift
from pulmo_jax.data.synthetic import rotating_stack
from pulmo_jax.types import InputError

FWHM_PX = 4.6


def gaussian(y, x, fwhm=FWHM_PX, size=61):
    rows, columns = np.mgrid[:size, :size]
    return np.exp(-4 * np.log(2) * ((rows - y) ** 2 + (columns - x) ** 2) / fwhm**2)


def airy(y, x, fwhm=FWHM_PX, size=61):
    rows, columns = np.mgrid[:size, :size]
    r = np.hypot(rows - y, columns - x) * 1.03 * np.pi / fwhm + 1e-9
    return (2 * j1(r) / r) ** 2


# --- bad pixels


@pytest.mark.parametrize("image", [gaussian, airy])
@pytest.mark.parametrize("fwhm", [2.5, 4.6, 9.0])
def test_no_star_is_sharper_than_its_psf_wherever_it_is_centred(image, fwhm):
    for offset in np.random.default_rng(0).uniform(-0.5, 0.5, (20, 2)):
        star = image(*(30 + offset), fwhm)
        assert sharpness(star[None], fwhm)[0][29:32, 29:32].max() < 1e-3
        assert sharpness(-star[None], fwhm)[0][29:32, 29:32].max() < 1e-3


def test_a_single_pixel_is_sharp():
    image = np.zeros((1, 11, 11))
    image[0, 5, 5] = 7
    found = sharpness(image, FWHM_PX)[0]
    assert found[5, 5] == 7
    assert np.delete(found.ravel(), 60).max() <= 0


@pytest.fixture(scope="module")
def damaged():
    clean = rotating_stack(3).stack.cube
    rng, cube = np.random.default_rng(0), clean.copy()
    permanent = rng.random((100, 100)) < 0.005
    permanent[47:54, 47:54] = False
    cube[:, permanent] += rng.choice([-1, 1], permanent.sum()) * rng.uniform(200, 1000, permanent.sum())
    hits = (rng.random(cube.shape) < 0.0005) & ~permanent
    cube[hits] += rng.uniform(100, 2000, hits.sum())
    cube[5, 10, 10], hits[5, 10, 10] = np.nan, True
    cube[:, 70, 70], permanent[70, 70] = np.nan, True
    return clean, cube, permanent, hits


def test_bad_pixels_are_found_and_replaced(damaged):
    clean, cube, permanent, hits = damaged
    normal = learn_normal(cube, FWHM_PX, 6.0)
    found = find_hits(cube, normal, FWHM_PX, 6.0)
    assert (normal.permanent & permanent).sum() >= 0.98 * permanent.sum()
    assert (normal.permanent & ~permanent).sum() <= 25  # 0.25 % of the pixels
    assert (found & hits).sum() >= 0.98 * hits.sum()
    assert (found & ~hits).sum() <= 0.05 * hits.sum()
    repaired = replace_bad(cube, found | normal.permanent, normal)
    assert repaired.dtype == cube.dtype
    assert np.isfinite(repaired).all()
    bad = found | normal.permanent
    np.testing.assert_array_equal(repaired[~bad], cube[~bad])
    away = bad & (np.hypot(*(np.mgrid[:100, :100] - 50)) > 10)
    assert (repaired - clean)[away].std() < 2 * clean.std(axis=0)[away.any(axis=0)].mean()


def test_clean_frames_with_a_bright_planet_stay_as_they_are():
    cube = rotating_stack(3, planets=((70.3, 60.2, 20000.0),)).stack.cube
    normal = learn_normal(cube, FWHM_PX, 6.0)
    assert find_hits(cube, normal, FWHM_PX, 6.0).sum() == 0
    assert normal.permanent.sum() < 15


def test_a_declared_defect_is_replaced_and_a_large_one_becomes_unknown():
    cube = rotating_stack(1, frames=12).stack.cube
    declared = np.zeros((100, 100), bool)
    declared[20, 30] = declared[60:69, 60:69] = True
    normal = learn_normal(cube, FWHM_PX, 6.0, declared)
    assert normal.permanent[declared].all()
    repaired = replace_bad(cube, np.broadcast_to(normal.permanent, cube.shape), normal)
    assert np.isfinite(repaired[:, 20, 30]).all()
    assert np.isnan(repaired[:, 64, 64]).all()


def test_stuck_and_noisy_pixels_are_permanent():
    cube = np.random.default_rng(0).standard_normal((40, 50, 50))
    cube[:, 10, 10] = 0.3
    cube[:, 30, 30] *= 8
    permanent = learn_normal(cube, FWHM_PX, 6.0).permanent
    assert permanent[10, 10]
    assert permanent[30, 30]
    assert permanent.sum() <= 4


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_constant_stack_has_no_bad_pixels(value):
    cube = np.full((5, 31, 31), value)
    normal = learn_normal(cube, FWHM_PX, 6.0)
    assert not normal.permanent.any()
    assert not find_hits(cube, normal, FWHM_PX, 6.0).any()
    np.testing.assert_array_equal(normal.median, cube[0])


def test_holes_of_an_image_are_filled_from_the_neighbours():
    image, bad = gaussian(30, 30, 8.0), np.zeros((61, 61), bool)
    bad[30, 32] = bad[10, 10] = True
    filled = fill_image(np.where(bad, np.nan, image), bad)
    np.testing.assert_allclose(filled[~bad], image[~bad])
    assert filled[30, 32] == pytest.approx(image[30, 32], rel=0.1)


# --- shifts


@pytest.mark.parametrize(("fwhm", "error"), [(2.0, 2e-3), (2.5, 1e-3), (3.0, 3e-4), (4.6, 2e-5)])
def test_a_shift_keeps_the_flux(fwhm, error):
    moved = shift_frames(gaussian(30, 30, fwhm)[None], np.array([[0.5, 0.5]]))[0]
    known, truth = np.isfinite(moved), gaussian(30.5, 30.5, fwhm)
    assert abs((moved * truth)[known].sum() / (truth**2)[known].sum() - 1) < error


def test_unknown_pixels_move_and_no_shift_changes_nothing():
    image = gaussian(30, 30)
    image[20, 40] = np.nan
    moved = shift_frames(np.stack([image, image]), np.array([[2.0, -3.0], [0.0, 0.0]]))
    np.testing.assert_array_equal(moved[1], image)
    assert np.isnan(moved[0][22, 37])
    assert np.isnan(moved[0][:2]).all()
    assert np.isnan(moved[0][:, -3:]).all()
    assert np.isfinite(moved[0][2:, :-3]).sum() == 59 * 58 - 1
    truth = gaussian(32, 27)
    known = np.isfinite(moved[0])
    np.testing.assert_allclose(moved[0][known], truth[known], atol=2e-3)


# --- registration


def test_known_shifts_are_found_by_cross_correlation():
    rng, made = np.random.default_rng(1), rotating_stack(0, frames=12, size=140).stack.cube
    true = rng.uniform(-1.5, 1.5, (12, 2))
    cube = np.stack([shift(frame.astype(float), *d) for frame, d in zip(made, true, strict=True)])[:, 20:120, 20:120]
    cube += rng.standard_normal(cube.shape)
    reference, shifts = np.median(cube, axis=0), np.zeros_like(true)
    for _ in range(2):
        shifts = register(cube, make_target(reference, (50.0, 50.0), 50))
        reference = np.nanmedian(shift_frames(cube, shifts - np.median(shifts, axis=0)), axis=0)
    error = shifts + true
    error -= error.mean(axis=0)
    assert error.std() < 0.03
    assert np.abs(error).max() < 0.07


# --- star and spots


@pytest.mark.parametrize("star", [gaussian, airy])
@pytest.mark.parametrize("fwhm", [2.2, 4.6, 8.0])
def test_the_peak_of_a_star(star, fwhm):
    rng = np.random.default_rng(0)
    for _ in range(5):
        true = 30 + rng.uniform(-3, 3, 2)
        image = 1000 * star(*true, fwhm) + 50 + 5 * rng.standard_normal((61, 61))
        assert np.abs(np.subtract(peak_position(image, (30.0, 30.0), 10, fwhm), true)).max() < 0.03


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.minimum(1000 * airy(30, 30.3), 600), "saturated"),
        (1000 * gaussian(30, 30, 20) * (1 - gaussian(30, 30, 8)), "use recentre.method=satellite_spots"),
        (rotating_stack(0, size=61).stack.cube[0], "behind a coronagraph or saturated; use recentre.method"),
        (np.zeros((61, 61)), "there is no star within 10 px of"),
        (1000 * gaussian(30, 30, 2.0), "the star's core has a FWHM of"),
    ],
)
def test_no_peak_is_refused(image, message):
    with pytest.raises(InputError, match=message):
        peak_position(image, (30.0, 30.0), 10, FWHM_PX)


def spotted(centre, peak, size=101, seed=5):
    image = rotating_stack(seed, frames=2, size=size, planets=()).stack.cube[0].astype(float)
    offsets = 28 * np.array([[np.sin(a), np.cos(a)] for a in np.deg2rad(20 + 90 * np.arange(4))])
    for dy, dx in offsets:
        image += peak * gaussian(centre[0] + dy, centre[1] + dx, size=size)
    return image, offsets


def test_the_diagonals_of_satellite_spots_cross_at_the_star():
    for centre in [(50.0, 50.0), (51.3, 48.8), (49.2, 50.6)]:
        image, offsets = spotted(centre, 1500.0)
        found = np.array([spot_position(image, (50 + dy, 50 + dx), 6, FWHM_PX) for dy, dx in offsets[[2, 0, 3, 1]]])
        assert np.abs(np.subtract(crossing(found), centre)).max() < 0.05


def test_missing_spots_and_wrong_figures_are_refused():
    image, _ = spotted((50, 50), 0.0)
    with pytest.raises(InputError, match="there is no satellite spot"):
        spot_position(np.zeros((101, 101)), (30.0, 30.0), 6, FWHM_PX)
    with pytest.raises(InputError, match="lies outside the frames"):
        spot_position(image, (150.0, 30.0), 6, FWHM_PX)
    with pytest.raises(InputError, match="do not halve each other"):
        crossing(np.array([[20.0, 20], [20, 80], [80, 80], [70, 20]]))
    with pytest.raises(InputError, match="no quadrangle"):
        crossing(np.array([[20.0, 20], [30, 30], [40, 40], [50, 50.5]]))


# --- frames


def test_scores_and_outliers():
    rng, median = np.random.default_rng(0), 100 * airy(30, 30, 12.0)
    region = annulus((61, 61), (30.0, 30.0), 3, 28)
    frames = median + rng.standard_normal((40, 61, 61))
    frames[7] *= 0.4  # cloud
    frames[12] = shift(median, 6, 0) + rng.standard_normal((61, 61))
    frames[20] += 20 * rng.standard_normal((61, 61))
    frames[30] = np.nan
    scores = score_frames(frames, median_frame(frames), region)
    x, y = median_frame(frames)[region], frames[3][region]
    assert scores.correlation[3] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert scores.flux[3] == pytest.approx(np.polyfit(x, y, 1)[0])
    found = outliers(scores, np.zeros((40, 2)), 5.0)
    assert found["flux"][7]
    assert found["correlation"][12]
    assert found["spread"][20]
    assert all(mask[30] for name, mask in found.items() if name != "shift")
    assert set(np.flatnonzero(np.any(list(found.values()), axis=0))) == {7, 12, 20, 30}


def test_a_star_far_from_its_usual_place_is_an_outlier():
    shifts = np.random.default_rng(0).normal(0, 0.1, (30, 2))
    shifts[4], shifts[9], shifts[11] = (3, 0), np.nan, (0.9, 0)
    same = Scores(*np.random.default_rng(1).normal(0.5, 0.01, (3, 30)))
    assert np.flatnonzero(outliers(same, shifts, 6.0)["shift"]).tolist() == [4, 9]


def test_equal_frames_are_all_kept():
    same = Scores(np.ones(12), np.ones(12), np.zeros(12))
    assert not any(mask.any() for mask in outliers(same, np.zeros((12, 2)), 5.0).values())


@pytest.mark.parametrize("count", [4, 5])
def test_the_median_of_known_values(count):
    values = np.random.default_rng(0).standard_normal((count, 9, 7))
    np.testing.assert_array_equal(median_frame(values), np.median(values, axis=0))
    values[1, 2:5], values[2, 3], values[:, 8, 6], values[0, 0, 0] = np.nan, np.nan, np.nan, np.inf
    known = np.where(np.isfinite(values), values, np.nan)
    expected = np.array([[np.nan if np.isnan(v).all() else np.nanmedian(v) for v in row] for row in known.T]).T
    np.testing.assert_allclose(median_frame(values), expected)
