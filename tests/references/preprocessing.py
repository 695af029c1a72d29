"""Preprocessing whose every field has a value, for tests that care about a few."""

from pulmo_jax.data.transforms import Preprocessing


def preprocessing(patch_size: int = 8, channels: int = 1, **changes) -> Preprocessing:
    """Leaves pixels as they are, but for the changes."""
    unchanged = {
        "channels": channels,
        "dtype": "float32",
        "patch_size": patch_size,
        "resize": False,
        "offset": (0.0,) * channels,
        "scale": (1.0,) * channels,
        "fill": (0.0,) * channels,
        "mean": (0.0,) * channels,
        "std": (1.0,) * channels,
        "clip": (-1e9, 1e9),
    }
    return Preprocessing(**(unchanged | changes))
