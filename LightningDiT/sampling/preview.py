"""How an image forms: the model's prediction of the finished image, step by step, as one strip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from LightningDiT.images import image_grid, save_png
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.sampling.views import views
from LightningDiT.seeds import generator_for
from LightningDiT.transport import draw_noise, sampling_times

SHOWN = 4  # images of a strip, one row each


class Preview:
    """Decodes the first images of a batch after every `every`-th step and after the last one; a pipeline's callback.

    On the linear path x_t = t x_1 + (1 - t) x_0 the velocity is x_1 - x_0, so the model predicts x_t + (1 - t) v as
    the data; v is the slope of the last step, which costs no evaluation. On other paths and for the SDE, whose steps
    hold noise of their own, the state itself is shown.

    Attributes:
        path: the file of the strip.
    """

    def __init__(self, every: int, path: Path) -> None:
        self.every, self.path = every, path
        self._panels: list[list[Image.Image]] = []  # one list of images per step shown
        self._times: list[float] = []

    def start(self, pipe: LightningDiTPipeline, seed: int, indices: Sequence[int]) -> None:
        """Show the first images of a batch, image k of which starts from the noise of (seed, indices[k])."""
        self.pipe = pipe
        sample, transport = pipe.config.sample, pipe.transport
        stochastic = sample.mode == "SDE"
        times = (0.0, 1.0) if stochastic else sampling_times(transport, 2, reverse=sample.reverse).tolist()
        self._start, self._end = times
        self._predicts = not stochastic and transport.path_type == "Linear"
        self._seeds = [(seed, index) for index in indices[:SHOWN]]

    def __call__(self, step: int, t: float, state: Tensor) -> None:
        """Keep the images of the state (N, C, h, w) that the solver reached at time t."""
        if self.is_complete:
            return
        count = min(SHOWN, len(state))
        if step == 0:  # also when a batch starts again, in halves or in float32
            self._panels, self._times = [], []
            noise = draw_noise((count, *self.pipe.latent_shape), [generator_for(*pair) for pair in self._seeds[:count]])
            self._t, self._state = self._start, noise.to(state)
        now = state[:count]
        shown = now + (1 - t) * (now - self._state) / (t - self._t) if self._predicts else now
        if (step + 1) % self.every == 0 or self._is_end(t):
            self._panels.append(views(self.pipe.tokenizer.decode(shown)))
            self._times.append(t)
        self._t, self._state = t, now.clone()

    @property
    def is_complete(self) -> bool:
        """Whether the strip has reached its end, with states that are not sampled again."""
        return bool(self._times) and self._is_end(self._times[-1]) and bool(self._state.isfinite().all())

    def save(self) -> None:
        """Write the strip, an image a row and a step a column."""
        images = [panel[row] for row in range(len(self._panels[0])) for panel in self._panels]
        captions = [f"t = {t:.2f}" for t in self._times] * len(self._panels[0])
        save_png(image_grid(images, captions, columns=len(self._panels)), self.path)

    def _is_end(self, t: float) -> bool:
        return abs(t - self._end) < 1e-6
