"""The mean of a folder's images, and how far others are from it."""

from pulmo_jax.runs.task import Task

TASK = Task(__name__)
