"""What is observed: every kind of bad input is used rightly with a caveat, or refused with a message that helps."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.methods.paco import Observation
from pulmo_jax.methods.paco import observe as checked_observe
from pulmo_jax.types import InputError

T, H, W = 12, 16, 20
ANGLES = np.linspace(-20, 50, T)
observe = inspect.unwrap(checked_observe)  # without the check of annotations, which a user does not have


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def gaussian(side: int, middle: float) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - middle
    return np.exp(-(y**2 + x**2) / 6)


PSF = gaussian(11, 5.0)


def stack() -> np.ndarray:
    """(T, H, W) on a pedestal."""
    return np.random.default_rng(0).normal(50, 3, (T, H, W))


def spoilt(*places: tuple) -> np.ndarray:
    """The stack with a value at every (index, value)."""
    cube = stack()
    for index, value in places:
        cube[index] = value
    return cube


def assert_same(found: Observation, expected: Observation) -> None:
    np.testing.assert_allclose(found.deviations, expected.deviations, atol=1e-12)
    np.testing.assert_array_equal(found.angles_deg, expected.angles_deg)
    np.testing.assert_array_equal(found.usable, expected.usable)
    assert found.unit == pytest.approx(expected.unit, rel=1e-12)
    assert found.centre == expected.centre


# --- what is right


def test_a_sound_stack_is_taken_as_it_is():
    of = checked_observe(stack(), ANGLES, PSF)
    deviations = stack() - stack().mean(0)
    unit = np.sqrt((deviations**2).mean())
    assert of.unit == pytest.approx(unit, rel=1e-12)
    np.testing.assert_allclose(of.deviations, deviations / unit, atol=1e-12)
    np.testing.assert_allclose(of.deviations.mean(0), 0, atol=2e-15)
    assert of.kept.all()
    assert of.usable.all()
    assert of.caveats == ()
    assert (of.shape, of.centre) == ((H, W), (8.0, 10.0))
    np.testing.assert_array_equal(of.psf.stamp, PSF)


@pytest.mark.parametrize("shape", [(5, 7, 9), (5, 8, 8), (2, 9, 6), (30, 8, 5)])
def test_default_centre_is_the_middle_pixel(shape):
    cube = np.random.default_rng(1).normal(size=shape)
    of = observe(cube, np.linspace(0, 60, shape[0]), PSF)
    assert of.centre == (shape[1] // 2, shape[2] // 2)
    assert of.caveats == ()


@pytest.mark.parametrize("centre", [(7.5, 9.25), (0, 0), (H - 1, W - 1)])
def test_a_centre_between_pixels_or_at_the_edge(centre):
    of = checked_observe(stack(), ANGLES, PSF, centre)
    assert of.centre == centre
    assert of.caveats == ()


@pytest.mark.parametrize("kind", ["float32", "float16", "int16", "uint16", "int64", ">f4", ">i2"])
def test_numbers_of_any_kind_are_computed_alike(kind):
    cube = (stack() * 10).round()
    of = checked_observe(cube.astype(kind), ANGLES.astype("float32"), PSF)
    assert of.deviations.dtype == jnp.float64
    expected = observe(cube.astype(kind).astype(float), ANGLES.astype("float32"), PSF)
    np.testing.assert_allclose(of.deviations, expected.deviations, atol=1e-12)
    assert of.caveats == ()


def test_lists_and_jax_arrays_are_taken_too():
    expected = observe(stack(), ANGLES, PSF)
    assert_same(checked_observe(stack(), ANGLES.tolist(), PSF), expected)
    assert_same(checked_observe(jnp.asarray(stack()), jnp.asarray(ANGLES), jnp.asarray(PSF)), expected)


def test_the_default_precision_is_jax_s():
    with jax.enable_x64(False):
        of = checked_observe(stack(), ANGLES, PSF)
        assert of.deviations.dtype == jnp.float32
    np.testing.assert_allclose(of.deviations, observe(stack(), ANGLES, PSF).deviations, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("x64", [False, True])
def test_units_far_from_one_are_kept_apart(scale, x64):
    """Their squares are no float32; nor are they in the deviations, only in `unit`."""
    with jax.enable_x64(x64):
        of = checked_observe(stack() * scale, ANGLES, PSF)
    expected = observe(stack(), ANGLES, PSF)
    np.testing.assert_allclose(of.deviations, expected.deviations, atol=1e-12 if x64 else 1e-5)
    assert of.unit / scale == pytest.approx(expected.unit, rel=1e-12 if x64 else 3e-6)


def test_the_input_is_not_written_to():
    cube, angles, psf = spoilt((np.s_[3], np.nan), (np.s_[:, 2, 2], 1.0)), ANGLES.copy(), PSF.copy()
    before = cube.copy()
    observe(cube, angles, psf)
    np.testing.assert_array_equal(cube, before)
    np.testing.assert_array_equal(angles, ANGLES)
    np.testing.assert_array_equal(psf, PSF)


# --- the PSF


def test_an_even_psf_is_made_odd_about_its_source():
    of = checked_observe(stack(), ANGLES, gaussian(16, 7.5))
    assert of.psf.stamp.shape == (15, 15)
    np.testing.assert_allclose(of.psf.stamp, gaussian(15, 7.0), atol=2e-3)
    assert of.psf.flux == 1


def test_a_psf_larger_than_the_frame_is_no_harm():
    of = checked_observe(stack(), ANGLES, gaussian(41, 20.0))
    assert of.psf.stamp.shape == (41, 41)
    assert of.caveats == ()


def test_a_prepared_psf_is_used_as_it_is():
    prepared = prepare_psf(PSF, "peak")
    assert checked_observe(stack(), ANGLES, prepared).psf is prepared


# --- frames and pixels that are left out


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_frames_that_are_not_finite_are_dropped_with_their_angles(value):
    cube = spoilt((4, value), (np.s_[9, : H // 2 + 1], value))
    of = checked_observe(cube, ANGLES, PSF)
    others = np.delete(np.arange(T), [4, 9])
    np.testing.assert_array_equal(of.kept, np.isin(np.arange(T), others))
    assert_same(of, observe(stack()[others], ANGLES[others], PSF))
    assert of.caveats == ("2 blank, saturated or mostly non-finite frames are dropped: 4, 9",)


@pytest.mark.parametrize("level", [0.0, 50.0, -1.0])
def test_blank_frames_are_dropped(level):
    of = checked_observe(spoilt((0, level)), ANGLES, PSF)
    assert_same(of, observe(stack()[1:], ANGLES[1:], PSF))
    assert of.caveats == ("1 blank, saturated or mostly non-finite frames are dropped: 0",)


def test_a_frame_that_is_blank_but_for_bad_pixels_is_dropped():
    of = checked_observe(spoilt((5, 0.0), (np.s_[5, 0, :3], np.nan)), ANGLES, PSF)
    others = np.delete(np.arange(T), 5)
    assert_same(of, observe(stack()[others], ANGLES[others], PSF))


def test_many_dropped_frames_are_not_all_listed():
    many = np.random.default_rng(0).normal(size=(30, 8, 8))
    many[3:15] = np.nan
    (caveat,) = checked_observe(many, np.linspace(0, 90, 30), PSF).caveats
    assert caveat.endswith("dropped: 3, 4, 5, 6, 7, 8, 9, 10, … (12 in all)")


def test_saturated_frames_are_dropped():
    """Full wells: most pixels of two frames hold the largest value."""
    cube = spoilt((np.s_[2, :, :15], 65535.0), (np.s_[7], 65535.0))
    of = checked_observe(cube, ANGLES, PSF)
    others = np.delete(np.arange(T), [2, 7])
    assert_same(of, observe(stack()[others], ANGLES[others], PSF))
    assert of.caveats == (
        f"{H * W} pixels are saturated in some frame",
        "2 blank, saturated or mostly non-finite frames are dropped: 2, 7",
    )


@pytest.mark.parametrize("kind", [np.float64, np.uint16])
def test_pixels_that_saturate_in_some_frames_are_left_out(kind):
    cube = spoilt((np.s_[3:5, 7:10, 9:12], 4095.0)).round().astype(kind)
    of = checked_observe(cube, ANGLES, PSF)
    assert of.kept.all()
    expected = np.ones((H, W), bool)
    expected[7:10, 9:12] = False
    np.testing.assert_array_equal(of.usable, expected)
    assert of.caveats == (
        "9 pixels are saturated in some frame",
        "9 pixels are excluded from every patch: not finite or saturated in a frame",
    )


def test_a_bright_pixel_is_not_saturation():
    """Nor are few values at the top of integers, or a top that the next values are as frequent as."""
    assert checked_observe(spoilt((np.s_[3, 7, 9], 4095.0)), ANGLES, PSF).caveats == ()
    coarse = np.random.default_rng(0).integers(0, 4, (T, H, W))
    assert checked_observe(coarse, ANGLES, PSF).usable.all()
    assert checked_observe(np.random.default_rng(0).integers(0, 2, (T, H, W)), ANGLES, PSF).usable.all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_a_frame_lacks_are_left_out(value):
    of = checked_observe(spoilt((np.s_[3, 4, 5], value), (np.s_[8, 4, 6], np.nan)), ANGLES, PSF)
    assert of.kept.all()
    assert np.argwhere(~of.usable).tolist() == [[4, 5], [4, 6]]
    assert (of.deviations[:, 4, 5:7] == 0).all()
    assert jnp.isfinite(of.deviations).all()
    assert of.caveats == ("2 pixels are excluded from every patch: not finite or saturated in a frame",)
    good = stack()[:, of.usable]
    assert of.unit == pytest.approx(np.sqrt(((good - good.mean(0)) ** 2).mean()), rel=1e-12)


def test_a_masked_centre_is_left_out_and_no_frame_is_dropped_for_it():
    """More than half of each frame is masked, but the same in all."""
    y, x = np.indices((H, W))
    mask = np.hypot(y - H // 2, x - W // 2) < 8
    assert mask.mean() > 0.5
    cube = stack()
    cube[:, mask] = np.nan
    of = checked_observe(cube, ANGLES, PSF)
    assert of.kept.all()
    np.testing.assert_array_equal(of.usable, ~mask)


def test_constant_pixels_are_left_out():
    of = checked_observe(spoilt((np.s_[:, 2, 3], 7.0), (np.s_[:, :, -1], 0.0)), ANGLES, PSF)
    expected = np.ones((H, W), bool)
    expected[2, 3], expected[:, -1] = False, False
    np.testing.assert_array_equal(of.usable, expected)
    assert of.caveats == (f"{H + 1} pixels are constant and excluded from every patch",)


def test_pixels_that_vary_in_dropped_frames_only_are_constant():
    cube = spoilt((np.s_[:, 2, 3], 7.0), (6, np.nan))
    cube[6, 0, 0] = 1.0
    of = checked_observe(cube, ANGLES, PSF)
    assert np.argwhere(~of.usable).tolist() == [[2, 3]]


# --- rotation


def test_angles_that_wrap_are_no_other_rotation():
    wrapped = np.mod(ANGLES, 360)
    assert np.ptp(wrapped) > 300
    assert checked_observe(stack(), wrapped, PSF).caveats == ()
    small = np.linspace(-1, 1, T)
    (caveat,) = checked_observe(stack(), np.mod(small, 360), PSF).caveats
    assert caveat.startswith("the field rotates by 2 degrees, 0.45 px at the corners: less than the PSF FWHM")


def test_without_rotation_nothing_can_be_found():
    for angles in (np.full(T, 12.5), np.array([12.5, 372.5] * (T // 2))):
        with pytest.raises(InputError, match=r"all 12 angles are 12\.5 degrees: without rotation .* check the angles"):
            checked_observe(stack(), angles, PSF)


def test_rotation_is_that_of_the_frames_that_are_kept():
    angles = np.full(T, 3.0)
    angles[4] = 80
    with pytest.raises(InputError, match="all 11 angles are 3 degrees"):
        checked_observe(spoilt((4, np.nan)), angles, PSF)


# --- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cube": stack()[0]}, r"the cube has the shape \(16, 20\); it must be \(T, H, W\)"),
        ({"cube": stack()[None]}, r"the cube has the shape \(1, 12, 16, 20\); it must be \(T, H, W\)"),
        ({"cube": stack()[:0]}, r"the cube is of shape \(0, 16, 20\) and type float64; real numbers are needed"),
        ({"cube": stack().astype(complex)}, "the cube is of shape .* and type complex128; real numbers are needed"),
        ({"cube": stack() > 50}, "the cube is of shape .* and type bool; real numbers are needed"),
        ({"angles_deg": ANGLES[1:]}, r"12 frames, but angles of shape \(11,\); give one angle for each frame"),
        ({"angles_deg": ANGLES[:, None]}, r"12 frames, but angles of shape \(12, 1\); give one angle for each frame"),
        ({"angles_deg": ["a"] * T}, r"the angles are of shape \(12,\) and type .*; real numbers are needed"),
        ({"angles_deg": np.where(ANGLES > 30, np.nan, ANGLES)}, "the angle of frame 8 is not finite; leave the frame"),
        ({"centre": (-0.6, 10)}, r"the centre \(y, x\) = \(-0\.6, 10\.0\) lies outside the frames of 16 x 20 px"),
        ({"centre": (8, 20)}, r"the centre \(y, x\) = \(8\.0, 20\.0\) lies outside the frames of 16 x 20 px"),
        ({"centre": (8, np.nan)}, r"the centre \(y, x\) = \(8\.0, nan\) lies outside the frames"),
        ({"psf": -PSF}, "the PSF has no positive flux"),
        ({"psf": np.where(PSF > 0.9, np.nan, PSF)}, "the PSF has no positive flux: 1 of 121 pixels are not finite"),
        ({"cube": stack()[:1], "angles_deg": ANGLES[:1]}, "1 usable frame; patch statistics need at least 2"),
        ({"cube": spoilt((np.s_[1:], np.nan))}, "1 usable frame; patch statistics need at least 2"),
        ({"cube": stack() * np.nan}, "0 usable frames; patch statistics need at least 2"),
        ({"cube": stack() * 0}, "0 usable frames; patch statistics need at least 2"),
        ({"cube": np.tile(stack()[:1], (T, 1, 1))}, "no pixel is finite and varies over the frames"),
    ],
)
def test_what_cannot_be_used_is_named(change, message):
    given = {"cube": stack(), "angles_deg": ANGLES, "psf": PSF} | change
    with pytest.raises(InputError, match=message):
        observe(**given)


def test_two_frames_are_enough():
    of = checked_observe(stack()[:2], np.array([0.0, 60.0]), PSF)
    np.testing.assert_allclose(of.deviations[0], -of.deviations[1], atol=1e-12)
