"""Looks at what samples are worth while a network trains: seen as asked, copies, and utility on validation passes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from LightningDiT.compiling import PLAIN
from LightningDiT.config import Config
from LightningDiT.data.image_files import shown
from LightningDiT.data.labels import Labels
from LightningDiT.distributed import Processes
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import levels_of
from LightningDiT.metrics.sample_worth import SampleJudge, Worth
from LightningDiT.radar.level_images import Windows, load_windows
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.seeds import generator_for

CONDITION_STREAM = 11  # second seed of the conditions that samples are drawn with
LISTED = 5  # people in a message
FIX = "set data.levels_path, data.split_file and data.fold to what step 5 wrote"


class JudgedSamples:
    """Samples of every class by noise that never changes, judged beside the windows of the split.

    Args:
        pipe: draws the held-out windows by its tokenizer, and knows classes and conditions.
        each: samples of a class.
        seed: of noise, conditions and judge.

    Attributes:
        judge: with the windows.
        people: (N,) whom each sample shows, by the split's numbers; classes: (N,) by the model's.
        conditions: of each sample, None for a model without a second label.
    """

    def __init__(self, config: Config, pipe: LightningDiTPipeline, each: int, seed: int = 0) -> None:
        self.seed, self._tokenizer = seed, pipe.tokenizer
        training, validation = (windows_of(config, part) for part in ("training", "validation"))
        numbers = class_numbers(pipe.labels, training)
        classes = len(training.class_names)
        self.judge = SampleJudge(training, validation, classes, self._drawn, pipe.device, seed)
        self.people = torch.tensor(sorted(numbers)).repeat(each)
        self.classes = [numbers[person] for person in self.people.tolist()]
        self.conditions = drawn_conditions(pipe.conditions, training, self.people, seed)

    def worth(self, pipe: LightningDiTPipeline, draw: int = 0) -> Worth:
        """Return what samples of a pipeline are worth.

        Args:
            draw: each number has noise of its own.

        Raises:
            LightningDiTError: samples are not finite.
        """
        indices = [draw * len(self.classes) + index for index in range(len(self.classes))]
        images = pipe(
            self.classes, seed=self.seed, indices=indices, output_type="pt", conditions=self.conditions
        ).images
        return self.judge.worth(levels_of(images).clamp(-1, 1), self.people)

    def _drawn(self, pixels: Tensor) -> Tensor:
        """Return windows (N, 1, H, W) as the tokenizer draws them."""
        return levels_of(self._tokenizer.decode(self._tokenizer.encode(pixels))).clamp(-1, 1).cpu()

    def text(self) -> str:
        """Return one line that says what looks are measured by, and what real windows reach."""
        valid, judge = self.judge.validation, self.judge
        return (
            f"looks: {len(self.people)} samples of {len(set(self.classes))} classes, beside {len(valid.people)}"
            f" validation windows of {len(valid.passes.unique())} passes; the judge sees {judge.real_accuracy:.1%}"
            f" of these rightly, the classifier trained on real windows {judge.real_utility:.1%}"
        )


class Looks:
    """The looks of a run; the main process takes them, all others learn the numbers.

    Args:
        make: returns the samples to judge, and the pipeline that draws them.
    """

    def __init__(self, make: Callable[[], tuple[JudgedSamples, LightningDiTPipeline]], processes: Processes) -> None:
        self.processes = processes
        # no exchange here: whoever makes the monitors shares an error
        self._held = [make()] if processes.is_main else []
        for judged, _ in self._held:
            print(judged.text(), flush=True)

    def observe(self, step: int) -> dict[str, float]:
        """Return the numbers of a look for the log; none if samples are not finite, which is said."""
        return self.processes.from_main(lambda: self._look(step))

    def _look(self, step: int) -> dict[str, float]:
        (judged, pipe), started = self._held[0], time.monotonic()
        try:
            with warnings.catch_warnings(), pipe.settled(PLAIN, "training"):  # no graph keeps a training's memory
                warnings.simplefilter("ignore")
                worth = judged.worth(pipe)
        except LightningDiTError as error:
            print(f"note: no look at step {step}: {error.message}", flush=True)
            return {}
        return worth.row() | {"look_seconds": time.monotonic() - started}


def windows_of(config: Config, part: str) -> Windows:
    """Return the windows of a part of the split that a configuration names.

    Raises:
        LightningDiTError: it names none, they are damaged, or they have another size than the model's images.
    """
    data = config.data
    for key in ("levels_path", "split_file"):
        if not getattr(data, key):
            raise LightningDiTError(
                f"{config.source}: samples are judged beside real windows, and data.{key} is not set", FIX
            )
    windows = load_windows(Path(str(data.levels_path)), Path(str(data.split_file)), part, data.fold)
    (height, width), side = windows.pixels.shape[2:], data.image_size
    if (height, width) != (side, side):
        raise LightningDiTError(
            f"the windows in {data.levels_path} have {width}x{height} pixels, samples have {side}x{side}",
            f"python step5_prepare_spectrograms.py --data DATA --write LEVELS --size {side}",
        )
    return windows


def check_windows(config: Config) -> None:
    """Raise what a training would of the windows that its looks need."""
    if config.train.judge_every:
        for part in ("training", "validation"):
            windows_of(config, part)


def class_numbers(labels: Labels, training: Windows) -> dict[int, int]:
    """Return the model's class of each person of the split who has training windows.

    Args:
        labels: the model's.

    Raises:
        LightningDiTError: the model lacks one of them.
    """
    there, names = training.people.unique().tolist(), training.class_names
    known = {name: number for number, name in enumerate(labels.identity or names)}
    lacking = [names[person] for person in there if known.get(names[person], labels.count) >= labels.count]
    if lacking:
        raise LightningDiTError(
            f"the split has people whom the model does not know: {', '.join(map(shown, lacking[:LISTED]))}",
            "choose the split that the latents were made of",
        )
    return {person: known[names[person]] for person in there}


def drawn_conditions(
    conditions: Labels | None, training: Windows, people: Tensor, seed: int
) -> list[int | str | None] | None:
    """Return the condition of a random training window of each of `people` (N,); None without a second label.

    Args:
        conditions: the model's second label.
    """
    if conditions is None:
        return None
    found = list[int | str | None]()
    by_name = bool(conditions.names and training.condition_names)
    for index, person in enumerate(people.tolist()):
        own = training.conditions[training.people == person]
        draw = torch.randint(len(own), (1,), generator=generator_for(seed, CONDITION_STREAM, index))
        number = int(own[draw])
        found.append(training.condition_names[number] if by_name else number)
    return found
