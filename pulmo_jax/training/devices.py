"""Data-parallel training on all devices of all hosts: the state is replicated, batches are divided.

Every process runs the same program on its share of each batch. Batches, noise and decisions depend on seed and step
only, so the number of devices changes only the order of summation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pulmo_jax.types import InputError

ROWS = "rows"


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connect the processes of a distributed training; must precede all other JAX calls.

    Args:
        coordinator: HOST:PORT of the first process; "auto": all arguments from SLURM, Open MPI or a TPU pod; None: a
            single process.
        processes: Number of processes.
        process: Index of this process.

    Raises:
        InputError: If the processes cannot connect.
    """
    if coordinator is None:
        return
    address = None if coordinator == "auto" else coordinator
    try:
        jax.distributed.initialize(address, processes, process)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"cluster.coordinator={coordinator} cluster.processes={processes} cluster.process={process}: "
            f"the processes cannot connect ({str(error).partition(chr(10))[0]:.200})"
        ) from error


def all_devices(batch_size: int) -> Mesh:
    """Mesh of all devices.

    Args:
        batch_size: Examples per batch.

    Returns:
        The mesh.

    Raises:
        InputError: If the batch size is not a multiple of the number of devices.
    """
    devices = jax.devices()
    if batch_size % len(devices):
        raise InputError(
            f"trainer.batch_size={batch_size} cannot be divided by the {len(devices)} devices; give a multiple of "
            f"{len(devices)}"
        )
    return Mesh(np.array(devices), (ROWS,), axis_types=(AxisType.Auto,))


def everywhere(mesh: Mesh) -> NamedSharding:
    """Sharding that replicates an array on all devices."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """Sharding that divides the first axis of an array among all devices."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def on_all(tree: Any, mesh: Mesh) -> Any:
    """Replicate the arrays of a tree on all devices; the values must be equal in all processes."""
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(everywhere(mesh), np.array(leaf)), tree)


def divided(share: Any, mesh: Mesh) -> Any:
    """Distribute a batch over the devices; `share` contains the rows of this process, in the order of the processes."""
    return jax.tree.map(partial(jax.make_array_from_process_local_data, rows(mesh)), share)


def described(batch: Any, mesh: Mesh) -> Any:
    """Describe a batch over all processes, as distributed by `divided`.

    Args:
        batch: Tree of shapes and dtypes on the host.
        mesh: Devices.

    Returns:
        Tree of shapes, dtypes and shardings.
    """
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtypes.canonicalize_dtype(leaf.dtype), sharding=rows(mesh)), batch
    )


def here(tree: Any) -> Any:
    """Copy of a replicated tree on the first device of this process, for work in this process alone."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def is_first() -> bool:
    """Whether this is the first process."""
    return jax.process_index() == 0


@contextmanager
def first_then_others() -> Iterator[None]:
    """Run the block in the first process before the others."""
    if jax.process_count() > 1 and not is_first():
        multihost_utils.sync_global_devices("first")
    yield
    if jax.process_count() > 1 and is_first():
        multihost_utils.sync_global_devices("first")


def require_same(number: int, quantity: str) -> None:
    """Check that a number is equal in all processes.

    Args:
        number: The number.
        quantity: Its name, for the error message.

    Raises:
        InputError: If it is not.
    """
    if jax.process_count() > 1:
        found = np.ravel(multihost_utils.process_allgather(np.array(number)))
        if (found != number).any():
            raise InputError(f"the processes differ in {quantity} (values {', '.join(map(str, found))})")


def agreement(mesh: Mesh) -> Callable[[int | None], int | None]:
    """Share received signals between processes, so that all stop after the same step.

    Args:
        mesh: Devices.

    Returns:
        Function (signal of this process) -> signal of any process. With several processes it returns the result of the
        previous call, so that no device waits for it.
    """
    if jax.process_count() == 1:
        return lambda signum: signum
    highest = jax.jit(jnp.max, out_shardings=everywhere(mesh))
    sent: list[jax.Array] = []

    def agreed(signum: int | None) -> int | None:
        sent.append(highest(divided(np.full(len(mesh.local_devices), signum or 0, np.int32), mesh)))
        return (int(sent.pop(0)) or None) if len(sent) > 1 else None

    return agreed


def disconnect() -> None:
    """Disconnect the processes after training; the first one continues alone."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("trained")
        jax.distributed.shutdown()
