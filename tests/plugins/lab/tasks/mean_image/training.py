"""Training: the mean of all images, in one step."""

import numpy as np
from matplotlib.figure import Figure

from lab.tasks.mean_image.assessment import findings
from lab.tasks.mean_image.run import MeanRun, distances, read_images
from pulmo_jax.runs.training import fitting


def check(config):
    pass  # no nodes of its own


def prepare(config, place):
    return config, ""


def read(config, place):
    return read_images(config.data.train, config.data.size, place)[0]


def learning(config, data, place):
    return fitting(
        fit=lambda: {"mean": data.pixels.mean(0)},
        like={"mean": np.zeros((config.data.size, config.data.size), np.float32)},
        error=lambda params: float(distances(params["mean"], data.pixels).mean()),
        identity={"size": config.data.size, "images": [ref.title for ref in data.refs]},
        titles=[ref.title for ref in data.refs],
        draw=lambda state: Figure(),
    )


def records(config, data):
    return {}


def finish(config, data, learned, place):
    return MeanRun(place.run_dir, config, np.asarray(learned.state.params["mean"]), learned.step)


def assess(run, data, learned, place):
    return findings(run, data)
