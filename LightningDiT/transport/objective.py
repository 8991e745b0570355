"""What a transport model is trained on: times, noisy states, and the loss of its prediction.

Losses follow Ma et al., "SiT" (2024), section 2 and Song et al., "Maximum Likelihood Training of
Score-Based Diffusion Models" (2021); the cosine term and the logit-normal times follow Yao et
al., "Reconstruction vs. Generation" (LightningDiT, 2025) and Esser et al. (2024).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .path import PATHS, Path, check_choice, expand_time

#: A network: model(x (N, ...), t (N,), **kwargs) -> prediction of the shape of x.
Model = Callable[..., Tensor]

PREDICTIONS = ("velocity", "noise", "score")

#: Weight of the squared error by path and time (N, 1, ...), for noise and score predictions.
LOSS_WEIGHTS: dict[str | None, Callable[[Path, Tensor], Tensor]] = {
    None: lambda path, t: torch.ones_like(t),
    "velocity": lambda path, t: (path.score_weight(t) / path.sigma(t)) ** 2,
    "likelihood": lambda path, t: path.score_weight(t) / path.sigma(t) ** 2,
}

#: Distance that an SDE keeps from t = 1, where the score is singular, and from t = 0, where SBDM's rate is;
#: used if `sample_eps` is 0.
SDE_EPS = 1e-3

#: Least length in the cosine. Without it a model that starts at zero has gradients of 1e7 in its first step, which
#: overflow fp16 and stay in Adam's second moment for hundreds of steps. Velocities are 100 times longer.
COSINE_EPS = 1e-2


def _mean_per_sample(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)  # (N, ...) -> (N,)


@dataclass(frozen=True)
class Transport:
    """The settings of one transport, checked at construction; holds no tensors.

    Raises:
        ValueError: a setting has a value that is not among its choices.
    """

    path_type: str = "Linear"  # Linear, GVP or VP
    prediction: str = "velocity"  # what the network's output is: velocity, noise or score
    loss_weight: str | None = None  # None, velocity or likelihood; for noise and score only
    train_eps: float = 0.0  # distance of training times from the singular ends
    sample_eps: float = 0.0  # the same for sampling
    use_cosine_loss: bool = False  # report the cosine distance to the velocity beside the loss
    use_lognorm: bool = False  # logit-normal instead of uniform training times

    def __post_init__(self) -> None:
        check_choice("path_type", self.path_type, PATHS)
        check_choice("prediction", self.prediction, PREDICTIONS)
        if self.loss_weight is not None:
            check_choice("loss_weight", self.loss_weight, ("velocity", "likelihood"))
        for name in ("train_eps", "sample_eps"):
            value = getattr(self, name)
            if not 0 <= value < 0.5:
                raise ValueError(f"{name}={value!r} is out of range, expected 0 <= {name} < 0.5")

    @property
    def path(self) -> Path:
        """The path that `path_type` names."""
        return PATHS[self.path_type]

    def interval(
        self,
        eps: float,
        *,
        sde: bool = False,
        diffusion_form: str = "SBDM",
        last_step_size: float = 0.0,
    ) -> tuple[float, float]:
        """Return the first and last time at which the model may be evaluated (SiT's check_interval).

        `last_step_size` is the time that an SDE leaves for its noiseless last step (0: there is none).
        """
        t0, t1 = 0.0, 1.0
        if sde and eps == 0:
            eps = SDE_EPS
        end = 1 - (last_step_size if sde and last_step_size > 0 else eps)
        if self.path_type == "VP":
            t1 = end
        elif self.prediction != "velocity" or sde:
            starts_singular = self.prediction != "velocity" or diffusion_form == "SBDM"
            t0, t1 = (eps if starts_singular else 0.0), end
        return t0, t1

    def sample_times(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw training times (n,) in [t0, t1], uniform or logit-normal, in float32."""
        t0, t1 = self.interval(self.train_eps)
        device = generator.device if generator is not None else "cpu"
        if self.use_lognorm:
            unit = torch.sigmoid(torch.randn(n, generator=generator, device=device))
        else:
            unit = torch.rand(n, generator=generator, device=device)
        return t0 + (t1 - t0) * unit

    def training_losses(
        self,
        model: Model,
        x1: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        x0: Tensor | None = None,
        t: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the model's losses on data `x1` (N, C, ...).

        Args:
            model: called as model(x_t, t, **model_kwargs).
            generator: draws the times and the noise that are not given.
            x0: noise of the shape of x1; t: times (N,).

        Returns:
            ``loss`` (N,), the mean squared error; ``pred``, the model's output; and with
            `use_cosine_loss` also ``cos_loss`` (N,), 1 - cosine over channels. LightningDiT
            trains on the mean of loss + cos_loss.
        """
        if t is None:
            t = self.sample_times(x1.shape[0], generator)
        if x0 is None:
            device = generator.device if generator is not None else x1.device
            x0 = torch.randn(x1.shape, generator=generator, device=device)
        t, x0 = t.to(x1.device), x0.to(x1)
        x_t, u_t = self.path.plan(t, x0, x1)
        pred = _checked(model(x_t, t, **(model_kwargs or {})), x_t)
        terms = {"pred": pred, "loss": _mean_per_sample(self._squared_error(pred, x0, u_t, t))}
        if self.use_cosine_loss and self.prediction == "velocity":
            cosine = F.cosine_similarity(pred.to(u_t.dtype), u_t, dim=1, eps=COSINE_EPS)  # (N, H, W)
            terms["cos_loss"] = _mean_per_sample(1 - cosine)
        return terms

    def _squared_error(self, pred: Tensor, x0: Tensor, u_t: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "velocity":
            return (pred - u_t) ** 2
        t = expand_time(t, pred)
        weight = LOSS_WEIGHTS[self.loss_weight](self.path, t)  # (N, 1, ...)
        if self.prediction == "noise":
            return weight * (pred - x0) ** 2
        # The score of x_t given x_1 is -x_0 / sigma: scaled so, its error is one in the noise.
        return weight * (pred * self.path.sigma(t) + x0) ** 2

    def velocity(self, model: Model, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """Return the velocity (N, ...) of the probability-flow ODE at states x and times (N,)."""
        out = _checked(model(x, t, **kwargs), x)
        if self.prediction == "score":
            return self.path.velocity_from_score(out, x, t)
        if self.prediction == "noise":
            return self.path.velocity_from_noise(out, x, t)
        return out

    def velocity_and_score(self, model: Model, x: Tensor, t: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return velocity and score at (x, t) from one evaluation of the model."""
        out = _checked(model(x, t, **kwargs), x)
        if self.prediction == "velocity":
            return out, self.path.score_from_velocity(out, x, t)
        score = out if self.prediction == "score" else self.path.score_from_noise(out, t)
        return self.path.velocity_from_score(score, x, t), score


def _checked(out: Tensor, x: Tensor) -> Tensor:
    if out.shape != x.shape:
        raise ValueError(f"the model returned shape {tuple(out.shape)}, expected that of its input, {tuple(x.shape)}")
    return out


def create_transport(
    path_type: str = "Linear",
    prediction: str = "velocity",
    loss_weight: str | None = None,
    train_eps: float | None = None,
    sample_eps: float | None = None,
    use_cosine_loss: bool = False,
    use_lognorm: bool = False,
    warn: Callable[[str], None] = lambda text: warnings.warn(text, stacklevel=3),
) -> Transport:
    """Return a `Transport`; an eps of None becomes the published value of its path.

    That is 1e-5 (training) and 1e-3 (sampling) for VP, 1e-3 for noise and score predictions, else 0.

    Args:
        warn: called with a text for each setting that has no effect; by default a warning at the caller's line.

    Raises:
        ValueError: a setting has a value that is not among its choices.
    """
    if isinstance(loss_weight, str) and loss_weight.lower() == "none":
        loss_weight = None
    train_default = sample_default = 0.0
    if path_type == "VP":
        train_default, sample_default = 1e-5, 1e-3
    elif prediction != "velocity":
        train_default = sample_default = 1e-3
    if prediction == "velocity" and loss_weight == "likelihood":
        warn("loss_weight is not used with prediction='velocity'")
    if prediction != "velocity" and use_cosine_loss:
        warn("use_cosine_loss is used with prediction='velocity' only")
    return Transport(
        path_type=path_type,
        prediction=prediction,
        loss_weight=loss_weight,
        train_eps=train_default if train_eps is None else float(train_eps),
        sample_eps=sample_default if sample_eps is None else float(sample_eps),
        use_cosine_loss=use_cosine_loss,
        use_lognorm=use_lognorm,
    )
