"""Remove latent channels that carry nothing: `python -m LightningDiT.tools.prune_latents --help`.

Under a KL penalty a tokenizer leaves channels unused: their posterior is the prior, and their mean hardly
moves (posterior collapse). Normalised to unit variance they are noise that the transformer would have to learn.
These channels are cut out of `quant_conv` and `post_quant_conv`; the decoder sees their mean instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from LightningDiT.console import importing, run_main

with importing(__name__):
    import torch
    from torch import Tensor

    from LightningDiT.checkpoint import WRITTEN_BY, check_weights_target, load_weights, save_weights, written_by
    from LightningDiT.errors import LightningDiTError
    from LightningDiT.tokenizer.latents import LatentStats

TOOL = "prune_latents"
DEAD_STD = 0.2  # of the posterior mean; the prior has 1, so this is 0.02 nats of information


def live_channels(stats: LatentStats, least_std: float) -> Tensor:
    """Return the indices (K,) of the channels with a standard deviation of at least `least_std`."""
    return (stats.std.flatten() >= least_std).nonzero().squeeze(1)


def prune(weights: Mapping[str, Tensor], stats: LatentStats, live: Tensor) -> dict[str, Tensor]:
    """Return the autoencoder's weights reduced to the latent channels `live` (K,).

    Args:
        stats: statistics of all C channels; the means of the removed ones go into the decoder's bias.
    """
    pruned = dict(weights)
    channels = stats.mean.numel()
    moments = torch.cat([live, live + channels])  # mean rows, then log-variance rows
    pruned["quant_conv.weight"] = weights["quant_conv.weight"][moments]
    pruned["quant_conv.bias"] = weights["quant_conv.bias"][moments]
    matrix = weights["post_quant_conv.weight"]  # (z, C, 1, 1)
    dead = torch.tensor([index for index in range(channels) if index not in live.tolist()], dtype=torch.long)
    constant = matrix[:, dead, 0, 0] @ stats.mean.flatten()[dead].to(matrix)  # (z,)
    pruned["post_quant_conv.weight"] = matrix[:, live]
    pruned["post_quant_conv.bias"] = weights["post_quant_conv.bias"] + constant
    return pruned


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.tools.prune_latents", description=__doc__)
    parser.add_argument("--weights", required=True, help="the tokenizer's weights")
    parser.add_argument("--stats", required=True, help="latents_stats.pt of all its channels")
    parser.add_argument("--output", required=True, help="the pruned weights (safetensors)")
    parser.add_argument(
        "--least-std", type=float, default=DEAD_STD, help="of a channel that is kept; default: %(default)s"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the channels that would be kept, and end")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    output = Path(args.output)
    check_weights_target(output, TOOL, (args.weights, args.stats))
    stats = LatentStats.load(args.stats)
    live = live_channels(stats, args.least_std)
    if not len(live):
        raise LightningDiTError(f"no channel of {args.stats} reaches a std of {args.least_std}", "lower --least-std")
    print(f"channels kept: {live.tolist()} of {stats.std.numel()}")
    if args.dry_run:
        return 0
    pruned = prune(load_weights(args.weights), stats, live)
    save_weights(pruned, output, {WRITTEN_BY: TOOL}, written_by(TOOL))
    print(f"wrote {output}\nNext: set embed_dim: {len(live)} in the tokenizer's YAML and extract the latents again")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
