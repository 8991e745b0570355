"""The pipeline: reproducible, the same in every batch, and clear about what is wrong with its files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from LightningDiT import inference
from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.compiling import Plan, Work, is_compiled
from LightningDiT.config import SampleConfig, load_config
from LightningDiT.device import Abilities
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import UNFINISHED
from LightningDiT.images import to_uint8
from LightningDiT.loading import guidance_of, make_model, model_settings
from LightningDiT.models.adapters import base_digest
from LightningDiT.models.lightningdit import LightningDiT
from LightningDiT.models.unet import UNet
from LightningDiT.sampling import networks
from LightningDiT.sampling.calibrated import (
    CalibratedSolver,
    SolverFile,
    guide_fingerprint,
    load_solvers,
    save_solvers,
    weights_fingerprint,
)
from LightningDiT.sampling.dry_run import verify, verify_config
from LightningDiT.sampling.options import apply_options
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.sampling.resumable_run import manifest_of
from LightningDiT.sampling.solver_choice import solver_of
from LightningDiT.transport import GuidanceSettings
from tests.conftest import BUNDLED, COMPUTED, PROJECT, seeded_tensor


@pytest.fixture(scope="module")
def pipe(tiny_source: Path) -> LightningDiTPipeline:
    return LightningDiTPipeline.from_config(tiny_source / "config.yaml", device="cpu")


def test_the_pipeline_is_euler_with_guidance_then_decoding(pipe: LightningDiTPipeline) -> None:
    """Every step written out, against the call."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    labels, null = torch.tensor([0, 2]), torch.tensor([3, 3])
    state, times = noise, torch.linspace(0, 1, 4)
    with torch.no_grad():
        for start, end in itertools.pairwise(times):
            t = start.expand(2)
            conditional = pipe.transformer(state, t, labels)
            unconditional = pipe.transformer(state, t, null)
            state = state + (end - start) * (unconditional + 2.0 * (conditional - unconditional))
        pixels = to_uint8(pipe.tokenizer.decode_latents(state * 1.7 + 0.3))
    out = pipe([0, 2], latents=noise, output_type="latent")
    torch.testing.assert_close(out.images, state, atol=1e-5, rtol=1e-5)
    assert out.nfe == 3
    difference = np.abs(pipe([0, 2], latents=noise, output_type="np").images.astype(int) - pixels.numpy())
    assert difference.max() <= 1


def test_an_image_depends_on_seed_and_index_alone(pipe: LightningDiTPipeline) -> None:
    together = pipe([0, 1, 2, 0, 1], seed=7, output_type="np", batch_size=5).images
    apart = pipe([0, 1, 2, 0, 1], seed=7, output_type="np", batch_size=2).images
    assert np.abs(together.astype(int) - apart.astype(int)).max() <= 1
    third = pipe([2], seed=7, indices=[2], output_type="np").images
    assert np.abs(third[0].astype(int) - together[2].astype(int)).max() <= 1
    other = pipe([2], seed=8, indices=[2], output_type="np").images
    assert np.abs(other[0].astype(int) - together[2].astype(int)).max() > 20


def test_output_types_hold_the_same_picture(pipe: LightningDiTPipeline) -> None:
    outputs = {kind: pipe([1], seed=1, output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    pixels = outputs["np"].images
    assert isinstance(outputs["pil"].images[0], Image.Image)
    np.testing.assert_array_equal(np.asarray(outputs["pil"].images[0]), pixels[0])
    np.testing.assert_array_equal(to_uint8(outputs["pt"].images).numpy(), pixels)
    decoded = pipe.tokenizer.decode(outputs["latent"].images)
    np.testing.assert_array_equal(to_uint8(decoded).numpy(), pixels)
    assert outputs["pil"].seeds == [(1, 0)]
    assert outputs["pil"].labels == [1]
    assert outputs["pil"].dtype == torch.float32
    assert outputs["pil"].seconds > 0


def test_the_callback_sees_every_step(pipe: LightningDiTPipeline) -> None:
    seen: list[tuple[int, float]] = []
    pipe([0], num_inference_steps=6, callback=lambda step, t, state: seen.append((step, round(t, 4))))
    assert seen == [(0, 0.2), (1, 0.4), (2, 0.6), (3, 0.8), (4, 1.0)]


def test_scale_one_needs_no_null_class(pipe: LightningDiTPipeline) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = pipe([0], latents=noise, guidance_scale=1.0, num_inference_steps=2, output_type="latent").images
    with torch.no_grad():
        expected = noise + pipe.transformer(noise, torch.zeros(1), torch.tensor([0]))
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        guided = pipe.guided([0], pipe.config.sample)(noise, torch.zeros(1))
    assert (guided - (expected - noise)).abs().max() > 1e-2


def test_the_sde_ends_near_nothing_but_finite_and_reproducible(pipe: LightningDiTPipeline) -> None:
    config = dataclasses.replace(
        pipe.config, sample=dataclasses.replace(pipe.config.sample, mode="SDE", num_sampling_steps=5)
    )
    stochastic = LightningDiTPipeline.from_config(config, device="cpu")
    first, second = (stochastic([0, 1], seed=3, output_type="latent") for _ in range(2))
    torch.testing.assert_close(first.images, second.images, atol=0, rtol=0)
    assert first.images.isfinite().all()
    alone = stochastic([1], seed=3, indices=[1], output_type="latent")
    torch.testing.assert_close(alone.images[0], first.images[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling_method": "dopri5"}, "Dopri5"),
        ({"sampling_method": "heun", "timestep_shift": 0.3}, "go with mode ODE"),
        ({"sampling_method": "heun", "time_grid": "graded"}, "go with mode ODE"),
        ({"sampling_method": "heun", "last_step": "Never"}, "Never"),
        ({"sampling_method": "heun", "diffusion_form": "square"}, "square"),
    ],
)
def test_the_sde_refuses_what_it_does_not_have(
    change: dict[str, object], message: str, pipe: LightningDiTPipeline
) -> None:
    sample = dataclasses.replace(pipe.config.sample, mode="SDE", **change)
    with pytest.raises(LightningDiTError, match=message):
        LightningDiTPipeline.from_config(dataclasses.replace(pipe.config, sample=sample), device="cpu")


def test_a_graded_grid_is_not_shifted_too(pipe: LightningDiTPipeline) -> None:
    sample = dataclasses.replace(pipe.config.sample, time_grid="graded", timestep_shift=0.3)
    with pytest.raises(LightningDiTError, match="timestep_shift goes with time_grid shifted"):
        LightningDiTPipeline.from_config(dataclasses.replace(pipe.config, sample=sample), device="cpu")


def test_the_sde_takes_its_settings_from_the_configuration(pipe: LightningDiTPipeline) -> None:
    ends = []
    for change in ({}, {"last_step": None}, {"sampling_method": "heun"}, {"diffusion_norm": 0.5}):
        sample = dataclasses.replace(pipe.config.sample, mode="SDE", num_sampling_steps=4, **change)
        stochastic = LightningDiTPipeline.from_config(dataclasses.replace(pipe.config, sample=sample), device="cpu")
        ends.append(stochastic([0], seed=1, output_type="latent").images)
    for end in ends[1:]:
        assert (end - ends[0]).abs().max() > 1e-3


def test_a_saved_pipeline_gives_the_same_images(pipe: LightningDiTPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    again = LightningDiTPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    np.testing.assert_array_equal(again([0, 1], output_type="np").images, pipe([0, 1], output_type="np").images)
    assert again.labels == pipe.labels
    assert len(verify_config(tmp_path / "saved" / "config.yaml")) == 5


def test_half_precision_stays_near(pipe: LightningDiTPipeline, tiny_source: Path) -> None:
    half = LightningDiTPipeline.from_config(tiny_source / "config.yaml", device="cpu").to("cpu", torch.bfloat16)
    assert half([0]).dtype == torch.bfloat16
    full_latent = pipe([0], output_type="latent").images
    half_latent = half([0], output_type="latent").images
    assert half_latent.dtype == torch.float32
    error = (half_latent - full_latent).norm() / full_latent.norm()
    assert 0 < error < 0.05


def test_wrong_arguments_are_named(pipe: LightningDiTPipeline) -> None:
    cases = {
        "output_type 'jpg' is unknown": {"output_type": "jpg"},
        "num_inference_steps is 1; 2 or more": {"num_inference_steps": 1},
        r"latents have the shape \[1, 4, 4, 4\]; \[1, 4, 8, 8\]": {"latents": torch.zeros(1, 4, 4, 4)},
        "values that are not finite": {"latents": torch.full((1, 4, 8, 8), float("inf"))},
    }
    for message, arguments in cases.items():
        with pytest.raises(LightningDiTError, match=message):
            pipe([0], **arguments)
    with pytest.raises(LightningDiTError, match="class_labels is empty"):
        pipe([])


def edit(folder: Path, old: str, new: str) -> Path:
    path = folder / "config.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("XS/2", "S/2", "holds LightningDiT-XS/2 and does not fit .*hidden_size: 192 in the file, 384"),
        (
            'num_classes: 3, class_names: ["cat, house cat", dog, "sea lion"]',
            "num_classes: 9",
            "num_classes: 3 in the file, 9",
        ),
        ("image_size: 16", "image_size: 32", "input_size: 8 in the file, 16"),
        ("transformer.safetensors", "tokenizer.safetensors", "no LightningDiT: tensors x_embedder"),
        ("transformer.safetensors", "absent.safetensors", "absent.safetensors does not exist"),
        ("data_path: .", "data_path: latents_stats.pt", "is a file; the folder that holds latents_stats.pt"),
        ("data_path: .", "data_path: elsewhere", "latents_stats.pt does not exist"),
        ("model_name: tokenizer.yaml", "model_name: other.yaml", "is neither one of"),
    ],
)
def test_files_that_do_not_fit_are_named(old: str, new: str, message: str, tiny_folder: Path) -> None:
    path = edit(tiny_folder, old, new)
    for open_it in (verify_config, LightningDiTPipeline.from_config):
        with pytest.raises(LightningDiTError, match=message):
            open_it(path)


def test_a_model_without_a_null_class_is_named_as_such(tiny_folder: Path) -> None:
    file, name = tiny_folder / "transformer.safetensors", "y_embedder.embedding_table.weight"
    weights = load_weights(file)
    save_weights(weights | {name: weights[name][:-1]}, tiny_folder / "bare.safetensors")
    path = edit(tiny_folder, "transformer.safetensors", "bare.safetensors")
    for open_it in (verify_config, LightningDiTPipeline.from_config):
        with pytest.raises(
            LightningDiTError, match=r"has 3 rows for the 3 classes of .*no null class.*cannot be"
        ) as caught:
            open_it(path)
        assert "num_classes" not in str(caught.value) and "2" not in str(caught.value.fix)


def test_save_pretrained_removes_what_a_killed_one_left(pipe: LightningDiTPipeline, tmp_path: Path) -> None:
    left = tmp_path / f".transformer.safetensors.x1y2z3w4{UNFINISHED}"
    left.write_bytes(b"half")
    pipe.save_pretrained(tmp_path)
    assert not left.exists()


def test_a_configuration_is_no_folder_of_save_pretrained(tiny_folder: Path) -> None:
    with pytest.raises(LightningDiTError, match=r"config.yaml is a file; .*; fix: LightningDiTPipeline.from_config\("):
        LightningDiTPipeline.from_pretrained(tiny_folder / "config.yaml")


def test_nan_in_the_weights_is_found(tiny_folder: Path) -> None:
    file = tiny_folder / "transformer.safetensors"
    weights = {name: value.clone() for name, value in load_weights(file).items()}
    weights["blocks.3.mlp.w12.weight"][5, 5] = float("nan")
    save_weights(weights, file)
    with pytest.raises(LightningDiTError, match=r"blocks\.3\.mlp\.w12\.weight holds NaN"):
        LightningDiTPipeline.from_config(tiny_folder / "config.yaml")


def test_reverse_runs_from_data_to_noise(pipe: LightningDiTPipeline) -> None:
    sample = dataclasses.replace(pipe.config.sample, reverse=True, cfg_scale=1.0, num_sampling_steps=2)
    backwards = LightningDiTPipeline.from_config(dataclasses.replace(pipe.config, sample=sample), device="cpu")
    data = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = data - pipe.transformer(data, torch.ones(1), torch.tensor([1]))
    noise = backwards([1], latents=data, output_type="latent").images
    torch.testing.assert_close(noise, expected, atol=1e-5, rtol=1e-5)


def test_latents_of_another_size_are_refused(tiny_folder: Path) -> None:
    path = edit(tiny_folder, "image_size: 16", "image_size: 32")
    edit(tiny_folder, "downsample_ratio: 2", "downsample_ratio: 4")
    with pytest.raises(LightningDiTError, match=r"vae.downsample_ratio is 4, and 2 in the tokenizer"):
        LightningDiTPipeline.from_config(path)


def test_a_tokenizer_of_other_channels_is_refused(tiny_folder: Path) -> None:
    text = (tiny_folder / "tokenizer.yaml").read_text()
    (tiny_folder / "tokenizer.yaml").write_text(text.replace("embed_dim: 4", "embed_dim: 8"))
    with pytest.raises(LightningDiTError, match=r"of another shape: .*quant_conv"):
        verify_config(tiny_folder / "config.yaml")


#: Where class 0 overflows; the attention of torch 2.2 keeps q k^T in half on the CPU.
LOUDEST = r"blocks\.0\.(mlp\.w3|attn\.proj)"


def loud_pipeline(folder: Path, factor: float, dtype: torch.dtype) -> LightningDiTPipeline:
    """The small pipeline, with a larger embedding of class 0: its modulation grows, and SwiGLU's product more so."""
    loud = LightningDiTPipeline.from_config(folder / "config.yaml", device="cpu")
    loud.transformer.y_embedder.embedding_table.weight[0] *= factor
    return loud.to("cpu", dtype)


def weights_of(pipe: LightningDiTPipeline) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipe.transformer.state_dict().items()}


def assert_untouched(pipe: LightningDiTPipeline, before: dict[str, torch.Tensor]) -> None:
    for name, value in pipe.transformer.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
        assert not value.is_inference()
    assert pipe.dtype == torch.float16


@pytest.mark.parametrize(
    "change", [{}, {"sampling_method": "dopri5", "rtol": 0.1, "atol": 0.1}, {"mode": "SDE", "sampling_method": "euler"}]
)
def test_a_batch_that_overflows_fp16_is_made_again_in_float32(tiny_source: Path, change: dict[str, object]) -> None:
    loud = loud_pipeline(tiny_source, 2e4, torch.float16)
    loud.config = dataclasses.replace(loud.config, sample=dataclasses.replace(loud.config.sample, **change))
    before, used = weights_of(loud), []
    quiet = loud([1], indices=[1], output_type="latent")
    loud.transformer.register_forward_pre_hook(lambda module, inputs: used.append(module.pos_embed.dtype))
    with pytest.warns(UserWarning) as caught:
        out = loud([0, 1], output_type="latent", batch_size=1)
    (warning,) = [str(w.message) for w in caught]
    assert re.match(
        rf"sampling in torch.float16 gave values that are not finite, first the input of {LOUDEST} ", warning
    )
    assert "made again in float32" in warning
    assert caught[0].filename == __file__
    # half until it fails, half to find the layer, float32, and the next batch in half again
    order = [dtype for dtype, _ in itertools.groupby(used)]
    assert order == [torch.float16, torch.float32, torch.float16]
    assert used[-quiet.nfe :] == [torch.float16] * quiet.nfe
    assert_untouched(loud, before)
    torch.testing.assert_close(out.images[1], quiet.images[0], atol=0, rtol=0)
    full = loud.to("cpu", torch.float32)([0], output_type="latent")
    torch.testing.assert_close(out.images[:1], full.images, atol=0, rtol=0)
    assert full.images.isfinite().all()


def test_what_is_finite_in_half_does_not_depend_on_its_batch(tiny_source: Path) -> None:
    loud = loud_pipeline(tiny_source, 2e4, torch.float16)
    quiet = loud([1, 1], output_type="latent", batch_size=2).images
    with pytest.warns(UserWarning, match="made again in float32"):
        mixed = loud([0, 1], output_type="latent", batch_size=2).images
    torch.testing.assert_close(mixed[1], quiet[1], atol=0, rtol=0)
    full = loud.to("cpu", torch.float32)([0, 1], output_type="latent", batch_size=2).images
    torch.testing.assert_close(mixed[0], full[0], atol=0, rtol=0)
    assert (full[1] - mixed[1]).abs().max() > 1e-4  # half is not float32


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_the_weights_are_half_again_when_float32_is_broken_off(tiny_source: Path, error: type[BaseException]) -> None:
    loud = loud_pipeline(tiny_source, 2e4, torch.float16)
    before = weights_of(loud)

    def stop(step: int, t: float, state: torch.Tensor) -> None:
        if loud.dtype == torch.float32:
            raise error

    with pytest.warns(UserWarning, match="again in float32"), pytest.raises((KeyboardInterrupt, LightningDiTError)):
        loud([0], callback=stop)
    assert_untouched(loud, before)


def test_what_overflows_float32_is_an_error_that_names_the_layer(tiny_source: Path) -> None:
    message = rf"torch.float32 gave values that are not finite, first the input of {LOUDEST} at t = 0;"
    with pytest.raises(LightningDiTError, match=message):
        loud_pipeline(tiny_source, 1e25, torch.float32)([0])
    warned = pytest.warns(UserWarning, match=rf"torch.bfloat16 .* {LOUDEST} at t = 0;")
    with warned, pytest.raises(LightningDiTError, match=message):
        loud_pipeline(tiny_source, 1e25, torch.bfloat16)([0])


def test_a_layer_of_the_guide_is_named_as_such(tiny_source: Path) -> None:
    loud = loud_pipeline(tiny_source, 2e4, torch.float16)
    guided = LightningDiTPipeline.from_config(tiny_source / "config.yaml", device="cpu")
    guided.guide = loud.transformer
    guided.to("cpu", torch.float16)
    with pytest.warns(UserWarning, match=rf"first the input of guide\.{LOUDEST} at t = 0;"):
        out = guided([0], output_type="latent")
    full = guided.to("cpu", torch.float32)([0], output_type="latent")
    torch.testing.assert_close(out.images, full.images, atol=0, rtol=0)


def test_the_time_of_a_batch_is_embedded_once_a_step(pipe: LightningDiTPipeline) -> None:
    rows = []
    hook = pipe.transformer.t_embedder.register_forward_pre_hook(lambda module, t: rows.append(len(t[0])))
    pipe([0, 1], output_type="latent", num_inference_steps=4, batch_size=2)
    hook.remove()
    assert rows == [1, 1, 1]


# --- autoguidance: a second, weaker network guides ---


@pytest.fixture
def guided_folder(tiny_folder: Path) -> Path:
    """The small pipeline with other seeded weights as a guide, on three channels from t = 0.3 on."""
    weights = load_weights(tiny_folder / "transformer.safetensors")
    other = {
        name: value if name.endswith(COMPUTED) else seeded_tensor(f"guide.{name}", tuple(value.shape))
        for name, value in weights.items()
    }
    save_weights(other, tiny_folder / "weaker.safetensors")
    edit(
        tiny_folder,
        "cfg_scale: 2.0, guided_channels: all",
        "cfg_scale: 2.5, guided_channels: 3, cfg_interval_start: 0.3, guide_ckpt: weaker.safetensors",
    )
    return tiny_folder


def network_of(weights: Path, like: LightningDiTPipeline) -> LightningDiT:
    """The network of a file, built without the pipeline."""
    network = LightningDiT(like.transformer.settings)
    network.load_state_dict(load_weights(weights))
    return network.eval()


def test_autoguidance_is_what_the_paper_says(guided_folder: Path) -> None:
    """Euler with the guide's prediction for the same labels, written out, against the call."""
    pipe = LightningDiTPipeline.from_config(guided_folder / "config.yaml", device="cpu")
    strong, weak = (network_of(guided_folder / f"{name}.safetensors", pipe) for name in ("transformer", "weaker"))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    labels, state = torch.tensor([0, 2]), noise
    with torch.no_grad():
        for step in range(4):  # t = 0, 0.25, 0.5, 0.75; the last two are guided
            t = torch.full((2,), step / 4)
            velocity = strong(state, t, labels)
            if step > 1:
                guide = weak(state, t, labels)
                velocity[:, :3] = guide[:, :3] + 2.5 * (velocity[:, :3] - guide[:, :3])
            state = state + velocity / 4
    calls: dict[str, list[int]] = {"model": [], "guide": []}
    for name, network in (("model", pipe.transformer), ("guide", pipe.guide)):
        assert network is not None
        network.register_forward_hook(lambda module, inputs, out, seen=calls[name]: seen.append(len(inputs[0])))
    out = pipe([0, 2], latents=noise, num_inference_steps=5, output_type="latent")
    torch.testing.assert_close(out.images, state, atol=1e-5, rtol=1e-5)
    assert calls == {"model": [2, 2, 2, 2], "guide": [2, 2]}
    assert out.nfe == 4


def test_a_pipeline_that_guides_itself_is_unguided(guided_folder: Path) -> None:
    edit(guided_folder, "weaker", "transformer")
    pipe = LightningDiTPipeline.from_config(guided_folder / "config.yaml", device="cpu")
    unguided = pipe([0, 1], guidance_scale=1.0, output_type="latent").images
    for scale in (0.0, 3.0, 10.0):
        assert torch.equal(pipe([0, 1], guidance_scale=scale, output_type="latent").images, unguided)


def test_the_guide_moves_and_is_saved_with_the_pipeline(guided_folder: Path, tmp_path: Path) -> None:
    pipe = LightningDiTPipeline.from_config(guided_folder / "config.yaml", device="cpu")
    pipe.save_pretrained(tmp_path / "saved")
    (guided_folder / "weaker.safetensors").unlink()
    again = LightningDiTPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    np.testing.assert_array_equal(again([0, 1], output_type="np").images, pipe([0, 1], output_type="np").images)
    lines = verify_config(tmp_path / "saved" / "config.yaml")
    assert len(lines) == 6
    assert any(line.startswith(f"guide {tmp_path / 'saved' / 'guide.safetensors'}: ") for line in lines)
    assert again.guide is not None
    assert {value.dtype for value in again.to("cpu", torch.bfloat16).guide.parameters()} == {torch.bfloat16}
    exact, half = pipe([0], output_type="latent").images, again([0], output_type="latent").images
    assert 0 < (half - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        ("absent.safetensors", r"the guide weights file .*absent.safetensors does not exist; .*sample.guide_ckpt"),
        ("tokenizer.safetensors", "the guide .*tokenizer.safetensors: no LightningDiT.*sample.guide_ckpt"),
        ("small.safetensors", "the guide .* holds LightningDiT-S/2 .*hidden_size: 384 in the file, 192"),
        ("short.safetensors", "the guide .* tensors 1 missing: blocks.3.mlp.w3.bias"),
    ],
)
def test_a_guide_that_does_not_fit_is_named(guide: str, message: str, guided_folder: Path) -> None:
    config = load_config(guided_folder / "config.yaml")
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, model_type="LightningDiT-S/2"))
    save_weights(LightningDiT(model_settings(small)).state_dict(), guided_folder / "small.safetensors")
    weights = load_weights(guided_folder / "weaker.safetensors")
    save_weights(
        {name: value for name, value in weights.items() if name != "blocks.3.mlp.w3.bias"},
        guided_folder / "short.safetensors",
    )
    path = edit(guided_folder, "weaker.safetensors", guide)
    for open_it in (verify_config, LightningDiTPipeline.from_config):
        with pytest.raises(LightningDiTError, match=message) as caught:
            open_it(path)
        assert "\n" not in str(caught.value)


def test_the_guide_is_an_option_of_the_command_line(guided_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weaker = guided_folder / "weaker.safetensors"
    edit(guided_folder, ", guide_ckpt: weaker.safetensors", "")
    options = ["--config", str(guided_folder / "config.yaml"), "--num-samples", "1", "--guide-ckpt", str(weaker)]
    assert inference.main([*options, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"autoguidance by {weaker}, scale 2.5 on 3 channels" in shown
    assert f"guide {weaker}: " in shown


def test_a_solver_for_classifier_free_guidance_is_refused_under_autoguidance(guided_folder: Path) -> None:
    own, weaker = (guided_folder / f"{name}.safetensors" for name in ("transformer", "weaker"))
    edit(guided_folder, "sample: {", "sample: {sampling_method: calibrated, solver_file: solvers.yaml, ")
    sample = load_config(guided_folder / "config.yaml").sample
    free = dataclasses.replace(sample, guide_ckpt=None)
    file = guided_folder / "solvers.yaml"

    def written(settings: SampleConfig, middle: float) -> CalibratedSolver:
        rows, times = ((middle,), (0.0, 1 - middle)), (0.0, middle, 1.0)
        guide = guide_fingerprint(settings)
        return CalibratedSolver(guidance_of(settings), "Linear", times, rows, 0.5, 1, guide)

    save_solvers(SolverFile(weights_fingerprint(own), (written(free, 0.5),)), file)
    config = load_config(guided_folder / "config.yaml")

    def found(settings: SampleConfig) -> CalibratedSolver | None:
        return solver_of(config, settings).calibrated

    assert found(free) == written(free, 0.5)
    pipe = LightningDiTPipeline.from_config(config, device="cpu")
    with pytest.raises(LightningDiTError, match=r"no solver .* autoguidance \(guide [0-9a-f]{16}\) 2.5 on 3 channels"):
        pipe([0])
    both = load_solvers(file).with_solver(written(sample, 0.25))
    assert len(both.solvers) == 2
    save_solvers(both, file)
    assert set(load_solvers(file).solvers) == set(both.solvers)
    assert found(sample) == written(sample, 0.25)
    assert found(free) == written(free, 0.5)
    save_weights({name: 0.5 * value for name, value in load_weights(weaker).items()}, weaker)
    with pytest.raises(LightningDiTError, match="has no solver"):  # another guide, another solver
        found(sample)


def test_a_guide_of_digits_alone_comes_back_as_text(tmp_path: Path) -> None:
    guidance, guide = GuidanceSettings(2.0, 0.0, 1.0, "all"), "1234567890123456"
    solver = CalibratedSolver(guidance, "Linear", (0.0, 1.0), ((1.0,),), 0.5, 1, guide)
    file = SolverFile("0123456789012345", (solver,))
    save_solvers(file, tmp_path / "solvers.yaml")
    assert load_solvers(tmp_path / "solvers.yaml") == file


def test_solver_files_from_before_autoguidance_read_and_write_unchanged(tmp_path: Path) -> None:
    file = load_solvers(BUNDLED / "solvers.yaml")
    assert {solver.guide for solver in file.solvers} == {None}
    save_solvers(file, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_bytes() == (BUNDLED / "solvers.yaml").read_bytes()


# what is settled once, and what a call may not ask for


def with_settings(folder: Path, **change: object) -> LightningDiTPipeline:
    config = load_config(folder / "config.yaml")
    sample = dataclasses.replace(config.sample, **change)
    return LightningDiTPipeline.from_config(dataclasses.replace(config, sample=sample), device="cpu")


def test_steps_that_a_solver_chooses_suit_each_image_alone(tiny_folder: Path) -> None:
    pipe = with_settings(tiny_folder, sampling_method="dopri5")
    together = pipe([0, 1, 2], seed=3, output_type="latent", batch_size=3)
    alone = [pipe([label], seed=3, indices=[label], output_type="latent") for label in range(3)]
    assert torch.equal(together.images, torch.cat([one.images for one in alone]))
    assert together.nfe == max(one.nfe for one in alone)


def test_the_evaluations_are_those_of_the_image_that_takes_most(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, taken = with_settings(tiny_folder, sampling_method="dopri5"), iter((12, 30, 20))
    state = torch.zeros(1, *pipe.latent_shape)
    monkeypatch.setattr(pipe, "_solve", lambda *given, **named: (state, next(taken)))
    assert pipe([0, 1, 2], output_type="latent").nfe == 30


def test_a_solver_file_is_read_once(tiny_folder: Path) -> None:
    file = tiny_folder / "solvers.yaml"
    sample = dataclasses.replace(
        load_config(tiny_folder / "config.yaml").sample, sampling_method="fast", solver_file=str(file)
    )
    solver = CalibratedSolver(guidance_of(sample), "Linear", (0.0, 0.5, 1.0), ((0.5,), (0.0, 0.5)), 0.5, 1)
    save_solvers(SolverFile(weights_fingerprint(tiny_folder / "transformer.safetensors"), (solver,)), file)
    pipe = with_settings(tiny_folder, sampling_method="fast", solver_file=str(file))
    first = pipe([0], output_type="latent")
    file.unlink()  # what a run began with is what it ends with
    assert torch.equal(pipe([0], output_type="latent").images, first.images)
    assert first.nfe == 2


@pytest.mark.parametrize("source", ["tiny_folder", "guided_folder"])
def test_a_rounded_copy_keeps_its_calibrated_solvers(
    source: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(source)
    file = folder / "solvers.yaml"
    sample = dataclasses.replace(load_config(folder / "config.yaml").sample, solver_file=str(file))
    steps, guide = ((0.0, 0.5, 1.0), ((0.5,), (0.0, 0.5))), guide_fingerprint(sample)
    solver = CalibratedSolver(guidance_of(sample), "Linear", *steps, 0.5, 1, guide)
    save_solvers(SolverFile(weights_fingerprint(folder / "transformer.safetensors"), (solver,)), file)
    pipe = with_settings(folder, sampling_method="fast", solver_file=str(file), precision="bf16")
    pipe.save_pretrained(tmp_path / "saved")
    again = LightningDiTPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    rounded = guide_fingerprint(again.config.sample)
    assert (rounded is None) == (guide is None)
    assert again.solver(again.config.sample).calibrated == dataclasses.replace(solver, guide=rounded)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; 1 or more"),
        ({"batch_size": -1}, "batch_size is -1; 1 or more"),
        ({"num_inference_steps": 1}, "num_inference_steps is 1; 2 or more"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5; int is expected"),
        ({"num_inference_steps": "5"}, "num_inference_steps is '5'; int is expected"),
        ({"guidance_scale": -3.0}, "guidance_scale is -3.0; a scale from 0 to below 10000"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; a scale from 0 to below 10000"),
        ({"guidance_scale": "2"}, "guidance_scale is '2'; float is expected"),
    ],
)
def test_a_call_is_held_to_the_rules_of_the_configuration(
    call: dict[str, object], message: str, pipe: LightningDiTPipeline
) -> None:
    with pytest.raises(LightningDiTError, match=re.escape(message)):
        pipe([0], **call)


def test_labels_and_latents_of_numpy_are_taken(pipe: LightningDiTPipeline) -> None:
    noise = torch.randn((1, *pipe.latent_shape), generator=torch.Generator().manual_seed(0))
    wanted = pipe([1], latents=noise, output_type="latent").images
    assert torch.equal(pipe(np.array([1]), latents=noise.numpy(), output_type="latent").images, wanted)


def test_from_data_to_noise_needs_the_data(tiny_folder: Path) -> None:
    with pytest.raises(LightningDiTError, match="no latents are given"):
        with_settings(tiny_folder, reverse=True)([0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guided_channels": 9}, "guided_channels is 9, and model.in_chans 4"),
        ({"sampling_method": "ab3", "time_grid": "graded", "num_sampling_steps": 2}, "expected at least 3"),
        ({"sampling_method": "calibrated"}, "needs sample.solver_file"),
        ({"mode": "SDE", "sampling_method": "fast"}, "fast goes with mode ODE"),
        ({"deterministic": True, "compile": "on"}, "deterministic goes without compile"),
    ],
)
def test_the_check_before_a_run_refuses_what_sampling_would(
    change: dict[str, object], message: str, tiny_folder: Path
) -> None:
    config = load_config(tiny_folder / "config.yaml")
    sample = dataclasses.replace(config.sample, cfg_interval_start=0.2, **change)
    with pytest.raises(LightningDiTError, match=message):
        verify(dataclasses.replace(config, sample=sample))


def test_an_interval_of_no_length_is_one_jump(tiny_folder: Path) -> None:
    change = {"sampling_method": "ab3", "num_sampling_steps": 8, "cfg_interval_start": 0.5, "cfg_interval_end": 0.5}
    for grid in ("shifted", "graded"):
        out = with_settings(tiny_folder, time_grid=grid, **change)([0], output_type="latent")
        assert out.images.isfinite().all()


def test_a_device_that_is_not_there_is_one_line(tiny_folder: Path) -> None:
    with pytest.raises(LightningDiTError, match="device 'nowhere' cannot be used"):
        LightningDiTPipeline.from_config(tiny_folder / "config.yaml", device="nowhere")


# torch.compile as a switch


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="a CPU's torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("error:torch.compile does not work here")
def test_a_compiled_pipeline_gives_the_same_images(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch is read, the pixels differ by one level at most, and the names of the weights are the same."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tiny_folder / "code"))
    path = tiny_folder / "config.yaml"
    options = ["--config", str(path), "--demo", "--compile"]
    config = apply_options(load_config(path), inference.parse(options))
    assert (load_config(path).sample.compile, config.sample.compile) == ("auto", "on")
    plain, compiled = (LightningDiTPipeline.from_config(one, "cpu") for one in (path, config))
    images = [pipe([0, 2], seed=1, output_type="np").images.astype(int) for pipe in (plain, compiled)]
    assert any(map(is_compiled, compiled.transformer.modules()))
    assert not any(map(is_compiled, plain.transformer.modules()))
    assert len(list((tiny_folder / "code").glob("lightningdit-*.json"))) == 1
    assert abs(images[0] - images[1]).max() <= 1
    compiled.save_pretrained(tiny_folder / "saved")
    names = load_weights(tiny_folder / "transformer.safetensors").keys()
    assert load_file(tiny_folder / "saved" / "transformer.safetensors").keys() == names
    assert load_config(tiny_folder / "saved" / "config.yaml").sample.compile == "on"


# warnings

USER_SCRIPT = """
import dataclasses, sys
import torch
from LightningDiT.pipeline import LightningDiTPipeline

folder = sys.argv[1]
pipe = LightningDiTPipeline.from_config(folder + "/config.yaml", device="cpu")

def full(step, t, state):
    if len(state) > 1:
        torch.empty(2**59, dtype=torch.uint8)

pipe([1, 2], batch_size=2, callback=full)  # memory ran out
settings = dataclasses.replace(pipe.config.sample, sampling_method="fast", solver_file=folder + "/solvers.yaml")
pipe.with_sample(settings)([1], guidance_scale=7.5)  # is used instead
pipe.transformer.y_embedder.embedding_table.weight[0] *= 2e4
pipe.to("cpu", torch.float16)
pipe([0])  # made again in float32
"""


def test_warnings_name_the_line_of_the_users_script(tiny_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "user.py"
    script.write_text(USER_SCRIPT)
    shutil.copy(BUNDLED / "solvers.yaml", tiny_folder)
    weights = weights_fingerprint(tiny_folder / "transformer.safetensors")
    solvers = load_solvers(tiny_folder / "solvers.yaml")
    save_solvers(dataclasses.replace(solvers, weights=weights), tiny_folder / "solvers.yaml")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONWARNINGS": "default"}
    command = [sys.executable, str(script), str(tiny_folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for number, line in enumerate(USER_SCRIPT.splitlines(), 1):
        if "  # " in line:
            warning = rf"{re.escape(str(script))}:{number}: UserWarning: .*{line.rpartition('  # ')[2]}"
            assert re.search(warning, done.stderr), done.stderr


# ---- other networks, and adapters


@pytest.fixture
def unet_folder(tiny_folder: Path) -> Path:
    """The small pipeline's folder with a U-Net in the transformer's place."""
    pytest.importorskip("diffusers")
    file = edit(tiny_folder, "LightningDiT-XS/2", "UNet-S")
    model = make_model(model_settings(load_config(file)))
    torch.manual_seed(0)
    weights = {name: 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()}
    save_weights(weights, tiny_folder / "transformer.safetensors")
    return tiny_folder


def test_a_unet_samples_as_a_transformer_does(unet_folder: Path, tmp_path: Path) -> None:
    """Guided Euler steps by hand, in every batch, saved and opened again."""
    unet = LightningDiTPipeline.from_config(unet_folder / "config.yaml", "cpu")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    state, labels, null = noise, torch.tensor([0, 2]), torch.tensor([3, 3])
    with torch.no_grad():
        for start, end in itertools.pairwise(torch.linspace(0, 1, 4)):
            t = start.expand(2)
            weak = unet.transformer(state, t, null)
            state = state + (end - start) * (weak + 2.0 * (unet.transformer(state, t, labels) - weak))
    out = unet([0, 2], latents=noise, output_type="latent").images
    torch.testing.assert_close(out, state, atol=1e-4, rtol=1e-4)
    alone = unet([2], latents=noise[1:], output_type="latent").images
    torch.testing.assert_close(alone[0], out[1], atol=1e-4, rtol=1e-4)
    unet.save_pretrained(tmp_path / "saved")
    again = LightningDiTPipeline.from_pretrained(tmp_path / "saved", "cpu")
    torch.testing.assert_close(again([0, 2], latents=noise, output_type="latent").images, out, atol=1e-4, rtol=1e-4)


def test_a_plan_of_a_unet_compiles_it_whole(unet_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no blocks of one shape; what it computes is asked of its own settings and attention."""
    unet = LightningDiTPipeline.from_config(unet_folder / "config.yaml", "cpu")
    able = Abilities("a card", (9, 0), (2, 11), "", "")
    seen = list[Work]()
    monkeypatch.setattr(networks, "abilities", lambda device: able)
    monkeypatch.setattr(networks, "attention_failure", lambda kernel, *shape: str(shape))
    monkeypatch.setattr(networks, "choose", lambda work, *rest: seen.append(work) or Plan(compiled="block"))
    plan = networks.plan_of(unet.solver(unet.config.sample), unet.transformer, unet.precision, 4, 4)
    assert plan.compiled == "whole"
    assert seen[0].gflop == unet.transformer.settings.gflop and seen[0].kernels == ()
    heads, tokens, width = unet.transformer.attention_shape
    assert networks._attention_failure("flash", unet.transformer).startswith(f"({heads}, {tokens}, {width}, ")
    monkeypatch.setattr(UNet, "attention_shape", None)
    assert networks._attention_failure("flash", unet.transformer) == "the network has no attention"


@pytest.fixture
def adapted(tiny_folder: Path) -> Path:
    """The small pipeline with an adapter that changes one matrix by B A, and no tensor of one dimension."""
    name = "blocks.1.mlp.w3"
    base = load_weights(tiny_folder / "transformer.safetensors")
    out, inner = base[f"{name}.weight"].shape
    changes = {f"{name}.lora_A.weight": torch.full((1, inner), 0.5), f"{name}.lora_B.weight": torch.full((out, 1), 0.5)}
    told = {"adapter_kind": '"lora"', "base_weights": json.dumps(base_digest(base, changes, list(base)))}
    save_weights(changes, tiny_folder / "adapter.safetensors", told)
    path = tiny_folder / "config.yaml"
    path.write_text("adapter_path: adapter.safetensors\n" + path.read_text())
    return path


def test_an_adapter_is_part_of_what_a_run_depends_on(adapted: Path, pipe: LightningDiTPipeline, tmp_path: Path) -> None:
    config = load_config(adapted)
    manifest = manifest_of(config, [0], 0, "float32")
    assert set(manifest["weights"]) - set(manifest_of(pipe.config, [0], 0, "float32")["weights"]) == {"adapter"}
    with_it, without = LightningDiTPipeline.from_config(config, "cpu"), pipe
    images = with_it([0], output_type="latent").images
    assert (images - without([0], output_type="latent").images).abs().max() > 1e-3
    base = weights_fingerprint(config.ckpt_path)
    both = weights_fingerprint(config.ckpt_path, config.adapter_path)
    assert base == weights_fingerprint(pipe.config.ckpt_path) != both == with_it._weights_fingerprint
    with_it.save_pretrained(tmp_path / "merged")
    merged = LightningDiTPipeline.from_pretrained(tmp_path / "merged", "cpu")
    assert merged.config.adapter_path is None
    torch.testing.assert_close(merged([0], output_type="latent").images, images, atol=1e-5, rtol=1e-5)
    assert weights_fingerprint(tmp_path / "merged" / "transformer.safetensors") != base


def test_a_solver_of_other_weights_is_not_taken_for_an_adapter(adapted: Path, tmp_path: Path) -> None:
    config = load_config(adapted)
    solver = CalibratedSolver(guidance_of(config.sample), "Linear", (0.0, 1.0), ((1.0,),), 0.1, 4)
    of_base, of_both = (
        SolverFile(weights_fingerprint(config.ckpt_path, adapter), (solver,)) for adapter in (None, config.adapter_path)
    )
    for file, fits in ((of_base, False), (of_both, True)):
        save_solvers(file, tmp_path / "solvers.yaml")
        sample = dataclasses.replace(
            config.sample, sampling_method="calibrated", solver_file=str(tmp_path / "solvers.yaml")
        )
        if not fits:
            with pytest.raises(LightningDiTError, match="solvers.yaml belongs to weights"):
                solver_of(config, sample)
            continue
        assert solver_of(config, sample).calibrated == solver
        changed = dataclasses.replace(config, sample=sample)
        saved = LightningDiTPipeline.from_config(changed, "cpu")
        saved.save_pretrained(tmp_path / "merged")
        again = LightningDiTPipeline.from_pretrained(tmp_path / "merged", "cpu")
        assert again.solver(again.config.sample).calibrated == solver
