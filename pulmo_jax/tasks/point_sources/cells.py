"""Cells of the tables of sources: values with errors, to the digits that the errors allow."""

import math

MAS_PER_ARCSEC = 1000.0
DIGITS = 2  # significant digits of an error
PLAIN = (1e-2, 1e5)  # range of values without a power of ten


def measured(value: float, std: float) -> str:
    """A value with its error.

    Args:
        value: The value.
        std: Standard deviation.

    Returns:
        Text such as "698 ± 29" or "(9.13 ± 0.38)e-04": the error has two significant digits, the value as many
        decimals. An unknown error is "?".
    """
    if not math.isfinite(value):
        return "-"
    power = 0 if value == 0 or PLAIN[0] <= abs(value) < PLAIN[1] else math.floor(math.log10(abs(value)))
    scaled, error = value / 10.0**power, std / 10.0**power
    if not (math.isfinite(error) and error > 0):
        text = f"{scaled:.3g} ± ?"
    else:
        decimals = max(0, DIGITS - 1 - math.floor(math.log10(error)))
        text = f"{scaled:.{decimals}f} ± {error:.{decimals}f}"
    return f"({text})e{power:+03d}" if power else text


def separation(px: float, px_std: float, pixel_scale: float | None) -> str:
    """A separation with its error, in mas if the pixel scale (arcsec per pixel) is known, otherwise in px."""
    factor = 1.0 if pixel_scale is None else pixel_scale * MAS_PER_ARCSEC
    return measured(px * factor, px_std * factor)


def in_px_and_mas(px: float, pixel_scale: float | None) -> str:
    """A length in px, and in mas if the pixel scale (arcsec per pixel) is known."""
    return f"{px:.2f} px" + ("" if pixel_scale is None else f" = {px * pixel_scale * MAS_PER_ARCSEC:.1f} mas")
