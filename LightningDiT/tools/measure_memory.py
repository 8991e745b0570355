"""Measure what sampling takes of memory on the CPU: `python -m LightningDiT.tools.measure_memory`.

Every case is a process of its own that loads seeded weights from a file, computes once and reports the largest
resident size that it had (VmHWM of /proc/self/status, so on Linux only). Beside it stands what
setup_steps/memory_model.py says, and the ratio; the published model's weights take 2.7 GB of disk meanwhile.
It is run from the project's folder.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from LightningDiT.checkpoint import save_weights
from LightningDiT.config import Config, load_config, load_tokenizer_config, tokenizer_config_path
from LightningDiT.console import run_main
from LightningDiT.errors import LightningDiTError
from LightningDiT.models.lightningdit import LightningDiT
from LightningDiT.pipeline import LightningDiTPipeline, load_transformer, model_settings
from LightningDiT.tokenizer.autoencoder import AutoencoderKL
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.tokenizer.vavae import VA_VAE, autoencoder_settings
from LightningDiT.transport import GuidanceSettings, GuidedVelocity
from setup_steps import memory_model

PROJECT = Path(__file__).resolve().parents[2]
STATUS = Path("/proc/self/status")
MODELS = ("LightningDiT-XL/1", "LightningDiT-B/1")
BATCHES = (1, 2, 4)
WEIGHT_STD = 0.02
GUIDANCE = GuidanceSettings(scale=9.0)


@dataclass(frozen=True)
class Row:
    """One case: bytes at the peak, measured and modelled."""

    model: str
    case: str
    batch: int
    measured: int
    modelled: int


def largest_resident_bytes() -> int:
    """Return the largest resident size that this process had so far.

    Raises:
        LightningDiTError: the system does not say.
    """
    try:
        return int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[1]) * 1024
    except (OSError, TypeError) as error:
        raise LightningDiTError(f"{STATUS} gives no VmHWM, which Linux writes there", "measure on Linux") from error


def write_model(folder: Path, model_type: str) -> Path:
    """Write seeded weights of a transformer and of VA-VAE f16d32 and return the YAML that names them."""
    path = folder / "config.yaml"
    settings = {
        "ckpt_path": "transformer.safetensors",
        "data": {"data_path": "."},
        "vae": {"ckpt_path": "tokenizer.safetensors"},
        "model": {"model_type": model_type},
        "sample": {"cfg_scale": GUIDANCE.scale},
    }
    path.write_text(json.dumps(settings), encoding="utf-8")  # YAML reads JSON
    with torch.device("meta"):
        modules = {"transformer": _transformer(load_config(path)), "tokenizer": _tokenizer(load_config(path))}
    generator = torch.Generator().manual_seed(0)
    for name, module in modules.items():
        shapes = {key: value.shape for key, value in module.state_dict().items()}
        weights = {key: WEIGHT_STD * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        save_weights(weights, folder / f"{name}.safetensors")
    channels = load_config(path).model.in_chans
    LatentStats(torch.zeros(1, channels, 1, 1), torch.full((1, channels, 1, 1), 2.0)).save(folder / "latents_stats.pt")
    return path


def _transformer(config: Config) -> nn.Module:
    return LightningDiT(model_settings(config))


def _tokenizer(config: Config) -> nn.Module:
    return AutoencoderKL(autoencoder_settings(load_tokenizer_config(tokenizer_config_path(config))))


def run_framework(config: Config, batch: int) -> None:
    """What every case begins with: the library, and the modules without weights."""
    with torch.device("meta"):
        _transformer(config)
        _tokenizer(config)


def run_step(config: Config, batch: int) -> None:
    """One guided evaluation of the transformer."""
    model = load_transformer(config)
    sizes = model.settings
    state = torch.randn(batch, sizes.in_channels, sizes.input_size, sizes.input_size)
    labels = torch.zeros(batch, dtype=torch.long)
    with torch.inference_mode():
        GuidedVelocity(model, labels, torch.full_like(labels, model.null_class), GUIDANCE)(state, torch.zeros(batch))


def run_decode(config: Config, batch: int) -> None:
    """Latents to images."""
    tokenizer = VA_VAE(tokenizer_config_path(config), ckpt_path=config.vae.ckpt_path, device="cpu")
    side = tokenizer.img_size // tokenizer.downsample_factor
    with torch.inference_mode():
        tokenizer.decode_latents(torch.randn(batch, tokenizer.embed_dim, side, side))


def run_sampling(config: Config, batch: int) -> None:
    """The pipeline as step 4 uses it, with one evaluation."""
    pipeline = LightningDiTPipeline.from_config(config, "cpu")
    pipeline([0] * batch, num_inference_steps=2, batch_size=batch)


CASES: dict[str, Callable[[Config, int], None]] = {
    "framework": run_framework,
    "step": run_step,
    "decode": run_decode,
    "sampling": run_sampling,
}


def modelled(config: Config, case: str, batch: int) -> int:
    """Return the bytes that the memory model gives for a case."""
    need = memory_model.sampling_need(config, False, Path(config.ckpt_path or "").stat().st_size)
    transformer, tokenizer = (count * memory_model.FLOAT32 for count in memory_model.parameters_of(config))
    rows = batch * memory_model.ROWS_PER_IMAGE
    step = memory_model.block_bytes(model_settings(config), rows, memory_model.FLOAT32)
    sizes = autoencoder_settings(load_tokenizer_config(tokenizer_config_path(config)))
    decode = memory_model.decode_bytes(sizes, batch, config.data.image_size)
    return {
        "framework": need.framework,
        "step": need.framework + transformer + step,
        "decode": need.framework + tokenizer + decode,
        "sampling": need.peak(batch),
    }[case]


def measure(path: Path, case: str, batch: int) -> Row:
    """Run one case of the configuration at `path` in a process of its own."""
    command = [sys.executable, "-m", "LightningDiT.tools.measure_memory", "--case", case]
    command += ["--config", str(path), "--batches", str(batch)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise LightningDiTError(f"case {case} with {batch} images failed: {reason}", "free memory, or fewer --batches")
    config = load_config(path)
    return Row(config.model.model_type, case, batch, int(done.stdout.split()[-1]), modelled(config, case, batch))


def table(rows: Sequence[Row]) -> str:
    """Return the rows in Markdown, in MB."""
    lines = ["| model | case | images | measured | modelled | modelled / measured |", "|---|---|--:|--:|--:|--:|"]
    for row in rows:
        sizes = f"{row.measured / 1e6:,.0f} MB | {row.modelled / 1e6:,.0f} MB"
        lines.append(f"| {row.model} | {row.case} | {row.batch} | {sizes} | {row.modelled / row.measured:.2f} |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.tools.measure_memory", description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, metavar="N", help="images at a time")
    parser.add_argument("--folder", help="where the weights are written; a temporary folder where left out")
    parser.add_argument("--case", choices=CASES, help="run this case here, and print bytes alone")
    parser.add_argument("--config", help="of --case")
    args = parser.parse_args(argv)
    if bool(args.case) != bool(args.config):
        parser.error("--case and --config go together")
    if min(args.batches) < 1:
        parser.error("--batches takes numbers from 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    args = parse(argv)
    if args.case:
        config = load_config(args.config)
        run_framework(config, 0)
        CASES[args.case](config, args.batches[0])
        print(largest_resident_bytes())
        return 0
    largest_resident_bytes()
    rows = []
    for model_type in args.models:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            print(f"writing seeded weights of {model_type} to {folder}", file=sys.stderr)
            path = write_model(Path(folder), model_type)
            plan = [("framework", 1)]
            plan += [(case, batch) for case in CASES if case != "framework" for batch in args.batches]
            for case, batch in plan:
                print(f"  {case}, {batch} images", file=sys.stderr)
                rows.append(measure(path, case, batch))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
