"""Detection of point sources in rotating image stacks by patch covariances (Flasseur et al. 2018, A&A 618, A138)."""

from pulmo_jax.methods.paco.map_terms import MapPlan, MapTerms, map_terms, plan_maps
from pulmo_jax.methods.paco.maps import LikelihoodMaps, compute_maps, likelihood_maps
from pulmo_jax.methods.paco.observation import Observation, observe
from pulmo_jax.methods.paco.posterior import Posterior, sample_posterior
from pulmo_jax.methods.paco.settings import Settings
from pulmo_jax.methods.paco.source_likelihood import TrackNoise, log_likelihood, track_noise

__all__ = [
    "LikelihoodMaps", "MapPlan", "MapTerms", "Observation", "Posterior", "Settings", "TrackNoise", "compute_maps",
    "likelihood_maps", "log_likelihood", "map_terms", "observe", "plan_maps", "sample_posterior", "track_noise",
]  # fmt: skip
