"""Maps as FITS, read back by astropy: pixels, keywords, and every parameter, whatever its text."""

import ast
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import given
from hypothesis import strategies as st

from pulmo_jax.inference.fits import plain, write_fits
from pulmo_jax.types import InputError

IMAGE = np.array([[0.5, np.nan, -1], [np.inf, 1e-30, 3]])


def parameters_of(path: Path) -> dict:
    """Everything that `write_fits` wrote as a parameter."""
    header = fits.getheader(path)
    found = {card.keyword[3:]: card.value for card in header.cards if card.keyword.startswith("PJ ")}
    text = ""
    for card in header.get("COMMENT", []):
        text += card
        if len(card) == 72 and card.endswith("&"):
            text = text[:-1]
            continue
        name, _, value = text.partition(" = ")
        found[ast.literal_eval(f"'{name}'")] = (
            float(value) if value in ("nan", "inf", "-inf") else ast.literal_eval(value)
        )
        text = ""
    return found


def test_pixels(tmp_path):
    write_fits(tmp_path / "deep" / "snr.fits", IMAGE, {}, {})
    with fits.open(tmp_path / "deep" / "snr.fits") as hdus:
        hdus.verify("exception")
        assert hdus[0].header["BITPIX"] == -32
        np.testing.assert_array_equal(hdus[0].data, IMAGE.astype(np.float32))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["snr.fits"]


def test_an_old_file_is_replaced(tmp_path):
    for value in (1, 2):
        write_fits(tmp_path / "x.fits", IMAGE * value, {"VALUE": value}, {})
    assert fits.getheader(tmp_path / "x.fits")["VALUE"] == 2


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    write_fits(tmp_path / "x.fits", IMAGE, {}, {})
    before = (tmp_path / "x.fits").read_bytes()

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(fits.PrimaryHDU, "writeto", fail)
    with pytest.raises(InputError, match="no space"):
        write_fits(tmp_path / "x.fits", 2 * IMAGE, {}, {})
    assert (tmp_path / "x.fits").read_bytes() == before


def test_the_same_input_gives_the_same_bytes(tmp_path):
    for name in ("a.fits", "b.fits"):
        write_fits(tmp_path / name, IMAGE, {"BUNIT": "snr"}, {"a.b": 1})
    assert (tmp_path / "a.fits").read_bytes() == (tmp_path / "b.fits").read_bytes()


def test_header(tmp_path):
    cards = {"BUNIT": "snr", "CDELT1": (-0.02719 / 3600, "deg"), "CENTREY": (50, "px"), "STAR": ("β Pic", "näme")}
    cards |= {"LONG": (0.125, "c" * 60), "FLAG": (np.True_, "yes"), "SCALE": np.float32(0.5)}
    write_fits(tmp_path / "x.fits", IMAGE, cards, {})
    header = fits.getheader(tmp_path / "x.fits")
    assert (header["BUNIT"], header["CENTREY"], header.comments["CENTREY"]) == ("snr", 50, "px")
    assert header["CDELT1"] == pytest.approx(-0.02719 / 3600, rel=1e-12)
    assert (header["LONG"], header["FLAG"], header["SCALE"]) == (0.125, True, 0.5)
    comments = "".join(header["COMMENT"])
    assert "STAR = '\\u03b2 Pic' / n\\xe4me" in comments
    assert f"LONG: {'c' * 60}" in comments


def test_a_card_is_one_line_as_others_read_it(tmp_path):
    write_fits(tmp_path / "x.fits", IMAGE, {}, {"method.shrinkage": "paco", "method.radius_px": 4})
    content = (tmp_path / "x.fits").read_bytes()
    lines = [content[i : i + 80].decode().rstrip() for i in range(0, 2880, 80)]
    assert "HIERARCH PJ method.shrinkage = 'paco    '" in lines
    assert "HIERARCH PJ method.radius_px = 4" in lines


PARAMETERS = {
    "method.shrinkage": None,
    "method.rho": 0.1 + 0.2,
    "tiny": -1.2345678901234567e-5,
    "large": 1.7976931348623157e308,
    "seed": 2**70,
    "on": True,
    "off": False,
    "data.cube": Path("/data/cube.fits"),
    "data.psf": Path("/data/β Pictoris/psf.fits"),
    "data.angles": "/a" * 200,
    "rings": (1, 2.5, None, "a"),
    "list": [1, [2, 3]],
    "numpy": np.float64(0.1),
    "not_a_number": float("nan"),
    "infinite": float("-inf"),
    "quote": "it's = 'quoted' / not a comment",
    "empty": "",
    "trailing": "two spaces  ",
    "lines": "a\nb\t\\n",
    "record": "axis.1: 3",
    "number as text": "12",
    "truth as text": "T",
    "k" * 90: 3,
    "key=with=equals": 1,
    "Upper.Case": 1,
    "ümlaut": 1,
    "edge": "z" * 70 + "&",
    "last": "&",
}


def test_nothing_is_lost(tmp_path):
    write_fits(tmp_path / "x.fits", IMAGE, {"BUNIT": "snr"}, PARAMETERS)
    with fits.open(tmp_path / "x.fits") as hdus:
        hdus.verify("exception")
    found = parameters_of(tmp_path / "x.fits")
    assert found.keys() == PARAMETERS.keys()
    for name, value in PARAMETERS.items():
        expected = plain(value)
        assert type(found[name]) is type(expected), name
        assert found[name] == expected or (found[name] != found[name] and expected != expected), name


@given(st.text(max_size=200) | st.floats() | st.integers() | st.booleans(), st.text("abz._-0", min_size=1, max_size=80))
def test_any_value_comes_back(tmp_path_factory, value, name):
    path = tmp_path_factory.mktemp("fits") / "x.fits"
    write_fits(path, IMAGE, {}, {name: value})
    (back,) = parameters_of(path).items()
    assert back[0] == name
    assert type(back[1]) is type(value)
    assert back[1] == value or (value != value and back[1] != back[1])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "None"),
        (Path("a/b"), "a/b"),
        ((1, None, "x"), "[1, None, x]"),
        (np.int32(3), 3),
        (np.bool_(True), True),
        ({"a": 1}, "{'a': 1}"),
    ],
)
def test_plain(value, expected):
    assert plain(value) == expected
    assert type(plain(value)) is type(expected)
