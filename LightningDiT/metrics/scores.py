"""The scores of a set of generated images by torch-fidelity, each with its interval."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from LightningDiT.console import Progress
from LightningDiT.device import best_device
from LightningDiT.metrics.cache import cached, cached_list, digest
from LightningDiT.metrics.extractors import INCEPTION, Activations
from LightningDiT.metrics.formulas import FrechetDistance, moments
from LightningDiT.metrics.sources import Moments
from LightningDiT.seeds import generator_for

FIDELITY_PIN = "torch-fidelity==0.4.0"
NEIGHBOURHOOD = 3  # k of precision and recall (Kynkaanniemi et al., arXiv 1904.06991, and ADM)
SPLITS = 10  # of the Inception Score (Salimans et al., arXiv 1606.03498)
LEVEL = 0.95  # confidence level of the intervals
NORMAL_QUANTILE = NormalDist().inv_cdf((1 + LEVEL) / 2)
FEW = 10_000  # with fewer images a Frechet distance is noticeably biased
FRECHET = {"fid": "features", "sfid": "spatial"}  # score -> its activations
#: Scores in the order of the report, with their titles.
TITLES = {
    "fid": "Frechet distance (FID)",
    "frechet_distance": "Frechet distance",
    "sfid": "spatial Frechet distance (sFID)",
    "inception_score": "Inception Score",
    "classifier_score": "score of the classifier, as IS",
    "precision": "precision",
    "recall": "recall",
}
#: Names of the scores that bear Inception's name, if another network computes them.
OF_OTHER_NETWORKS = {"fid": "frechet_distance", "inception_score": "classifier_score"}

Resampled = Callable[[Tensor], float]  # indices (N,) of images, with repetitions -> score


@dataclass(frozen=True)
class Score:
    """A score and its interval.

    Attributes:
        value: over all images.
        low, high: ends of the interval; None: there is none.
        bias: mean of the resamples minus the value; None: nothing was resampled.
    """

    value: float
    low: float | None = None
    high: float | None = None
    bias: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Generated images and the reference that they are compared with.

    Attributes:
        network: the extractor's name.
        samples: activations of the generated images.
        reference: activations of the real images; None: only moments are known.
        moments: given statistics of the reference, which replace those of its activations.
        key: text that changes with the attributes above.
    """

    network: str
    samples: Activations
    reference: Activations | None
    moments: Moments
    key: str


@dataclass(frozen=True)
class Bootstrap:
    """Resampling of the generated images.

    Attributes:
        resamples: number of resamples; 0: none.
        folder: where scores are cached.
    """

    resamples: int
    seed: int
    folder: Path


def scores_of(comparison: Comparison, bootstrap: Bootstrap) -> dict[str, Score]:
    """Return every score that the activations allow, in the order of `TITLES`.

    FID, sFID and the Inception Score have a bootstrap interval, see `bootstrap_score`: the generated images are
    resampled, the reference stays. Precision and recall are shares of images and have Wilson's interval.
    """
    file = bootstrap.folder / f"scores-{digest(comparison.key, NEIGHBOURHOOD, SPLITS)}.json"
    values: dict[str, float] = cached(file, lambda: _values(comparison), dict)
    counts = {"precision": _count(comparison.samples), "recall": _count(comparison.reference)}
    result = {name: proportion(values[name], counts[name]) for name in counts if name in values}
    resampled = {name: _resampled(comparison, name) for name in (*FRECHET, "inception_score") if name in values}
    drawn = _resamples(comparison, resampled, bootstrap) if bootstrap.resamples else {}
    result |= {name: bootstrap_score(values[name], drawn.get(name, [])) for name in resampled}
    names = {} if comparison.network == INCEPTION else OF_OTHER_NETWORKS
    named = {names.get(name, name): score for name, score in result.items()}
    return {name: named[name] for name in TITLES if name in named}


def bootstrap_score(value: float, resampled: Sequence[float]) -> Score:
    """Return `value` with the interval of the resamples' values.

    A resample has fewer different images than the set, and fewer images give a larger Frechet distance. The resamples
    therefore lie above the value, by about as much as the value lies above that of infinitely many images. This shift
    is the bias; that of the Inception Score is small and of either sign. The interval is that of the resamples, moved
    back by the bias, so that it surrounds the value and shows the effect of the choice of images alone.
    """
    if len(resampled) < 2:
        return Score(value)
    draws = np.asarray(resampled)
    bias = float(draws.mean() - value)
    low, high = (float(end) - bias for end in np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Score(value, max(0.0, low), high, bias)


def proportion(share: float, count: int) -> Score:
    """Return a share of `count` images with its score interval (Wilson, 1927), which holds at 0 and 1 too.

    For precision and recall it covers the choice of the counted images, with fixed neighbourhoods.
    """
    square = NORMAL_QUANTILE**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = NORMAL_QUANTILE * math.sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    # at 0 and 1 an end is exact, and rounding would print it as 2.8e-17
    return Score(share, centre - half if share > 0 else 0.0, centre + half if share < 1 else 1.0)


def distance_of(features: Tensor, distance: FrechetDistance) -> Resampled:
    """Return a function from indices to the distance of those rows of features (N, F) float64."""

    def score(drawn: Tensor) -> float:
        weights = torch.bincount(drawn, minlength=len(features)).to(features.device)
        return distance(*moments(features, weights))

    return score


def _values(comparison: Comparison) -> dict[str, float]:
    """Return the scores over all images, by torch-fidelity except for sFID, which it lacks."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    samples, reference = comparison.samples, comparison.reference
    found: dict[str, float] = {}
    if known := _reference_moments(comparison, "features"):
        sides = [{"mu": mean.numpy(), "sigma": cov.numpy()} for mean, cov in (moments(samples["features"]), known)]
        found["fid"] = max(fid_statistics_to_metric(*sides, verbose=False)[KEY_METRIC_FID], 0.0)
    if "spatial" in samples and (known := _reference_moments(comparison, "spatial")):
        found["sfid"] = FrechetDistance(*known)(*moments(samples["spatial"]))
    if "logits" in samples and len(samples["logits"]) >= SPLITS:
        found["inception_score"] = _inception_score(samples["logits"])
    if reference and min(_count(samples), _count(reference)) > NEIGHBOURHOOD:
        options = {"prc_neighborhood": NEIGHBOURHOOD, "save_cpu_ram": True, "verbose": False}
        shares = prc_features_to_metric(samples["features"], reference["features"], **options)
        found |= {"precision": shares[KEY_METRIC_PRECISION], "recall": shares[KEY_METRIC_RECALL]}
    return found


def _inception_score(logits: Tensor) -> float:
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    return isc_features_to_metric(logits, SPLITS)[KEY_METRIC_ISC_MEAN]


def _reference_moments(comparison: Comparison, kind: str) -> tuple[Tensor, Tensor] | None:
    """Return mean and covariance of the reference's activations of one kind: the given ones, else computed ones."""
    if kind in comparison.moments:
        return comparison.moments[kind]
    if comparison.reference is None or kind not in comparison.reference or _count(comparison.reference) < 2:
        return None
    return moments(comparison.reference[kind])


def _count(activations: Activations | None) -> int:
    return len(activations["features"]) if activations else 0


def _resamples(comparison: Comparison, scores: Mapping[str, Resampled], bootstrap: Bootstrap) -> dict[str, list[float]]:
    """Return the values of each score in all resamples, cached one by one; each resample has its own generator."""
    count = _count(comparison.samples)
    key = digest(comparison.key, bootstrap.seed, SPLITS)

    def value(score: Resampled, number: int) -> float:
        return score(torch.randint(count, (count,), generator=generator_for(bootstrap.seed, number)))

    with Progress(bootstrap.resamples * len(scores), "resample") as progress:
        return {
            name: cached_list(
                bootstrap.folder / f"resamples-{name}-{key}.json",
                bootstrap.resamples,
                functools.partial(value, score),
                progress,
            )
            for name, score in scores.items()
        }


def _resampled(comparison: Comparison, name: str) -> Resampled:
    """Return the score `name` as a function of indices; it prepares the reference at the first call."""
    if name == "inception_score":
        return lambda drawn: _inception_score(comparison.samples["logits"][drawn])

    @functools.cache
    def prepared() -> Resampled:
        known = _reference_moments(comparison, FRECHET[name])
        assert known is not None  # else there is no score to resample
        device = best_device()
        distance = FrechetDistance(*(part.to(device) for part in known))
        return distance_of(comparison.samples[FRECHET[name]].to(device).double(), distance)

    return lambda drawn: prepared()(drawn)
