"""The images of a cross-validated run, in images.json, which may come from elsewhere."""

from pathlib import Path
from typing import Any

from pulmo_jax.host.reading import read_json
from pulmo_jax.types import InputError


def read_images(path: Path, n_networks: int) -> list[dict[str, Any]]:
    """Read images.json.

    Args:
        path: The file.
        n_networks: Number of networks.

    Returns:
        Images of the run, each with the networks that were not trained on it.

    Raises:
        InputError: If the file cannot be read, or is not a list of such images.
    """
    try:
        content = read_json(path, inside=path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); train again") from error
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not all(is_image(image, n_networks) for image in images):
        raise InputError(f"{path}: does not list the images of the run; train again")
    return images


def is_image(image: Any, n_networks: int) -> bool:
    """Whether an entry of images.json has the values that are used, in their range."""
    if not isinstance(image, dict):
        return False
    unseen, look = image.get("unseen_by"), image.get("look")
    return (
        isinstance(image.get("content"), str)
        and (look is None or (type(look) is int and 0 <= look < 2**64))
        and isinstance(unseen, list)
        and all(type(i) is int and 0 <= i < n_networks for i in unseen)
    )
