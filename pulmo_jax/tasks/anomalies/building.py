"""The method of a config: its networks, that of its base run, and an ensemble if there are several networks."""

from typing import Any

from flax import nnx

from pulmo_jax.config.nodes import build, find_target
from pulmo_jax.data.transforms import Preprocessing
from pulmo_jax.methods.base import Method, ShapesNetwork
from pulmo_jax.methods.ensemble import Ensemble
from pulmo_jax.tasks.anomalies.config import BaseConfig, TrainConfig
from pulmo_jax.training.members import seed_of
from pulmo_jax.types import InputError


def build_method(config: TrainConfig, how: Preprocessing) -> Method:
    """Build the networks, randomly initialised, and the method from the config."""
    return build_parts(parts_of(config), how, config.seed, config.plugins)


def parts_of(config: TrainConfig) -> BaseConfig:
    """Method, model and base run of a config."""
    members = config.trainer.members
    return BaseConfig(method=config.method, model=config.model, members=members, lora=config.lora, base=config.base)


def build_parts(parts: BaseConfig, how: Preprocessing, seed: int, plugins: tuple[str, ...]) -> Method:
    """Build a method on that of its base run, if it has one; several networks make an ensemble.

    Args:
        parts: Method, model and base run.
        how: Preprocessing.
        seed: Seed of the initial parameters; each further network has a seed of its own.
        plugins: Packages that may be imported.

    Returns:
        The method.

    Raises:
        InputError: If the model does not fit the patches, the base run the method, or settings each other.
    """
    base = None if parts.base is None else build_parts(parts.base, how, seed, plugins)
    target = find_target(parts.method, "method", plugins)
    shape = network_arguments(target, base)
    seeds = [seed, *(seed_of("network", seed, i) for i in range(1, parts.members))]

    def one(seed: int) -> Method:
        given: dict[str, Any] = {"patch_size": how.patch_size, "channels": how.channels, **shape}
        try:
            network = build(parts.model, "model", plugins, rngs=nnx.Rngs(seed), **given)
            return build(parts.method, "method", plugins, network=network, base=base, lora=parts.lora, seed=seed)
        except ValueError as error:
            raise InputError(str(error)) from error

    members = tuple(one(seed) for seed in seeds)
    return members[0] if len(members) == 1 else Ensemble(members)


def network_arguments(target: Any, base: Method | None) -> dict[str, Any]:
    """Arguments of the network that a method class determines, some of them by the method of the base run.

    Args:
        target: Class of the method.
        base: Method of the base run, if any.

    Returns:
        Values by name; empty for a class that determines none.

    Raises:
        InputError: If the base run is an ensemble, and an argument depends on it.
    """
    shape = dict(target.NETWORK) if isinstance(target, ShapesNetwork) else {}
    of_base = {name: value for name, value in shape.items() if isinstance(value, str)}
    if of_base and isinstance(base, Ensemble):
        raise InputError(
            f"method.base_run: is an ensemble of {base.count} networks, which have no {', '.join(of_base)} in common; "
            "give a run with trainer.members=1"
        )
    return shape | {name: getattr(base, attribute) for name, attribute in of_base.items()}
