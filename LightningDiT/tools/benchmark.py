"""Measure the speed on this machine: `python -m LightningDiT.tools.benchmark [--json FILE] [--quick]`.

Times are compared with the rate of a large matrix product of the same run, so that the shares of two machines,
or of two hours on a shared machine, can be compared. All repetitions are interleaved and the medians stated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from LightningDiT.checkpoint import atomic_path
from LightningDiT.config import load_config
from LightningDiT.console import run_main
from LightningDiT.errors import LightningDiTError
from LightningDiT.models.layers import Attention
from LightningDiT.models.lightningdit import LightningDiT, preset_settings
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.autoencoder import AttnBlock, AutoencoderKL, AutoencoderSettings
from LightningDiT.tools.timed_script import FIRST_FORWARD

PROJECT = Path(__file__).resolve().parents[2]
DEMO = PROJECT / "step4_demo_inference.py"
STEP3_CONFIG = PROJECT / "kaggle_inference_config.yaml"
BUNDLED_WEIGHTS = PROJECT / "models" / "fashion-mnist" / "transformer.safetensors"
GEMM_SIDE = 2048
BATCHES = (1, 2, 8)
LATENT_SHAPE = (32, 16, 16)  # of a 256x256 image
PUBLISHED_FLAGS = {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
WEIGHT_STD = 0.02  # any weights do, as long as they are no zeros, which some kernels pass over
REPETITIONS = 7
QUICK_REPETITIONS = 2
GEMM_KEY = "matrix product"

Forward = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Something to be timed.

    Attributes:
        name: as the table shows it.
        flops: floating-point operations of its matrix products and convolutions.
        run: does it once.
    """

    name: str
    flops: float
    run: Forward


@dataclass(frozen=True)
class Result:
    """Medians of one case.

    Attributes:
        name: the case.
        seconds: of one run.
        gflops: billions of operations, counted exactly.
        share: of the rate of the matrix product that was timed beside it.
    """

    name: str
    seconds: float
    gflops: float
    share: float


def product_flops(module: nn.Module, call: Callable[[], object]) -> int:
    """Return the floating-point operations of all matrix products that `call` makes inside `module`.

    A multiplication and its addition count as two. Linear layers, convolutions and the two products of each
    attention are counted from the shapes that they meet, so a linear layer that sees one vector an image
    counts less than one that sees all tokens. Put the module on the meta device and nothing is computed.
    """
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Linear):
            total += 2 * output.numel() * layer.in_features
        elif isinstance(layer, nn.Conv2d):
            total += 2 * output.numel() * layer.weight[0].numel()
        elif isinstance(layer, Attention):
            total += 4 * inputs[0].numel() * inputs[0].shape[1]  # (N, T, width): q k^T, then times v
        else:
            total += 4 * inputs[0].numel() * inputs[0][0, 0].numel()  # (N, C, H, W), a token a pixel

    counted = (nn.Linear, nn.Conv2d, Attention, AttnBlock)
    hooks = [layer.register_forward_hook(count) for layer in module.modules() if isinstance(layer, counted)]
    try:
        with torch.no_grad():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return total


def model_flops(model: LightningDiT, batch: int) -> int:
    """Return the operations of one forward of `model` (meta device) on `batch` latents."""
    return product_flops(model, lambda: model(*model_inputs(model, batch)))


def model_inputs(model: LightningDiT, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents (N, C, h, w), times (N,) and labels (N,) on the device of `model`."""
    settings, device = model.settings, model.pos_embed.device
    shape = (batch, settings.in_channels, settings.input_size, settings.input_size)
    latents = torch.randn(shape, generator=generator_for(0, batch)).to(device)
    labels = torch.arange(batch, device=device) % settings.num_classes
    return latents, torch.linspace(0.1, 0.9, batch, device=device), labels


def random_weights(module: nn.Module) -> nn.Module:
    """Fill a module from the meta device with small random values, in eval mode on the CPU."""
    module = module.to_empty(device="cpu").eval().requires_grad_(False)
    generator = generator_for(0)
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.normal_(0.0, WEIGHT_STD, generator=generator)
    return module


def gemm_case() -> Case:
    """Return the float32 product of two 2048x2048 matrices, against which everything is measured."""
    generator = generator_for(1)
    left, right = (torch.randn(GEMM_SIDE, GEMM_SIDE, generator=generator) for _ in range(2))
    out = torch.empty(GEMM_SIDE, GEMM_SIDE)
    return Case(GEMM_KEY, 2.0 * GEMM_SIDE**3, lambda: torch.mm(left, right, out=out))


def model_cases(batches: Sequence[int]) -> list[Case]:
    """Return forwards of LightningDiT-B/1 with the published flags."""
    settings = preset_settings("B/1", input_size=LATENT_SHAPE[1], in_channels=LATENT_SHAPE[0], **PUBLISHED_FLAGS)
    with torch.device("meta"):
        model = LightningDiT(settings)
    flops = {batch: model_flops(model, batch) for batch in batches}
    random_weights(model)

    def forward(batch: int) -> Case:
        inputs = model_inputs(model, batch)
        return Case(f"B/1 forward, batch {batch}", flops[batch], lambda: model(*inputs))

    return [forward(batch) for batch in batches]


def decoder_cases() -> list[Case]:
    """Return the decoding of one 256x256 image by VA-VAE f16d32, in both layouts."""
    cases = []
    for title, layout in (("default", torch.contiguous_format), ("channels last", torch.channels_last)):
        with torch.device("meta"):
            tokenizer = AutoencoderKL(AutoencoderSettings())
            del tokenizer.encoder  # only the decoder is timed
            latent = torch.empty(1, *LATENT_SHAPE)
            flops = product_flops(tokenizer, lambda vae=tokenizer, z=latent: vae.decode(z))
        random_weights(tokenizer).to(memory_format=layout)
        latent = torch.randn(1, *LATENT_SHAPE, generator=generator_for(2)).to(memory_format=layout)
        run = lambda vae=tokenizer, z=latent: vae.decode(z)  # noqa: E731 - binds this round's values
        cases.append(Case(f"VAE decode 256x256, {title}", flops, run))
    return cases


def measure(cases: Sequence[Case], repetitions: int) -> list[Result]:
    """Time all cases in turn, `repetitions` times after one round to warm up, and return medians.

    The share of a case is the median over rounds of its rate divided by that round's matrix product.
    """
    gemm = gemm_case()
    rounds: list[dict[str, float]] = []
    for number in range(repetitions + 1):
        times = {}
        for case in (gemm, *cases):
            started = time.perf_counter()
            with torch.inference_mode():
                case.run()
            times[case.name] = time.perf_counter() - started
        print(f"  round {number} of {repetitions}{' (warming up)' if not number else ''}", flush=True)
        rounds.append(times)
    return [_result(case, gemm, rounds[1:]) for case in (gemm, *cases)]


def _result(case: Case, gemm: Case, rounds: list[dict[str, float]]) -> Result:
    seconds = statistics.median(times[case.name] for times in rounds)
    shares = [(case.flops / times[case.name]) / (gemm.flops / times[gemm.name]) for times in rounds]
    return Result(case.name, seconds, case.flops / 1e9, statistics.median(shares))


def demo_samples_bundled_model(config: Path = STEP3_CONFIG, weights: Path = BUNDLED_WEIGHTS) -> bool:
    """Whether the demonstration would sample the bundled model and not one that step 3 was told to use."""
    if not weights.exists():
        return False
    chosen = load_config(config).ckpt_path if config.exists() else weights
    return chosen is not None and Path(chosen).resolve() == weights.resolve()


def time_demo(script: Path) -> dict[str, float]:
    """Return the seconds from the start of the demonstration to its first sampling step and to its end.

    Raises:
        LightningDiTError: it failed, or sampled nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times.json"
        command = [sys.executable, "-m", "LightningDiT.tools.timed_script", str(times), str(script)]
        started = time.time()
        done = subprocess.run(
            [*command, "--output", str(Path(folder) / "pictures")],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=False,
        )
        ended = time.time()
        if done.returncode or not times.exists():
            reason = (done.stderr.strip().splitlines() or ["it sampled nothing"])[-1]
            raise LightningDiTError(f"{script.name} failed: {reason}", f"python {script.name}")
        first = json.loads(times.read_text(encoding="utf-8"))[FIRST_FORWARD]
    return {"first_step": first - started, "picture": ended - started}


def processor_name() -> str:
    """Return the processor's name as the system states it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(facts: dict[str, Any], results: Sequence[Result], demo: dict[str, float] | None) -> list[str]:
    """Return the figures as a Markdown table under a line about the machine."""
    rate = results[0].gflops / results[0].seconds
    lines = [
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads,"
        f" Python {facts['python']}, torch {facts['torch']}; float32",
        f"Matrix product {GEMM_SIDE}^3: {rate:.0f} GFLOP/s ({facts['threads']} threads)",
        "",
        "| What | seconds | GFLOP | share of the matrix product's rate |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row.name} | {row.seconds:.3f} | {row.gflops:.1f} | {row.share:.2f} |" for row in results[1:]]
    if demo:
        lines.append(f"| {DEMO.name}: start to first sampling step | {demo['first_step']:.1f} | | |")
        lines.append(f"| {DEMO.name}: start to picture | {demo['picture']:.1f} | | |")
    return lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.tools.benchmark", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE besides")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, no batch of 8, no demonstration")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    facts = machine()
    print(f"Measuring on {facts['processor']} with {facts['threads']} threads", flush=True)
    cases = model_cases(BATCHES[:2] if args.quick else BATCHES) + decoder_cases()
    results = measure(cases, QUICK_REPETITIONS if args.quick else REPETITIONS)
    demo = None
    if demo_samples_bundled_model() and not args.quick:
        print(f"  {DEMO.name}", flush=True)
        demo = time_demo(DEMO)
    elif not args.quick:
        print(f"  {DEMO.name} is not timed: it would not sample the bundled model", flush=True)
    print("\n".join(table(facts, results, demo)))
    if args.json:
        figures = {"machine": facts, "results": [asdict(result) for result in results], "demo_seconds": demo}
        with atomic_path(args.json) as temporary:
            temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
