"""How evenly latents are spread over directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 2.0  # t of the paper


def uniformity(points: Tensor) -> float:
    """Return `log E exp(-t |x - y|^2)` over all pairs of points on the unit sphere, t = 2.

    Wang and Isola, arXiv 2005.10242, equation for L_uniform: 0 where all points coincide, and the lower, the more
    evenly they lie. It stands in for the density of a t-SNE picture that the VA-VAE paper measures, which depends on
    how the picture was made.

    Args:
        points: (N, D), N at least 2, scaled to length 1 here; memory grows with N^2.
    """
    unit = F.normalize(points.double(), dim=1)  # (N, D)
    squares = 2.0 - 2.0 * unit @ unit.T  # (N, N)
    above = torch.ones_like(squares).triu(1).bool()
    exponents = -TEMPERATURE * squares[above]  # (N (N - 1) / 2,)
    return float(torch.logsumexp(exponents, 0)) - math.log(len(exponents))
