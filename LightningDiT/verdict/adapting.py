"""Files and commands of step 6, which follow from its plan.

The networks of a cell see its images alone: the split in its folder is that of step 5 with all other training windows
made guards, which nothing may train on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from LightningDiT.config import as_yaml, read_yaml
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import check_target, holding, write_text
from LightningDiT.radar.augmentation import NAMES
from LightningDiT.radar.level_images import condition_names
from LightningDiT.radar.split import Split, is_split, save_restricted
from LightningDiT.radar.training_file import TEMPLATE
from LightningDiT.verdict.intervals import PassBootstrap, level_of
from LightningDiT.verdict.jobs import Job
from LightningDiT.verdict.seen import is_labels, labels_text

if TYPE_CHECKING:
    from LightningDiT.files import Ours

from LightningDiT.verdict.plan import (
    ADAPTER,
    ALL,
    BIAS,
    CHOSEN,
    FORMAT,
    LATENTS,
    PLAN,
    PRESETS,
    SPLIT,
    TOKENIZER,
    TOKENIZER_WEIGHTS,
    Model,
    Plan,
    cell_folder,
    images_text,
)

LABELS, VALID, GENERATED, TRAINED = "labels.csv", "latents_valid", "generated", "training.safetensors"
TOKENIZER_TEMPLATE = Path(__file__).parents[1] / "tokenizer" / "configs" / "levels_f4d6.yaml"
#: Learning rate of a part. That of the whole is the template's; `studies.small_data` compares them.
PART_RATE = 3e-3
LISTED = 3  # unseen pairs of a fold
PASS_DEVIATION = 10.0  # points by which the differences of test passes vary, on simulated walkers, with three seeds


def counts_of(plan: Plan, split: Split) -> dict[tuple[int, int | None], int]:
    """Return the number of real windows that each cell trains on."""
    return {cell: len(plan.seen(split, *cell).training.people) for cell in plan.cells}


def validating(plan: Plan, split: Split, fold: int) -> int:
    """Return how many windows of a fold the weights are chosen by."""
    return len(plan.seen(split, fold, 1).validation.people)


def write_cells(plan: Plan, folder: Path, split: Split) -> None:
    """Write split, configurations and labels of every cell.

    Raises:
        LightningDiTError: a file that no step 6 wrote has the name.
    """
    for fold, images in plan.cells:
        cell, seen = cell_folder(folder, fold, images), plan.seen(split, fold, images)
        chosen = seen.training.rows.tolist(), fold, seen.validation.rows.tolist()
        save_restricted(cell / SPLIT, split, plan.split_file, *chosen)
        write_text(cell / LABELS, labels_text(seen, plan.generated, plan.known(seen)), ours=is_labels)
        for path, values in _configurations(plan, cell, split, fold, len(seen.training.people)):
            write_text(path, as_yaml(values), ours=_with_sections(values))


def check_files(plan: Plan, folder: Path, split: Split) -> None:
    """Raise LightningDiTError if `save_plan` or `write_cells` would replace a file that no step 6 wrote."""
    check_target(folder / PLAN, holding(FORMAT))
    for fold, images in plan.cells:
        cell = cell_folder(folder, fold, images)
        check_target(cell / SPLIT, is_split)
        check_target(cell / LABELS, is_labels)
        for path, values in _configurations(plan, cell, split, fold, 1):
            check_target(path, _with_sections(values))


def _configurations(
    plan: Plan, cell: Path, split: Split, fold: int, count: int
) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield each configuration of a cell that trains on `count` windows, with its file."""
    yield cell / f"{TOKENIZER}.yaml", tokenizer_values(plan, count)
    for model in plan.models:
        yield cell / f"{model.name}.yaml", training_values(plan, model, split, fold, count)


def _with_sections(values: Mapping[str, Any]) -> Ours:
    """Return a test that is true of a YAML file with the same sections, whatever their values."""
    keys = {key for key, value in values.items() if isinstance(value, Mapping)}

    def test(path: Path) -> bool:
        try:
            return read_yaml(path).keys() >= keys
        except LightningDiTError:
            return False

    return test


def tokenizer_values(plan: Plan, count: int) -> dict[str, Any]:
    """Return the configuration of a tokenizer's training on `count` windows."""
    values, every = read_yaml(TOKENIZER_TEMPLATE), max(1, plan.tokenizer_steps // 2)
    train = values["train"]
    train |= {"max_steps": plan.tokenizer_steps, "ckpt_every": every, "log_every": max(1, every // 4)}
    train |= {"seed": plan.seed, "batch_size": min(train["batch_size"], count)}
    return values


def training_values(plan: Plan, model: Model, split: Split, fold: int, count: int) -> dict[str, Any]:
    """Return the configuration of a network's training and sampling; paths are relative to the cell's folder.

    Args:
        count: windows that it is trained on, each in `plan.draws` draws.
    """
    values, every, conditions = read_yaml(TEMPLATE), plan.look_every, condition_names(split)
    if model.trainable == ALL:
        values["ckpt_path"] = f"{model.name}/{CHOSEN}"
    else:
        values |= {"ckpt_path": model.start, "adapter_path": f"{model.name}/{ADAPTER}"}
        values["optimizer"]["lr"] = PART_RATE
    if model.trainable == BIAS:
        values["optimizer"]["weight_decay"] = 0.0  # which matrices alone have
    values["data"] = {
        "data_path": LATENTS,
        "valid_path": VALID,
        "image_size": plan.size,
        "num_classes": len(split.people),
        "num_conditions": len(conditions or ()),
        "split_file": SPLIT,
        "fold": fold,
        "levels_path": str(plan.levels),
    }
    values["vae"]["ckpt_path"] = f"{TOKENIZER}/{TOKENIZER_WEIGHTS}"
    values["model"] |= {"model_type": model.model_type, "augmentation": len(NAMES)}
    train = values["train"]
    batch = min(plan.batch, plan.draws * count)
    train |= {"max_steps": plan.steps, "global_batch_size": batch, "global_seed": plan.seed}
    train |= {"output_dir": ".", "exp_name": model.name, "weight_init": model.start, "trainable": model.trainable}
    train |= {"log_every": max(1, every // 4), "ckpt_every": every, "valid_every": every, "judge_every": every}
    train |= {"choose": "utility", "patience": plan.patience}
    values["sample"] |= {"cfg_scale": plan.guidance}
    if not validating(plan, split, fold):  # nobody has a window that the weights could be chosen by
        values["data"]["valid_path"] = None
        train |= {"valid_every": 0, "judge_every": 0, "choose": "last", "patience": 0}
    return values


def jobs_of(plan: Plan, folder: Path, split: Split) -> list[Job]:
    """Return every job, in the order in which each finds what it needs."""
    jobs, counts = [], counts_of(plan, split)
    for fold, images in plan.cells:
        cell = cell_folder(folder, fold, images)
        source = ("--levels", str(plan.levels), "--split-file", str(cell / SPLIT), "--fold", str(fold))
        start = ("--init", plan.tokenizer_start) if plan.tokenizer_start else ()
        make = ("--config", str(cell / f"{TOKENIZER}.yaml"), *start, *source, "--output", str(cell / TOKENIZER))
        jobs.append(Job(f"{cell.name} tokenizer", ("LightningDiT.train_tokenizer", *make), cell / TOKENIZER / TRAINED))
        extract = ("LightningDiT.extract_features", "--config", str(cell / f"{plan.models[0].name}.yaml"), *source)
        parts = [(LATENTS, ("--draws", str(plan.draws), "--seed", str(plan.seed)))]
        parts += [(VALID, ("--part", "validation"))] if validating(plan, split, fold) else []
        for name, more in parts:
            command = (*extract, *more, "--output", str(cell / name))
            jobs.append(Job(f"{cell.name} {name}", command, cell / name / "manifest.json"))
        for model in plan.models:
            jobs += _model_jobs(plan, cell, model, plan.generated * counts[fold, images])
    return jobs


def _model_jobs(plan: Plan, cell: Path, model: Model, count: int) -> list[Job]:
    """Return the jobs that train a network and sample from its chosen weights."""
    config, run = ("--config", str(cell / f"{model.name}.yaml")), cell / model.name
    sample = ("--labels", str(cell / LABELS), "--by-class", "--seed", str(plan.seed), "--output", str(run / GENERATED))
    return [
        Job(f"{cell.name} {model.name}", ("LightningDiT.train", *config), run / model.weights),
        Job(f"{cell.name} {model.name} samples", ("LightningDiT.inference", *config, *sample), run / GENERATED, count),
    ]


# ---- what a plan says


def power_line(plan: Plan, split: Split) -> str:
    """Return what difference the test passes of a plan can show."""
    tested = [plan.seen(split, fold, 1).tested for fold in plan.folds]
    people, passes = (np.concatenate([getattr(one, name) for one in tested]) for name in ("people", "passes"))
    bootstrap = PassBootstrap(people, passes, resamples=1)
    least = bootstrap.smallest(PASS_DEVIATION, level_of(plan.verdicts))
    together = f" in each of {plan.verdicts} verdicts" if plan.verdicts > 1 else ""
    return (
        f"power          {bootstrap.passes} test passes: differences of about {least:.0f} points and more will show"
        f"{together}, if passes and trainings differ as those of simulated walkers do"
    )


def describe(plan: Plan, split: Split) -> list[str]:
    """Return what a plan does in a few lines, with the difference that its verdict will be able to show."""
    images = ", ".join(map(images_text, plan.images))
    folds = ", ".join(map(str, plan.folds))
    lines = [
        f"preset         {plan.preset}, for {PRESETS[plan.preset].for_}: {images} images a person; fold {folds}",
        f"windows        {len(split.people)} people, {plan.size}x{plan.size} pixels, of {plan.levels}",
        f"tokenizer      {plan.tokenizer_steps} steps from {plan.tokenizer_start or 'random weights'}",
    ]
    lines += [
        f"{model.name:<15}{model.model_type}, at most {plan.steps} steps from {model.start or 'random weights'}, trains"
        f" {model.trainable}"
        for model in plan.models
    ]
    lines.append(power_line(plan, split))
    lines += [
        f"note: fold {fold} has no validation windows, so its last weights are taken"
        for fold in plan.folds
        if not validating(plan, split, fold)
    ]
    return lines + unseen_lines(plan, split)


def unseen_lines(plan: Plan, split: Split) -> list[str]:
    """Return what is unseen in each fold, and what no network can draw."""
    if plan.unseen is None:
        return []
    lines, untaught = [], set[str]()
    for fold in plan.folds:
        seen = plan.seen(split, fold, None)
        names, held = seen.training.condition_names or (), sorted(seen.scenario.held_out)
        pairs = [f"{seen.training.class_names[person]} {names[condition]}" for person, condition in held[:LISTED]]
        more = f" and {len(held) - LISTED} more" if len(held) > LISTED else ""
        lines.append(f"unseen         fold {fold}: {', '.join(pairs)}{more}; neither trained nor validated on")
        untaught |= {names[one] for _, one in held} - {names[one] for one in plan.known(seen)}
    lines += [
        f"note: no network learns what {name!r} is, so that no windows of it are generated" for name in sorted(untaught)
    ]
    return lines
