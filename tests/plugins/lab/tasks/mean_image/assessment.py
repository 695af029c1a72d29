"""Evaluation: the mean distance."""

from lab.tasks.mean_image.run import distances, read_images
from pulmo_jax.reporting.report import Section
from pulmo_jax.runs.report import Findings


def read_test(run, config, place):
    return read_images(config.data.test, run.config.data.size, place)[0]


def assess(run, data, config, place):
    return findings(run, data)


def findings(run, images):
    distance = float(distances(run.mean, images.pixels).mean())
    text = f"Mean distance of {len(images.refs)} images: {distance:.3g}."
    return Findings(
        title=run.config.name,
        metrics={"distance": distance},
        markdown=text,
        sections=[Section("Distance", text)],
        summary={"run": str(run.path)},
        objective=distance,
    )
