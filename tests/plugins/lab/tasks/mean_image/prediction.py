"""Prediction: a table of distances."""

from lab.tasks.mean_image.run import distances, read_images
from pulmo_jax.runs.directory import digest_of_run
from pulmo_jax.runs.records import Item, Outputs


def read(run, config, place):
    images, failed = read_images(config.input, run.config.data.size, place)
    found = zip(images.refs, distances(run.mean, images.pixels), strict=True)
    digest = digest_of_run(run.path)
    items = [Item(ref.file_name, (ref,), digest, (), float(distance)) for ref, distance in found]
    return items, failed


def predict(run, items, config, place):
    yield from ((item, {"filename": item.refs[0].title, "distance": item.context}) for item in items)


def collect(run, items, records, failed, config, place):
    lines = ["filename,distance", *(f"{record['filename']},{record['distance']:.6g}" for record in records)]
    return Outputs({"distances.csv": "\n".join(lines) + "\n"}, {"images": len(records)}, "distances.csv")
