"""Anomaly detection: learns from normal images only; maps and lists abnormal regions of new images."""

from pulmo_jax.runs.task import Task

TASK = Task(__name__)
