"""Measure what a precision changes: `python -m studies.precision_study --data-root FOLDER`.

Five parts compare with float32 from the same noises. `bundled`: latents, pixels, Frechet distance and class accuracy
of the bundled model in bf16 and in emulated fp16. `solvers`: its latents by several solvers, which amplify rounding
more or less. `kernels`: emulated fp16 beside torch's fp16 kernels on the CPU, which are slow, on few images. `b1`:
latents of LightningDiT-B/1 with seeded weights and the published guidance, without pixels, since there is no decoder
for them. `decode`: pixels of the bundled decoder, and of that of VA-VAE f16d32 with seeded weights, in fp16 as sampling
decodes on a GPU, in bf16, and in emulated TF32. Each part is kept in docs/precision/study.json as soon as it is done,
and the tables between the marks in docs/precision.md are renewed from there.

Emulated fp16 computes in float32 with every parameter and table rounded to fp16, and with the inputs and the output of
each linear layer, convolution and rotation rounded to fp16; a value beyond 65504 becomes infinite. The output of the
attention is rounded as the input of the projection behind it. It differs from fp16 in two places: the product of
SwiGLU is rounded once and not twice, and the weights of the softmax are not rounded. Emulated TF32 rounds the weights
and inputs of linear layers and convolutions to 10 bits of mantissa; the products of attention stay as they are.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from LightningDiT.config import load_config
from LightningDiT.console import positive, run_main
from LightningDiT.device import autocast
from LightningDiT.images import to_uint8
from LightningDiT.models.lightningdit import LightningDiT, preset_settings
from LightningDiT.models.positions import RotaryEmbedding2d
from LightningDiT.sampling.pipeline import CONFIG_NAME, LightningDiTPipeline
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.autoencoder import AutoencoderKL, AutoencoderSettings
from LightningDiT.tokenizer.vavae import LAYOUT
from LightningDiT.tools.report import table
from LightningDiT.transport import GuidanceSettings, GuidedVelocity, draw_noise, graded_grid, integrate_ode, jumps_of
from studies.judged import BATCH_SIZE, distance_and_accuracy, equal_labels, judge_of, judged, real_images, sample_images
from studies.pages import Figures, Part, add_study_options, run_parts

LEVELS = (1, 2, 4)  # of 255, by which a pixel has changed
SEED = 0
#: Solvers whose drift is compared, as settings of `sample`.
SOLVERS: dict[str, dict[str, Any]] = {
    "fast": {"sampling_method": "fast"},
    "ab3, graded, 16 points": {"sampling_method": "ab3", "time_grid": "graded", "num_sampling_steps": 16},
    "ab3, graded, 26 points": {"sampling_method": "ab3", "time_grid": "graded", "num_sampling_steps": 26},
    "euler, 50 points": {"sampling_method": "euler", "num_sampling_steps": 50},
}
F16D32_LATENTS = (2, 32, 8, 8)  # of images of 128 x 128: fp16 is slow on a CPU
LEVELS_OF_RANGE = 127.5  # of 255, by which an image in [-1, 1] is wider
B1_IMAGES = 2
B1_SOLVER = ("ab3", 11)  # method and points of a graded grid
B1_GUIDANCE = GuidanceSettings(6.7, cfg_interval_start=0.125)  # as published for 800 epochs
B1_SETTINGS = {"input_size": 16, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
FULL, BF16, EMULATED, FP16, TF32 = "float32", "bf16", "fp16, emulated", "fp16", "TF32, emulated"


def rounded(x: Tensor) -> Tensor:
    """Return float32 values rounded to fp16; those beyond 65504 become infinite."""
    return x.half().float()


def emulate_fp16(network: nn.Module) -> nn.Module:
    """Round parameters and buffers of a float32 network in place, and later inputs and outputs of its products."""
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.copy_(rounded(tensor))
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | RotaryEmbedding2d):
            layer.register_forward_pre_hook(lambda layer, inputs: tuple(map(rounded, inputs)))
            layer.register_forward_hook(lambda layer, inputs, output: rounded(output))
    return network


def rounded_to_tf32(x: Tensor) -> Tensor:
    """Return float32 values with the nearest 10 bits of mantissa; halfway between two, the even ones."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


def emulate_tf32(network: nn.Module) -> nn.Module:
    """Round the weights of products of a float32 network in place, and their later inputs, to TF32."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            with torch.no_grad():
                layer.weight.copy_(rounded_to_tf32(layer.weight))
            layer.register_forward_pre_hook(lambda layer, inputs: tuple(map(rounded_to_tf32, inputs)))
    return network


#: Functions that change a float32 network into a precision, in place.
PRECISIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    FULL: lambda network: network,
    BF16: lambda network: network.to(torch.bfloat16),
    EMULATED: emulate_fp16,
    FP16: lambda network: network.to(torch.float16),
    TF32: emulate_tf32,
}
#: In what products and convolutions of a decoder compute, with float32 weights.
DECODED_IN = {TF32: torch.float32, FP16: torch.float16, BF16: torch.bfloat16}


def in_precision(network: LightningDiT, name: str) -> LightningDiT:
    """Return a copy of a float32 network in one of `PRECISIONS`."""
    return PRECISIONS[name](copy.deepcopy(network))


def pipeline_in(pipe: LightningDiTPipeline, name: str) -> LightningDiTPipeline:
    """Return a pipeline like a float32 one, with copies of its networks in a precision."""
    other = copy.copy(pipe)
    other.transformer = in_precision(pipe.transformer, name)
    other.guide = pipe.guide and in_precision(pipe.guide, name)
    return other.to(pipe.device)


def latent_drift(latents: Tensor, reference: Tensor) -> Figures:
    """Return mean and largest of |x - r| / |r| over latents (N, C, h, w)."""
    errors = (latents - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)  # (N,)
    return {"error": float(errors.mean()), "worst": float(errors.max())}


def pixel_drift(pixels: Tensor, reference: Tensor) -> Figures:
    """Return the shares of uint8 values that differ by more than each of `LEVELS`."""
    steps = (pixels.int() - reference.int()).abs()
    return {"changed": {str(level): float((steps > level).double().mean()) for level in LEVELS}}


def sampled(pipe: LightningDiTPipeline, name: str, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return latents (N, C, h, w) and pixels (N, H, W, 3) uint8 of classes (N,) in a precision."""
    print(f"In {name}: ", end="")
    latents = sample_images(pipeline_in(pipe, name), labels, SEED, "latent").images
    pixels = [to_uint8(pipe.tokenizer.decode(batch)).cpu() for batch in latents.split(BATCH_SIZE)]
    return latents, torch.cat(pixels)


def drift_rows(pipe: LightningDiTPipeline, names: Sequence[str], labels: Tensor) -> list[tuple[Figures, Tensor]]:
    """Return for each precision the drift of the images of classes (N,) from float32, and their pixels."""
    reference, found = sampled(pipe, FULL, labels), []
    for name in names:
        latents, pixels = reference if name == FULL else sampled(pipe, name, labels)
        drift = {**latent_drift(latents, reference[0]), **pixel_drift(pixels, reference[1])}
        found.append(({"precision": name, **drift}, pixels))
    return found


def measure_bundled(args: argparse.Namespace) -> Figures:
    """Return drift, Frechet distance and accuracy of `args.count` images in bf16 and emulated fp16."""
    pipe, judge = full_pipeline(args.model), judge_of(args.model)
    test, labels = real_images(judge, args.data_root, train=False), equal_labels(args.count)
    rows = [
        {**drift, **distance_and_accuracy(judged(judge, pixels, labels), test)}
        for drift, pixels in drift_rows(pipe, (FULL, BF16, EMULATED), labels)
    ]
    return {"count": args.count, "solver": pipe.config.sample.sampling_method, "rows": rows}


def measure_kernels(args: argparse.Namespace) -> Figures:
    """Return the drift of emulated fp16 and of fp16 as this torch computes it on the CPU."""
    pipe = full_pipeline(args.model)
    labels = torch.arange(args.noises) % pipe.config.data.num_classes
    rows = [drift for drift, _ in drift_rows(pipe, (EMULATED, FP16), labels)]
    return {"count": args.noises, "torch": torch.__version__, "rows": rows}


def measure_solvers(args: argparse.Namespace) -> Figures:
    """Return the drift of the latents by each of `SOLVERS` in bf16 and emulated fp16."""
    own, rows = full_pipeline(args.model), []
    labels = torch.arange(args.noises) % own.config.data.num_classes
    for solver, change in SOLVERS.items():
        pipe = own.with_sample(replace(own.config.sample, **change))
        made = {name: sample_images(pipeline_in(pipe, name), labels, SEED, "latent") for name in (FULL, BF16, EMULATED)}
        errors = {name: latent_drift(made[name].images, made[FULL].images)["error"] for name in (BF16, EMULATED)}
        rows.append({"solver": solver, "evaluations": made[FULL].nfe, "errors": errors})
    return {"count": args.noises, "rows": rows}


def full_pipeline(folder: str) -> LightningDiTPipeline:
    """Return the pipeline of a folder on the CPU in float32."""
    config = load_config(Path(folder) / CONFIG_NAME)
    sample = replace(config.sample, precision="fp32", compile=False)  # a copy would run the compiled original
    return LightningDiTPipeline.from_config(replace(config, sample=sample), "cpu")


def seed_weights(network: nn.Module) -> nn.Module:
    """Fill the parameters so that signals keep their size, and return the network in eval mode.

    Matrices and kernels get the standard deviation 0.7 / sqrt(inputs), norms values near 1, other vectors values near
    0; the table of positions stays. The adaLN-Zero of a new model would make every block the identity.
    """
    for index, (name, value) in enumerate(network.named_parameters()):
        if not value.requires_grad:
            continue
        draw = torch.randn(value.shape, generator=generator_for(SEED, index))
        with torch.no_grad():
            if value.ndim > 1:
                value.copy_(draw * 0.7 / value[0].numel() ** 0.5)
            else:
                value.copy_(1 + 0.1 * draw if name.endswith("weight") else 0.02 * draw)
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def follow(network: LightningDiT, noise: Tensor, labels: Tensor, guidance: GuidanceSettings) -> tuple[Tensor, Tensor]:
    """Return the guided velocity at t = 0.5 of noise (N, C, h, w) and classes (N,), and the final latents."""

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return network(x, t[:1], y).float()

    velocity = GuidedVelocity(predict, labels, torch.full_like(labels, network.null_class), guidance)
    once = velocity(noise, torch.full((len(noise),), 0.5))
    method, points = B1_SOLVER
    jumps = jumps_of(guidance)
    return once, integrate_ode(velocity, noise, graded_grid(points, jumps)[0], method, jumps=jumps)


def measure_b1(args: argparse.Namespace) -> Figures:
    """Return the drift of velocity and latents of LightningDiT-B/1 with seeded weights."""
    network = seed_weights(LightningDiT(preset_settings("LightningDiT-B/1", **B1_SETTINGS)))
    return {"count": B1_IMAGES, "rows": seeded_drift(network)}


def seeded_drift(network: LightningDiT) -> list[Figures]:
    """Return the drift of velocity and latents of a float32 network in emulated TF32, bf16 and emulated fp16."""
    size = network.settings
    shape = (B1_IMAGES, size.in_channels, size.input_size, size.input_size)
    noise = draw_noise(shape, [generator_for(SEED, index) for index in range(B1_IMAGES)])
    labels = torch.arange(B1_IMAGES)
    rows: list[Figures] = []
    for name in (FULL, TF32, BF16, EMULATED):
        print(f"Following {len(noise)} seeded latents in {name}", flush=True)
        once, last = follow(in_precision(network, name), noise, labels, B1_GUIDANCE)
        if name == FULL:
            reference = once, last
            continue
        velocity = latent_drift(once, reference[0])["error"]
        rows.append({"precision": name, "velocity": velocity, **latent_drift(last, reference[1])})
    return rows


@torch.inference_mode()
def decoded(model: AutoencoderKL, name: str, latents: Tensor) -> Tensor:
    """Return float32 images (N, 3, H, W) of raw latents (N, C, h, w) in a precision; one at a time, as on the CPU."""
    own = emulate_tf32(copy.deepcopy(model)) if name == TF32 else model
    with autocast(latents.device, DECODED_IN.get(name, torch.float32)):
        return torch.cat([own.decode(one).float() for one in latents.split(1)])


def decoder_rows(model: AutoencoderKL, latents: Tensor) -> list[Figures]:
    """Return how far images of raw latents (N, C, h, w) in each of `DECODED_IN` are from float32's."""
    exact, rows = decoded(model, FULL, latents), []
    for name in DECODED_IN:
        print(f"Decoding {len(latents)} latents in {name}", flush=True)
        images = decoded(model, name, latents)
        levels = (images - exact).abs() * LEVELS_OF_RANGE
        drift = pixel_drift(to_uint8(images), to_uint8(exact))
        rows.append({"precision": name, "mean": float(levels.mean()), "largest": float(levels.max()), **drift})
    return rows


def measure_decode(args: argparse.Namespace) -> Figures:
    """Return the drift of the images of two decoders."""
    pipe = full_pipeline(args.model)
    labels = torch.arange(args.noises) % pipe.config.data.num_classes
    latents = pipe.tokenizer.stats.denormalise(sample_images(pipe, labels, SEED, "latent").images)
    published = seed_weights(AutoencoderKL(AutoencoderSettings())).to(memory_format=LAYOUT)
    seeded = torch.randn(F16D32_LATENTS, generator=generator_for(SEED))
    return {
        "torch": torch.__version__,
        "decoders": [
            {"decoder": "bundled", "count": args.noises, "rows": decoder_rows(pipe.tokenizer.model, latents)},
            {"decoder": "f16d32, seeded", "count": len(seeded), "rows": decoder_rows(published, seeded)},
        ],
    }


def drift_cells(row: Figures) -> list[str]:
    """Return the cells of precision, latents and pixels."""
    figures = (row["error"], row["worst"], *(row["changed"][str(level)] for level in LEVELS))
    return [row["precision"], *(f"{figure:.3%}" for figure in figures)]


DRIFT_HEAD = ("precision", "latents: mean error", "worst image", *(f"pixels off by > {level}" for level in LEVELS))


def bundled_table(part: Figures) -> list[str]:
    """Return the table of the bundled model."""
    rows = [[*drift_cells(row), f"{row['frechet']:.3f}", f"{row['accuracy']:.2%}"] for row in part["rows"]]
    title = f"**The bundled model**, {part['count']} images by the solver `{part['solver']}`, against float32:"
    return [title, "", *table((*DRIFT_HEAD, "Fréchet distance", "seen as asked"), rows)]


def solvers_table(part: Figures) -> list[str]:
    """Return the table of the drift by several solvers."""
    title = f"**The same by other solvers**, mean error of {part['count']} latents against float32 by the same solver:"
    rows = [
        [row["solver"], str(row["evaluations"]), *(f"{error:.3%}" for error in row["errors"].values())]
        for row in part["rows"]
    ]
    return [title, "", *table(("solver", "evaluations", BF16, EMULATED), rows)]


def kernels_table(part: Figures) -> list[str]:
    """Return the table that puts emulated fp16 beside torch's kernels."""
    title = f"**Emulated fp16 and torch {part['torch']}'s own on the CPU**, {part['count']} images, against float32:"
    return [title, "", *table(DRIFT_HEAD, map(drift_cells, part["rows"]))]


def b1_table(part: Figures) -> list[str]:
    """Return the table of LightningDiT-B/1."""
    method, points = B1_SOLVER
    title = (
        f"**LightningDiT-B/1 with seeded weights**, {part['count']} latents of 32x16x16, guidance"
        f" {B1_GUIDANCE.cfg_scale:g} from t = {B1_GUIDANCE.cfg_interval_start:g} on {B1_GUIDANCE.guided_channels}"
        f" channels, {points - 1} evaluations of `{method}`, against float32:"
    )
    rows = [
        [row["precision"], f"{row['velocity']:.3%}", f"{row['error']:.3%}", f"{row['worst']:.3%}"]
        for row in part["rows"]
    ]
    return [title, "", *table(("precision", "one evaluation", "latents: mean error", "worst image"), rows)]


def decode_table(part: Figures) -> list[str]:
    """Return the table of the decoders."""
    title = f"**Decoders**, errors against float32 in levels of 255, torch {part['torch']} on the CPU:"
    head = ("decoder", "images", "precision", "mean error", "largest", *DRIFT_HEAD[3:5])
    rows = [
        [made["decoder"], str(made["count"]), row["precision"], f"{row['mean']:.4f}", f"{row['largest']:.3f}"]
        + [f"{row['changed'][str(level)]:.3%}" for level in LEVELS[:2]]
        for made in part["decoders"]
        for row in made["rows"]
    ]
    return [title, "", *table(head, rows)]


PARTS: dict[str, Part] = {
    "bundled": (measure_bundled, bundled_table),
    "solvers": (measure_solvers, solvers_table),
    "kernels": (measure_kernels, kernels_table),
    "b1": (measure_b1, b1_table),
    "decode": (measure_decode, decode_table),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.precision_study", description=__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure; default: all")
    add_study_options(parser, count=1000)
    parser.add_argument("--noises", type=positive, default=40, help="images of the parts solvers, kernels and decode")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    run_parts(parse(argv), "precision", PARTS)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
