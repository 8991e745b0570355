"""The scores of a set of generated images: by torch-fidelity, with the interval that each has."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from LightningDiT.console import Progress
from LightningDiT.device import best_device
from LightningDiT.metrics.cache import digest, kept, kept_values
from LightningDiT.metrics.extractors import Views
from LightningDiT.metrics.formulas import FrechetDistance, moments
from LightningDiT.metrics.sources import Moments
from LightningDiT.seeds import generator_for

NEIGHBOURHOOD = 3  # k of precision and recall (Kynkaanniemi et al., arXiv 1904.06991, and ADM)
SPLITS = 10  # of the Inception Score (Salimans et al., arXiv 1606.03498)
LEVEL = 0.95  # share of resamples that an interval holds
NORMAL_QUANTILE = 1.959963984540054  # of (1 + LEVEL) / 2
FEW = 10_000  # images below which distances are said to be biased
FRECHET = {"fid": "features", "sfid": "spatial"}  # score -> the view that it compares
#: Scores in the order of the report, with what they are called.
TITLES = {
    "fid": "Frechet distance (FID)",
    "frechet_distance": "Frechet distance",
    "sfid": "spatial Frechet distance (sFID)",
    "inception_score": "Inception Score",
    "classifier_score": "score of the classifier, as IS",
    "precision": "precision",
    "recall": "recall",
}
#: What those are called that bear the name of Inception, where the network is another one.
OF_OTHER_NETWORKS = {"fid": "frechet_distance", "inception_score": "classifier_score"}

Resampled = Callable[[Tensor], float]  # indices (N,) of images, repeated ones among them -> score


@dataclass(frozen=True)
class Score:
    """A figure with the interval that holds it.

    Attributes:
        value: over all images.
        low, high: ends of the interval; None where there is none.
        bias: what the resamples lie above the value in the mean; None where nothing was resampled.
    """

    value: float
    low: float | None = None
    high: float | None = None
    bias: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        samples: views of the generated images.
        reference: views of the real images; None where there are statistics alone.
        moments: statistics of the reference, which stand in for those of its images.
        network: the extractor's name; FID and Inception Score have other names where it is not `inception`.
        key: a text that changes with any of these.
    """

    network: str
    samples: Views
    reference: Views | None
    moments: Moments
    key: str


@dataclass(frozen=True)
class Bootstrap:
    """How often the generated images are drawn again, from which seed, and where the values are kept."""

    resamples: int
    seed: int
    folder: Path


def scores_of(comparison: Comparison, bootstrap: Bootstrap) -> dict[str, Score]:
    """Return every score that the views allow, in the order of `TITLES`.

    FID, sFID and the Inception Score have a bootstrap interval (see `bootstrap_score`), for which the generated
    images are drawn again and the reference stays; precision and recall are shares of images and have Wilson's.
    """
    file = bootstrap.folder / f"scores-{digest(comparison.key, NEIGHBOURHOOD, SPLITS)}.json"
    values: dict[str, float] = kept(file, lambda: _values(comparison), dict)
    resampled = {**_distances(comparison, values), **_inception_scores(comparison, values)}
    counts = {"precision": len(comparison.samples["features"]), "recall": _count(comparison.reference)}
    result = {name: proportion(values[name], counts[name]) for name in counts if name in values}
    drawn = _resampled(comparison, resampled, bootstrap) if bootstrap.resamples else {}
    result |= {name: bootstrap_score(values[name], drawn.get(name, [])) for name in resampled}
    names = {} if comparison.network == "inception" else OF_OTHER_NETWORKS
    named = {names.get(name, name): score for name, score in result.items()}
    return {name: named[name] for name in TITLES if name in named}


def _resampled(comparison: Comparison, scores: Mapping[str, Resampled], bootstrap: Bootstrap) -> dict[str, list[float]]:
    """Return the values of every score in all resamples, which are kept one by one."""
    count = len(comparison.samples["features"])
    progress = Progress(bootstrap.resamples * len(scores), "resample")
    key = digest(comparison.key, bootstrap.seed, SPLITS)
    try:
        return {
            name: kept_values(
                bootstrap.folder / f"resamples-{name}-{key}.json",
                bootstrap.resamples,
                _redrawn(score, count, bootstrap.seed),
                progress,
            )
            for name, score in scores.items()
        }
    finally:
        progress.close()


def bootstrap_score(value: float, resampled: Sequence[float]) -> Score:
    """Return `value` with the interval of the values that resampled images gave.

    A resample has fewer different images than the set, and a Frechet distance of fewer images is larger in the mean:
    the resamples lie above the value, by about what the value itself lies above that of infinitely many images. That
    shift is the bias (the Inception Score has a small one, of either sign); the interval is that of the resamples
    moved back by it, so that it shows what the choice of images moves and lies around the value.
    """
    if len(resampled) < 2:
        return Score(value)
    draws = np.asarray(resampled)
    bias = float(draws.mean() - value)
    low, high = (float(end) - bias for end in np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Score(value, max(0.0, low), high, bias)


def proportion(share: float, count: int) -> Score:
    """Return a share of `count` images with its score interval (Wilson, 1927), which holds at 0 and at 1 too.

    For precision and recall it covers which images were drawn to be counted, the neighbourhoods held fixed.
    """
    square = NORMAL_QUANTILE**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = NORMAL_QUANTILE * math.sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    return Score(share, max(0.0, centre - half), min(1.0, centre + half))


def reference_moments(comparison: Comparison, view: str) -> tuple[Tensor, Tensor] | None:
    """Return mean and covariance that a view is compared with: the given ones, else those of the reference's images."""
    if view in comparison.moments:
        return comparison.moments[view]
    if comparison.reference is None or view not in comparison.reference or _count(comparison.reference) < 2:
        return None
    return moments(comparison.reference[view])


def _count(views: Views | None) -> int:
    return len(views["features"]) if views else 0


def _values(comparison: Comparison) -> dict[str, float]:
    """Return the scores over all images: by torch-fidelity's own functions, and sFID, which it does not have."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    samples, reference = comparison.samples, comparison.reference
    found: dict[str, float] = {}
    known = reference_moments(comparison, FRECHET["fid"])
    if known is not None:
        sides = [{"mu": mean.numpy(), "sigma": cov.numpy()} for mean, cov in (moments(samples["features"]), known)]
        found["fid"] = max(fid_statistics_to_metric(*sides, verbose=False)[KEY_METRIC_FID], 0.0)
    known = reference_moments(comparison, FRECHET["sfid"])
    if known is not None and FRECHET["sfid"] in samples:
        found["sfid"] = FrechetDistance(*known)(*moments(samples[FRECHET["sfid"]]))
    if "logits" in samples and len(samples["logits"]) >= SPLITS:
        found["inception_score"] = isc_features_to_metric(samples["logits"], SPLITS)[KEY_METRIC_ISC_MEAN]
    if reference and min(_count(samples), _count(reference)) > NEIGHBOURHOOD:
        options = {"prc_neighborhood": NEIGHBOURHOOD, "save_cpu_ram": True, "verbose": False}
        shares = prc_features_to_metric(samples["features"], reference["features"], **options)
        found |= {"precision": shares[KEY_METRIC_PRECISION], "recall": shares[KEY_METRIC_RECALL]}
    return found


def _redrawn(score: Resampled, count: int, seed: int) -> Callable[[int], float]:
    """Return number of a resample -> its score; every resample has a generator of its own."""
    return lambda number: score(torch.randint(count, (count,), generator=generator_for(seed, number)))


def _distances(comparison: Comparison, values: dict[str, float]) -> dict[str, Resampled]:
    """Return a function for each Frechet distance there is, which prepares itself when it is called first."""
    names = [name for name in FRECHET if name in values]
    prepared = {name: functools.cache(functools.partial(_prepared, comparison, FRECHET[name])) for name in names}
    return {name: lambda drawn, name=name: prepared[name]()(drawn) for name in names}


def _prepared(comparison: Comparison, view: str) -> Resampled:
    """Return a function from indices to a distance, for which the root of the reference's covariance is taken once."""
    known = reference_moments(comparison, view)
    if known is None:
        raise ValueError(f"nothing to compare {view} with")
    device = best_device()
    distance = FrechetDistance(*(part.to(device) for part in known))
    return distance_of(comparison.samples[view].to(device).double(), distance)


def distance_of(features: Tensor, distance: FrechetDistance) -> Resampled:
    """Return a function from indices to the distance of those rows of features (N, F) float64."""

    def score(drawn: Tensor) -> float:
        weights = torch.bincount(drawn, minlength=len(features)).to(features.device)
        return distance(*moments(features, weights))

    return score


def _inception_scores(comparison: Comparison, values: dict[str, float]) -> dict[str, Resampled]:
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    if "inception_score" not in values:
        return {}
    logits = comparison.samples["logits"]
    return {"inception_score": lambda drawn: isc_features_to_metric(logits[drawn], SPLITS)[KEY_METRIC_ISC_MEAN]}
