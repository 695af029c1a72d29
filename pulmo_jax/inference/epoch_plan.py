"""Settings of the search in several epochs."""

from dataclasses import dataclass

from pulmo_jax.methods.paco.epochs import Flux, Star


@dataclass(frozen=True)
class Plan:
    """Settings of the search in several epochs.

    Attributes:
        star: The star and the limits of the orbits about it; None for sources at a fixed position.
        flux: Whether the flux is free at every epoch, or constant.
        shapes: Number of orbits tried through every position at the reference date.
        fields: Number of noise fields for the threshold.
        level: Probability of a false alarm anywhere in the field.
        single_threshold: SNR threshold for a single epoch, which provides only one noise field.
        max_sources: Maximum number of sources.
        seed: Seed of all random numbers.
    """

    star: Star | None = None
    flux: Flux = "free"
    shapes: int = 1024
    fields: int = 200
    level: float = 0.05
    single_threshold: float = 5.0
    max_sources: int = 5
    seed: int = 0
