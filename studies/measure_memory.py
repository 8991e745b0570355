"""Measure how much memory sampling takes on the CPU: `python -m studies.measure_memory`, in the project's folder.

Every case is a separate process that loads seeded weights from a file, computes once and reports its largest resident
size (VmHWM of /proc/self/status, so on Linux only). The table also has the value of LightningDiT/sampling/memory_model
and the ratio. The published model's weights take 2.7 GB of disk meanwhile, and 8 GB more in the form of the official
file with the model and the optimizer's state beside the EMA.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from LightningDiT.console import OK
from LightningDiT.errors import LightningDiTError
from LightningDiT.sampling import memory_model
from setup_steps import project
from setup_steps.project import PROJECT

if TYPE_CHECKING:
    from torch import nn

    from LightningDiT.config import Config

STATUS = Path("/proc/self/status")
MODELS = ("LightningDiT-XL/1", "LightningDiT-B/1")
BATCHES = (1, 2, 4)
PRECISIONS = {"fp32": memory_model.FLOAT32, "bf16": memory_model.HALF}  # bytes of a value
WEIGHT_STD = 0.02
OFFICIAL = "official"  # the case, and the name of its file
GUIDANCE_SCALE = 9.0


@dataclass(frozen=True)
class Row:
    """One case: bytes at the peak, measured and modelled."""

    model: str
    precision: str
    case: str
    batch: int
    measured: int
    modelled: int


def largest_resident_bytes() -> int:
    """Return the largest resident size of this process so far.

    Raises:
        LightningDiTError: the system does not report it.
    """
    try:
        return int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[1]) * 1024
    except (OSError, TypeError) as error:
        raise LightningDiTError(f"{STATUS} gives no VmHWM, which Linux writes there", "measure on Linux") from error


def write_model(folder: Path, model_type: str) -> Path:
    """Write seeded weights of a transformer and of VA-VAE f16d32, in float32, and return the YAML that names them."""
    import torch

    from LightningDiT.checkpoint import save_weights, without_values
    from LightningDiT.config import load_config
    from LightningDiT.tokenizer.latents import LatentStats

    path = folder / "config.yaml"
    settings = {
        "ckpt_path": "transformer.safetensors",
        "data": {"data_path": "."},
        "vae": {"ckpt_path": "tokenizer.safetensors"},
        "model": {"model_type": model_type},
        "sample": {"cfg_scale": GUIDANCE_SCALE},
    }
    path.write_text(json.dumps(settings), encoding="utf-8")  # YAML reads JSON
    with without_values():
        modules = {"transformer": _transformer(load_config(path)), "tokenizer": _tokenizer(load_config(path))}
    generator = torch.Generator().manual_seed(0)
    for name, module in modules.items():
        shapes = {key: value.shape for key, value in module.state_dict().items()}
        weights = {key: WEIGHT_STD * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        save_weights(weights, folder / f"{name}.safetensors")
    channels = load_config(path).model.in_chans
    LatentStats(torch.zeros(1, channels, 1, 1), torch.full((1, channels, 1, 1), 2.0)).save(folder / "latents_stats.pt")
    return path


def write_official(path: Path) -> None:
    """Write the weights of the configuration at `path` beside it again, as training's `ema`, `model` and `opt`.

    The latter two are zeros, which take no memory to write.
    """
    import torch

    from LightningDiT.checkpoint import load_weights, save_training_state
    from LightningDiT.config import load_config

    ema = load_weights(load_config(path).ckpt_path or "")
    model, moments = ({name: torch.zeros(tensor.shape) for name, tensor in ema.items()} for _ in range(2))
    state = {index: {"exp_avg": moment} for index, moment in enumerate(moments.values())}
    save_training_state({"model": model, "ema": ema, "opt": {"state": state}}, path.with_name(f"{OFFICIAL}.pt"))


def _transformer(config: Config) -> nn.Module:
    from LightningDiT.loading import model_settings
    from LightningDiT.models.lightningdit import LightningDiT

    return LightningDiT(model_settings(config))


def _tokenizer(config: Config) -> nn.Module:
    from LightningDiT.tokenizer.autoencoder import AutoencoderKL
    from LightningDiT.tokenizer.config import load_tokenizer_config, tokenizer_config_path
    from LightningDiT.tokenizer.vavae import autoencoder_settings

    return AutoencoderKL(autoencoder_settings(load_tokenizer_config(tokenizer_config_path(config))))


def run_framework(config: Config, batch: int) -> None:
    """Load the library and make the modules without weights, as every case begins."""
    from LightningDiT.checkpoint import without_values

    with without_values():
        _transformer(config)
        _tokenizer(config)


def run_step(config: Config, batch: int) -> None:
    """Evaluate the transformer once with guidance, as the pipeline does."""
    import torch

    from LightningDiT.device import resolve_precision
    from LightningDiT.loading import load_transformer
    from LightningDiT.transport import GuidanceSettings, GuidedVelocity

    dtype = resolve_precision(config.sample.precision, torch.device("cpu")).dtype
    model = load_transformer(config, dtype)
    sizes = model.settings
    state = torch.randn(batch, sizes.in_channels, sizes.input_size, sizes.input_size, dtype=dtype)
    labels = torch.zeros(batch, dtype=torch.long)
    null = torch.full_like(labels, model.null_class)
    with torch.inference_mode():
        GuidedVelocity(model, labels, null, GuidanceSettings(GUIDANCE_SCALE))(state, torch.zeros(batch))


def run_decode(config: Config, batch: int) -> None:
    """Decode latents to images."""
    import torch

    from LightningDiT.tokenizer.config import tokenizer_config_path
    from LightningDiT.tokenizer.vavae import VA_VAE

    tokenizer = VA_VAE(tokenizer_config_path(config), ckpt_path=config.vae.ckpt_path, device="cpu")
    side = tokenizer.img_size // tokenizer.downsample_factor
    with torch.inference_mode():
        tokenizer.decode_latents(torch.randn(batch, tokenizer.embed_dim, side, side))


def run_sampling(config: Config, batch: int) -> None:
    """Run the pipeline as step 4 does, with one evaluation."""
    from LightningDiT.sampling.pipeline import LightningDiTPipeline

    pipeline = LightningDiTPipeline.from_config(config, "cpu")
    pipeline([0] * batch, num_inference_steps=2, batch_size=batch)


CASES: dict[str, Callable[[Config, int], None]] = {
    "framework": run_framework,
    "step": run_step,
    "decode": run_decode,
    "sampling": run_sampling,
    OFFICIAL: run_sampling,
}


def modelled(config: Config, case: str, batch: int) -> int:
    """Return the memory model's bytes for a case."""
    value_bytes = PRECISIONS[config.sample.precision]
    need = memory_model.sampling_need(config, False, value_bytes)
    transformer, tokenizer = memory_model.parameters_of(config)
    return {
        "framework": need.framework,
        "step": replace(need, weights=transformer * value_bytes, decode=0).peak(batch),
        "decode": replace(need, weights=tokenizer * memory_model.FLOAT32, step=0).peak(batch),
        "sampling": need.peak(batch),
        OFFICIAL: need.peak(batch),
    }[case]


def config_of(path: Path, precision: str, case: str) -> Config:
    """Return the configuration at `path` with the precision and the file of a case."""
    from LightningDiT.config import load_config

    config = load_config(path)
    if case == OFFICIAL:
        config = replace(config, ckpt_path=str(path.with_name(f"{OFFICIAL}.pt")))
    return replace(config, sample=replace(config.sample, precision=precision))


def measure(path: Path, precision: str, case: str, batch: int) -> Row:
    """Run one case of the configuration at `path` in a separate process."""
    command = [sys.executable, "-m", "studies.measure_memory", "--case", case, "--config", str(path)]
    command += ["--precisions", precision, "--batches", str(batch)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise LightningDiTError(f"case {case} with {batch} images failed: {reason}", "free memory, or fewer --batches")
    config = config_of(path, precision, case)
    measured = int(done.stdout.split()[-1])
    return Row(config.model.model_type, precision, case, batch, measured, modelled(config, case, batch))


def table(rows: Sequence[Row]) -> str:
    """Return the rows in Markdown, in MB."""
    head = "| model | precision | case | images | measured | modelled | modelled / measured |"
    lines = [head, "|---|---|---|--:|--:|--:|--:|"]
    for row in rows:
        named = f"{row.model} | {row.precision} | {row.case} | {row.batch}"
        sizes = f"{row.measured / 1e6:,.0f} MB | {row.modelled / 1e6:,.0f} MB"
        lines.append(f"| {named} | {sizes} | {row.modelled / row.measured:.2f} |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.measure_memory", description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, metavar="N", help="batch sizes")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), metavar="NAME")
    parser.add_argument("--folder", help="for the weights; by default a temporary folder")
    parser.add_argument("--case", choices=CASES, help="run this case here and print only bytes")
    parser.add_argument("--config", help="for --case")
    args = parser.parse_args(argv)
    if bool(args.case) != bool(args.config):
        parser.error("--case and --config go together")
    if min(args.batches) < 1:
        parser.error("--batches takes numbers from 1")
    return args


def measure_all(args: argparse.Namespace, model_type: str) -> list[Row]:
    """Write one model's weights and run every case of it."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print(f"writing seeded weights of {model_type} to {folder}", file=sys.stderr)
        path = write_model(Path(folder), model_type)
        plan = [("fp32", "framework", 1)] + [("fp32", "decode", batch) for batch in args.batches]
        plan += [(name, case, n) for name in args.precisions for case in ("step", "sampling") for n in args.batches]
        plan += [(name, OFFICIAL, 1) for name in args.precisions]
        write_official(path)
        rows = []
        for precision, case, batch in plan:
            print(f"  {case} in {precision}, {batch} images", file=sys.stderr)
            rows.append(measure(path, precision, case, batch))
        return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    args = parse(argv)
    if args.case:
        config = config_of(Path(args.config), args.precisions[0], args.case)
        run_framework(config, 0)
        CASES[args.case](config, args.batches[0])
        print(largest_resident_bytes())
        return OK
    largest_resident_bytes()
    rows = [row for model_type in args.models for row in measure_all(args, model_type)]
    import torch

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n\n{table(rows)}")
    return OK


if __name__ == "__main__":
    project.run(main)
