"""Table of a sweep's runs: python experiments/lung_ct/collect.py SWEEP_DIR

Rows are the settings that differ, with mean and standard deviation over seeds where there are several.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

FIGURES = ("ap", "auroc", "aupro", "dice", "best_dice")


def main() -> None:
    groups: dict[str, list[dict]] = defaultdict(list)
    for path in sorted(Path(sys.argv[1]).glob("*/metrics.json")):
        overrides = json.loads((path.parent / "job.json").read_text())["overrides"]
        setting = ", ".join(o for o in overrides if not o.startswith(("seed=", "+experiment="))) or "default"
        groups[setting].append(json.loads(path.read_text()))
    print("| setting | seeds | " + " | ".join(FIGURES) + " | highest pixel in the nodule | training s |")
    print("| --- " * (len(FIGURES) + 4) + "|")
    for setting, runs in groups.items():
        print(row(setting, runs, "autoencoder"))
    first = next(iter(groups.values()))[:1]
    for baseline in ("intensity", "local intensity", "z-score"):
        print(row(f"*{baseline}*", first, baseline))


def row(setting: str, runs: list[dict], score: str) -> str:
    cells = []
    for figure in FIGURES:
        values = np.array([run["pixel"][score][figure]["value"] for run in runs])
        spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
        cells.append(f"{values.mean():.3f}{spread}")
    if score == "autoencoder":
        lesions = [run["lesions"] for run in runs]
        found = (f"{x['images_with_highest_pixel_in_lesion']}/{x['images_with_lesions']}" for x in lesions)
        cells.append(", ".join(found))
        cells.append(f"{np.mean([run['training']['training_s'] for run in runs]):.0f}")
    else:
        cells += ["", ""]
    return f"| {setting} | {len(runs)} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
