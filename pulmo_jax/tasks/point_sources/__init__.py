"""Point sources in rotating image stacks: maps, positions, fluxes and detection limits."""

from pulmo_jax.runs.task import Task

TASK = Task(__name__)
