"""Results of the finished runs: results.json, the tables in README.md and the figure."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from merit import (
    COMBINED,
    NAMES,
    PIXEL,
    STATISTICS,
    TRIVIAL,
    Tested,
    false_alarms,
    image_auroc,
    summary,
)
from methods import DEFAULT, METHODS
from runs import PARTS
from stored import add_finished, tested

from pulmo_jax.reporting import figures
from pulmo_jax.reporting.provenance import provenance

FIGURE = """![Figures of merit by method](model_family.png)

*Dots are seeds, ticks their mean, bars the 95 % interval described above. Blue: methods. Red: trivial scores. The
dashed line is the best of those that use the pixels.*"""
MARKS = ("<!-- written by study.py -->", "<!-- end -->")
ONE_PATIENT = ("ct",)  # all seeds test the same images of one patient: intervals are over seeds
TITLES = {"ct": "Sample CT", "chest": "X-rays", "chest_aligned": "X-rays, aligned", "brain": "Brain slices"}
LABELS = {"ap": "pixel AP", "aupro": "AUPRO", "dice": "Dice at the threshold", "best_dice": "best Dice"}
LABELS |= {"nodule first": "nodule first", "auroc": "image AUROC"}
Tests = dict[str, list[Tested]]  # by method or trivial score, one for each seed


def collect(work: Path, names: list[str], seeds: list[int], out: Path) -> None:
    """Store the finished runs (runs_PART.json), and write the results of all stored ones."""
    stored = {part: add_finished(work, out, part, names, seeds) for part in PARTS}
    parts = {part: found for part in PARTS if (found := part_results(part, stored[part], names, seeds))}
    if not parts:
        raise SystemExit(f"{work} and {out}: no method has finished runs with the seeds {seeds}")
    results = {"parts": parts, "seeds": seeds, **provenance()}
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text, page = "\n\n".join([*tables(parts), FIGURE]), out / "README.md"
    if page.is_file():
        before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
        page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")
    figures.save(draw(parts), out, "model_family")
    print(text)


def part_results(part: str, stored: dict[str, Any], names: list[str], seeds: list[int]) -> dict[str, Any]:
    """Figures of merit of a part, by method and by trivial score; methods without all seeds are named and left out."""
    runs = stored["runs"]
    done = [name for name in names if all(str(seed) in runs.get(name, {}) for seed in seeds)]
    if missing := [name for name in names if name not in done]:
        print(f"{part}: without a finished run for every seed, and left out: {'; '.join(missing)}")
    if not done:
        return {}
    images, trivial = ([stored[key][str(seed)] for seed in seeds] for key in ("images", "trivial"))
    tests: Tests = {
        name: [tested(of, runs[name][str(seed)]) for seed, of in zip(seeds, images, strict=True)] for name in done
    }
    tests |= {
        score: [tested(of, scores[score]) for of, scores in zip(images, trivial, strict=True)]
        for score in TRIVIAL
        if score in trivial[0]
    }
    image = {name: image_auroc(seen, COMBINED, part not in ONE_PATIENT) for name, seen in tests.items()}
    best = best_trivial({name: values.mean() for name, (values, _) in image.items()})
    return {
        "best trivial": best,
        "test": {
            "groups": len({g for t in tests[best] for g in t.groups}),
            "abnormal": int(tests[best][0].abnormal.sum()),
        },
        "scores": {
            name: describe(part, name, tests, image, best) | (facts(runs, name, seeds) if name in METHODS else {})
            for name in tests
        },
    }


def best_trivial(means: dict[str, float]) -> str:
    """The trivial score of the pixels with the highest mean; the sign of darkness was chosen by labels."""
    return max((name for name in means if name in TRIVIAL and name not in NAMES), key=lambda name: means[name])


def describe(part: str, name: str, tests: Tests, image: dict[str, tuple], best: str) -> dict[str, Any]:
    """Figures of merit of a score, with paired differences from the default method and the best trivial score."""
    seeds = tests[name]
    found: dict[str, Any] = {"auroc": summary(*image[name])}
    for other in {DEFAULT, best} & set(tests) - {name}:
        found[f"auroc minus {other}"] = difference(image[name], image[other])
    for statistic in (COMBINED, *STATISTICS) if seeds[0].statistics else ():
        found[f"auroc, {statistic}"] = summary(*image_auroc(seeds, statistic, part not in ONE_PATIENT))
    if seeds[0].threshold is not None:
        found["false alarms"] = false_alarms(seeds, pooled=part not in ONE_PATIENT)
    pixels = {
        figure: [t.pixels[figure] for t in seeds] for figure in (*PIXEL, "nodule first") if figure in seeds[0].pixels
    }
    found |= {figure: summary(np.array(x)) for figure, x in pixels.items()}
    if "ap" in pixels:
        trivial = best_trivial(
            {n: float(np.mean([t.pixels["ap"] for t in ts])) for n, ts in tests.items() if "ap" in ts[0].pixels}
        )
        for other in {DEFAULT, trivial} & set(tests) - {name}:
            found[f"ap minus {other}"] = summary(np.subtract(pixels["ap"], [t.pixels["ap"] for t in tests[other]]))
        found["best trivial of pixels"] = trivial
    return found


def difference(a: tuple, b: tuple) -> dict[str, Any]:
    """Paired difference of two (values of the seeds, replicates or None)."""
    return summary(a[0] - b[0], None if a[1] is None else a[1] - b[1])


def facts(runs: dict[str, Any], name: str, seeds: list[int]) -> dict[str, Any]:
    """Cost of the runs of a method, alone and with their base runs; AP of planted anomalies; steps."""
    of_runs = [runs[name][str(seed)]["facts"] for seed in seeds]
    costs, base = [f["cost"] for f in of_runs], METHODS[name].base
    cost = {"cpu_s": float(np.median([c["cpu_s"] for c in costs])), "peak_mib": max(c["peak_mib"] for c in costs)}
    if base is not None and all(str(seed) in runs.get(base, {}) for seed in seeds):
        before = [runs[base][str(seed)]["facts"]["cost"]["cpu_s"] for seed in seeds]
        cost["with_base_cpu_s"] = cost["cpu_s"] + float(np.median(before))
    planted = [f["planted_ap"] for f in of_runs if f["planted_ap"] is not None]
    steps = [f["steps"] for f in of_runs]
    return {"cost": cost, "steps": steps, **({"planted_ap": summary(np.array(planted))} if planted else {})}


def number(found: dict[str, Any] | None) -> str:
    """Mean and interval as text."""
    if found is None:
        return ""
    ends = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
    return f"{found['mean']:.3f}{ends}"


def signed(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    ends = "" if found["low"] is None else f" [{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"{found['mean']:+.3f}{ends}"


def grid(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def titled(name: str) -> str:
    return name if name in METHODS else f"*{name}*"


def tables(parts: dict[str, Any]) -> list[str]:
    """Markdown: for each part figures of merit and single statistics; then false alarms and cost of all parts."""
    texts = []
    for part, found in parts.items():
        texts += [f"### {TITLES[part]}", merit_table(found)]
        if part == "ct":
            texts.append(pixel_table(found["scores"]))
        texts.append(statistic_table(found["scores"]))
    texts += ["### False alarms", alarm_table(parts), "### Cost", cost_table(parts)]
    return texts


def merit_table(found: dict[str, Any]) -> str:
    best, scores = found["best trivial"], found["scores"]
    head = ["score", "image AUROC", f"minus {DEFAULT}", f"minus *{best}*", "planted AP"]
    rows = [
        [
            titled(name),
            number(s["auroc"]),
            signed(s.get(f"auroc minus {DEFAULT}")),
            signed(s.get(f"auroc minus {best}")),
            number(s.get("planted_ap")),
        ]
        for name, s in scores.items()
    ]
    return grid(head, rows)


def pixel_table(scores: dict[str, Any]) -> str:
    shown = (*PIXEL, "nodule first")
    best = next(s["best trivial of pixels"] for s in scores.values() if "best trivial of pixels" in s)
    head = ["score", *(LABELS[figure] for figure in shown), f"AP minus {DEFAULT}", f"AP minus *{best}*"]
    rows = [
        [
            titled(name),
            *(number(s.get(figure)) for figure in shown),
            signed(s.get(f"ap minus {DEFAULT}")),
            signed(s.get(f"ap minus {best}")),
        ]
        for name, s in scores.items()
        if "ap" in s
    ]
    return grid(head, rows)


def statistic_table(scores: dict[str, Any]) -> str:
    """Mean image AUROC by every statistic."""
    shown = (COMBINED, *STATISTICS)
    rows = [
        [name, *(f"{s[f'auroc, {statistic}']['mean']:.3f}" for statistic in shown)]
        for name, s in scores.items()
        if name in METHODS
    ]
    return grid(["image AUROC by", *shown], rows)


def alarm_table(parts: dict[str, Any]) -> str:
    """Rate of false alarms on held-out normal images, with the range that the stored threshold allows."""
    names = [
        name
        for name in [*METHODS, *TRIVIAL]
        if any("false alarms" in p["scores"].get(name, {}) for p in parts.values())
    ]

    def cell(part: str, name: str) -> str:
        f = parts[part]["scores"].get(name, {}).get("false alarms")
        if f is None:
            return ""
        outside = "" if f["low"] <= f["rate"] <= f["high"] else " **outside**"
        return f"{f['rate']:.3f} ({f['low']:.3f} to {f['high']:.3f}){outside}"

    return grid(
        ["score", *(TITLES[part] for part in parts)], [[titled(n), *(cell(p, n) for p in parts)] for n in names]
    )


def cost_table(parts: dict[str, Any]) -> str:
    """CPU seconds of a run (with those of its base run), and peak memory."""
    names = [name for name in METHODS if any(name in p["scores"] for p in parts.values())]

    def cell(part: str, name: str) -> str:
        cost = parts[part]["scores"].get(name, {}).get("cost")
        if cost is None:
            return ""
        both = f" ({cost['with_base_cpu_s']:.0f} with base)" if "with_base_cpu_s" in cost else ""
        return f"{cost['cpu_s']:.0f} s{both}, {cost['peak_mib'] / 1024:.1f} GiB"

    return grid(["method", *(TITLES[part] for part in parts)], [[n, *(cell(p, n) for p in parts)] for n in names])


def draw(parts: dict[str, Any]) -> Figure:
    """One panel for each figure of merit: dots are seeds, a tick is their mean, a bar its 95 % interval."""
    panels = [(part, "auroc") for part in parts]
    if "ct" in parts:
        panels.insert(0, ("ct", "ap"))
    order = [n for n in [*METHODS, *TRIVIAL] if any(n in p["scores"] for p in parts.values())]
    with figures.style():
        size = (figures.TEXT_WIDTH_IN, 0.8 + 0.16 * len(order))
        figure = Figure(figsize=size, layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
        for i, (axis, (part, metric)) in enumerate(zip(axes, panels, strict=True)):
            draw_panel(axis, parts[part], metric, order)
            axis.set(xlabel=LABELS[metric], xlim=(0, 1.02), xticks=[0, 0.5, 1])
            axis.set_title(f"{'abcdef'[i]}  {TITLES[part]}", loc="left")
        axes[0].set(yticks=range(len(order)), yticklabels=order)
        axes[0].invert_yaxis()
        for label, name in zip(axes[0].get_yticklabels(), order, strict=True):
            label.set_color(colour_of(name))
    return figure


def colour_of(name: str) -> str:
    return figures.BLUE if name in METHODS else figures.VERMILLION


def draw_panel(axes: Any, found: dict[str, Any], metric: str, order: list[str]) -> None:
    scores = found["scores"]
    for y, name in enumerate(order):
        if metric not in (s := scores.get(name, {})):
            continue
        merit, colour = s[metric], colour_of(name)
        if merit["low"] is not None:
            ends = [merit["low"], merit["high"]]
            axes.plot(ends, [y, y], color=colour, lw=3, alpha=0.25, solid_capstyle="butt")
        axes.plot(merit["seeds"], [y] * len(merit["seeds"]), "o", color=colour, ms=2, mew=0)
        axes.plot(merit["mean"], y, "|", color="black", ms=7, mew=1)
    best = found["best trivial"]
    if metric == "ap":
        best = next(s["best trivial of pixels"] for s in scores.values() if "best trivial of pixels" in s)
    axes.axvline(scores[best][metric]["mean"], color=figures.VERMILLION, lw=0.8, ls="--", zorder=0)
    axes.tick_params(axis="y", length=0)
