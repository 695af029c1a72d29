"""Normal and pneumonia chest X-rays: an autoencoder compared with trivial scores, and false-alarm rates.

    python experiments/chest_xray/study.py --data ../shared/data/chest_xray --work runs/chest_xray

DATA holds normal/ and pneumonia/ of NIH ChestX-ray14 (names PATIENT_FOLLOWUP.tif). Writes results.json, the tables in
README.md and chest_xray.png and .pdf beside this file. `--only-score` reuses the runs in WORK.

The settings are in experiment/chest_xray.yaml and in NETWORKS and SCORES below; none was selected by a test score.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import betabinom, spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score

from pulmo_jax.core.histogram import group_weights
from pulmo_jax.data.images import ImageRef, index_images
from pulmo_jax.data.reader import Reader
from pulmo_jax.inference.assess import METHOD, assess, calibrate, truth_by_folder
from pulmo_jax.inference.score import Scorer
from pulmo_jax.reporting import figures
from pulmo_jax.reporting.provenance import provenance
from pulmo_jax.tasks.anomalies.run import Run, open_run

HERE = Path(__file__).parent
SEEDS = (0, 1, 2, 3, 4)  # each of a split and a training; as many folds as seeds
PATIENT = r"^(\d{8})_"  # of NIH's names
NETWORKS = {"plain": 0.0, "denoising": 0.2}  # method.noise_sigma; both trained with the l2 loss
SCORES = {  # of the same networks
    "l2": {"score": "l2", "image_statistic": "mean"},
    "SSIM": {"score": "ssim", "image_statistic": "mean"},
    "default score": {"score": "local_mean", "image_statistic": "max"},
}
DARKNESS = "darkness (−intensity)"
REPLICATES = 1000
RATES = np.array([0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5])  # nominal, for the figure


@dataclass(frozen=True)
class Tested:
    """The test images of one seed by one score. p_values, threshold: None for what has no calibration."""

    name: str
    seed: int
    scores: np.ndarray
    abnormal: np.ndarray
    files: list[str]
    patients: list[str]
    p_values: np.ndarray | None = None
    threshold: float | None = None
    rate: float | None = None  # that the threshold bounds
    n_normal: int = 0  # images that it rests on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only-score", action="store_true")
    options, began = parser.parse_args(), time.monotonic()
    if not options.only_score:
        make_splits(options.data, options.work)
        train(options.work)
    runs = [open_run(path.parent) for path in sorted(options.work.glob("runs/*/finished.json"))]
    wanted = {(sigma, seed) for sigma in NETWORKS.values() for seed in SEEDS}
    if {(run.config.method["noise_sigma"], run.config.seed) for run in runs} != wanted or len(runs) != len(wanted):
        raise SystemExit(f"{options.work}/runs: not one finished run for each network and seed")
    tested: dict[str, list[Tested]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.config.seed):
        for result in test(run):
            tested[result.name].append(result)
    results = {
        "scores": {name: describe(seeds, tested) for name, seeds in tested.items()},
        "splits": splits_of(runs),
        "training": [facts_of(run) for run in runs],
        "seconds": {"all" if not options.only_score else "scoring alone": round(time.monotonic() - began)},
        **provenance(),
    }
    write(results, tested)


def make_splits(data: Path, work: Path) -> None:
    """WORK/splits/SEED/{train,val,test/normal,test/pneumonia}: links to the images.

    Patients of normal images are dealt into five folds of as many images. With seed s fold s is the test, the next one
    is for validation, and three are trained on, so each normal image is tested once. A patient who has pneumonia in
    another image is neither trained nor calibrated on.
    """
    normal, ill = (sorted((data / name).iterdir()) for name in ("normal", "pneumonia"))
    images: dict[str, list[Path]] = defaultdict(list)
    for path in normal:
        images[patient(path)].append(path)
    folds: list[list[Path]] = [[] for _ in SEEDS]
    for index in np.random.default_rng(0).permutation(len(images)):
        min(folds, key=len).extend(images[sorted(images)[index]])
    both = {patient(path) for path in ill} & set(images)
    shutil.rmtree(work / "splits", ignore_errors=True)
    for seed in SEEDS:
        tested, val, *rest = (folds[(seed + k) % len(folds)] for k in range(len(folds)))
        parts = {
            "train": [path for fold in rest for path in fold if patient(path) not in both],
            "val": [path for path in val if patient(path) not in both],
            "test/normal": tested,
            "test/pneumonia": ill,
        }
        for name, paths in parts.items():
            (work / "splits" / str(seed) / name).mkdir(parents=True)
            for path in paths:
                (work / "splits" / str(seed) / name / path.name).symlink_to(path.resolve())
        sides = [{patient(path) for path in paths} for paths in (parts["train"], parts["val"], [*tested, *ill])]
        assert len(set.union(*sides)) == sum(map(len, sides)), "a patient is on two sides"


def patient(path: Path) -> str:
    found = re.match(PATIENT, path.name)
    if found is None:
        raise SystemExit(f"{path.name}: is no name of NIH ChestX-ray14, PATIENT_FOLLOWUP")
    return found[1]


def train(work: Path) -> None:
    """Both networks with every seed, in one sweep."""
    splits = f"{work.resolve()}/splits/${{seed}}"
    command = [
        *(sys.executable, "-m", "pulmo_jax.train", "--config-dir", str(HERE), "-m", "+experiment=chest_xray"),
        *(f"data.{name}={splits}/{name}" for name in ("train", "val", "test")),
        "method.noise_sigma=" + ",".join(map(str, NETWORKS.values())),
        "seed=" + ",".join(map(str, SEEDS)),
        f"hydra.sweep.dir={work}/runs",
    ]
    print(*command)
    subprocess.run(command, check=True)


def test(run: Run) -> list[Tested]:
    """A run by each of SCORES, and with the plain network by trivial scores too.

    The network and the images that set thresholds are the same for all. The thresholds of l2, the score that the run
    was made with, are those that it stored.
    """
    network = next(name for name, sigma in NETWORKS.items() if sigma == run.config.method["noise_sigma"])
    data, rates, reader, results = run.config.data, run.config.calibration, Reader(), []
    val, _ = index_images(data.val, group_regex=PATIENT)
    refs, _ = index_images(data.test, group_regex=PATIENT)
    truth_of = truth_by_folder(refs, data.test, data.normal_name)
    for score, changes in SCORES.items():
        method = replace(run.scorer.method, **changes)
        scorer = Scorer.of(method, run.scorer.params, run.scorer.how, run.scorer.tiles)
        calibrations = run.calibrations
        if method != run.scorer.method:
            arguments = (rates.pixel_rate, rates.image_rate, run.config.seed, untracked)
            calibrations = calibrate(scorer, val, reader, *arguments)
        found = assess(
            scorer, calibrations, refs, truth_of, reader, lesion_sizes_px=(), replicates=10, seed=0, track=untracked
        )
        names = found.image_scores if (score, network) == ("l2", "plain") else [METHOD]
        for name in names:
            title = f"{network}, {score}" if name == METHOD else name
            results.append(tested_of(title, run.config.seed, refs, found.abnormal, found.image_scores[name]))
            results[-1] = replace(results[-1], **judged(calibrations[name], found.image_scores[name]))
    if network == "plain":
        results += trivial(results)
    return results


def untracked(items: Iterable, count: int) -> Iterable:
    return items


def tested_of(name: str, seed: int, refs: Sequence[ImageRef], abnormal: Sequence[bool], scores: Any) -> Tested:
    files, patients = [ref.path.name for ref in refs], [ref.group for ref in refs]
    return Tested(name, seed, np.array(scores, float), np.array(abnormal), files, patients)


def judged(calibration: Any, scores: list[float]) -> dict[str, Any]:
    limit = calibration.image_threshold
    p_values = np.array([calibration.image_p_value(score) for score in scores])
    return {
        "p_values": p_values,
        "threshold": limit.value,
        "rate": limit.attainable_rate,
        "n_normal": limit.n_scores,
    }


def trivial(results: list[Tested]) -> list[Tested]:
    """Scores that the product does not print: darkness, and what a file's name says."""
    base = next(result for result in results if result.name == "intensity")
    bare = {"p_values": None, "threshold": None, "rate": None, "n_normal": 0}
    numbers = np.array([[int(part) for part in Path(name).stem.split("_")] for name in base.files], float).T
    scores = {DARKNESS: -base.scores, "patient number": numbers[0], "follow-up number": numbers[1]}
    return [replace(base, name=name, scores=values, **bare) for name, values in scores.items()]


def aurocs(t: Tested, weights: np.ndarray) -> np.ndarray:
    """(replicates,): of a seed, its images weighted by weights (replicates, images)."""
    above, below = t.scores[t.abnormal][:, None], t.scores[~t.abnormal]
    wins = (above > below) + 0.5 * (above == below)
    ill, normal = weights[:, t.abnormal], weights[:, ~t.abnormal]
    return np.einsum("rp,pn,rn->r", ill, wins, normal, optimize=True) / ill.sum(axis=1) / normal.sum(axis=1)


def describe(seeds: list[Tested], tested: dict[str, list[Tested]]) -> dict[str, Any]:
    """Figures of merit of a score over the seeds, with 95 % intervals that resample patients.

    The pneumonia images are the same in all seeds, so the sd over seeds does not hold what comes from their number; a
    patient weighs the same in all of them, and in what a score is compared with.
    """
    drawn = [np.stack([group_weights(p, REPLICATES, 0) for p in t.patients], axis=1) for t in seeds]
    draws = sum(aurocs(t, w) for t, w in zip(seeds, drawn, strict=True)) / len(seeds)
    values = np.array([roc_auc_score(t.abnormal, t.scores) for t in seeds])
    result: dict[str, Any] = {"auroc": spread(values) | interval(draws)}
    result["ap"] = spread([average_precision_score(t.abnormal, t.scores) for t in seeds])
    same_network = [seeds[0].name.replace("SSIM", "l2")] if "SSIM" in seeds[0].name else []
    for other in ("z-score", DARKNESS, *same_network):
        others = tested[other]
        other_draws = sum(aurocs(o, w) for o, w in zip(others, drawn, strict=True)) / len(seeds)
        other_values = np.array([roc_auc_score(o.abnormal, o.scores) for o in others])
        result[f"auroc minus {other}"] = spread(values - other_values) | interval(draws - other_draws)
    highest = max(number for t in seeds for number in numbers_of(t)[~t.abnormal])
    known = [~t.abnormal | (numbers_of(t) <= highest) for t in seeds]
    values = [roc_auc_score(t.abnormal[k], t.scores[k]) for t, k in zip(seeds, known, strict=True)]
    result["auroc, same patient numbers"] = spread(values) | {"abnormal": int((known[0] & seeds[0].abnormal).sum())}
    dark = tested[DARKNESS]
    values = [spearmanr(t.scores, d.scores).statistic for t, d in zip(seeds, dark, strict=True)]
    result["rank correlation with darkness"] = spread(values)
    if seeds[0].threshold is not None:
        result["false alarms"] = false_alarms(seeds, drawn)
        result["sensitivity"] = spread([float((t.scores[t.abnormal] > t.threshold).mean()) for t in seeds])
    return result


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)), "seeds": [float(v) for v in values]}


def interval(replicates: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(replicates, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def numbers_of(t: Tested) -> np.ndarray:
    return np.array([int(patient) for patient in t.patients])


def false_alarms(seeds: list[Tested], drawn: list[np.ndarray]) -> dict[str, Any]:
    """On held-out normal images, each tested once: by seed and pooled.

    low, high: 95 % interval of the pooled rate, patients resampled and thresholds as they are. expected_low, _high: the
    range in which it lies in 95 % of cases if images are exchangeable, thresholds drawn anew.
    """
    counts = [int((t.scores[~t.abnormal] > t.threshold).sum()) for t in seeds]
    n = [int((~t.abnormal).sum()) for t in seeds]
    alarms = np.concatenate([t.scores[~t.abnormal] > t.threshold for t in seeds])
    weights = np.concatenate([w[:, ~t.abnormal] for t, w in zip(seeds, drawn, strict=True)], axis=1)
    low, high = expected(seeds, 0.05)
    return {
        "nominal": 0.05,
        "bound": float(np.mean([t.rate for t in seeds])),
        "by_seed": [f"{k}/{m}" for k, m in zip(counts, n, strict=True)],
        "rate": sum(counts) / sum(n),
        **interval(weights @ alarms / weights.sum(axis=1)),
        **{"expected_low": low, "expected_high": high},
    }


def expected(seeds: list[Tested], rate: float) -> tuple[float, float]:
    """Of the pooled rate, 95 %: a threshold at rank n + 1 - r of n is exceeded with a probability that is Beta(r,
    n + 1 - r), if images are exchangeable."""
    rng, drawn, n_all = np.random.default_rng(0), np.zeros(100_000), 0
    for t in seeds:
        n, n_test = t.n_normal, int((~t.abnormal).sum())
        rank = int((n + 1) * rate + 1e-9)
        if rank > 0:
            drawn += betabinom.rvs(n_test, rank, n + 1 - rank, size=drawn.size, random_state=rng)
        n_all += n_test
    low, high = np.percentile(drawn / n_all, [2.5, 97.5])
    return float(low), float(high)


def splits_of(runs: list[Run]) -> list[dict[str, Any]]:
    """Images and patients by seed."""
    rows = []
    for run in runs:
        if run.config.method["noise_sigma"] == 0:
            folders = {"train": run.config.data.train, "val": run.config.data.val}
            folders |= {name: run.config.data.test / name for name in ("normal", "pneumonia")}
            refs = {name: index_images(folder, group_regex=PATIENT)[0] for name, folder in folders.items()}
            counts = {name: [len(found), len({ref.group for ref in found})] for name, found in refs.items()}
            rows.append({"seed": run.config.seed, **counts})
    return sorted(rows, key=lambda row: row["seed"])


def facts_of(run: Run) -> dict[str, Any]:
    facts = json.loads((run.path / "metrics.json").read_text())["training"]
    kept = {key: facts[key] for key in ("steps", "best_step", "best_val_loss", "training_s") if key in facts}
    return {"seed": run.config.seed, "noise_sigma": run.config.method["noise_sigma"], **kept}


def write(results: dict[str, Any], tested: dict[str, list[Tested]]) -> None:
    (HERE / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = (HERE / "README.md").read_text(encoding="utf-8")
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    text = "\n".join([merit_table(results["scores"]), "", alarm_table(results["scores"])])
    (HERE / "README.md").write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")
    figures.save(draw(results["scores"], tested), HERE, "chest_xray")


MARKS = ("<!-- written by study.py -->", "<!-- end -->")


def in_order(scores: dict[str, Any]) -> list[str]:
    """The autoencoders, then the trivial scores, each by falling AUROC."""
    return sorted(scores, key=lambda name: ("," not in name, -scores[name]["auroc"]["mean"]))


def merit_table(scores: dict[str, Any]) -> str:
    lines = [
        "| score | AUROC | 95 % | AP | minus the z-score's | 15 of like patient numbers | correlation with darkness |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in in_order(scores):
        s = scores[name]
        a, d = s["auroc"], s["auroc minus z-score"]
        cells = [
            name if "," in name else f"*{name}*",
            f"{a['mean']:.3f} ± {a['sd']:.3f}",
            f"{a['low']:.2f}–{a['high']:.2f}",
            f"{s['ap']['mean']:.3f} ± {s['ap']['sd']:.3f}",
            "" if name == "z-score" else f"{d['mean']:+.3f} ({d['low']:+.2f} to {d['high']:+.2f})",
            f"{s['auroc, same patient numbers']['mean']:.3f} ± {s['auroc, same patient numbers']['sd']:.3f}",
            f"{s['rank correlation with darkness']['mean']:+.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def alarm_table(scores: dict[str, Any]) -> str:
    lines = [
        "| score | by seed | pooled | 95 % | if exchangeable | sensitivity |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in in_order(scores):
        s = scores[name]
        if (f := s.get("false alarms")) is None:
            continue
        cells = [
            name if "," in name else f"*{name}*",
            ", ".join(f["by_seed"]),
            f"{f['rate']:.3f}",
            f"{f['low']:.3f} to {f['high']:.3f}",
            f"{f['expected_low']:.3f} to {f['expected_high']:.3f}",
            f"{s['sensitivity']['mean']:.2f} ± {s['sensitivity']['sd']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(scores: dict[str, Any], tested: dict[str, list[Tested]]) -> Figure:
    """AUROC by score, a dot for each seed; and the false-alarm rate against its nominal value."""
    with figures.style():
        figure = Figure(figsize=(figures.TEXT_WIDTH_IN, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
        draw_auroc(left, scores)
        draw_alarms(right, tested)
        left.set_title("a", loc="left", fontweight="bold")
        right.set_title("b", loc="left", fontweight="bold")
    return figure


def draw_auroc(axes: Any, scores: dict[str, Any]) -> None:
    order = in_order(scores)
    for y, name in enumerate(order):
        merit, colour = scores[name]["auroc"], figures.BLUE if "," in name else figures.VERMILLION
        axes.plot([merit["low"], merit["high"]], [y, y], color=colour, lw=3, alpha=0.25, solid_capstyle="butt")
        axes.plot(merit["seeds"], [y] * len(merit["seeds"]), "o", color=colour, ms=2.5, mew=0)
        axes.plot(merit["mean"], y, "|", color="black", ms=9, mew=1.2)
    axes.axvline(0.5, color="0.55", lw=0.8, ls=":")
    axes.set(yticks=range(len(order)), yticklabels=order, xlabel="AUROC of an image", xlim=(0.15, 1))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    for label, name in zip(axes.get_yticklabels(), order, strict=True):
        label.set_color(figures.BLUE if "," in name else figures.VERMILLION)


def draw_alarms(axes: Any, tested: dict[str, list[Tested]]) -> None:
    seeds = tested["plain, l2"]
    low, high = np.array([expected(seeds, rate) for rate in RATES]).T
    axes.plot(RATES, RATES, color="0.4", lw=0.8, ls="--", label="as calibrated")
    axes.fill_between(RATES, low, high, color="0.5", alpha=0.2, lw=0, label="range to expect (95 %)")
    looks = zip(("l2", "SSIM"), (figures.BLUE, figures.GREEN), strict=True)
    for score, colour in looks:
        for network, line in (("plain", "-"), ("denoising", ":")):
            seeds = tested[f"{network}, {score}"]
            p_values = np.concatenate([t.p_values[~t.abnormal] for t in seeds])
            observed = [(p_values <= rate + 1e-9).mean() for rate in RATES]
            axes.plot(RATES, observed, line, color=colour, marker="o", ms=2.5, lw=1, label=f"{network}, {score}")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="nominal false-alarm rate of an image",
        ylabel="rate on held-out normal images",
    )
    ticks = [0.05, 0.1, 0.2, 0.5]
    axes.set(xticks=ticks, yticks=ticks, xticklabels=ticks, yticklabels=ticks)
    axes.minorticks_off()
    axes.legend(loc="lower right")


if __name__ == "__main__":
    main()
