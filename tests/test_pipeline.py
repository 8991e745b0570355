"""The pipeline: reproducible, the same in every batch, and clear about what is wrong with its files."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import to_uint8
from LightningDiT.pipeline import LightningDiTPipeline, verify_config
from LightningDiT.transport.guidance import guided_velocity


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
    y, null = torch.tensor([0]), torch.tensor([3])
    with torch.no_grad():
        guided = guided_velocity(pipe.transformer, noise, torch.zeros(1), y, null, 2.0, guided_channels=None)
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
    assert len(verify_config(tmp_path / "saved" / "config.yaml")) == 4


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
        "is not finite": {"guidance_scale": float("nan")},
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
        ("XS/2", "S/2", "holds LightningDiT-XS/2 and does not fit .*hidden_size is 192 in the file and 384"),
        (
            'num_classes: 3, class_names: ["cat, house cat", dog, "sea lion"]',
            "num_classes: 9",
            "num_classes is 3 in the file and 9",
        ),
        ("image_size: 16", "image_size: 32", "input_size is 8 in the file and 16"),
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
