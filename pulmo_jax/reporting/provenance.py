"""How results were made: command, versions, commit, devices, date and duration; without names of users or machines."""

import importlib.metadata
import os
import platform
from collections import Counter
from typing import Any

import jax

from pulmo_jax import __version__
from pulmo_jax.host.calls import CALL, commit_of

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "scipy",
    "tifffile",
    "astropy",
)
SHOWN = ("jax", "jaxlib", "flax", "numpy")  # in reports; run.json has all


def provenance() -> dict[str, Any]:
    """Command, date, commit, versions, platform, CPUs and devices, for run.json.

    Returns:
        JSON values by name.
    """
    call = CALL.get()
    return {
        "command": call.command or None,
        "date": call.date.isoformat(timespec="seconds"),
        "commit": commit_of(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
        "packages": {"pulmo-jax": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}},
    }


def how_made(*, with_devices: bool = True) -> dict[str, str]:
    """Describe how the results of this process were made, for the end of a report.

    Args:
        with_devices: State the devices; False if this process must not occupy them.

    Returns:
        Text by label.
    """
    call, commit = CALL.get(), commit_of()
    python = f"Python {platform.python_version()}"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in SHOWN]
    cpus = f"{os.cpu_count()} CPU cores"
    return {
        "command": call.command or "from Python",
        "versions": ", ".join([f"pulmo_jax {__version__}", python, *versions]),
        **({"commit": commit} if commit else {}),
        "device": f"{devices()}, {cpus}" if with_devices else cpus,
        "date": f"{call.date:%Y-%m-%d %H:%M} UTC",
        "wall time": f"{call.seconds:.0f} s until this report",
    }


def devices() -> str:
    """Kinds of the devices of JAX, with their numbers."""
    kinds = Counter(f"{device.platform} ({device.device_kind})" for device in jax.devices())
    return ", ".join(kind if n == 1 else f"{n} x {kind}" for kind, n in kinds.items())
