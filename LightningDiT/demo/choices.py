"""What the page offers and takes: the models found, a person's wishes checked, and the command that repeats them."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from LightningDiT.config import Config, SampleConfig, as_mapping, load_config, with_overrides
from LightningDiT.console import program
from LightningDiT.data.labels import Labels
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import read_json
from LightningDiT.hub.bundled import bundled_model
from LightningDiT.radar.sensor import Sensor
from LightningDiT.radar.split import load_split
from LightningDiT.sampling.conditions import NO_CONDITION, numbers_of_conditions
from LightningDiT.sampling.null_row import check_guidance
from LightningDiT.sampling.options import CONTACT_SHEET, demo_classes
from LightningDiT.sampling.pipeline import captions_of
from LightningDiT.sampling.solver_choice import CALIBRATED, SOLVER_NAMES, check_solver
from LightningDiT.verdict.gait import Axes, axes_of
from LightningDiT.verdict.pictures import colour_map_of

#: Where configurations of weights lie, below a project's folder: models, step 3's, and the trainings of step 6.
PLACES = (
    *("models/*/config.yaml", "models/*/*/config.yaml", "kaggle_inference_config.yaml"),
    *("adapted/fold*/transformer.yaml", "adapted/fold*/unet.yaml"),
)
#: Beside the configuration of a model of spectrograms without a split: native_columns and colour_maps as a split's.
WINDOWS = "spectrograms.json"
SDE_METHODS = ("euler", "heun")
SHOWN_CLASSES = 4  # that are chosen when the page opens
MOST_IMAGES = 64  # of one wish
MOST_STEPS = 1000
MOST_SEED = 2**53 - 1  # the largest whole number that a browser keeps
MOST_GUIDANCE = 20.0
#: What the page calls each sampling setting, for messages.
FIELDS = {"cfg_scale": "guidance", "num_sampling_steps": "steps", "sampling_method": "solver"}


@dataclass(frozen=True)
class Model:
    """Weights that the page offers.

    Attributes:
        name: as the page shows it.
        config: of the weights, which lie where it says.
        path: of the configuration, as a person would type it here.
    """

    name: str
    config: Config
    path: str

    @cached_property
    def labels(self) -> Labels:
        return Labels.of(self.config)

    @cached_property
    def conditions(self) -> Labels | None:
        return Labels.conditions_of(self.config)

    @cached_property
    def axes(self) -> Axes | None:
        """Axes of the windows that the model makes, with the sensor of step 7's default; None if it makes none."""
        side = self.config.data.image_size
        return None if self._windows is None else axes_of(self._windows, (side, side), Sensor())

    @cached_property
    def colour_map(self) -> str:
        """The colours of the model's levels, if it makes levels."""
        return colour_map_of(self._windows or {})

    @cached_property
    def _windows(self) -> Mapping[str, Any] | None:
        """What a split says of windows: from that of the training, or from a file beside the configuration.

        Raises:
            LightningDiTError: the file is damaged.
        """
        split, file = self.config.data.split_file, Path(self.config.source).with_name(WINDOWS)
        if split and Path(split).is_file():
            return load_split(Path(split)).settings
        if not file.is_file():
            return None
        try:
            return as_mapping(read_json(file), str(file))
        except (OSError, ValueError) as error:
            raise LightningDiTError(f"{file} cannot be read ({error})", "correct or remove it") from error

    @property
    def solvers(self) -> tuple[str, ...]:
        """Names of the solvers that the model takes."""
        sample = self.config.sample
        if sample.mode == "SDE":
            return SDE_METHODS
        return tuple(name for name in SOLVER_NAMES if name != CALIBRATED or sample.solver_file)

    @property
    def first_classes(self) -> list[int]:
        """Return the classes that are chosen when the page opens."""
        return [int(number) for number in demo_classes(self.config.data.num_classes)[:SHOWN_CLASSES]]


# ---- models


def find_models(folders: Sequence[Path], named: Sequence[Path] = ()) -> tuple[dict[str, Model], list[str]]:
    """Return the models found, the named ones first and the bundled one last, and why others are not offered.

    Args:
        folders: projects, see `PLACES`.
        named: configurations that must be usable.

    Raises:
        LightningDiTError: a named configuration or its weights cannot be used, or there is no model at all.
    """
    models, left_out = dict[str, Model](), list[str]()
    for path in named:
        _add(models, path, _model(path))
    for path in _found(folders):
        try:
            _add(models, path, _model(path))
        except LightningDiTError as error:
            left_out.append(str(error))
    if not models:
        raise LightningDiTError("no model is found here", "name one by --config FILE")
    return models, left_out


def _found(folders: Sequence[Path]) -> Iterator[Path]:
    """Yield each configuration in a place once."""
    seen = set[Path]()
    places = [sorted(folder.glob(place)) for folder in folders for place in PLACES]
    paths = [path for files in places for path in files]
    with contextlib.suppress(LightningDiTError):  # a package without one
        paths.append(bundled_model() / "config.yaml")
    for path in paths:
        if path.resolve() not in seen:
            seen.add(path.resolve())
            yield path


def _model(path: Path) -> Model:
    config = load_config(path)
    if not config.ckpt_path or not Path(config.ckpt_path).is_file():
        raise LightningDiTError(f"{path}: its weights {config.ckpt_path} are not there", "train or download them")
    here = Path.cwd()
    typed = path.resolve()
    shown = str(typed.relative_to(here)) if typed.is_relative_to(here) else str(typed)
    return Model(_name(typed), config, shown)


def _name(path: Path) -> str:
    """Return the folder of a configuration, with its own name if the folder may hold others."""
    if path.name == "config.yaml":
        parent = path.parent.parent.name
        return path.parent.name if parent in ("models", "bundled", "") else f"{parent}/{path.parent.name}"
    return f"{path.parent.name}/{path.stem}"


def _add(models: dict[str, Model], path: Path, model: Model) -> None:
    if any(other.config.source == model.config.source for other in models.values()):
        return
    name = model.name if model.name not in models else str(path)
    models[name] = dataclasses.replace(model, name=name)


# ---- wishes


@dataclass(frozen=True)
class Wish:
    """What a person asked for, checked.

    Attributes:
        model: that samples.
        labels, conditions: of each image; conditions as `conditions_of_images` gives them.
        seed: image k starts from the noise of (seed, k).
        sample: the settings.
        command_classes, command_conditions: of a round, as the command names them.
        solver: as the command names it.
        steps: None: those of the solver.
    """

    model: Model
    labels: list[int]
    conditions: list[int | None] | None
    seed: int
    sample: SampleConfig
    command_classes: list[str]
    command_conditions: list[str]
    solver: str
    steps: int | None

    @property
    def captions(self) -> list[str]:
        """What stands below each image: its class and, if it has one, its condition."""
        return captions_of(self.model, self.labels, self.conditions)  # a model has labels as a pipeline has

    def command(self, output: str) -> str:
        """Return the command that makes the same images in a folder `output`."""
        words = ["--config", self.model.path, "--classes", *self.command_classes]
        words += ["--conditions", *self.command_conditions] if self.command_conditions else []
        words += ["--count", str(len(self.labels)), "--seed", str(self.seed)]
        words += ["--guidance-scale", f"{self.sample.cfg_scale:g}", "--solver", self.solver]
        words += ["--steps", str(self.steps)] if self.steps else []
        return f"{sample_program()} {shlex.join([*words, '--output', output])}"


def sample_program() -> str:
    """Return how `lightningdit sample` is called where this command was called."""
    called = program("command.demo")
    return "lightningdit sample" if called.startswith("lightningdit") else "python -m LightningDiT.inference"


def wish_of(
    model: Model,
    classes: Sequence[int | str] | None,
    conditions: Sequence[int | str] | None,
    each: Any,
    seed: Any,
    guidance: Any,
    solver: str | None,
    steps: Any,
) -> Wish:
    """Return a checked wish: `each` images of each class under each condition.

    Args:
        classes, conditions: numbers or names; no condition means the null condition.
        each, seed, guidance, steps: as a browser sends them; steps 0 are those of the solver.

    Raises:
        LightningDiTError: a value is none that can be; the message names it and what is expected.
    """
    if not classes:
        raise LightningDiTError("no class is chosen; one or more are expected", "choose a class")
    numbers = list(dict.fromkeys(model.labels.numbers(classes)))
    rounds = _conditions(model, conditions)
    total = len(numbers) * len(rounds or [None]) * whole(each, "images of each class", 1, MOST_IMAGES)
    if total > MOST_IMAGES:
        raise LightningDiTError(
            f"{total} images are asked for; at most {MOST_IMAGES} are made at a time", "choose fewer"
        )
    given = None if steps in (None, "", 0) else whole(steps, "steps", 2, MOST_STEPS)
    scale = number(guidance, "guidance", 0, MOST_GUIDANCE)
    sample = with_overrides(
        model.config.sample, FIELDS, sampling_method=solver or None, num_sampling_steps=given, cfg_scale=scale
    )
    check_solver(sample, model.config.transport.path_type)
    labels = [numbers[index % len(numbers)] for index in range(total)]
    of_images = rounds and [rounds[index // len(numbers) % len(rounds)] for index in range(total)]
    return Wish(
        model,
        labels,
        numbers_of_conditions(model.conditions, of_images, total),
        whole(seed, "seed", 0, MOST_SEED),
        sample,
        [typed_name(model.labels, one) for one in numbers],
        [NO_CONDITION if one is None else typed_name(model.conditions, one) for one in rounds or ()],
        solver or model.config.sample.sampling_method,
        given,
    )


def _conditions(model: Model, conditions: Sequence[int | str] | None) -> list[int | None] | None:
    """Return the number of each condition of a wish, once; None for a model without, or if none is named."""
    if model.conditions is None or not conditions:
        return None
    return list(dict.fromkeys(numbers_of_conditions(model.conditions, list(conditions), len(conditions)) or ()))


def typed_name(labels: Labels, label: int) -> str:
    """Return what names a class on a command line: the first of its names that means it alone, else its number."""
    for name in (labels.names[label].split(",")[0].strip(), labels.names[label]) if labels.names else ():
        try:
            if labels.number(name) == label and name.lower() not in (CONTACT_SHEET, NO_CONDITION) and name[:1] != "-":
                return name
        except LightningDiTError:  # several classes have it
            continue
    return str(label)


def whole(value: Any, name: str, least: int, most: int) -> int:
    """Return a whole number of a field.

    Raises:
        LightningDiTError: it is none, or beyond its bounds.
    """
    found = number(value, name, least, most, "a whole number")
    if found != int(found):
        raise _wrong(value, name, least, most, "a whole number")
    return int(found)


def number(value: Any, name: str, least: float, most: float, kind: str = "a number") -> float:
    """Return a number of a field; raises as `whole`."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise _wrong(value, name, least, most, kind) from None
    if not least <= found <= most or isinstance(value, bool):
        raise _wrong(value, name, least, most, kind)
    return found


def _wrong(value: Any, name: str, least: float, most: float, kind: str) -> LightningDiTError:
    shown = "empty" if value in (None, "") else f"{value!r}"[:80]
    return LightningDiTError(
        f"{name} is {shown}; {kind} from {least:g} to {most:.16g} is expected", "choose another value"
    )


def check_wish(wish: Wish, null_failure: str) -> None:
    """Raise LightningDiTError if a wish needs null labels that were never trained, once the weights are read."""
    check_guidance(wish.sample, null_failure)
    numbers_of_conditions(wish.model.conditions, wish.conditions, len(wish.labels), null_failure)
