"""Names of the parameters of networks."""

from typing import Any


def name_of(path: tuple[Any, ...]) -> str:
    """Name of a parameter from its path in a tree of parameters.

    Args:
        path: Path, as given by `jax.tree.map_with_path`.

    Returns:
        Attributes, keys and indices, joined by dots, such as "blocks.1.expand.0.kernel".
    """
    parts = (str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)
    return ".".join(part for part in parts if part not in ("value", ""))
