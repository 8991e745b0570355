"""Which weights of a run are kept: those of the best look at it, and when looks no longer get better.

A look is a row of the log that has what `train.choose` compares. The looks so far and the best weights are part of each
checkpoint, so a run that was stopped, killed or went back goes on with exactly what it knew at that step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from LightningDiT.config import Config, describe_guidance
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import write_text
from LightningDiT.metrics.copies import MOST_TIMES, CopyRates
from LightningDiT.training.ema import Ema

CHOICE_NAME, LAST_NAME = "choice.json", "last.safetensors"
CHOSEN = "chosen"  # key of the metadata of chosen weights: their step, and by what they were chosen
KEPT = ("utility", "judge_accuracy", "copies", "copies_real", "valid_loss")  # numbers of a look

Look = Mapping[str, float]


def by_loss(look: Look) -> tuple[float, ...]:
    """Return the rank of a look by its validation loss."""
    return (-look["valid_loss"],)


def by_utility(look: Look) -> tuple[float, ...]:
    """Return the rank of a look by its utility, if samples are copies at most twice as often as held-out windows.

    Looks with more copies come after all others, and those with the fewest copies first. Utility alone would choose
    copies too: they are real windows, and a classifier learns well from them.
    """
    if is_original(look):
        return (1.0, look["utility"], -look["copies"])
    return (0.0, -look["copies"], look["utility"])


def is_original(look: Look) -> bool:
    """Tell whether the samples of a look are copies at most twice as often as held-out windows."""
    return CopyRates(look["copies"], look["copies_real"], math.nan).passes


#: What each rule reads of a look, and the rank that it gives; of equal ranks the first look counts.
RULES: dict[str, tuple[tuple[str, ...], Callable[[Look], tuple[float, ...]]]] = {
    "valid_loss": (("valid_loss",), by_loss),
    "utility": (("utility", "copies", "copies_real"), by_utility),
}


class Choice:
    """The looks of a run, and the weights of the best one.

    Args:
        rule: of `RULES`.
        measured: how the numbers of a look are measured; looks of another measure are not compared.
        patience: looks without a better one after which the run ends; 0: never.

    Attributes:
        looks: by the number of steps done.
        best: number of steps of the best look, None before the first one.
        weights: averaged weights at that step, on the CPU.
    """

    def __init__(self, rule: str, measured: str, patience: int = 0) -> None:
        self.rule, self.measured, self.patience = rule, measured, patience
        self._needed, self._rank = RULES[rule]
        self.looks: dict[int, dict[str, float]] = {}
        self.best: int | None = None
        self.weights: dict[str, Tensor] = {}

    def see(self, row: Mapping[str, float], ema: Ema) -> bool:
        """Take a row of the log, which is a look if it has what the rule reads; return whether it is one.

        Looks whose numbers are not finite are not compared.
        """
        if not all(math.isfinite(row.get(name, math.nan)) for name in self._needed):
            return False
        step, look = int(row["step"]), {name: float(row[name]) for name in KEPT if name in row}
        self.looks[step] = look
        if self.best is None or self._rank(look) > self._rank(self.looks[self.best]):
            self.best = step
            self.weights = {name: value.detach().cpu().clone() for name, value in ema.weights.items()}
        return True

    @property
    def has_ended(self) -> bool:
        """Whether the run has had its patience's number of looks since the best one."""
        if not self.patience or self.best is None:
            return False
        return sum(step > self.best for step in self.looks) >= self.patience

    def text(self) -> str:
        """Return one line that says which weights are chosen, and why."""
        if self.best is None:
            return f"no look had a {self.rule}, so the last weights are kept"
        look = self.looks[self.best]
        if self.rule == "valid_loss":
            return f"weights of step {self.best} are kept: lowest valid_loss {look['valid_loss']:.4g}"
        copies = f"copies {look['copies']:.1%}, {look['copies_real']:.1%} of held-out windows"
        if is_original(look):
            return f"weights of step {self.best} are kept: best utility {look['utility']:.1%} ({copies})"
        return (
            f"weights of step {self.best} are kept, of the fewest copies: no look has at most {MOST_TIMES:g} times as"
            f" many as held-out windows ({copies}; utility {look['utility']:.1%})"
        )

    def ending(self) -> str:
        """Return one line that says why the run ends before its last step."""
        return f"{self.patience} looks without a better one than that of step {self.best} end the run (train.patience)"

    def metadata(self) -> dict[str, str]:
        """Return what the file of the chosen weights says of the choice."""
        return {CHOSEN: json.dumps({"step": self.best, "by": self.rule})}

    def save_looks(self, folder: Path) -> None:
        """Write all looks, and which is the best, into the folder of the run."""
        content = {
            "rule": self.rule,
            "measured": self.measured,
            "chosen": self.best,
            "text": self.text(),
            "ended_by_patience": self.has_ended,
            "looks": [{"step": step, **self.looks[step]} for step in sorted(self.looks)],
        }
        write_text(folder / CHOICE_NAME, json.dumps(content, indent=1) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values for a checkpoint."""
        return {
            "kind": {"rule": self.rule, "measured": self.measured},
            "looks": {str(step): dict(look) for step, look in self.looks.items()},
            "best": self.best,
            "weights": self.weights,
        }

    def load_state_dict(self, state: Mapping[str, Any], shapes: Mapping[str, Tensor]) -> str:
        """Restore what `state_dict` returned, and return a note if its looks do not count any longer.

        Args:
            shapes: the run's averaged weights, whose names and shapes the best ones must have.

        Raises:
            ValueError: an entry has another form.
        """
        self.looks, self.best, self.weights = {}, None, {}
        kind = {"rule": self.rule, "measured": self.measured}
        if not state:
            return ""  # the run began without a choice
        if state["kind"] != kind:
            return f"earlier looks were by other settings and do not count ({_short(state['kind'])})"
        looks = {int(step): {name: float(look[name]) for name in look} for step, look in state["looks"].items()}
        best, weights = state["best"], state["weights"]
        if best is not None:
            if best not in looks or any(name not in looks[best] for name in self._needed):
                raise ValueError(f"the best look {best!r:.40} is none of the looks")
            if _forms(weights) != _forms(shapes):
                raise ValueError("the chosen weights have other tensors than the run")
        self.looks, self.best = looks, best
        self.weights = {name: value.clone() for name, value in weights.items()}
        return ""


def _forms(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}


def _short(kind: Mapping[str, Any]) -> str:
    return f"{kind.get('rule')!s:.20}, {kind.get('measured')!s:.80}"


def choice_of(config: Config) -> Choice | None:
    """Return how a run chooses its weights, None where it keeps the last ones.

    Raises:
        LightningDiTError: nothing measures what `train.choose` compares.
    """
    train = config.train
    rule = train.choose
    if rule == "auto":
        rule = "utility" if train.judge_every else "last"
    if rule == "last":
        return None
    every = "judge_every" if rule == "utility" else "valid_every"
    if not getattr(train, every):
        raise LightningDiTError(
            f"{config.source}: train.choose is {rule}, and train.{every} is 0, so that nothing measures it",
            f"set train.{every}: 100",
        )
    if rule == "utility":
        measured = f"{train.judge_samples} samples of each class, guidance {describe_guidance(config.sample)}"
    else:
        measured = f"at most {train.valid_samples} latents"
    return Choice(rule, measured, train.patience)
