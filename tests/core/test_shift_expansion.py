"""A point source between pixels against a plain Fourier sum, and its expansion in the shift against the source."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import paco

from pulmo_jax.core import patches, psf

SIDE = 11
RNG_STAMP = np.random.default_rng(0).normal(size=(SIDE, SIDE))
WHOLE_STAMP = np.argwhere(np.ones((SIDE, SIDE))) - SIDE // 2


def source(fwhm: float, side: int = SIDE) -> np.ndarray:
    """Not symmetric, so that no axis is mistaken for another."""
    y, x = np.mgrid[:side, :side] - side // 2
    return np.exp(-4 * np.log(2) * (y**2 + 1.3 * x**2 + 0.4 * y * x) / fwhm**2) * (1 + 0.05 * y - 0.03 * x)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


shift, render = jax.jit(psf.shift), jax.jit(psf.render)


# --- interpolation


@pytest.mark.parametrize("period", [1, 3, 11])
def test_the_kernel_is_one_at_its_middle_and_zero_at_other_pixels(period):
    pixel = np.arange(-period, period + 1)
    found = psf.dirichlet(jnp.asarray(pixel, float), period)
    np.testing.assert_allclose(found, pixel % period == 0, atol=1e-14)


def test_the_kernel_is_a_ratio_of_sines():
    u = np.linspace(-4.9, 4.9, 50)
    expected = np.sin(np.pi * u) / (11 * np.sin(np.pi * u / 11))
    np.testing.assert_allclose(psf.dirichlet(jnp.asarray(u), 11), expected, atol=1e-14)


def test_shifted_stamps_are_the_reference_s():
    shifts = np.array([[0.0, 0.0], [0.3, -0.45], [-0.5, 0.5], [2.0, -1.0], [1.7, 0.2]])
    expected = paco.shift_psf(RNG_STAMP, *shifts.T, WHOLE_STAMP).reshape(-1, SIDE, SIDE)
    np.testing.assert_allclose(shift(RNG_STAMP, shifts), expected, atol=1e-13)
    np.testing.assert_allclose(shift(RNG_STAMP, shifts[0]), RNG_STAMP, atol=1e-14)
    np.testing.assert_allclose(shift(RNG_STAMP, shifts[3]), np.roll(RNG_STAMP, (2, -1), (0, 1)), atol=1e-13)


def test_samples_on_whole_pixels_about_a_shifted_source():
    pixels, shifts = np.arange(-2, 4), np.array([[1.2, -0.7], [0.0, 2.0], [-0.31, 0.5]])
    grid = np.stack(np.meshgrid(pixels, pixels, indexing="ij"), -1).reshape(-1, 2)
    expected = paco.shift_psf(RNG_STAMP, *shifts.T, grid).reshape(3, 6, 6)
    found = jax.jit(lambda at: psf.sample(jnp.asarray(RNG_STAMP), pixels, at))(shifts)
    np.testing.assert_allclose(found, expected, atol=1e-13)


@pytest.mark.parametrize("side", [1, 3, 11])
def test_interpolation_matrix_is_the_kernel_at_all_distances(side):
    pixels, shifts = np.arange(-4, 7), np.array([0.0, 0.25, -0.5, 1.7])
    found = jax.jit(lambda at: psf.interpolation_matrix(pixels, at, side))(shifts)
    distance = pixels[:, None] - (np.arange(side) - side // 2) - shifts[:, None, None]
    np.testing.assert_allclose(found, psf.dirichlet(jnp.asarray(distance), side), atol=1e-14)


def test_sampling_in_float32():
    shifts = np.array([[0.3, -0.45]], np.float32)
    with jax.enable_x64(False):
        found = shift(RNG_STAMP.astype(np.float32), shifts)
        assert found.dtype == jnp.float32
    expected = paco.shift_psf(RNG_STAMP, *shifts[0].astype(float), WHOLE_STAMP).reshape(SIDE, SIDE)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


@pytest.mark.parametrize("at", [(0.0, 0.0), (0.3, -0.45), (2.0, 0.5)])
def test_derivatives_of_a_shifted_source_are_finite_differences(at):
    """Whole pixels too, where a ratio of sines would have none."""
    slope = jax.jit(jax.jacfwd(psf.shift, 1))(source(3.0), jnp.array(at))
    backward = jax.jit(jax.jacrev(lambda s, at: psf.shift(s, at)[4, 6], 1))(source(3.0), jnp.array(at))
    for axis in range(2):
        step = 1e-5 * np.eye(2)[axis]
        difference = (shift(source(3.0), at + step) - shift(source(3.0), at - step)) / 2e-5
        np.testing.assert_allclose(slope[..., axis], difference, atol=1e-9)
        assert float(backward[axis]) == pytest.approx(float(difference[4, 6]), abs=1e-9)


def test_rendered_sources_are_placed_stamps_and_nothing_beyond():
    """Stamps that reach over an edge are cut there."""
    rng = np.random.default_rng(1)
    stamps, corner = rng.normal(size=(4, 5, 5)), np.array([[2, 3], [-2, 6], [7, 8], [-9, 1]])
    frames = np.zeros((4, 9, 10))
    for frame, stamp, (top, left) in zip(frames, stamps, corner, strict=True):
        for i, j in np.ndindex(5, 5):
            if 0 <= top + i < 9 and 0 <= left + j < 10:
                frame[top + i, left + j] = stamp[i, j]
    y, x = np.indices((9, 10))[..., None] * np.ones(4, int)
    np.testing.assert_array_equal(render(stamps, corner, y, x), np.moveaxis(frames, 0, -1))
    assert not frames[3].any()


# --- the expansion

OFFSETS = patches.disc(3.0)


def evaluate(expansion: psf.ShiftExpansion, shifts: np.ndarray) -> np.ndarray:
    """(n, P): the stamp on the footprint at the shifts (n, 2)."""
    terms = psf.terms(*jnp.asarray(shifts.T), expansion.degree)
    return np.stack(terms, axis=-1) @ expansion.templates


@pytest.mark.parametrize("fwhm", [1.5, 3.0, 4.6])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-11])
def test_the_reported_error_is_what_random_shifts_show(fwhm, tolerance):
    """The error is measured on a grid of shifts, so that 10 % more may be found between; and the edges are on it."""
    stamp = source(fwhm)
    expansion = psf.expand(stamp, OFFSETS, tolerance)
    assert expansion.error <= tolerance
    assert len(expansion.templates) == (expansion.degree + 1) * (expansion.degree + 2) // 2
    shifts = np.vstack([np.random.default_rng(0).uniform(-0.5, 0.5, (400, 2)), [[0.5, 0.5], [-0.5, 0.5]]])
    truth = paco.shift_psf(stamp, *shifts.T, OFFSETS)
    residual = evaluate(expansion, shifts) - truth
    scale = np.linalg.norm(truth, axis=1).max()
    rounding = 1e-14
    assert np.linalg.norm(residual, axis=1).max() / scale <= 1.1 * expansion.error + rounding
    assert np.linalg.norm(residual, axis=1).max() / scale >= 0.5 * expansion.error - rounding
    assert (abs(residual).max(0) <= 1.1 * expansion.neglected + 10 * rounding * scale).all()
    assert expansion.neglected.max() <= expansion.error * scale * 1.1


def test_a_degree_less_would_not_do_and_every_degree_helps():
    stamp = source(2.0)
    expansions = [psf.expand(stamp, OFFSETS, tolerance) for tolerance in 10.0 ** -np.arange(1, 12)]
    degrees = [expansion.degree for expansion in expansions]
    assert degrees == sorted(degrees)
    assert degrees[0] < 4 < 9 < degrees[-1]
    for coarse, fine in itertools.pairwise(expansions):
        if fine.degree > coarse.degree:
            assert fine.error < coarse.error
    just_not = psf.expand(stamp, OFFSETS, expansions[3].error * (1 - 1e-9))
    assert just_not.degree == expansions[3].degree + 1


def test_wide_sources_need_few_terms():
    degrees = [psf.expand(source(fwhm), OFFSETS, 1e-3).degree for fwhm in (1.2, 2.0, 4.6)]
    assert degrees == sorted(degrees, reverse=True)
    assert degrees[-1] <= 4


def test_a_source_of_one_pixel_has_a_limit():
    stamp = np.zeros((15, 15))
    stamp[7, 7] = 1
    assert psf.expand(stamp, OFFSETS, 1e-10).error <= 1e-10
    with pytest.raises(ValueError, match=r"degree 24 a shift expansion errs by more than 1\.0e-17"):
        psf.expand(stamp, OFFSETS, 1e-17)


def test_no_expansion_is_the_stamp_where_it_is():
    expansion = psf.centred(RNG_STAMP, OFFSETS)
    np.testing.assert_allclose(expansion.templates[0], paco.shift_psf(RNG_STAMP, 0.0, 0.0, OFFSETS), atol=1e-13)
    assert (expansion.degree, expansion.error, expansion.neglected.max()) == (0, 0.0, 0.0)
    np.testing.assert_array_equal(expansion.product, [[[1.0]]])


@pytest.mark.parametrize("degree", [0, 1, 2, 5])
def test_products_of_terms_are_terms_of_twice_the_degree(degree):
    """terms_i terms_j = sum_q product[q, i, j] terms_q, whatever i and j."""
    shifts = jnp.asarray(np.random.default_rng(0).uniform(-0.5, 0.5, (2, 20)))
    of_degree, of_twice = (np.array(psf.terms(*shifts, d)) for d in (degree, 2 * degree))
    found = np.einsum("qn,qij->ijn", of_twice, psf.products(degree))
    np.testing.assert_allclose(found, of_degree[:, None] * of_degree, atol=1e-14)
    np.testing.assert_allclose(of_twice[psf.linear_terms(degree)], of_degree, atol=1e-14)


def test_a_quadratic_form_of_the_source_is_a_polynomial_of_its_shift():
    """h' G h of the shifted source, from the Gram matrix of its templates."""
    expansion = psf.expand(source(3.0), OFFSETS, 1e-12)
    rng = np.random.default_rng(2)
    mixed = rng.normal(size=(len(OFFSETS), 60))
    g, shifts = mixed @ mixed.T / 60, rng.uniform(-0.5, 0.5, (50, 2))
    h = paco.shift_psf(source(3.0), *shifts.T, OFFSETS)
    gram = expansion.templates @ g @ expansion.templates.T
    polynomial = np.einsum("qij,ij->q", expansion.product, gram)
    found = np.stack(psf.terms(*jnp.asarray(shifts.T), 2 * expansion.degree), axis=-1) @ polynomial
    np.testing.assert_allclose(found, np.einsum("ni,ij,nj->n", h, g, h), rtol=1e-10)


@pytest.mark.parametrize("degree", [1, 2, 5])
def test_terms_are_products_of_chebyshev_s_polynomials(degree):
    y, x = np.random.default_rng(3).uniform(-0.5, 0.5, (2, 20))
    terms = psf.terms(jnp.asarray(y), jnp.asarray(x), degree)
    ky, kx = psf.orders(degree)
    assert len(terms) == len(ky) == len({*zip(ky, kx, strict=True)})
    assert (ky + kx).max() == degree
    for term, i, j in zip(terms, ky, kx, strict=True):
        np.testing.assert_allclose(term, np.cos(i * np.arccos(2 * y)) * np.cos(j * np.arccos(2 * x)), atol=1e-13)


@pytest.mark.parametrize("degree", [0, 3, 8])
def test_shift_templates_are_those_of_the_expansion(degree):
    """Traceable and linear in the stamp; of degree 0 the PSF itself."""
    stamp, offsets = source(4.0, 15), patches.disc(3)
    ky, kx = psf.orders(degree)
    expected = psf.chebyshev_coefficients(stamp, offsets)[ky, kx] if degree else psf.centred(stamp, offsets).templates
    values, slope = jax.jvp(lambda s: psf.shift_templates(s, offsets, degree), *2 * [(jnp.asarray(stamp),)])
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(slope, expected, rtol=0, atol=1e-13)
