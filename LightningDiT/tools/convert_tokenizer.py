"""Write a tokenizer in diffusers' layout (`AutoencoderKL`), or one in that layout in ours; what is there decides.

`python -m LightningDiT.tools.convert_tokenizer --tokenizer T --output FOLDER`. docs/diffusers.md says more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from LightningDiT.console import importing, run_main

with importing(__name__):
    from LightningDiT.errors import LightningDiTError
    from LightningDiT.files import require_writable
    from LightningDiT.formats import diffusers_vae
    from LightningDiT.interop.autoencoder_kl import YAML, check_target_folder, converted, stats_beside
    from LightningDiT.tokenizer.config import TOKENIZER_CONFIGS, load_tokenizer_config
    from LightningDiT.tokenizer.latents import LatentStats


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.tools.convert_tokenizer", description=__doc__)
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="tokenizer YAML, its folder, the name of a shipped one (vavae_f16d32), or a folder in diffusers' layout",
    )
    parser.add_argument("--weights", help="file of the weights; default: the one that the tokenizer names")
    parser.add_argument("--stats", help="latents_stats.pt; default: in the weights or beside them")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be written, and end")
    return parser.parse_args(argv)


def tokenizer_path(name: str) -> Path:
    """Return the YAML, or the folder in diffusers' layout, that `--tokenizer` names."""
    shipped, path = TOKENIZER_CONFIGS / f"{name}.yaml", Path(name)
    if shipped.is_file() and not path.exists():
        return shipped
    return path / YAML if path.is_dir() and not diffusers_vae.folder_of(path) else path


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    config = load_tokenizer_config(tokenizer_path(args.tokenizer))
    weights = args.weights or config.ckpt_path
    if not weights:
        raise LightningDiTError(f"{config.source} names no ckpt_path", "name the weights by --weights")
    weights = diffusers_vae.weights_file(weights)
    output, ours = Path(args.output), diffusers_vae.folder_of(weights) is not None
    check_target_folder(output, ours, (config.source, weights, args.stats))
    stats = LatentStats.load(args.stats) if args.stats else stats_beside(weights)
    if args.dry_run:
        print(converted(config, weights, stats, None))
        return 0
    require_writable(output)
    print(converted(config, weights, stats, output))
    back = diffusers_vae.folder_of(output) is not None
    print(
        f"wrote {output}\nNext: "
        + (f"AutoencoderKL.from_pretrained({str(output)!r}), or " if back else "")
        + "set "
        + (f"vae.ckpt_path: {output}" if back else f"vae.model_name: {output / YAML}")
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
