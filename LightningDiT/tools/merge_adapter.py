"""Write the weights of `ckpt_path` with the adapter of `adapter_path` in them, as one file of whole weights.

`python -m LightningDiT.tools.merge_adapter --config C --output F`. Programs that know no adapters, and a further
training by `train.weight_init`, take such a file. The samples are those of both files together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from LightningDiT.console import importing, run_main

with importing(__name__):
    from LightningDiT.checkpoint import WRITTEN_BY, check_weights_target, inspect, save_weights, written_by
    from LightningDiT.config import TRAINING_FIX, Config, load_config
    from LightningDiT.data.labels import CLASS_NAMES, CONDITION_NAMES, NULL_TRAINED
    from LightningDiT.errors import LightningDiTError
    from LightningDiT.loading import adapted_weights, check_transformer_file, required
    from LightningDiT.sampling.calibrated import ADAPTER, adapter_digest

TOOL = "merge_adapter"
LABELS = (CLASS_NAMES, CONDITION_NAMES, NULL_TRAINED)  # metadata of the adapter that hold for the whole


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.tools.merge_adapter", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML with ckpt_path and adapter_path")
    parser.add_argument("--output", required=True, help="the whole weights (safetensors)")
    parser.add_argument("--dry-run", action="store_true", help="check that both files fit, and end")
    return parser.parse_args(argv)


def read_config(path: str) -> Config:
    """Return the configuration; raises LightningDiTError if it names no adapter."""
    config = load_config(path, TRAINING_FIX)
    if not config.adapter_path:
        raise LightningDiTError(
            f"{config.source} names no adapter_path", "set it to the adapter.safetensors of a training"
        )
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    config, output = read_config(args.config), Path(args.output)
    check_weights_target(output, TOOL, (config.source, config.ckpt_path, config.adapter_path))
    print(check_transformer_file(config, required(config, "ckpt_path")))
    if args.dry_run:
        return 0
    adapter = str(config.adapter_path)
    told = {name: value for name, value in inspect(adapter).metadata.items() if name in LABELS}
    weights = {name: value.contiguous() for name, value in adapted_weights(config).items()}
    save_weights(weights, output, told | {ADAPTER: adapter_digest(adapter), WRITTEN_BY: TOOL}, written_by(TOOL))
    print(f"wrote {output}, {len(weights)} tensors\nNext: set ckpt_path: {output}, and no adapter_path")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
