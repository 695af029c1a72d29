"""The sign of the angles: found where a source is there, silent on noise."""

import numpy as np
import pytest

from pulmo_jax.data.psf import shift
from pulmo_jax.data.synthetic import rotating_stack, synthetic_psf
from pulmo_jax.evaluation.angle_sign import SignEvidence, _unwrapped, sign_evidence

FWHM_PX = 4.6


def evidence(stack, sign=1, size=100):
    deviations = stack.cube - stack.cube.mean(axis=0)
    found = sign_evidence(deviations, sign * stack.angles_deg, (size / 2, size / 2), FWHM_PX)
    assert found is not None
    return found


@pytest.mark.parametrize("rotation_deg", [20.0, 60.0])
def test_noise_never_contradicts(rotation_deg):
    found = [evidence(rotating_stack(s, rotation_deg=rotation_deg, planets=()).stack) for s in range(10)]
    assert not any(one.contradicts for one in found)
    assert max(max(one.given, one.reversed) for one in found) < 6


def test_a_planet_is_seen_with_the_right_sign_alone():
    stack = rotating_stack(1, planets=((50 + 20.0, 50 - 18.0, 250.0),)).stack
    right, wrong = evidence(stack), evidence(stack, sign=-1)
    assert right.given > 6 > right.reversed
    assert not right.contradicts
    assert wrong.contradicts
    assert np.hypot(wrong.place[0] - 70, wrong.place[1] - 32) < 2


def test_the_place_is_that_of_a_source_moved_by_hand():
    """White noise and a source placed in every frame by the documented convention, theta - angle."""
    rng, angles = np.random.default_rng(0), np.linspace(340, 395, 40)  # past a full turn
    cube, psf = rng.standard_normal((40, 81, 81)).astype(np.float32), synthetic_psf()
    for frame, angle in zip(cube, np.deg2rad(np.mod(angles, 360)), strict=True):
        theta = np.deg2rad(70.0) - angle
        y, x = 40 + 25 * np.sin(theta), 40 + 25 * np.cos(theta)
        low_y, low_x = round(y) - 19, round(x) - 19
        stamp = 20 * shift(psf, y - round(y), x - round(x))
        rows, columns = slice(max(low_y, 0), min(low_y + 39, 81)), slice(max(low_x, 0), min(low_x + 39, 81))
        frame[rows, columns] += stamp[
            rows.start - low_y : rows.stop - low_y, columns.start - low_x : columns.stop - low_x
        ]
    found = sign_evidence(cube - cube.mean(axis=0), np.mod(-angles, 360), (40.0, 40.0), FWHM_PX)
    assert found is not None
    assert found.contradicts
    theta = np.deg2rad(70.0)
    assert np.hypot(found.place[0] - 40 - 25 * np.sin(theta), found.place[1] - 40 - 25 * np.cos(theta)) < 1.5


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_the_unit_and_a_bright_background_do_not_matter(factor):
    stack = rotating_stack(1, planets=((70.0, 32.0, 250.0),)).stack
    cube = factor * (stack.cube.astype(float) + 1e6)
    cube[3, 5, 5], cube[4, 5, 5], cube[7, 80, 80] = np.inf, -np.inf, np.nan
    found = sign_evidence(cube, -stack.angles_deg, (50.0, 50.0), FWHM_PX)
    same = evidence(stack, sign=-1)
    assert found is not None
    assert found.contradicts
    assert found.reversed == pytest.approx(same.reversed, rel=0.02)


def test_frames_that_are_not_kept_do_not_count():
    stack = rotating_stack(1, planets=((70.0, 32.0, 250.0),)).stack
    kept = np.arange(60) % 7 != 3
    cube = np.where(kept[:, None, None], stack.cube, np.nan)
    found = sign_evidence(cube, -stack.angles_deg[kept], (50.0, 50.0), FWHM_PX, kept)
    assert found == sign_evidence(stack.cube[kept], -stack.angles_deg[kept], (50.0, 50.0), FWHM_PX)
    assert found is not None
    assert found.contradicts


def test_small_frames_cannot_tell():
    assert sign_evidence(np.zeros((5, 20, 20), np.float32), np.arange(5.0), (10.0, 10.0), FWHM_PX) is None


def test_both_the_height_and_the_excess_count():
    assert SignEvidence(5.0, 7.0, (0, 0)).contradicts
    assert not SignEvidence(6.0, 7.0, (0, 0)).contradicts
    assert not SignEvidence(3.0, 5.5, (0, 0)).contradicts


@pytest.mark.parametrize("angles", [[350.0, 355, 1, 5], [-170.0, -179, 178, 170], [10.0, 20, 30]])
def test_unwrapped_angles_are_the_same_modulo_a_turn_and_span_the_arc(angles):
    found = _unwrapped(np.array(angles))
    np.testing.assert_allclose(np.cos(np.deg2rad(found)), np.cos(np.deg2rad(angles)), atol=1e-12)
    np.testing.assert_allclose(np.sin(np.deg2rad(found)), np.sin(np.deg2rad(angles)), atol=1e-12)
    assert np.ptp(found) <= 20 + 1e-9
