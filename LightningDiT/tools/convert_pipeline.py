"""Write a model as a folder that diffusers loads as a pipeline, whose images are the same bit for bit.

`python -m LightningDiT.tools.convert_pipeline --config C --output FOLDER`. docs/diffusers.md says more.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from LightningDiT.console import importing, run_main

with importing(__name__):
    from LightningDiT.config import PATHS, Config, load_config
    from LightningDiT.files import require_writable
    from LightningDiT.interop.autoencoder_kl import diffusers_config
    from LightningDiT.interop.pipeline_folder import check_pipeline_folder, write_pipeline
    from LightningDiT.sampling.dry_run import verify
    from LightningDiT.sampling.pipeline import LightningDiTPipeline
    from LightningDiT.tokenizer.config import load_tokenizer_config, tokenizer_config_path
    from LightningDiT.tokenizer.vavae import autoencoder_settings


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.tools.convert_pipeline", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML of the model")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--dry-run", action="store_true", help="check everything that the configuration names, and end")
    return parser.parse_args(argv)


def in_float32(config: Config) -> LightningDiTPipeline:
    """Return the pipeline on the CPU with its weights in float32; its settings are those of the configuration."""
    sample = dataclasses.replace(config.sample, precision="fp32")
    pipe = LightningDiTPipeline.from_config(dataclasses.replace(config, sample=sample), "cpu")
    pipe.config = config
    return pipe


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    config, output = load_config(args.config), Path(args.output)
    tokenizer = load_tokenizer_config(tokenizer_config_path(config))
    named = (*(attrgetter(key)(config) for key in PATHS), tokenizer.source, tokenizer.ckpt_path)
    check_pipeline_folder(output, (config.source, *named))
    print("\n".join(verify(config)))
    sizes = autoencoder_settings(tokenizer)
    diffusers_config(sizes, None, {"latent_channels": sizes.embed_dim})  # refuses a tokenizer that diffusers lacks
    if args.dry_run:
        return 0
    require_writable(output)
    write_pipeline(in_float32(config), output)
    print(f"wrote {output}\nNext: DiffusionPipeline.from_pretrained({str(output)!r}, trust_remote_code=True)")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
