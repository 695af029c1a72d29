"""The models of the normal on three data sets, by the same splits and budget.

    python experiments/model_family/study.py --part ct chest brain --work runs/model_family --data ../shared/data
    python experiments/model_family/study.py --part chest_aligned --landmarks LANDMARK_RUN ...
    python experiments/model_family/study.py --part collect ...

Parts: ct (the sample CT), chest (NIH X-rays), chest_aligned (the same in the lung frame of LANDMARK_RUN), brain (MRI
slices), collect (runs_PART.json, results.json, the tables in README.md and model_family.png and .pdf beside this file).
Finished and stored runs are not repeated. Methods and budget: methods.py; splits: splits.py; statistics: collect.py.
"""

import argparse
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from collect import collect
from methods import BATCH, METHODS, STEPS
from runs import PARTS, folder_of, is_finished, measure
from splits import FOLDS, Source, brain, chest, chest_aligned, make_splits
from stored import is_stored

HERE = Path(__file__).parent
SAVING = ("callbacks=no_figures", "evaluation.replicates=20", "evaluation.examples=1")
VALIDATIONS = 20
WHOLE = ("data.resize=true", "data.patch_size=64", f"trainer.batch_size={BATCH}")


@dataclass(frozen=True)
class Options:
    """Choices of the command line."""

    parts: list[str]
    methods: list[str]
    seeds: list[int]
    work: Path
    data: Path
    landmarks: Path | None
    steps: int | None
    out: Path
    dry_run: bool


def main() -> None:
    options = parse()
    for part in (part for part in PARTS if part in options.parts):
        source = source_of(part, options)
        for seed in options.seeds:
            for name in options.methods:
                run(part, name, seed, source, options)
    if "collect" in options.parts and not options.dry_run:
        collect(options.work, options.methods, options.seeds, options.out)


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=[*PARTS, "collect"], required=True)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, choices=range(FOLDS), default=list(range(FOLDS)))
    parser.add_argument("--work", type=Path, default=Path("runs/model_family"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of chest_xray and brain_mri")
    parser.add_argument("--landmarks", type=Path, help="run of train +experiment=landmarks, for chest_aligned")
    parser.add_argument("--steps", type=int, help="training steps of every method, for a trial")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results, with a README.md")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    given = parser.parse_args()
    if "chest_aligned" in given.part and given.landmarks is None:
        parser.error("--part chest_aligned needs --landmarks RUN")
    return Options(
        given.part,
        given.methods,
        given.seeds,
        given.work.absolute(),
        given.data.absolute(),
        given.landmarks and given.landmarks.absolute(),
        given.steps,
        given.out,
        given.dry_run,
    )


def source_of(part: str, options: Options) -> Source | None:
    """Images of a part, split into folds; None for the CT, which has its own split."""
    folder = options.work / part
    folder.mkdir(parents=True, exist_ok=True)
    if part == "ct":
        return None
    if part == "chest_aligned":
        assert options.landmarks is not None
        source = chest_aligned(options.data, options.landmarks, folder / "images")
    else:
        source = chest(options.data) if part == "chest" else brain(options.data, folder / "images")
    make_splits(source, folder / "splits")
    return source


def run(part: str, name: str, seed: int, source: Source | None, options: Options, is_base: bool = False) -> None:
    """Train and test one method with one seed, after its base run, unless this is finished."""
    folder, base = folder_of(options.work, part, name, seed), METHODS[name].base
    if not is_base and is_stored(options.out, part, name, seed):
        return
    if base is not None:
        run(part, base, seed, source, options, is_base=True)
    if is_finished(folder):
        return
    command = [
        *(sys.executable, "-m", "pulmo_jax.train", *METHODS[name].overrides),
        *(data_of(part, seed, source, options.work) if source else ()),
        *METHODS[name].only.get(part, ()),
        *steps_of(part, name, options.steps),
        *([f"method.base_run={folder_of(options.work, part, base, seed)}"] if base else []),
        *(*SAVING, f"seed={seed}", f"hydra.run.dir={folder}"),
    ]
    if options.dry_run:
        print(shlex.join(["python", *command[1:]]))
        return
    shutil.rmtree(folder, ignore_errors=True)
    measure(command, folder)


def data_of(part: str, seed: int, source: Source, work: Path) -> list[str]:
    """Overrides of the data of a fold."""
    split = work / part / "splits" / str(seed)
    overrides = [*WHOLE, f"data.group_regex='{source.group}'", f"data.normal_name={source.normal}"]
    overrides += [f"data.{name}={split / name}" for name in ("train", "val", "test")]
    if source.foreground is not None:  # as with data.align_run: scores relative to normal ones at the same location
        overrides += [f"data.foreground={source.foreground}", "calibration.locations=each"]
    return overrides


def steps_of(part: str, name: str, trial: int | None) -> list[str]:
    """Overrides of the number of training steps, with 20 validations at any number.

    None for the defaults of the CT, and for what is fitted in one pass.
    """
    if name not in STEPS or (part == "ct" and trial is None):
        return []
    steps = STEPS[name] if trial is None else trial
    every = max(1, steps // VALIDATIONS)
    return [f"trainer.steps={steps}", f"trainer.validate_every={every}", f"trainer.checkpoint_every={steps}"]


if __name__ == "__main__":
    main()
