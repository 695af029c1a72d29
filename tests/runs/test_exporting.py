"""Names of exported parameters."""

import jax.numpy as jnp
import numpy as np

from pulmo_jax.runs.exporting import named_arrays


def test_names_are_places_in_the_model():
    arrays = named_arrays([{"layers": [{"kernel": jnp.ones((2, 3))}, {"kernel": np.zeros(1)}], "scale": np.float32(2)}])
    assert {name: array.shape for name, array in arrays.items()} == {
        "layers.0.kernel": (2, 3),
        "layers.1.kernel": (1,),
        "scale": (),
    }
    assert all(isinstance(array, np.ndarray) for array in arrays.values())


def test_each_network_has_names_of_its_own():
    arrays = named_arrays([{"bias": np.full(2, i)} for i in range(3)])
    assert {name: array.tolist() for name, array in arrays.items()} == {f"networks.{i}.bias": [i, i] for i in range(3)}
