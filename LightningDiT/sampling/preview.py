"""How an image forms: the model's prediction of the finished image, step by step, as one strip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from LightningDiT.files import check_target, holding
from LightningDiT.images import image_grid, save_png
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.sampling.views import views
from LightningDiT.seeds import generator_for
from LightningDiT.transport import draw_noise, sampling_times

SHOWN = 4  # images of a strip, one row each
MARK = "LightningDiT preview"
MANIFEST = "manifest.json"  # of a run


class Predictions:
    """What the model predicts as the finished latents of some images at each step of the solver.

    On the linear path x_t = t x_1 + (1 - t) x_0 the velocity is x_1 - x_0, so the model predicts x_t + (1 - t) v as
    the data; v is the slope of the last step, which costs no evaluation. On other paths and for the SDE, whose steps
    hold noise of their own, the state itself is shown.

    Args:
        indices: image k starts from the noise of (seed, indices[k]).

    Attributes:
        state: the last one seen, of these images.
    """

    def __init__(self, pipe: LightningDiTPipeline, seed: int, indices: Sequence[int]) -> None:
        self._shape = pipe.latent_shape
        sample, transport = pipe.config.sample, pipe.transport
        stochastic = sample.mode == "SDE"
        times = (0.0, 1.0) if stochastic else sampling_times(transport, 2, reverse=sample.reverse).tolist()
        self._start, self._end = times
        self._predicts = not stochastic and transport.path_type == "Linear"
        self._seeds = [(seed, index) for index in indices]

    def at(self, step: int, t: float, state: Tensor) -> Tensor:
        """Return the prediction (M, C, h, w) of the first M images at a state (N, C, h, w) that was reached at t."""
        count = min(len(self._seeds), len(state))
        if step == 0:  # also when a batch starts again, in halves or in float32
            noise = draw_noise((count, *self._shape), [generator_for(*pair) for pair in self._seeds[:count]])
            self._t, self.state = self._start, noise.to(state)
        now = state[:count]
        shown = now + (1 - t) * (now - self.state) / (t - self._t) if self._predicts else now
        self._t, self.state = t, now.clone()
        return shown

    def is_end(self, t: float) -> bool:
        """Return whether the solver ends at t."""
        return abs(t - self._end) < 1e-6


def check_preview(path: Path, run_of_it: Path, manifests: str = MANIFEST) -> None:
    """Raise LightningDiTError if the strip would replace a file that no preview wrote.

    Strips of earlier releases have no mark, and are known by their run.

    Args:
        run_of_it: folder of the run; manifests: a pattern for its manifest.
    """
    check_target(path, lambda file: holding(MARK)(file) or any(run_of_it.glob(manifests)))


class Preview:
    """Decodes the first images of a batch after every `every`-th step and after the last one; a pipeline's callback.

    Attributes:
        path: the file of the strip.
    """

    def __init__(self, every: int, path: Path) -> None:
        self.every, self.path = every, path
        self._panels: list[list[Image.Image]] = []  # one list of images per step shown
        self._times: list[float] = []

    def start(self, pipe: LightningDiTPipeline, seed: int, indices: Sequence[int]) -> None:
        """Show the first images of a batch, image k of which starts from the noise of (seed, indices[k])."""
        self.pipe, self._predictions = pipe, Predictions(pipe, seed, indices[:SHOWN])

    def __call__(self, step: int, t: float, state: Tensor) -> None:
        """Keep the images of the state (N, C, h, w) that the solver reached at time t."""
        if self.is_complete:
            return
        if step == 0:
            self._panels, self._times = [], []
        shown = self._predictions.at(step, t, state)
        if (step + 1) % self.every == 0 or self._predictions.is_end(t):
            self._panels.append(views(self.pipe.tokenizer.decode(shown)))
            self._times.append(t)

    @property
    def is_complete(self) -> bool:
        """Whether the strip has reached its end, with states that are not sampled again."""
        ended = bool(self._times) and self._predictions.is_end(self._times[-1])
        return ended and bool(self._predictions.state.isfinite().all())

    def save(self) -> None:
        """Write the strip, an image a row and a step a column."""
        images = [panel[row] for row in range(len(self._panels[0])) for panel in self._panels]
        captions = [f"t = {t:.2f}" for t in self._times] * len(self._panels[0])
        save_png(image_grid(images, captions, columns=len(self._panels)), self.path, MARK)
