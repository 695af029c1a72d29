"""World coordinates of a map: FITS cards of celestial axes, or of offsets from the star."""

from typing import Any

import numpy as np

from pulmo_jax.data.observation_header import Position

ARCSEC_PER_DEG = 3600.0


def sky_axes(
    centre: tuple[float, float], pixel_scale: float | None, north_deg: float, star: Position | None = None
) -> dict[str, tuple[Any, str]]:
    """FITS cards of the world coordinates of a map.

    The star is the reference point. With a pixel scale, the cards are those of a gnomonic projection if the position
    of the star is known, and otherwise of two linear axes, the offsets to the east and to the north in arcsec.

    Args:
        centre: Position (y, x) of the star, px from 0.
        pixel_scale: Pixel scale, arcsec per pixel; None: unknown, then only the reference pixel is given.
        north_deg: Direction of north in the map, degrees from the x axis toward y; east is 90 degrees further.
        star: Position of the star on the sky, if known.

    Returns:
        Value and comment by keyword.

    Reference:
        Greisen & Calabretta 2002, A&A 395, 1061; Calabretta & Greisen 2002, A&A 395, 1077.
    """
    cards: dict[str, tuple[Any, str]] = {
        "CRPIX1": (centre[1] + 1, "[px] star, from 1"),
        "CRPIX2": (centre[0] + 1, "[px] star, from 1"),
    }
    if pixel_scale is None:
        return cards
    celestial = star is not None
    step = pixel_scale / ARCSEC_PER_DEG if celestial else pixel_scale
    north = np.deg2rad(north_deg)
    sine, cosine = (0.0 if abs(v) < np.finfo(float).eps else float(v) for v in (np.sin(north), np.cos(north)))
    types = ("RA---TAN", "DEC--TAN") if celestial else ("EAST", "NORTH")
    values = (star.ra_deg, star.dec_deg) if celestial else (0.0, 0.0)
    names = ("right ascension", "declination") if celestial else ("offset from the star to the east", "to the north")
    for axis in (1, 2):
        cards[f"CTYPE{axis}"] = (types[axis - 1], names[axis - 1])
        cards[f"CUNIT{axis}"] = ("deg" if celestial else "arcsec", "")
        cards[f"CRVAL{axis}"] = (values[axis - 1], "star")
    # Of the offset (dx, dy), the position angle is atan2(dy, dx) - north.
    cards["CD1_1"], cards["CD1_2"] = (-step * sine, ""), (step * cosine, "")
    cards["CD2_1"], cards["CD2_2"] = (step * cosine, ""), (step * sine, "")
    if star is not None:
        cards["RADESYS"] = (star.frame, "")
        cards["EQUINOX"] = (star.equinox, "[yr]")
    return cards
