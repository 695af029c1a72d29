"""Landmarks: localises anatomical landmarks with calibrated uncertainties, and aligns images by them."""

from pulmo_jax.runs.task import Task

TASK = Task(__name__)
