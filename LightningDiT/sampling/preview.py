"""How a picture forms: what the model takes the finished image for, step by step, as one strip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from LightningDiT.images import image_grid, save_png, to_pil, to_uint8
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.seeds import generator_for
from LightningDiT.transport import Sampler, draw_noise

SHOWN = 4  # images of a strip, one row each


class Preview:
    """Decodes a batch on its way, for its first images; a callback of the pipeline.

    On the linear path x_t = t x_1 + (1 - t) x_0 the velocity is x_1 - x_0, so that x_t + (1 - t) v is what the
    model takes the data for; v is the slope of the step that was just done, which costs no evaluation. On other
    paths and for the SDE, whose steps hold noise of their own, the state itself is shown.
    """

    def __init__(self, pipe: LightningDiTPipeline, every: int, seed: int, indices: Sequence[int]) -> None:
        """Show every `every`-th step and the last one of the images `indices`, of which the first few count."""
        self.pipe, self.every = pipe, every
        sample, transport = pipe.config.sample, pipe.transport
        stochastic = sample.mode == "SDE"
        times = (0.0, 1.0) if stochastic else Sampler(transport).times(2, reverse=sample.reverse).tolist()
        self._start, self._end = times
        self._predicts = not stochastic and pipe.config.transport.path_type == "Linear"
        self._seeds = [(seed, index) for index in indices[:SHOWN]]
        self._panels: list[list[Image.Image]] = []  # one list of pictures per step shown
        self._times: list[float] = []

    def __call__(self, step: int, t: float, state: Tensor) -> None:
        """Keep the picture of the state (N, C, h, w) that the solver reached at time t."""
        if self.whole:
            return
        count = min(SHOWN, len(state))
        if step == 0:  # also where a batch begins again, in halves or in float32
            self._panels, self._times = [], []
            self._t, self._state = self._start, self._noise(count).to(state)
        now = state[:count]
        shown = now + (1 - t) * (now - self._state) / (t - self._t) if self._predicts else now
        if (step + 1) % self.every == 0 or self._is_end(t):
            self._panels.append(to_pil(to_uint8(self.pipe.tokenizer.decode(shown)).cpu().numpy()))
            self._times.append(t)
        self._t, self._state = t, now.clone()

    @property
    def whole(self) -> bool:
        """Whether the strip has come to its end, with states that are not made again."""
        return bool(self._times) and self._is_end(self._times[-1]) and bool(self._state.isfinite().all())

    def save(self, path: str | Path) -> Path:
        """Write the strip, an image a row and a step a column, and return the path."""
        pictures = [panel[row] for row in range(len(self._panels[0])) for panel in self._panels]
        captions = [f"t = {t:.2f}" for t in self._times] * len(self._panels[0])
        return save_png(image_grid(pictures, captions, columns=len(self._panels)), path)

    def _noise(self, count: int) -> Tensor:
        return draw_noise((count, *self.pipe.latent_shape), [generator_for(*pair) for pair in self._seeds[:count]])

    def _is_end(self, t: float) -> bool:
        return abs(t - self._end) < 1e-6
