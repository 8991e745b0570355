"""How like real windows generated ones are, each distance beside the one between real windows of different passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from LightningDiT.errors import LightningDiTError, import_package
from LightningDiT.metrics.copies import CopyRates, copy_rates
from LightningDiT.metrics.formulas import frechet_distance
from LightningDiT.metrics.scores import FIDELITY_PIN, NEIGHBOURHOOD, Score, proportion
from LightningDiT.radar.arrays import SCIPY_PIN
from LightningDiT.radar.level_images import Windows
from LightningDiT.seeds import generator_for
from LightningDiT.verdict.classifiers import BANDS, CHUNK, Recipe, SmallResidual, train_classifier
from LightningDiT.verdict.gait import Axes, Gait, measure
from LightningDiT.verdict.rows import Generated

Floats = NDArray[np.float64]
JUDGE_SEED = 990  # of the network whose features are compared; no trial has it
DRAW_STREAM = 6104


@dataclass(frozen=True)
class Quantity:
    """A measure of windows, whose distributions are compared.

    Attributes:
        title, chinese: in reports.
        values: from measures of N windows to numbers (K,): one of each window, or of each column of it.
        unit: from axes to the unit.
    """

    title: str
    chinese: str
    values: Callable[[Gait], Floats]
    unit: Callable[[Axes], str]


def _speed(axes: Axes) -> str:
    return axes.speed_unit


QUANTITIES = {
    "ridge": Quantity(
        "ridge: strongest speed of a column", "脊线：每列最强速度", lambda gait: gait.ridge.ravel(), _speed
    ),
    "upper": Quantity("upper envelope", "上包络", lambda gait: gait.upper.ravel(), _speed),
    "lower": Quantity("lower envelope", "下包络", lambda gait: gait.lower.ravel(), _speed),
    "fastest": Quantity("upper Doppler bound", "多普勒上界", lambda gait: gait.fastest, _speed),
    "slowest": Quantity("lower Doppler bound", "多普勒下界", lambda gait: gait.slowest, _speed),
    "cadence": Quantity("cadence of the steps", "步频", lambda gait: gait.cadence, lambda axes: axes.rate_unit),
    "texture": Quantity(
        "texture: standard deviation of the high pass",
        "纹理：高通标准差",
        lambda gait: gait.texture,
        lambda axes: "levels",
    ),
}


@dataclass(frozen=True)
class Distance:
    """The distance of generated windows to real training windows, beside that of real held-out windows.

    Attributes:
        quantity: of `QUANTITIES`.
        unit: of the distances.
        generated, real: Wasserstein-1 distances, means over the people.
        people: by number, both distances of that person.
        means: of the quantity in generated, held-out and training windows, means over the people.
        lacking: share of the generated windows, and of the real ones, that have no such number.
    """

    quantity: str
    unit: str
    generated: float
    real: float
    people: Mapping[int, tuple[float, float]]
    means: tuple[float, float, float]
    lacking: tuple[float, float]

    @property
    def ratio(self) -> float:
        """1: generated windows differ from training windows as real ones of other passes do."""
        return self.generated / self.real if self.real else float("inf" if self.generated else 1)


def gait_distances(
    generated: Generated, held_out: Windows, training: Windows, axes: Axes, seed: int = 0
) -> list[Distance]:
    """Return the distance of each quantity of `QUANTITIES`, person by person.

    Generated and held-out windows of a person are compared in equal numbers, drawn by `seed`, since a distance between
    samples falls with their number. People without windows in one of the three are left out.

    Raises:
        LightningDiTError: scipy is missing, or nobody has windows in all three.
    """
    wasserstein = import_package("scipy.stats", "distances of distributions", SCIPY_PIN).wasserstein_distance
    chosen = equal_numbers(generated.people, held_out.people, training.people, seed)
    if not chosen:
        raise LightningDiTError(
            "nobody has generated, held-out and training windows", "generate windows of the people of the split"
        )
    sets = [measure(part.pixels, axes, training.db_range) for part in (generated, held_out, training)]
    found = []
    for name, quantity in QUANTITIES.items():
        people: dict[int, tuple[float, float]] = {}
        means, lacking = [], []
        for person, rows in chosen.items():
            own = [quantity.values(_rows(gait, part)) for gait, part in zip(sets, rows, strict=True)]
            lacking.append([float(np.mean(~np.isfinite(values))) for values in own])
            made, held, known = (values[np.isfinite(values)] for values in own)
            if len(made) and len(held) and len(known):
                people[person] = float(wasserstein(made, known)), float(wasserstein(held, known))
                means.append([part.mean() for part in (made, held, known)])
        if people:
            both = np.mean(list(people.values()), 0)
            made, held, known = np.mean(means, 0).tolist()
            shares = np.mean(lacking, 0)
            without = float(shares[0]), float(shares[1:].mean())
            unit = quantity.unit(axes)
            found.append(Distance(name, unit, float(both[0]), float(both[1]), people, (made, held, known), without))
    return found


def _rows(gait: Gait, rows: Tensor) -> Gait:
    return Gait(**{name: getattr(gait, name)[rows.numpy()] for name in Gait.__dataclass_fields__})


def equal_numbers(
    generated: Tensor, held_out: Tensor, training: Tensor, seed: int = 0
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Return for each person in all three the rows of each set: as many generated as held-out ones, all training ones.

    Args:
        generated, held_out, training: (N,) the person of each window.
    """
    found = {}
    for person in training.unique().tolist():
        own = [torch.nonzero(people == person)[:, 0] for people in (generated, held_out, training)]
        count = min(len(rows) for rows in own[:2])
        if count:
            drawn = [
                rows[torch.randperm(len(rows), generator=generator_for(DRAW_STREAM, seed, person, at))[:count]]
                for at, rows in enumerate(own[:2])
            ]
            found[person] = drawn[0].sort().values, drawn[1].sort().values, own[2]
    return found


@dataclass(frozen=True)
class FeatureScores:
    """Scores in the features of a classifier of real training windows, of generated and of real held-out windows.

    Attributes:
        frechet: to the training windows.
        precision, recall: with training windows as the reference; None without torch-fidelity or with too few windows.
        windows: how many of each were compared.
    """

    frechet: tuple[float, float]
    precision: tuple[Score, Score] | None
    recall: tuple[Score, Score] | None
    windows: int


def feature_judge(training: Windows, recipe: Recipe | None = None) -> SmallResidual:
    """Return a classifier of real training windows whose features are compared; it neither selects nor reports."""
    recipe = recipe or Recipe()
    few = Recipe(steps=recipe.steps, batch=recipe.batch, looks=1)
    nothing = (training.pixels[:0], training.people[:0])
    classes = len(training.class_names)
    model = train_classifier(training.pixels, training.people, nothing, classes, few, JUDGE_SEED, True).model
    assert isinstance(model, SmallResidual)
    return model


@torch.no_grad()
def features_of(model: SmallResidual, pixels: Tensor) -> Tensor:
    """Return features (N, 256) of windows (N, 1, H, W) on the CPU: those of the last layer, averaged over Doppler.

    Without the average they would be more than most sets have windows, and a Frechet distance would take minutes.
    """
    device = next(model.parameters()).device
    parts = [model.features(part.to(device)).unflatten(1, (-1, BANDS)).mean(2) for part in pixels.split(CHUNK)]
    return torch.cat(parts).float().cpu()


def feature_scores(generated: Tensor, held_out: Tensor, training: Tensor) -> FeatureScores:
    """Return Frechet distance, precision and recall (Kynkaanniemi et al., arXiv 1904.06991) in features.

    With fewer windows than features a Frechet distance is far too large; that of equally many real windows, which
    stands beside it, is so too.

    Args:
        generated, held_out: (N, F), of one number of windows.
        training: (M, F).
    """
    pair = (generated, held_out)
    frechet = [frechet_distance(part, training) for part in pair]
    count = len(generated)
    try:
        from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
    except ImportError:
        return FeatureScores((frechet[0], frechet[1]), None, None, count)
    if min(count, len(training)) <= NEIGHBOURHOOD:
        return FeatureScores((frechet[0], frechet[1]), None, None, count)
    options = {"prc_neighborhood": NEIGHBOURHOOD, "save_cpu_ram": True, "verbose": False}
    shares = [prc_features_to_metric(part, training, **options) for part in pair]
    precision = [proportion(share[KEY_METRIC_PRECISION], count) for share in shares]
    recall = [proportion(share[KEY_METRIC_RECALL], len(training)) for share in shares]
    return FeatureScores((frechet[0], frechet[1]), (precision[0], precision[1]), (recall[0], recall[1]), count)


@dataclass(frozen=True)
class Fidelity:
    """All that is said about generated windows without training on them.

    Attributes:
        notes: the axes, and what could not be computed, in English and Chinese.
    """

    distances: Sequence[Distance]
    features: FeatureScores
    copies: CopyRates
    notes: Sequence[tuple[str, str]]


def fidelity(
    generated: Generated, held_out: Windows, training: Windows, axes: Axes, recipe: Recipe | None = None, seed: int = 0
) -> Fidelity:
    """Return distances, scores and shares of copies of generated windows.

    Args:
        held_out: real windows of passes that nothing was trained on.
        training: the real windows that the generator saw.

    Raises:
        LightningDiTError: see `gait_distances`.
    """
    distances = gait_distances(generated, held_out, training, axes, seed)
    chosen = equal_numbers(generated.people, held_out.people, training.people, seed)
    made, held, known = (torch.cat(rows) for rows in zip(*chosen.values(), strict=True))
    judge = feature_judge(training, recipe)
    parts = (generated.pixels[made], held_out.pixels[held], training.pixels[known])
    scores = feature_scores(*(features_of(judge, part) for part in parts))
    notes = [axes.note]
    if scores.precision is None:
        how = f"pip install {FIDELITY_PIN}"
        notes.append((f"precision and recall need torch-fidelity: {how}", f"精确率与召回率需要 torch-fidelity：{how}"))
    lacking = len(training.people.unique()) - len(chosen)
    if lacking:
        english = f"people without generated or held-out windows, who are left out: {lacking}"
        notes.append((english, f"没有生成窗口或留出窗口而未计入的人数：{lacking}"))
    return Fidelity(distances, scores, copy_rates(generated.pixels, held_out.pixels, training.pixels), notes)


def averaged(found: Sequence[Fidelity]) -> Fidelity:
    """Return the means over folds; of each person, over the folds that have a number; each note once."""
    if len(found) == 1:
        return found[0]
    names = [name for name in QUANTITIES if any(name == one.quantity for part in found for one in part.distances)]
    distances = [
        _mean_distance([one for part in found for one in part.distances if one.quantity == name]) for name in names
    ]
    scores = [part.features for part in found]
    features = FeatureScores(
        _pair([score.frechet for score in scores]),
        _mean_scores([score.precision for score in scores]),
        _mean_scores([score.recall for score in scores]),
        sum(score.windows for score in scores),
    )
    copies = CopyRates(*(float(np.mean([getattr(part.copies, name) for part in found])) for name in COPY_NUMBERS))
    return Fidelity(distances, features, copies, tuple(dict.fromkeys(note for part in found for note in part.notes)))


COPY_NUMBERS = ("samples", "held_out", "threshold")


def _pair(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    first, second = np.mean(pairs, 0).tolist()
    return first, second


def _mean_distance(found: Sequence[Distance]) -> Distance:
    people = {person: None for one in found for person in one.people}
    means = np.mean([one.means for one in found], 0).tolist()
    return Distance(
        found[0].quantity,
        found[0].unit,
        *_pair([(one.generated, one.real) for one in found]),
        {person: _pair([one.people[person] for one in found if person in one.people]) for person in people},
        (means[0], means[1], means[2]),
        _pair([one.lacking for one in found]),
    )


def _mean_scores(found: Sequence[tuple[Score, Score] | None]) -> tuple[Score, Score] | None:
    """Return the means of both scores without intervals, since folds share training windows; None if one is missing."""
    pairs = [pair for pair in found if pair]
    if len(pairs) < len(found):
        return None
    first, second = _pair([(pair[0].value, pair[1].value) for pair in pairs])
    return Score(first), Score(second)
