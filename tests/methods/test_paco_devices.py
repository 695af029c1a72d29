"""Maps spread over several devices are those of one."""

import os

import jax
import numpy as np
import pytest
from references import child

from pulmo_jax.methods import paco

PROGRAM = """
import sys
import jax
import numpy as np
from pulmo_jax.methods import paco

assert len(jax.devices()) == 4
given = np.load(sys.argv[1])
found = {}
for mode in ("exact", "fast", "robust"):
    maps = paco.likelihood_maps(given["cube"], given["angles"], given["psf"], mode, patch_radius_px=2.0, memory_mb=1)
    found |= {f"{mode} {name}": getattr(maps, name) for name in ("a", "b", "snr", "n_frames", "shrinkage")}
np.savez(sys.argv[2], **found)
"""


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the other devices are simulated on a CPU")
def test_four_devices_compute_the_maps_of_one(tmp_path):
    """In float64; a pixel is missing, so that the number of locations is no multiple of four."""
    y, x = np.mgrid[:15, :15] - 7
    given = {
        "cube": np.random.default_rng(0).normal(size=(14, 20, 20)),
        "angles": np.linspace(-20, 60, 14),
        "psf": np.exp(-(y**2 + x**2) / 9),
    }
    given["cube"][3, 12, 5] = np.nan
    np.savez(tmp_path / "given.npz", **given)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    files = [tmp_path / "given.npz", tmp_path / "found.npz"]
    child.run_program(PROGRAM, *files, XLA_FLAGS=flags, JAX_PLATFORMS="cpu", JAX_ENABLE_X64=1)
    found = np.load(tmp_path / "found.npz")
    for mode in ("exact", "fast", "robust"):
        with jax.enable_x64(True):
            assert len(jax.local_devices()) == 1
            expected = paco.likelihood_maps(*given.values(), mode, patch_radius_px=2.0, memory_mb=1)
        assert np.isfinite(expected.snr).sum() > 150
        for name in ("a", "b", "snr", "n_frames", "shrinkage"):
            values = getattr(expected, name)
            np.testing.assert_allclose(found[f"{mode} {name}"], values, rtol=0, atol=1e-10 * np.nanmax(abs(values)))
