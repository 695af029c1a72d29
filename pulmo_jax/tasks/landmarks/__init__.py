"""Landmarks: find anatomical points, with calibrated uncertainties, and align images by them."""

from pulmo_jax.runs.task import Task

TASK = Task(__name__)
