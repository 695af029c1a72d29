"""Classification: assigns images to classes; cross-validated by patient."""

from pulmo_jax.runs.task import Task

TASK = Task(__name__)
