"""One program over all devices of all hosts: the state is on each, the rows of a batch are divided.

Every process runs the same job on its own share of each batch. Batches, noise and decisions are functions of (seed,
step), so that the number of devices changes the order of some sums and nothing else.
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
    """Join the processes of a job; before any other call of JAX. Without a coordinator this process is alone.

    coordinator: HOST:PORT of the first process; "auto": as SLURM, Open MPI or a TPU pod tell, which also know the rest.
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
    """Raises InputError where they cannot share a batch evenly."""
    devices = jax.devices()
    if batch_size % len(devices):
        raise InputError(
            f"trainer.batch_size={batch_size} cannot be divided by the {len(devices)} devices; give a multiple of "
            f"{len(devices)}"
        )
    return Mesh(np.array(devices), (ROWS,), axis_types=(AxisType.Auto,))


def everywhere(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(ROWS))


def on_all(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array on every device. All processes give the same values."""
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(everywhere(mesh), np.array(leaf)), tree)


def divided(share: Any, mesh: Mesh) -> Any:
    """The batch, an array or several, of which this process has read `share`: the p-th of n consecutive ones."""
    return jax.tree.map(partial(jax.make_array_from_process_local_data, rows(mesh)), share)


def described(batch: Any, mesh: Mesh) -> Any:
    """A whole batch as `divided` makes it, without its values.

    Args:
        batch: Shapes and dtypes on the host.
    """
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtypes.canonicalize_dtype(leaf.dtype), sharding=rows(mesh)), batch
    )


def here(tree: Any) -> Any:
    """This process's own copy of what is on all devices, for work that the other processes do not share."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def is_first() -> bool:
    return jax.process_index() == 0


@contextmanager
def first_then_others() -> Iterator[None]:
    """The first process passes the block before the others enter it."""
    if jax.process_count() > 1 and not is_first():
        multihost_utils.sync_global_devices("first")
    yield
    if jax.process_count() > 1 and is_first():
        multihost_utils.sync_global_devices("first")


def require_same(number: int, quantity: str) -> None:
    """Raises InputError where the processes do not have the same."""
    if jax.process_count() > 1:
        found = np.ravel(multihost_utils.process_allgather(np.array(number)))
        if (found != number).any():
            raise InputError(f"the processes differ in {quantity} (values {', '.join(map(str, found))})")


def agreement(mesh: Mesh) -> Callable[[int | None], int | None]:
    """Lets all processes act on a signal that any of them has received, after the same step.

    Returns:
        (signal of this process) -> signal of any process. With several processes the answer is that of the call before,
        so that no device waits for it.
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
    """Training is over: the first process goes on alone, however long it takes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("trained")
        jax.distributed.shutdown()
