"""Images of XL/1 on a GPU from noise to pixels, by the published procedure and by ours, and the first of a process.

`python -m` this module CONFIG COMPILE COUNT samples twice in a fresh process and prints the seconds as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from LightningDiT.config import load_config
from LightningDiT.console import run_main
from LightningDiT.device import best_device
from LightningDiT.images import to_uint8
from LightningDiT.loading import STATS_NAME
from LightningDiT.sampling.pipeline import LightningDiTPipeline, PipelineOutput
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.config import load_tokenizer_config
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.tokenizer.vavae import autoencoder_settings
from LightningDiT.transport import draw_noise

from .forward import PUBLISHED_FLAGS
from .gpu_networks import compiled_network, lively_tokenizer, plain_transformer
from .loading import write_model
from .machine import PROJECT
from .rounds import Setting
from .rows import Run, cold_code, measured
from .sampling import PUBLISHED_NAME, TOKENIZER, published_procedure

COUNT, QUICK_COUNT = 64, 4
WARM_UP_POINTS = 3  # of the time grid: one step without guidance and one with


def measure_gpu_sampling(setting: Setting, model_type: str = "LightningDiT-XL/1") -> dict[str, Any]:
    """Return images from noise to pixels by the published procedure and by ours."""
    count = QUICK_COUNT if setting.quick else COUNT
    with tempfile.TemporaryDirectory() as folder, cold_code(), torch.inference_mode(False):
        config = write_pipeline(Path(folder), model_type)
        pipe = LightningDiTPipeline.from_config(config, setting.device)
        rows = [measured(PUBLISHED_NAME, count, partial(published_pictures, pipe, count), setting, once=True)]
        for solver, precision, images, wish in (
            ("published", "tf32", count, "auto"),
            ("fast", "auto", count, "on"),
            ("fast", "auto", 1, "on"),
            ("fast", "auto", 1, "off"),
        ):
            chosen = load_config(config)
            sample = replace(chosen.sample, sampling_method=solver, precision=precision, compile=wish)
            pipe = None  # before the next one takes memory
            pipe = LightningDiTPipeline.from_config(replace(chosen, sample=sample), setting.device)
            build = partial(our_pictures, pipe, images)
            row = measured(
                f"ours, {solver}, {precision}, compile {wish}", images, build, setting, once=solver == "published"
            )
            rows.append(row if row.note else replace(row, note=pipe.plan(images, images).describe()))
    return {"rows": rows, "skipped": []}


def measure_gpu_firsts(setting: Setting, model_type: str = "LightningDiT-XL/1") -> dict[str, Any]:
    """Return the seconds until the first images of fresh processes."""
    with tempfile.TemporaryDirectory() as name:
        config = write_pipeline(Path(name), model_type)
        return {"firsts": first_results(config, QUICK_COUNT if setting.quick else COUNT)}


def write_pipeline(folder: Path, model_type: str) -> Path:
    """Write a transformer and a tokenizer with random weights, and return the YAML that names them."""
    tokenizer = load_tokenizer_config(TOKENIZER)
    settings = autoencoder_settings(tokenizer)
    sizes = {"embed_dim": tokenizer.embed_dim, "ddconfig": dict(tokenizer.ddconfig)}
    yaml = {"ckpt_path": lively_tokenizer(tokenizer, folder).name, "model": {"params": sizes}}
    (folder / "tokenizer.yaml").write_text(json.dumps(yaml), encoding="utf-8")  # YAML reads JSON
    shape = (1, settings.embed_dim, 1, 1)
    LatentStats(torch.full(shape, 0.1), torch.ones(shape)).save(folder / STATS_NAME)
    return write_model(
        folder,
        {
            "data": {"data_path": ".", "image_size": settings.resolution},
            "vae": {"model_name": "tokenizer.yaml", "downsample_ratio": settings.downsample_factor},
            "model": {"model_type": model_type, "in_chans": settings.embed_dim, **PUBLISHED_FLAGS},
            "sample": {"cfg_scale": 6.7, "cfg_interval_start": 0.125, "timestep_shift": 0.3},
        },
    )


def published_pictures(pipe: LightningDiTPipeline, count: int) -> Run:
    """Return the published procedure from noise to pixels: float32 with TF32, its layers compiled."""
    model = plain_transformer(pipe.transformer.settings, pipe.transformer.float().state_dict(), pipe.device)
    network, labels = compiled_network(model, torch.float32, tf32=True), list(range(count))
    noise = draw_noise((count, *pipe.latent_shape), [generator_for(0, index) for index in labels]).to(pipe.device)

    t = torch.zeros(2 * count, device=pipe.device)
    network(torch.cat([noise, noise]), t, t.long())  # compiles

    def run() -> Tensor:
        latents = published_procedure(pipe, pipe.config.sample, noise, labels, network)
        return to_uint8(pipe.tokenizer.decode(latents, tf32=True)).cpu()

    return run


def our_pictures(pipe: LightningDiTPipeline, count: int) -> Run:
    """Return our sampling from noise to pixels, planned for a run of `count` images.

    Long runs are measured once, so their code is compiled here.
    """
    plan = pipe.plan(count, count)

    def run(points: int | None = None) -> PipelineOutput:
        with pipe.settled(plan, "the benchmark"):
            return pipe(list(range(count)), num_inference_steps=points, output_type="np", batch_size=count)

    if pipe.config.sample.sampling_method == "published":
        run(WARM_UP_POINTS)
    return run


def first_results(config: Path, count: int) -> list[dict[str, Any]]:
    """Return the seconds of fresh processes until their first images, without code of earlier runs and with it."""
    found = []
    for images, wish in ((1, "off"), (1, "on"), (count, "on")):
        with cold_code():
            for code in ("cold", "warm") if wish == "on" else ("none",):
                print(f"  first result of {images}, compile {wish}, code {code} ...", flush=True)
                module = "LightningDiT.tools.benchmark.gpu_sampling"
                command = [sys.executable, "-m", module, str(config), wish, str(images)]
                done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
                row = {"images": images, "compile": wish, "code": code}
                last = (done.stdout.strip().splitlines() or ["{}"])[-1]
                failed = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                found.append(row | ({"failed": failed} if done.returncode else json.loads(last)))
    return found


def main() -> int:
    """Load a pipeline, sample twice, and print the seconds as JSON; see `first_results`."""
    config, wish, count = load_config(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    started = time.perf_counter()
    config = replace(config, sample=replace(config.sample, compile=wish, sampling_method="fast"))
    pipe = LightningDiTPipeline.from_config(config, best_device())
    seconds = {"loading": time.perf_counter() - started}
    for name in ("first", "second"):
        started = time.perf_counter()
        our_pictures(pipe, count)()
        seconds[name] = time.perf_counter() - started
    print(json.dumps(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
