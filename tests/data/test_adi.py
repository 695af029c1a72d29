"""A rotating stack from three files: what fits together, what is changed with a caveat, what is refused."""

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from pulmo_jax.data.adi import load_channels, load_spectra, load_stack
from pulmo_jax.data.psf import fit_gaussian
from pulmo_jax.types import InputError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "adi_betapic"


def gaussian(height: int, width: int, y: float, x: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 8)


CUBE = np.random.default_rng(0).normal(size=(12, 21, 24)).astype(np.float32)
ANGLES = np.linspace(10, 40, 12)
PSF = gaussian(15, 15, 7, 7)


def load(folder: Path, cube: np.ndarray = CUBE, angles: np.ndarray = ANGLES, psf: np.ndarray = PSF):
    for name, array in {"cube": cube, "angles": angles, "psf": psf}.items():
        np.save(folder / f"{name}.npy", array)
    return load_stack(folder / "cube.npy", folder / "angles.npy", folder / "psf.npy")


def refusal(folder: Path, name: str, **arrays: np.ndarray) -> str:
    with pytest.raises(InputError) as error:
        load(folder, **arrays)
    assert str(error.value).startswith(f"{folder / name}.npy: ")
    return str(error.value)


def test_what_fits_is_as_it_was(tmp_path):
    stack = load(tmp_path)
    np.testing.assert_array_equal(stack.cube, CUBE)
    np.testing.assert_array_equal(stack.angles_deg, ANGLES)
    np.testing.assert_array_equal(stack.psf, PSF)
    assert stack.caveats == ()


@pytest.mark.parametrize(
    ("stored", "kept"),
    [("f4", "f4"), ("f8", "f8"), ("f2", "f4"), ("u1", "f4"), ("u2", "f4"), ("i2", "f4"), ("i4", "f8"), ("i8", "f8")],
)
def test_frames_become_floats_that_hold_them(tmp_path, stored, kept):
    top = 1000 if stored[0] == "f" else np.iinfo(stored).max // 2 if stored == "i8" else np.iinfo(stored).max
    cube = np.full(CUBE.shape, min(top, 2**31 - 1), stored)
    stack = load(tmp_path, cube=cube)
    assert stack.cube.dtype == np.dtype(kept)
    np.testing.assert_array_equal(stack.cube.astype("f8"), cube.astype("f8"))
    assert (stack.angles_deg.dtype, stack.psf.dtype) == (np.float64, np.float64)


def test_frames_may_hold_nan(tmp_path):
    cube = CUBE.copy()
    cube[3, :5] = np.nan
    np.testing.assert_array_equal(load(tmp_path, cube=cube).cube, cube)


@pytest.mark.parametrize("shape", [(1, 12, 21, 24), (12, 21, 24, 1)])
def test_a_cube_of_one_wavelength(tmp_path, shape):
    np.testing.assert_array_equal(load(tmp_path, cube=CUBE.reshape(shape)).cube, CUBE)


def test_one_frame(tmp_path):
    stack = load(tmp_path, cube=CUBE[:1], angles=ANGLES[:1])
    assert (stack.cube.shape, stack.angles_deg.shape) == ((1, 21, 24), (1,))


def test_cubes_of_other_axes_are_refused(tmp_path):
    assert "(21, 24)" in refusal(tmp_path, "cube", cube=CUBE[0])
    message = refusal(tmp_path, "cube", cube=np.stack([CUBE, CUBE]))
    assert "(2, 12, 21, 24)" in message
    assert "data.wavelengths" in message


def test_another_number_of_angles(tmp_path):
    message = refusal(tmp_path, "angles", angles=ANGLES[:11])
    assert "has 11 angles" in message
    assert f"{tmp_path / 'cube.npy'} has 12 frames (shape (12, 21, 24))" in message
    assert "another order" not in message


@pytest.mark.parametrize(("order", "axis"), [((1, 2, 0), 2), ((1, 0, 2), 1)])
def test_axes_in_another_order_are_suspected(tmp_path, order, axis):
    message = refusal(tmp_path, "angles", cube=CUBE.transpose(order))
    assert f"Axis {axis} of the cube has that length" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_angles_that_are_not_finite(tmp_path, value):
    angles = ANGLES.copy()
    angles[[5, 8]] = value
    assert f"2 of 12 angles are not finite; the first is {value}, of frame 5" in refusal(
        tmp_path, "angles", angles=angles
    )


@pytest.mark.parametrize(
    ("angles", "suspected"),
    [
        (np.deg2rad(ANGLES), True),
        (ANGLES, False),
        (np.linspace(-1.5, 1.5, 12), False),  # spans 3
        (np.linspace(100, 101, 12), False),
        (np.zeros(12), False),
    ],
)
def test_radians_are_suspected(tmp_path, angles, suspected):
    caveats = load(tmp_path, angles=angles).caveats
    assert [("radians" in c and str(tmp_path / "angles.npy") in c) for c in caveats] == [True] * suspected
    assert load(tmp_path, cube=CUBE[:9], angles=angles[:9]).caveats == ()  # too few to tell


# --- the PSF


def test_psf_in_a_cube_of_one(tmp_path):
    stack = load(tmp_path, psf=PSF[None])
    np.testing.assert_array_equal(stack.psf, PSF)
    assert stack.caveats == ()


def test_psf_images_are_averaged(tmp_path):
    stack = load(tmp_path, psf=np.stack([PSF, 2 * PSF, 6 * PSF]))
    np.testing.assert_allclose(stack.psf, 3 * PSF)
    (caveat,) = stack.caveats
    assert "3 PSF images were averaged without recentring" in caveat


@pytest.mark.parametrize(("y", "x"), [(7, 7), (7, 20), (10, 33), (2, 39)])
def test_a_psf_that_is_not_square_is_cut_about_its_peak(tmp_path, y, x):
    stack = load(tmp_path, psf=gaussian(16, 40, y, x))
    assert stack.psf.shape == (15, 15)
    top, left = min(max(y - 7, 0), 1), min(max(x - 7, 0), 25)
    np.testing.assert_array_equal(stack.psf, gaussian(15, 15, y - top, x - left))
    (caveat,) = stack.caveats
    assert "16 x 40 px was cropped to 15 x 15 px" in caveat


@pytest.mark.parametrize("side", [22, 25, 41])
def test_a_psf_larger_than_the_frame_is_cut(tmp_path, side):
    stack = load(tmp_path, psf=gaussian(side, side, side // 2, side // 2))
    assert stack.psf.shape == (21, 21)
    assert fit_gaussian(stack.psf)[0] == pytest.approx((10, 10))
    assert "frames are 21 x 24 px" in stack.caveats[0]


@pytest.mark.parametrize("side", [14, 20, 21])
def test_a_square_psf_that_fits_is_not_cut(tmp_path, side):
    stack = load(tmp_path, psf=gaussian(side, side, 8, 8))
    assert (stack.psf.shape, stack.caveats) == ((side, side), ())


@pytest.mark.parametrize(
    ("psf", "found"),
    [
        (np.where(PSF > 0.9, np.nan, PSF), "1 of 225 pixels of the PSF are not finite"),
        (np.full((15, 15), np.nan), "225 of 225"),
        (-PSF, "no positive flux"),
        (np.zeros((15, 15)), "no positive flux"),
        (PSF - 1, "no positive flux"),
        (PSF[0], "(15,)"),
        (np.zeros((2, 3, 15, 15)), "(2, 3, 15, 15)"),
    ],
)
def test_a_psf_that_is_none(tmp_path, psf, found):
    assert found in refusal(tmp_path, "psf", psf=psf)


@pytest.mark.skipif(not REAL.is_dir(), reason="the data is not here")
def test_real_stack():
    names = ("cube_with_planet", "parallactic_angles", "psf")
    stack = load_stack(*(REAL / f"{name}.fits" for name in names))
    assert (stack.cube.shape, stack.angles_deg.shape, stack.psf.shape) == ((61, 100, 100), (61,), (39, 39))
    assert stack.caveats == ()
    np.testing.assert_array_equal(stack.cube, fits.getdata(REAL / "cube_with_planet.fits"))
    np.testing.assert_array_equal(stack.angles_deg, fits.getdata(REAL / "parallactic_angles.fits")[:, 0])


# --- several wavelengths

CHANNELS = np.stack([CUBE, CUBE + 1, CUBE + 2])
WAVELENGTHS = np.array([1.0, 1.2, 1.5])
PSFS = np.stack([PSF, 2 * PSF, 3 * PSF])


def load_several(folder: Path, cube=CHANNELS, wavelengths=WAVELENGTHS, psf=PSFS, spectrum=None, angles=ANGLES):
    arrays = {"cube": cube, "angles": angles, "psf": psf, "wavelengths": wavelengths, "spectrum": spectrum}
    for name, array in arrays.items():
        if array is not None:
            np.save(folder / f"{name}.npy", array)
    paths = {name: folder / f"{name}.npy" for name, array in arrays.items() if array is not None}
    return load_channels(**paths)


def test_channels_that_fit_are_as_they_were(tmp_path):
    stack = load_several(tmp_path, spectrum=np.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(stack.cube, CHANNELS)
    np.testing.assert_array_equal(stack.wavelengths, WAVELENGTHS)
    np.testing.assert_array_equal(stack.psf, PSFS)
    np.testing.assert_array_equal(stack.spectra, [[1.0, 2.0, 3.0]])
    assert stack.caveats == ()
    assert load_several(tmp_path).spectra is None


def test_without_wavelengths_it_is_a_stack_of_one(tmp_path):
    load(tmp_path)
    stack = load_channels(*(tmp_path / f"{name}.npy" for name in ("cube", "angles", "psf")))
    np.testing.assert_array_equal(stack.cube, CUBE[None])
    np.testing.assert_array_equal(stack.psf, PSF[None])
    assert len(stack.wavelengths) == 1


@pytest.mark.parametrize("cube", [CUBE, CUBE[None], CUBE[..., None]], ids=["3-D", "(1,T,H,W)", "(T,H,W,1)"])
def test_one_wavelength_of_one_channel(tmp_path, cube):
    stack = load_several(tmp_path, cube=cube, wavelengths=np.array([2.2]), psf=PSF)
    np.testing.assert_array_equal(stack.cube, CUBE[None])
    np.testing.assert_array_equal(stack.psf, PSF[None])


def test_channels_are_put_into_the_order_of_their_wavelengths(tmp_path):
    order = [2, 0, 1]
    spectra = np.array([[1.0, 2, 3], [4, 5, 6]])
    stack = load_several(tmp_path, CHANNELS[order], WAVELENGTHS[order], PSFS[order], spectra[:, order])
    np.testing.assert_array_equal(stack.cube, CHANNELS)
    np.testing.assert_array_equal(stack.wavelengths, WAVELENGTHS)
    np.testing.assert_array_equal(stack.psf, PSFS)
    np.testing.assert_array_equal(stack.spectra, spectra)
    (caveat,) = stack.caveats
    assert caveat.startswith(str(tmp_path / "wavelengths.npy"))
    assert "sorted by wavelength" in caveat


@pytest.mark.parametrize("psf", [PSF, PSF[None]])
def test_one_psf_for_all_channels_is_said_where_they_lie_far_apart(tmp_path, psf):
    stack = load_several(tmp_path, psf=psf)
    np.testing.assert_array_equal(stack.psf, np.stack([PSF] * 3))
    (caveat,) = stack.caveats
    assert "one PSF is used for all 3 channels" in caveat
    assert "a factor of 1.50 from" in caveat
    assert load_several(tmp_path, psf=psf, wavelengths=np.array([1.0, 1.01, 1.02])).caveats == ()


@pytest.mark.parametrize(
    ("changes", "file", "words"),
    [
        ({"wavelengths": WAVELENGTHS[:2]}, "wavelengths", "has 2 wavelengths"),
        ({"cube": CUBE}, "wavelengths", "has one channel, (T, H, W)"),
        ({"cube": np.swapaxes(np.repeat(CHANNELS, 2, 0), 0, 1)[:, :3]}, "wavelengths", "Axis 1 of the cube"),
        ({"wavelengths": np.array([1.0, 0.0, 1.2])}, "wavelengths", "0, of channel 1"),
        ({"wavelengths": np.array([1.0, -1.0, np.nan])}, "wavelengths", "2 of 3 wavelengths are not positive"),
        ({"wavelengths": np.array([1.0, 1.2, 1.0])}, "wavelengths", "2 channels have the same wavelength, 1"),
        ({"psf": PSFS[:2]}, "psf", "has 2 PSF images"),
        ({"psf": PSFS * [[[1]], [[-1]], [[1]]]}, "psf", "no positive flux"),
        ({"spectrum": np.ones(4)}, "spectrum", "shape (4,), but the stack has 3 channels"),
        ({"spectrum": np.ones((3, 2))}, "spectrum", "shape (3, 2), but the stack has 3 channels"),
        ({"angles": ANGLES[:5]}, "angles", "has 5 angles"),
        ({"cube": CHANNELS[:, :, 0, 0]}, "cube", "(3, 12)"),
    ],
    ids=str,
)
def test_channels_that_do_not_fit_are_refused(tmp_path, changes, file, words):
    with pytest.raises(InputError) as error:
        load_several(tmp_path, **changes)
    assert str(error.value).startswith(f"{tmp_path / file}.npy: ")
    assert words in str(error.value)


def test_a_spectrum_may_be_a_column_of_text(tmp_path):
    path = tmp_path / "spectrum.txt"
    path.write_text("1\n2.5\n3\n")
    np.testing.assert_array_equal(load_spectra(path, 3), [[1, 2.5, 3]])
    path.write_text("1 2.5 3\n4 5 6\n")
    np.testing.assert_array_equal(load_spectra(path, 3), [[1, 2.5, 3], [4, 5, 6]])


@pytest.mark.parametrize("name", ["cube", "angles", "psf"])
def test_every_file_of_a_stack_is_limited(tmp_path, name):
    load(tmp_path)
    sizes = {n: np.load(tmp_path / f"{n}.npy").nbytes for n in ("cube", "angles", "psf")}
    paths = [tmp_path / f"{n}.npy" for n in sizes]
    np.save(tmp_path / f"{name}.npy", np.zeros((2, 2000, 2000) if name != "angles" else 10**7))
    with pytest.raises(InputError, match=rf"{name}\.npy: .* the limit is .*raise data\.max_image_mb"):
        load_stack(*paths, max_bytes=2**23 if name == "angles" else max(sizes.values()))
