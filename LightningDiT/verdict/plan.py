"""The plan of step 6: which networks are trained on which images, as its file keeps it.

A cell is one fold with one number of real images a person.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LightningDiT.config import is_seed, typed
from LightningDiT.data.labels import LATENTS_MANIFEST
from LightningDiT.errors import LightningDiTError, first_line
from LightningDiT.files import fingerprint, read_json, write_text
from LightningDiT.radar.level_images import LevelFiles, open_level_files
from LightningDiT.radar.split import Split
from LightningDiT.radar.training_file import DOWNSAMPLING, PATCH, ROOT
from LightningDiT.seeds import SEEDS
from LightningDiT.verdict.same_levels import AGAIN, latents_are_of, levels_digest, others
from LightningDiT.verdict.seen import Seen, known_conditions, seen_of

if TYPE_CHECKING:
    pass

FORMAT = "adapted models, 1"
PLAN, SPLIT, TOKENIZER, LATENTS = "plan.json", "split.json", "tokenizer", "latents"
CHOSEN, ADAPTER = "transformer.safetensors", "adapter.safetensors"
TOKENIZER_WEIGHTS = "tokenizer.safetensors"
ALL, BIAS, LORA = "all", "bias", "lora"
MODELS = ROOT / "models"
STARTS = ("walkers", "fashion-mnist")  # folders of pretrained models, the better one first
TRANSFORMER, UNET = "transformer", "unet"
#: What `model.model_type` is called, and the pixels that a side must be a multiple of.
NETWORKS = {TRANSFORMER: ("LightningDiT-XS/2", DOWNSAMPLING * PATCH), UNET: ("UNet-S", DOWNSAMPLING * 4)}
MOST_GUIDANCE = 20
CELLS = ("folds", "images")  # fields of a plan whose values are a cell's
PUT_BACK = "restore that file, or choose another --output"
OTHER_OUTPUT = "choose another --output, or give the options of the first call"


@dataclass(frozen=True)
class Preset:
    """What a call trains unless its options say otherwise.

    Attributes:
        folds: None: all of the split.
        images: of a person; None: all.
        steps, tokenizer_steps: of each training.
        seeds: trainings of each classifier that step 7 should do.
        for_: the machine that it is for.
    """

    folds: tuple[int, ...] | None
    images: tuple[int | None, ...]
    models: tuple[str, ...]
    steps: int
    tokenizer_steps: int
    seeds: int
    for_: str


QUICK = "quick"
PRESETS = {
    QUICK: Preset((0,), (30,), (TRANSFORMER,), 500, 200, 3, "2 CPU cores"),
    "standard": Preset((0, 1), (30, 50, None), (TRANSFORMER, UNET), 1500, 600, 3, "a T4"),
    "full": Preset(None, (30, 50, 100, None), (TRANSFORMER, UNET), 3000, 1000, 3, "a GPU and a night"),
}


# ---- values of a plan that make sense, since its file can be edited

Rule = tuple[str, Callable[[Any], bool], str]  # name of a field, test of its value, and what is expected


def _is_count(value: int) -> bool:
    return 0 < value < SEEDS


def _is_text(value: Path | str | None) -> bool:
    return value is None or str(value) not in ("", ".")


def _are_several(values: Sequence[object], good: Callable[[Any], bool]) -> bool:
    """Return whether there are values, each a good one and none twice."""
    return bool(values) and len(set(values)) == len(values) and all(map(good, values))


COUNT, TEXT = "a number from 1 to below 2^32", "a text, or null for none"
MODEL_RULES: tuple[Rule, ...] = (
    ("name", NETWORKS.__contains__, " or ".join(NETWORKS)),  # a folder's name, and no path to elsewhere
    ("model_type", dict(NETWORKS.values()).__contains__, " or ".join(dict(NETWORKS.values()))),
    ("start", _is_text, TEXT),
    ("trainable", (ALL, BIAS, LORA).__contains__, f"{ALL}, {BIAS} or {LORA}"),
    ("start_fingerprint", _is_text, TEXT),
)
PLAN_RULES: tuple[Rule, ...] = (
    ("preset", PRESETS.__contains__, " or ".join(PRESETS)),
    *((name, _is_text, "a text") for name in ("split", "split_file", "levels")),
    ("folds", lambda value: _are_several(value, is_seed), "one number from 0 or several, none twice,"),
    (
        "images",
        lambda value: _are_several(value, lambda one: one is None or _is_count(one)),
        "one number from 1 (null: all) or several, none twice,",
    ),
    *((name, _is_count, COUNT) for name in ("size", "steps", "tokenizer_steps", "looks", "batch", "draws")),
    *((name, _is_count, COUNT) for name in ("generated", "seeds")),
    ("patience", is_seed, "0 (off) or a number below 2^32"),
    ("guidance", lambda value: 1 <= value <= MOST_GUIDANCE, f"a scale from 1 to {MOST_GUIDANCE}"),
    ("seed", is_seed, "a number from 0 to below 2^32"),
    *((name, _is_text, TEXT) for name in ("tokenizer_start", "tokenizer_fingerprint", "unseen", "levels_digest")),
)


def _check(filled: Model | Plan, rules: Sequence[Rule]) -> None:
    """Raise ValueError if a field has a value that makes no sense."""
    for name, good, expected in rules:
        if not good(value := getattr(filled, name)):
            shown = str(value) if isinstance(value, Path) else value
            raise ValueError(f"{name} is {shown!r}; {expected} is expected")


@dataclass(frozen=True)
class Model:
    """One network that each cell trains.

    Attributes:
        name: of its folder.
        model_type: of the configuration.
        start: weights that it starts from; None: random ones.
        trainable: what is trained, see `train.trainable`.
        start_fingerprint: of these weights; None in the plan of an earlier release.
    """

    name: str
    model_type: str
    start: str | None
    trainable: str = ALL
    start_fingerprint: str | None = None

    def __post_init__(self) -> None:
        _check(self, MODEL_RULES)
        if self.start is None and self.trainable != ALL:
            raise ValueError(f"trainable is {self.trainable!r} without a start; {ALL} is expected")

    @property
    def weights(self) -> str:
        """The file that its training writes."""
        return CHOSEN if self.trainable == ALL else ADAPTER


@dataclass(frozen=True)
class Plan:
    """Everything that step 6 does, and that step 7 must know of it.

    Attributes:
        split: digest of the split of step 5.
        levels: folder of its levels; size: side of a window in pixels.
        images: of a person; None: all.
        tokenizer_start: folder of the model whose tokenizer is adapted; None: random weights.
        steps, tokenizer_steps: of each training, at most.
        looks: at the samples of a training; patience: looks without a better one that end it.
        draws: latents of each training window.
        generated: windows for each real one.
        guidance: of the samples.
        seed: of trainings and samples; seeds: trainings of each classifier in step 7.
        unseen: `PAIRS`, or a condition, whose windows neither train nor validate; see `rows.scenario_of`.
        levels_digest: see `same_levels`; None in the plan of an earlier release.
        tokenizer_fingerprint: of the weights in `tokenizer_start`; None in the plan of an earlier release.
    """

    preset: str
    split: str
    split_file: Path
    levels: Path
    size: int
    folds: tuple[int, ...]
    images: tuple[int | None, ...]
    models: tuple[Model, ...]
    tokenizer_start: str | None
    steps: int
    tokenizer_steps: int
    looks: int = 4
    patience: int = 3
    batch: int = 64
    draws: int = 8
    generated: int = 4
    guidance: float = 1.0
    seed: int = 0
    seeds: int = 3
    unseen: str | None = None
    levels_digest: str | None = None
    tokenizer_fingerprint: str | None = None

    def __post_init__(self) -> None:
        _check(self, PLAN_RULES)
        names = [model.name for model in self.models]
        if not _are_several(names, NETWORKS.__contains__):
            raise ValueError(f"models is {names}; one network or several, none twice, is expected")

    @property
    def cells(self) -> list[tuple[int, int | None]]:
        return [(fold, images) for fold in self.folds for images in self.images]

    @property
    def verdicts(self) -> int:
        """How many verdicts step 7 is to give."""
        return len(self.models) * len(self.images)

    @property
    def look_every(self) -> int:
        return max(1, self.steps // self.looks)

    def seen(self, split: Split, fold: int, images: int | None) -> Seen:
        """Return what the networks of a cell see; raises LightningDiTError, see `seen_of`."""
        return seen_of(split, self.unseen, fold, images)

    def known(self, seen: Seen) -> set[int]:
        """Return the conditions that all networks learn, see `known_conditions`."""
        return known_conditions(seen, [model.start for model in self.models])


def make_plan(preset: str, opened: LevelFiles, pretrained: Path = MODELS, **given: Any) -> Plan:
    """Return the plan of a preset for the levels of a split.

    Args:
        pretrained: folder of pretrained models.
        given: fields of `Plan` that replace the preset's, `models` by their names in `NETWORKS`; `trainable` of each
            network that has a start; None is not given.

    Raises:
        LightningDiTError: a fold is not there, or the windows have a size that a network does not take.
    """
    known, split = PRESETS[preset], opened.split
    given = {key: value for key, value in given.items() if value is not None}
    given |= {key: tuple(dict.fromkeys(given[key])) for key in ("folds", "images", "models") if key in given}
    folds = tuple(given.pop("folds", known.folds or range(split.folds)))
    names, trainable = tuple(given.pop("models", known.models)), given.pop("trainable", None)
    check_people(split, folds, opened.split_file)
    _check_size(opened, names)
    values = {
        "images": known.images,
        "steps": known.steps,
        "tokenizer_steps": known.tokenizer_steps,
        "seeds": known.seeds,
        **given,
    }
    found = next((pretrained / name for name in STARTS if (pretrained / name / TOKENIZER_WEIGHTS).is_file()), None)
    plan = Plan(
        preset=preset,
        split=split.digest,
        split_file=opened.split_file,
        levels=opened.folder,
        size=opened.size[0],
        folds=folds,
        models=tuple(_model(pretrained, name, trainable) for name in names),
        tokenizer_start=str(found) if found else None,
        tokenizer_fingerprint=fingerprint(found / TOKENIZER_WEIGHTS) if found else None,
        levels_digest=levels_digest(opened),
        **values,
    )
    for fold in folds:
        plan.seen(split, fold, 1)  # what is unseen leaves something to train on
    return plan


def _model(pretrained: Path, name: str, trainable: str | None) -> Model:
    """Return a network with its start; of one that knows walkers already biases and labels suffice by default."""
    start = _start(pretrained, name)
    if start is None:
        return Model(name, NETWORKS[name][0], None)
    knows_walkers = Path(start).is_relative_to(pretrained / STARTS[0])
    return Model(name, NETWORKS[name][0], start, trainable or (BIAS if knows_walkers else ALL), fingerprint(start))


def _start(pretrained: Path, name: str) -> str | None:
    """Return the pretrained weights that a network starts from, None where there are none."""
    own = [pretrained / STARTS[0] / name / CHOSEN]
    files = [pretrained / start / CHOSEN for start in STARTS] if name == TRANSFORMER else own
    return next((str(file) for file in files if file.is_file()), None)


def check_people(split: Split, folds: Sequence[int], split_file: Path) -> None:
    """Raise LightningDiTError where a classifier has nobody to tell apart, or nothing to be tested on."""
    if len(split.people) < 2:
        raise LightningDiTError(
            f"{split_file} has the windows of one person ({split.people[0]}); a classifier tells two or more apart",
            "give step 5 a folder of two people or more",
        )
    usable = [fold for fold in range(split.folds) if split.part("training", fold) and split.part("test", fold)]
    if not usable:
        raise LightningDiTError(
            f"nobody in {split_file} walks in two passes, so no pass can be tested",
            "record a second pass of each person, and run step 5 again",
        )
    for fold in folds:
        if fold not in usable:
            raise LightningDiTError(
                f"fold {fold} of {split_file} lacks training or test windows", "choose other --folds"
            )


def _check_size(opened: LevelFiles, names: Sequence[str]) -> None:
    height, width = opened.size
    for name in names:
        if height != width or height % NETWORKS[name][1]:
            raise LightningDiTError(
                f"the windows in {opened.folder} have {width}x{height} pixels; {name} takes squares whose sides are"
                f" multiples of {NETWORKS[name][1]}",
                f"{opened.again_in()} --size 64",
            )


# ---- the file of the plan


def save_plan(plan: Plan, folder: Path) -> None:
    """Write `plan.json`."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(plan).items()}
    write_text(folder / PLAN, json.dumps({"format": FORMAT, **values}, indent=1, ensure_ascii=False) + "\n")


def load_plan(folder: Path) -> Plan:
    """Return the plan of a folder of step 6.

    Raises:
        LightningDiTError: there is none, it cannot be read, or one of its values makes no sense.
    """
    path = folder / PLAN
    try:
        content = read_json(path)
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
    except FileNotFoundError as error:
        raise LightningDiTError(
            f"there is no {path}, which step 6 writes", "python step6_adapt_models.py, or name its folder by --adapted"
        ) from error
    except (OSError, ValueError) as error:
        raise LightningDiTError(
            f"{path} is no plan of step 6 ({first_line(error)})", "run step6_adapt_models.py first"
        ) from error
    try:
        return typed(Plan, content, str(path))
    except LightningDiTError as error:
        raise LightningDiTError(error.message, f"restore that value, or {AGAIN}") from error


def asked_plan(
    folder: Path, levels: Path, split_file: Path, preset: str | None, **given: Any
) -> tuple[Plan, Plan | None]:
    """Return the plan that a command line asks for, and the one that its folder has begun with; None without one.

    Where the folder has a plan, what the command line leaves out is that of the folder.

    Args:
        preset: None: not given.
        given: as for `make_plan`.

    Raises:
        LightningDiTError: see `make_plan`, `with_levels`, `with_starts` and `continued`; or the levels are not those of
            the split.
    """
    opened = open_level_files(levels, split_file)
    if not (folder / PLAN).exists():
        return make_plan(preset or QUICK, opened, **given), None
    kept = with_starts(with_levels(load_plan(folder), folder, opened), folder)
    own = {name: getattr(kept, name) for name in ("folds", "images", "generated", "guidance", "seed", "unseen")}
    own |= {"models": [model.name for model in kept.models]}
    asked = given.get("trainable")
    if asked and any(model.start and model.trainable != asked for model in kept.models):
        raise LightningDiTError(f"the folder has trainings of another part than {asked}", OTHER_OUTPUT)
    given = own | {key: value for key, value in given.items() if value is not None}
    return continued(make_plan(preset or kept.preset, opened, **given), kept), kept


def with_levels(kept: Plan, folder: Path, opened: LevelFiles) -> Plan:
    """Return the plan of a folder, which names the levels that are there now: those that it was made of.

    The plan of an earlier release names none. Its latents show of which levels they are, so that its trainings can be
    kept; a cell without latents, whose tokenizer was being trained, shows nothing and goes on.

    Raises:
        LightningDiTError: the levels are others.
    """
    if opened.split.digest != kept.split:
        return kept  # `continued` says so
    found = levels_digest(opened)
    is_same_folder = opened.folder == kept.levels
    if kept.levels_digest is None:
        for fold, images in kept.cells:
            cell = cell_folder(folder, fold, images)
            if (cell / LATENTS / LATENTS_MANIFEST).exists() and not latents_are_of(
                opened, cell / LATENTS, cell / SPLIT, fold, kept.draws, kept.seed
            ):
                raise others(opened, is_same_folder, folder)
        print(f"note: the plan in {folder} is of an earlier release and names no levels; those of now are assumed")
    elif kept.levels_digest != found:
        raise others(opened, is_same_folder, folder)
    return replace(kept, levels_digest=found)


def with_starts(kept: Plan, folder: Path) -> Plan:
    """Return the plan of a folder with the fingerprints of its starting weights: those that it began with.

    The plan of an earlier release lacks them, which is said. Weights that are gone are left to the job that needs them.

    Raises:
        LightningDiTError: a file has other weights by now.
    """
    tokenizer = str(Path(kept.tokenizer_start, TOKENIZER_WEIGHTS)) if kept.tokenizer_start else None
    starts = [(tokenizer, kept.tokenizer_fingerprint)]
    starts += [(model.start, model.start_fingerprint) for model in kept.models]
    found = [fingerprint(file) if file and Path(file).is_file() else known for file, known in starts]
    for (file, known), now in zip(starts, found, strict=True):
        if known not in (None, now):
            raise LightningDiTError(f"{file} has other weights than those with which {folder} began", PUT_BACK)
    if unnamed := [file for (file, known), now in zip(starts, found, strict=True) if known != now and file]:
        print(
            f"note: the plan in {folder} is of an earlier release and says nothing of the content of its starting"
            f" weights; those that are there now are taken: {', '.join(unnamed)}"
        )
    pairs = zip(kept.models, found[1:], strict=True)
    models = tuple(replace(model, start_fingerprint=now) for model, now in pairs)
    return replace(kept, models=models, tokenizer_fingerprint=found[0])


def continued(plan: Plan, kept: Plan) -> Plan:
    """Return the plan that a folder goes on with: its own, whose trainings may be shorter than those asked for.

    Further folds and numbers of images join it, after its own.

    Raises:
        LightningDiTError: the folder holds something else than what is asked for.
    """
    kept = replace(kept, **{name: joined(getattr(kept, name), getattr(plan, name)) for name in CELLS})
    own = ("steps", "tokenizer_steps", "tokenizer_start", "tokenizer_fingerprint")
    same = replace(plan, **{name: getattr(kept, name) for name in own})
    for name in CELLS:
        if set(getattr(plan, name)) == set(getattr(kept, name)):
            same = replace(same, **{name: getattr(kept, name)})  # the order says nothing
    if [model.name for model in plan.models] == [model.name for model in kept.models]:
        same = replace(same, models=kept.models)  # a start that came since then changes nothing
    if same != kept:
        odd = [item.name for item in fields(Plan) if getattr(same, item.name) != getattr(kept, item.name)]
        own = [f"--{name} {' '.join(map(images_text, getattr(kept, name)))}" for name in CELLS if name in odd]
        fix = f"give its own too: {' '.join(own)}, or choose another --output" if len(own) == len(odd) else OTHER_OUTPUT
        raise LightningDiTError(f"the folder has a plan of other settings ({', '.join(odd)})", fix)
    return kept


def joined(old: tuple[Any, ...], new: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the old values, and those of the new ones that are not among them."""
    return tuple(dict.fromkeys((*old, *new)))


def images_text(number: int | None) -> str:
    """Return a number of images as --images takes it."""
    return "all" if number is None else str(number)


# ---- cells


def cell_folder(folder: Path, fold: int, images: int | None) -> Path:
    """Return the folder of a cell."""
    return folder / f"fold{fold}-{images_text(images)}"
