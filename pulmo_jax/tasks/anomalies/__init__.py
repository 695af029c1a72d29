"""Anomalies: learn what is normal from normal images alone, map and list what is not."""

from pulmo_jax.runs.task import Task

TASK = Task(__name__)
