"""Detection of point sources in rotating image stacks by patch covariances (Flasseur et al. 2018, A&A 618, A138)."""

from pulmo_jax.methods.paco.source_likelihood import TrackNoise, log_likelihood, track_noise
from pulmo_jax.methods.paco.maps import LikelihoodMaps, compute_maps, likelihood_maps
from pulmo_jax.methods.paco.observation import Observation, observe
from pulmo_jax.methods.paco.settings import Settings

__all__ = [
    "LikelihoodMaps", "Observation", "Settings", "TrackNoise", "compute_maps", "likelihood_maps", "log_likelihood",
    "observe", "track_noise",
]  # fmt: skip
