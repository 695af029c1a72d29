"""FITS files that lie: checksums, numbers that astropy would believe, and tiles that would end the process."""

import numpy as np
import pytest
from astropy.io import fits
from references.image_files import noise

from pulmo_jax.data import fits_headers
from pulmo_jax.data.arrays import read_array
from pulmo_jax.types import InputError

PLANE = noise((20, 30), np.int16)


def write(path, *hdus, checksum: bool | str = False) -> None:
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(path, checksum=checksum)


def change(path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


KINDS = {
    "image": lambda: fits.ImageHDU(PLANE),
    "tiles": lambda: fits.CompImageHDU(PLANE, compression_type="RICE_1"),
    "table": lambda: fits.BinTableHDU.from_columns([fits.Column("a", "D", array=np.arange(9.0))]),
    "odd length": lambda: fits.ImageHDU(noise((7, 3), np.uint8)),
}


@pytest.mark.parametrize("checksum", [True, "datasum"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_flipped_bit_is_found_by_the_checksum(tmp_path, kind, checksum):
    """Of the data, or with CHECKSUM of the header too. The sums are written by astropy."""
    path, dims = tmp_path / "x.fits", (1, 2)
    write(path, KINDS[kind](), checksum=checksum)
    read_array(path, dims)
    content = path.read_bytes()
    data = content.index(b"END     ", 2880) // 2880 * 2880 + 2880
    rng = np.random.default_rng(0)
    for at in (data, data + 10, *rng.integers(2880 if checksum is True else data, len(content), 30)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"x\.fits: "):
            read_array(path, dims)


def test_the_sums_agree_with_astropy_whatever_the_values(tmp_path):
    for seed in range(20):
        values = noise((50, 31), np.int32, seed)
        write(tmp_path / f"{seed}.fits", fits.ImageHDU(values), checksum=True)
        np.testing.assert_array_equal(read_array(tmp_path / f"{seed}.fits", (2,)), values)


def test_the_message_tells_what_to_do_with_a_stale_checksum(tmp_path):
    write(tmp_path / "x.fits", fits.ImageHDU(PLANE, name="STAR"), checksum=True)
    change(tmp_path / "x.fits", b"'STAR    '", b"'PLANET  '")
    with pytest.raises(InputError, match=r"checksum of HDU 1.*\n.*fitscheck --write --force"):
        read_array(tmp_path / "x.fits", (2,))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"NAXIS   =                    2", b"NAXIS   =           2147483647", "NAXIS of HDU 1 is 2147483647, allowed"),
        (b"NAXIS   =                    2", b"NAXIS   =                  'x'", "NAXIS of HDU 1 is .*not an integer"),
        (b"NAXIS1  =                   30", b"NAXIS1  =                  -30", "NAXIS1 of HDU 1 is -30"),
        (b"PCOUNT  =                    0", b"PCOUNT  =                   -1", "PCOUNT of HDU 1 is -1"),
    ],
)
def test_numbers_that_cannot_be(tmp_path, old, new, reason):
    write(tmp_path / "x.fits", fits.ImageHDU(PLANE))
    change(tmp_path / "x.fits", old, new)
    with pytest.raises(InputError, match=reason):
        read_array(tmp_path / "x.fits", (2,))


@pytest.mark.parametrize("value", ["-1", "0", "3", "2147483647"])
def test_bytes_of_a_pixel_in_compressed_tiles(tmp_path, value):
    """astropy passes them to C."""
    write(tmp_path / "x.fits", fits.CompImageHDU(noise((20, 30), np.float32), compression_type="RICE_1"))
    change(tmp_path / "x.fits", b"ZVAL2   =                    4", b"ZVAL2   =" + value.rjust(21).encode())
    with pytest.raises(InputError, match=f"(BYTEPIX|ZVAL2) of HDU 1 is {value}"):
        read_array(tmp_path / "x.fits", (2,))


def test_tiles_of_too_many_pixels(tmp_path):
    write(tmp_path / "x.fits", fits.CompImageHDU(PLANE, compression_type="RICE_1"))
    change(tmp_path / "x.fits", b"ZTILE1  =                   30", b"ZTILE1  =           2147483647")
    with pytest.raises(InputError, match="a tile of HDU 1 has 2147483647 pixels"):
        read_array(tmp_path / "x.fits", (2,))


def test_hcompress_is_refused(tmp_path):
    write(tmp_path / "x.fits", fits.CompImageHDU(noise((20, 30), np.int16), compression_type="HCOMPRESS_1"))
    with pytest.raises(InputError, match=r"HCOMPRESS.*RICE or GZIP"):
        read_array(tmp_path / "x.fits", (2,))


def test_a_lost_end_is_not_searched_for_in_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(fits_headers, "_MAX_HEADER", 2 * 2880)
    fits.PrimaryHDU(noise((100, 100), np.float32)).writeto(tmp_path / "x.fits")
    change(tmp_path / "x.fits", b"END     ", b"FND     ")
    with pytest.raises(InputError, match="header of HDU 0 has no END within 5760 bytes"):
        read_array(tmp_path / "x.fits", (2,))


@pytest.mark.parametrize("blank", [b"\0", b" "])
def test_what_follows_the_last_unit(tmp_path, blank):
    fits.PrimaryHDU(PLANE).writeto(tmp_path / "x.fits")
    content = (tmp_path / "x.fits").read_bytes()
    (tmp_path / "x.fits").write_bytes(content + blank * 2880)
    np.testing.assert_array_equal(read_array(tmp_path / "x.fits", (2,)), PLANE)
    (tmp_path / "x.fits").write_bytes(content + b"no further unit".ljust(2880))
    with pytest.raises(InputError, match="HDU 0 is followed by data that are not an HDU"):
        read_array(tmp_path / "x.fits", (2,))


def test_random_groups_are_walked_over(tmp_path):
    groups = fits.GroupData(np.arange(24.0).reshape(2, 3, 4), parnames=["u"], pardata=[np.arange(2.0)], bitpix=-32)
    hdus = fits.HDUList([fits.GroupsHDU(groups), fits.ImageHDU(PLANE)])
    hdus.writeto(tmp_path / "x.fits", checksum=True)
    np.testing.assert_array_equal(read_array(tmp_path / "x.fits", (2,)), PLANE)
