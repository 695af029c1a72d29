"""python -m pulmo_jax.predict: apply a run to new images."""

import sys
from pathlib import Path
from typing import Any

from pulmo_jax.shell import cli

EXAMPLES = """
Writes the results of every image, tables of all images, and OUTPUT/summary.json. A repeated call resumes an interrupted
one. Exit status 3 means that some files failed; they are listed in summary.json, the others are finished.

  python -m pulmo_jax.predict run=RUN input=image.tif output=results
  python -m pulmo_jax.predict run=RUN input=FOLDER output=results foreground=LUNG_MASKS

Anomaly detection: OUTPUT/maps/NAME_score.tif, NAME_pvalue.tif, NAME_mask.tif and NAME_overlay.png (with
method.score=matched also NAME_amplitude.tif and NAME_blob_sigma.tif), OUTPUT/image_scores.csv with one row for every
image, and OUTPUT/detections.csv with one row for every finding.

The model is two-dimensional: each slice is scored by itself. The slices of a NIfTI file or a DICOM series are sorted by
their position, and their findings are connected in OUTPUT/findings_3d.csv, with places in mm. format=nifti writes the
maps of a volume as NAME_score.nii.gz and so on, which lie on the input in any viewer.

  python -m pulmo_jax.predict run=RUN input=SERIES output=results format=nifti

Landmarks: OUTPUT/landmarks.csv, overlays/ and, with aligned=true, the aligned images in aligned/.

  python -m pulmo_jax.predict run=LANDMARK_RUN input=FOLDER output=results aligned=true

Classification: OUTPUT/predictions.csv, and saliency maps in overlays/.

  python -m pulmo_jax.predict run=CLASSIFICATION_RUN input=FOLDER_OR_STORE output=results

Segmentation: masks/, probabilities/, polygons/ and overlays/, and OUTPUT/components.csv with one row for
every component.

  python -m pulmo_jax.predict run=SEGMENTATION_RUN input=FOLDER output=results
"""


def predict(config: Any, _: Path) -> None:
    """Apply a run to images; the outputs of an image are on disk before its record is written.

    Args:
        config: Typed config of `predict` for the run's task.

    Raises:
        InputError: The run or the input cannot be used.
        SystemExit: With status 3, if some files failed.
    """
    from pulmo_jax.host.calls import CALL
    from pulmo_jax.host.files import write_json
    from pulmo_jax.reporting.provenance import provenance
    from pulmo_jax.runs.directory import task_of, use_compile_cache
    from pulmo_jax.runs.place import workplace
    from pulmo_jax.runs.records import predict_all
    from pulmo_jax.runs.task import find_task

    task = find_task(task_of(config.run), config.plugins)
    use_compile_cache(None)  # the user's own: programs from a folder that a run names would be foreign code
    run = task.open_run(config.run, config.plugins)
    with workplace(config.output, "predict", config, config.run) as place:
        status = predict_all(task.prediction, run, config, place)
        write_json(config.output / "run.json", {**provenance(), "seconds": round(CALL.get().seconds, 1)})
    if status:
        sys.exit(status)


if __name__ == "__main__":
    cli.main("predict", predict, EXAMPLES)
