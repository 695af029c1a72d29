"""Segmentation: learns the classes of pixels from masks; maps and lists their regions on images of any size."""

from pulmo_jax.runs.task import Task

TASK = Task(__name__)
