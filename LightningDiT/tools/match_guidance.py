"""Find the scale on all channels that matches one on the first few: `python -m LightningDiT.tools.match_guidance`.

The published figures guide 3 of 32 latent channels, by scales of 6.7 to 10. To switch to all channels, this measures
the scale s' with the same root mean square of the guidance correction,

    (s' - 1)^2 sum_all |d_c|^2 = (s - 1)^2 sum_first |d_c|^2,

where d_c is the difference between the strong and the weak prediction in channel c, averaged over noises, classes and
the times at which guidance acts, on trajectories with the scale s on the first channels. If all C channels were alike,
s' would be 1 + (s - 1) sqrt(c / C): 3.8 for a scale of 10 on 3 of 32 channels.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from LightningDiT.console import Progress, importing, positive, run_main, seed_number

with importing(__name__):
    import torch
    from torch import Tensor

    from LightningDiT.config import Config, SampleConfig, load_config, with_overrides
    from LightningDiT.errors import LightningDiTError
    from LightningDiT.reference.option import add_help_config
    from LightningDiT.sampling.pipeline import LightningDiTPipeline
    from LightningDiT.seeds import generator_for
    from LightningDiT.transport import GuidedVelocity, Transport, draw_noise, integrate_ode, jumps_of, sampling_times

METHOD = "ab3"  # of the trajectories, on equal steps: each interval of time counts by its length
STREAM = 3  # noises come from (seed, stream, index), those of images from (seed, index)


@dataclass(frozen=True)
class Match:
    """A scale on the first channels, and the one on all channels that matches it.

    Attributes:
        scale, channels: on the first channels, and their number.
        all_channels: number of all channels.
        matched: scale on all channels.
        by_noise: (N,) the matched scale from each noise alone.
        by_time: (K,) the matched scale from each time alone.
        times: (K,) those times, rising.
    """

    scale: float
    channels: int
    all_channels: int
    matched: float
    by_noise: Tensor
    by_time: Tensor
    times: Tensor

    @property
    def if_alike(self) -> float:
        """The matched scale if the correction were equally strong in all channels."""
        return 1 + (self.scale - 1) * math.sqrt(self.channels / self.all_channels)

    def summary(self) -> str:
        """Return the match, its spread, and the lines of YAML that set it."""
        low, high = int(self.by_time.argmin()), int(self.by_time.argmax())
        return "\n".join(
            (
                f"scale {self.scale:g} on the first {self.channels} of {self.all_channels} channels is matched by"
                f" {self.matched:.2f} on all of them",
                f"  from {len(self.by_noise)} noises: {self.by_noise.min():.2f} to {self.by_noise.max():.2f}",
                f"  from {len(self.times)} times: {self.by_time[low]:.2f} (t = {self.times[low]:.2f})"
                f" to {self.by_time[high]:.2f} (t = {self.times[high]:.2f})",
                f"  if all channels were alike: {self.if_alike:.2f}",
                "in the configuration:",
                "sample:",
                f"  cfg_scale: {self.matched:.2f}",
                "  guided_channels: all",
            )
        )


def matched_scale(energies: Tensor, scale: float, channels: int) -> Tensor:
    """Return the scale (...) on all channels with the correction of `scale` on the first `channels`.

    Args:
        energies: (..., C) mean square of the difference between strong and weak prediction in each channel.
    """
    return 1 + (scale - 1) * (energies[..., :channels].sum(-1) / energies.sum(-1)).sqrt()


def channel_energies(
    guided: GuidedVelocity, transport: Transport, noise: Tensor, times: Tensor, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """Follow noise (N, C, ...) along `times` and return the corrections by guidance, at the times when it acts.

    Returns:
        The times (K,), and the mean square of strong - weak (K, N, C) in float64, both on the CPU.
    """
    acted: list[float] = []
    squares: list[Tensor] = []

    def output(x: Tensor, t: Tensor) -> Tensor:
        if not guided.settings.acts_at(t):
            return guided(x, t)
        strong, weak = guided.both(x, t)  # (N, C, ...) each
        acted.append(float(t[0]))
        squares.append((strong - weak).double().square().flatten(2).mean(2).cpu())  # (N, C)
        return guided.mix(strong, weak)

    integrate_ode(
        lambda x, t: transport.velocity(output, x, t),
        noise,
        times,
        METHOD,
        callback=lambda step, t, state: progress.update() if progress else None,
        jumps=jumps_of(guided.settings),
    )
    return torch.tensor(acted), torch.stack(squares) if squares else torch.zeros(0, *noise.shape[:2])


@torch.inference_mode()
def match(pipe: LightningDiTPipeline, sample: SampleConfig, noises: int, points: int, seed: int) -> Match:
    """Return the scale on all channels that matches the guidance of sampling settings on their first channels.

    Args:
        noises: number of noises, dealt evenly over the classes.
        points: of the time grid, equally spaced.

    Raises:
        LightningDiTError: guidance acts nowhere, or corrects nothing.
    """
    all_channels, channels = pipe.latent_shape[0], channels_of(sample, pipe.latent_shape[0])
    labels = [index * pipe.config.data.num_classes // noises for index in range(noises)]
    noise = draw_noise((noises, *pipe.latent_shape), [generator_for(seed, STREAM, index) for index in range(noises)])
    times = sampling_times(pipe.transport, points)
    batches = torch.arange(noises).split(pipe.batch_size(sample))
    progress = Progress(len(batches) * (points - 1), "step")
    parts = []
    for batch in batches:
        guided = pipe.guided([labels[index] for index in batch.tolist()], sample)
        parts.append(channel_energies(guided, pipe.transport, noise[batch].to(pipe.device), times, progress))
    progress.close()
    acted, energies = parts[0][0], torch.cat([part[1] for part in parts], dim=1)  # (K,), (K, N, C)
    if not bool(energies.sum() > 0):
        raise LightningDiTError(
            f"{pipe.config.source}: guidance from t = {sample.cfg_interval_start:g} to {sample.cfg_interval_end:g}"
            f" changes nothing at the {points} times of the grid",
            "widen cfg_interval_start and cfg_interval_end, or name another sample.guide_ckpt",
        )
    overall, by_noise, by_time = (
        matched_scale(mean, sample.cfg_scale, channels)
        for mean in (energies.mean((0, 1)), energies.mean(0), energies.mean(1))
    )
    return Match(sample.cfg_scale, channels, all_channels, float(overall), by_noise, by_time, acted)


def channels_of(sample: SampleConfig, all_channels: int) -> int:
    """Return the number of guided channels, which must be some and not all of them."""
    channels = sample.guided_channels
    if isinstance(channels, str) or not 0 < channels < all_channels:
        raise LightningDiTError(
            f"guided channels are {channels} of {all_channels}; 1 to {all_channels - 1} are expected",
            "give --channels 3",
        )
    return channels


def sample_of(config: Config, args: argparse.Namespace) -> SampleConfig:
    """Return the sampling settings with the options of the command line."""
    names = {"cfg_scale": "--guidance-scale", "guided_channels": "--channels"}
    sample = with_overrides(config.sample, names, cfg_scale=args.guidance_scale, guided_channels=args.channels)
    if sample.cfg_scale == 1:
        raise LightningDiTError("the guidance scale is 1, which is no guidance", "give --guidance-scale 10")
    channels_of(sample, config.model.in_chans)
    return sample


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m LightningDiT.tools.match_guidance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_help_config(parser)
    parser.add_argument("--config", required=True, help="YAML of the model and its guidance interval")
    parser.add_argument("--guidance-scale", type=float, help="to match; default: the configuration's")
    parser.add_argument("--channels", type=positive, help="guided by it; default: the configuration's")
    parser.add_argument("--noises", type=positive, default=8, help="default: %(default)s")
    parser.add_argument("--points", type=positive, default=17, help="of the time grid; default: %(default)s")
    parser.add_argument("--seed", type=seed_number, default=0)
    args = parser.parse_args(argv)
    if args.points < 3:
        parser.error("--points of 3 or more are expected")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    config = load_config(args.config)
    sample = sample_of(config, args)
    pipe = LightningDiTPipeline.from_config(config)
    print(match(pipe, sample, args.noises, args.points, args.seed).summary())
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
