"""What the study keeps of its runs: runs_PART.json beside the tables, to which later calls add runs.

Each file has, for each seed, the test images and their trivial scores, and for each method and seed the image scores,
the figures of merit of the pixels, and the cost.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from merit import Tested, read_run
from runs import cost_file, folder_of, is_finished

IMAGES = ("abnormal", "files", "groups", "share")  # the same for every method


def stored_file(out: Path, part: str) -> Path:
    """File of a part."""
    return out / f"runs_{part}.json"


def load(out: Path, part: str) -> dict[str, Any]:
    """Stored runs of a part: {"images", "trivial", "runs"}, each by seed; runs first by method."""
    path = stored_file(out, part)
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"images": {}, "trivial": {}, "runs": {}}


def is_stored(out: Path, part: str, name: str, seed: int) -> bool:
    """Whether the results of a run are stored."""
    return str(seed) in load(out, part)["runs"].get(name, {})


def add_finished(work: Path, out: Path, part: str, names: list[str], seeds: list[int]) -> dict[str, Any]:
    """Add all finished runs of a part to its file, and return its content; without any run no file is written."""
    stored = load(out, part)
    for name in names:
        for seed in seeds:
            if is_finished(folder := folder_of(work, part, name, seed)):
                add(stored, name, str(seed), folder, part)
    if stored["runs"]:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(stored, ensure_ascii=False).replace('{"', '\n{"')
        stored_file(out, part).write_text(text + "\n", encoding="utf-8")
    return stored


def add(stored: dict[str, Any], name: str, seed: str, folder: Path, part: str) -> None:
    """Add a finished run. Raises SystemExit if it tested other images than those stored with this seed."""
    described = {score: plain(tested) for score, tested in read_run(folder, part).items()}
    images = {key: described[""][key] for key in IMAGES}
    if stored["images"].setdefault(seed, images) != images:
        raise SystemExit(f"{folder}: tested other images than the stored runs with seed {seed}")
    scores = {score: {key: value for key, value in of.items() if key not in IMAGES} for score, of in described.items()}
    stored["runs"].setdefault(name, {})[seed] = scores.pop("") | {"facts": facts(folder)}
    stored["trivial"][seed] = scores


def plain(tested: Tested) -> dict[str, Any]:
    """JSON values of test images; scores with six digits."""

    def value(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: value(inner) for key, inner in x.items()}
        if isinstance(x, np.ndarray):
            return [bool(v) for v in x] if x.dtype == bool else [float(f"{v:.6g}") for v in x]
        return list(x) if isinstance(x, tuple) else x

    return {key: value(x) for key, x in asdict(tested).items()}


def facts(folder: Path) -> dict[str, Any]:
    """Cost of a run, its number of steps, and its AP of planted anomalies."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return {
        "cost": json.loads(cost_file(folder).read_text()),
        "steps": metrics["training"].get("steps"),
        "planted_ap": metrics["validation"]["planted_ap"]["value"] if "validation" in metrics else None,
    }


def tested(images: dict[str, Any], score: dict[str, Any]) -> Tested:
    """Test images of a stored score."""
    return Tested(
        scores=np.array(score["scores"]),
        abnormal=np.array(images["abnormal"]),
        files=tuple(images["files"]),
        groups=tuple(images["groups"]),
        share=np.array(images["share"]),
        threshold=score["threshold"],
        n_normal=score["n_normal"],
        statistics={key: np.array(values) for key, values in score["statistics"].items()},
        pixels=score["pixels"],
    )
