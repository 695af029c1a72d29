"""What is watched during and after a training: validation loss, reconstructions, memory and cost of scoring."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure

from pulmo_jax.data.pipeline import evenly_spaced
from pulmo_jax.data.transforms import Preprocessing
from pulmo_jax.inference.memory import within_memory
from pulmo_jax.inference.score import LOWER, Scorer
from pulmo_jax.inference.strips import TILES, on_devices
from pulmo_jax.methods.base import Method
from pulmo_jax.methods.ensemble import calls_per_tile
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.anomalies.figures import patch_grid
from pulmo_jax.training import devices
from pulmo_jax.training.state import TrainState, inference_state, learnt


def require_scoring_memory(method: Method, how: Preprocessing, batch_size: int) -> None:
    """Check before training that a batch of tiles can be scored after it.

    Args:
        method: Method of the run.
        how: Preprocessing.
        batch_size: Number of tiles per batch.

    Raises:
        InputError: If the free memory is insufficient.
    """
    tiles = jax.ShapeDtypeStruct((batch_size, how.patch_size, how.patch_size, how.channels), jnp.float32)
    params = jax.eval_shape(lambda: learnt(method, inference_state(method)))
    operation = f"scoring a batch of {batch_size} tiles of {how.patch_size} x {how.patch_size} px"
    within_memory(method.residual, operation, LOWER.format(batch_size)).check(params, tiles)


def scoring_cost(scorer: Scorer, place: Place) -> dict[str, Any]:
    """Measure what a tile costs if a method evaluates its network several times per tile.

    Args:
        scorer: Scorer of the run.
        place: For the message.

    Returns:
        Entry "cost" of metrics.json; empty for other methods.
    """
    calls, how = calls_per_tile(scorer.method), scorer.how
    if calls is None:
        return {}
    count = -(-scorer.tiles.batch_size // jax.local_device_count()) * jax.local_device_count()
    shape = (count, how.patch_size, how.patch_size, how.channels)
    tiles = jnp.zeros(shape, jnp.float32, device=on_devices(TILES))  # divided as in scoring: the same program
    jax.block_until_ready(scorer.residual(scorer.params, tiles))  # compiles
    began = time.perf_counter()
    jax.block_until_ready(scorer.residual(scorer.params, tiles))
    seconds = (time.perf_counter() - began) / len(tiles)
    place.note(
        f"scoring takes {calls} network evaluations per tile: {1e3 * seconds:.3g} ms per tile, "
        f"{1e3 * seconds / calls:.3g} ms each"
    )
    return {"cost": {"network_calls_per_tile": calls, "seconds_per_tile": seconds}}


def reconstructions(method: Method, patches: np.ndarray) -> Callable[[TrainState], Figure]:
    """Function that draws validation patches above their reconstructions for a training state."""
    reconstruct = jax.jit(lambda state, patches: method.reconstruct(learnt(method, state), patches))

    def draw(state: TrainState) -> Figure:
        return patch_grid(patches, np.asarray(reconstruct(devices.here(state), patches)), int(state.step))

    return draw


def make_validation(
    method: Method, patches: np.ndarray, batch_size: int, seed: int, mesh: Mesh
) -> Callable[[TrainState], float]:
    """Make the validation loss: mean loss of the parameters for inference, with the same noise in every call.

    Args:
        method: Method of the run.
        patches: Validation patches, (n, P, P, C).
        batch_size: Maximum number of patches per batch.
        seed: Seed of the noise.
        mesh: Devices.

    Returns:
        Function of the training state.
    """
    size = min(batch_size, len(patches))
    whole = evenly_spaced(patches, len(patches) // size * size)  # batches of one shape: one compilation
    batches = devices.on_all(whole.reshape(-1, size, *patches.shape[1:]), mesh)

    @jax.jit
    def mean_loss(state: TrainState, batches: jax.Array) -> jax.Array:
        params, keys = learnt(method, state), jax.random.split(jax.random.key(seed), len(batches))
        return jax.lax.map(lambda item: method.train_loss(params, *item), (batches, keys)).mean()

    return lambda state: float(mean_loss(state, batches))
