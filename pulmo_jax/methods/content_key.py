"""Random keys that are functions of the content of a patch.

Noise at inference must not depend on the other patches of a batch, on their order or on the number of devices:
otherwise the score of an image would depend on how it was divided.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

MULTIPLIER = 2654435761  # of Knuth's multiplicative hash, 2^32 divided by the golden ratio


def content_keys(patches: Float[Array, "B P P C"], seed: int) -> Key[Array, "B"]:
    """Derive a random key from the bits of each patch.

    Args:
        patches: Patches, float32.
        seed: Seed; other seeds give independent keys.

    Returns:
        One key per patch. Equal patches have equal keys.
    """
    key = jax.random.key(seed)
    return jax.vmap(lambda digest: jax.random.fold_in(key, digest))(digests(patches))


def digests(patches: Float[Array, "B P P C"]) -> UInt32[Array, "B"]:
    """Hash the bits of each patch: the sum of its words, each mixed with its position, modulo 2^32."""
    words = jax.lax.bitcast_convert_type(patches.astype(jnp.float32), jnp.uint32).reshape(len(patches), -1)
    positions = jnp.arange(words.shape[1], dtype=jnp.uint32) * jnp.uint32(MULTIPLIER)
    mixed = (words ^ positions) * jnp.uint32(MULTIPLIER)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(2246822519)
    return (mixed ^ (mixed >> 13)).sum(axis=1, dtype=jnp.uint32)
