"""Registration of frozen dataclasses as JAX pytrees."""

from collections.abc import Iterable, Sequence

import jax


def register_pytree(cls: type, arrays: Sequence[str], static: Sequence[str]) -> None:
    """Register a frozen dataclass as a pytree.

    `jax.tree_util.register_dataclass` reconstructs instances through `__init__`, which validates its arguments. JAX
    also reconstructs them with placeholders instead of arrays; here `__init__` is not called.

    Args:
        cls: The dataclass.
        arrays: Fields that are traced; a tuple of numbers is a subtree.
        static: Other fields; hashable. A change of one compiles again.
    """

    def flatten_with_keys(instance: object) -> tuple[list, tuple]:
        children = [(jax.tree_util.GetAttrKey(name), getattr(instance, name)) for name in arrays]
        return children, tuple(getattr(instance, name) for name in static)

    def flatten(instance: object) -> tuple[list, tuple]:
        return [getattr(instance, name) for name in arrays], tuple(getattr(instance, name) for name in static)

    def unflatten(values: tuple, children: Iterable) -> object:
        instance = object.__new__(cls)
        for name, value in (*zip(arrays, children, strict=True), *zip(static, values, strict=True)):
            object.__setattr__(instance, name, value)
        return instance

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
