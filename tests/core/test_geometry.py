"""Where the sky stands in a frame, by hand and against the slow reference; rings hold all that their tracks pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from references import paco

from pulmo_jax.core import geometry

REACH = 0.5 * 2**0.5 + 0.01


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


position_of = jax.jit(geometry.frame_position)


@pytest.mark.parametrize(
    ("angle", "expected"),
    [(0, (50, 60)), (90, (40, 50)), (-90, (60, 50)), (180, (50, 40)), (30, (45, 50 + 75**0.5)), (450, (40, 50))],
)
def test_a_source_at_theta_stands_at_theta_less_the_angle(angle, expected):
    """Ten pixels right of the centre, at theta = 0; theta = atan2(dy, dx) grows towards larger y."""
    y, x = position_of(jnp.array(50.0), jnp.array(60.0), jnp.array(float(angle)), jnp.array([50.0, 50.0]))
    np.testing.assert_allclose([y, x], expected, atol=1e-12)


@given(st.floats(-400, 400), st.floats(0, 60), st.floats(0, 60), st.floats(0, 60), st.floats(0, 60))
def test_positions_are_the_reference_s_and_keep_their_distance(angle, y, x, cy, cx):
    found = position_of(*(jnp.array(value) for value in (y, x, angle)), jnp.array([cy, cx]))
    np.testing.assert_allclose(found, paco.tracks(np.array([angle]), y, x, (cy, cx))[0], atol=1e-11)
    assert np.hypot(found[0] - cy, found[1] - cx) == pytest.approx(np.hypot(y - cy, x - cx), abs=1e-11)


def test_positions_of_many_pixels_and_frames_at_once():
    y, x = np.array([[3.0], [8.0]]), np.array([[5.0], [1.0]])
    angles = np.array([0.0, 20.0, -70.0])
    found = position_of(jnp.asarray(y), jnp.asarray(x), jnp.asarray(angles), jnp.array([4.5, 6.0]))
    expected = [paco.tracks(angles, y[i, 0], x[i, 0], (4.5, 6.0)) for i in range(2)]
    np.testing.assert_allclose(np.stack(found, axis=-1), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("position", "pixel"),
    [(0.5, 1), (1.5, 2), (-0.5, 0), (0.5 - 1e-12, 1), (0.5 - 1e-6, 0), (0.4, 0), (-0.6, -1), (7, 7), (-1.5, -1)],
)
def test_nearest_pixel_and_halves_go_up(position, pixel):
    found, rest = geometry.nearest(jnp.array(float(position)), 100)
    assert (int(found), float(rest)) == (pixel, pytest.approx(position - pixel, abs=1e-14))
    assert found.dtype == jnp.int32


@given(st.floats(-100, 100))
def test_nearest_pixel_is_the_reference_s(position):
    pixel, rest = geometry.nearest(jnp.array(position), 100)
    expected, _ = paco.nearest_pixels(np.array([[position, 0.0]]), np.ones((1, 1), bool))
    assert int(pixel) == expected[0, 0]
    assert -0.5 - 2e-9 <= float(rest) <= 0.5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("angle", [30.0, 150.0, -330.0])
@pytest.mark.parametrize("centre", [32.0, 50.0, 127.0, 500.0])
def test_ties_go_up_in_every_precision(dtype, angle, centre):
    """The sine is 1/2, so odd steps along x lie midway between two rows; as computed, they lie on either side."""
    steps = np.arange(1, centre, 2)
    y, x = (jnp.asarray(values, dtype) for values in (np.full_like(steps, centre), centre + steps))
    found, _ = position_of(y, x, jnp.asarray(angle, dtype), jnp.full(2, centre, dtype))
    pixel, rest = geometry.nearest(found, 2 * centre)
    np.testing.assert_array_equal(pixel, centre - steps / 2 + 0.5)
    np.testing.assert_allclose(rest, -0.5, atol=geometry.tie_tolerance_px(dtype, 2 * centre))


@given(st.floats(-180, 180), st.floats(0, 200), st.floats(0, 200), st.floats(0, 200), st.floats(0, 200))
@settings(max_examples=300)
def test_the_tolerance_of_a_tie_exceeds_the_rounding_error_of_a_position(angle, y, x, cy, cx):
    exact = position_of(
        *(jnp.array(float(np.float32(v))) for v in (y, x, angle)), jnp.array(np.float32([cy, cx]), float)
    )
    found = position_of(*(jnp.array(v, jnp.float32) for v in (y, x, angle)), jnp.array([cy, cx], jnp.float32))
    for axis in (0, 1):
        assert abs(float(found[axis]) - float(exact[axis])) < geometry.tie_tolerance_px(jnp.float32, 200)


def test_the_tolerance_of_a_tie_in_float64_is_what_it_was():
    assert geometry.tie_tolerance_px(jnp.float64, 1000) == geometry.TIE_PX
    assert geometry.tie_tolerance_px(jnp.float32, 100) == pytest.approx(9.5e-5, rel=0.01)


# --- the field's rotation


@pytest.mark.parametrize(
    ("angles", "arc"),
    [
        ([10, 40, 25], 30),
        ([350, 10], 20),
        ([-10, 10], 20),
        ([170, -170, 175], 20),
        ([0, 120, 240], 240),
        ([5, 5], 0),
        ([5, 365, 725], 0),
        ([7], 0),
        ([0, 180], 180),
    ],
)
def test_rotation_is_the_shortest_arc_over_the_full_turn(angles, arc):
    assert geometry.rotation_deg(np.array(angles, float)) == pytest.approx(arc, abs=1e-12)


@given(st.lists(st.integers(-179, 179), min_size=1, max_size=9), st.integers(-720, 720), st.data())
def test_rotation_does_not_depend_on_zero_order_or_turns(angles, zero, data):
    arc = geometry.rotation_deg(np.array(angles, float))
    turns = data.draw(st.lists(st.integers(-2, 2), min_size=len(angles), max_size=len(angles)))
    other = data.draw(st.permutations(angles))
    assert geometry.rotation_deg(np.array(other) + 360.0 * np.array(turns) + zero) == pytest.approx(arc, abs=1e-9)
    assert arc <= max(angles) - min(angles)
    assert arc <= 360 * (1 - 1 / len(set(angles))) + 1e-9  # some gap is at least the mean one


# --- rings


@st.composite
def fields(draw):
    """A field of locations with its centre: (whole, centre)."""
    height, width = draw(st.integers(3, 14)), draw(st.integers(3, 14))
    seed, share = draw(st.integers(0, 999)), draw(st.sampled_from([0.1, 0.6, 1.0]))
    whole = np.random.default_rng(seed).random((height, width)) < share
    whole[draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))] = True
    at = st.sampled_from([0.0, 0.25, 0.5, 2 / 3, 1.0])
    centre = (draw(at) * (height - 1), draw(at) * (width - 1))
    if draw(st.booleans()):
        centre = (float(height // 2), float(width // 2))
    return whole, centre


@given(fields(), st.integers(1, 7), st.integers(1, 9))
def test_every_pixel_is_in_one_ring_and_rings_are_apart(field, count, multiple):
    whole, centre = field
    rings = geometry.rings(whole, centre, REACH, count, multiple)
    assert rings.pixels.shape == (count, -(-whole.size // count))
    assert rings.locations.shape[0] == count
    assert rings.locations.shape[1] % multiple == 0
    assert rings.locations.shape[1] > 0
    assert whole.ravel()[rings.locations].all()
    inside = rings.pixels.ravel()[: whole.size]
    np.testing.assert_array_equal(np.sort(inside), np.arange(whole.size))
    assert (rings.pixels.ravel()[whole.size :] == inside[-1]).all()
    y, x = np.divmod(inside, whole.shape[1])
    assert (np.diff(np.hypot(y - centre[0], x - centre[1])) >= 0).all()


@given(fields(), st.integers(1, 7), st.integers(1, 9), st.lists(st.floats(-360, 360), min_size=1, max_size=9))
@settings(max_examples=60)
def test_rings_hold_every_location_that_their_tracks_pass(field, count, multiple, angles):
    whole, centre = field
    for pixels, locations in zip(*geometry.rings(whole, centre, REACH, count, multiple), strict=True):
        for y, x in zip(*np.divmod(pixels, whole.shape[1]), strict=True):
            near, usable = paco.nearest_pixels(paco.tracks(np.array(angles), y, x, centre), whole)
            assert set(near[usable] @ [whole.shape[1], 1]) <= set(locations)


def test_rings_hold_little_more_than_what_their_tracks_pass():
    """Of 31 x 31 px in 5 rings, none needs more locations than those of its own radii and a reach on both sides."""
    whole = np.ones((31, 31), bool)
    rings = geometry.rings(whole, (15.0, 15.0), REACH, 5, 1)
    radius = np.hypot(*(np.indices(whole.shape) - 15)).ravel()
    for pixels, locations in zip(*rings, strict=True):
        assert radius[locations].min() >= radius[pixels].min() - REACH
        assert radius[locations].max() <= radius[pixels].max() + REACH
    assert rings.locations.shape[1] < 0.45 * whole.size
