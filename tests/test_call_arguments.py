"""A call of the pipeline: wrong arguments are one line that names them, and nothing around the call changes images."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from LightningDiT.errors import LightningDiTError
from LightningDiT.sampling.arguments import checked_noise, seeds_of
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.seeds import SEEDS, generator_for


@pytest.fixture(scope="module")
def pipe(tiny_source: Path) -> LightningDiTPipeline:
    return LightningDiTPipeline.from_config(tiny_source / "config.yaml", device="cpu")


def latents(pipe: LightningDiTPipeline, labels: Any = (0, 2), **options: Any) -> Tensor:
    return pipe(labels, num_inference_steps=3, output_type="latent", **options).images


# --- seeds


def test_neighbouring_seeds_and_indices_have_generators_of_their_own() -> None:
    pairs = [(seed, index) for seed in range(30) for index in range(30)]
    assert len({generator_for(*pair).initial_seed() for pair in pairs}) == len(pairs)
    again = torch.randn(4, generator=generator_for(7, 3))
    assert torch.equal(torch.randn(4, generator=generator_for(7, 3)), again)


@pytest.mark.parametrize("seeds", [(SEEDS,), (0, SEEDS), (-1, 0)])
def test_a_seed_that_numpy_would_split_is_refused(seeds: tuple[int, ...]) -> None:
    """It takes 2^32 for the pair (0, 1), whose image is another one."""
    with pytest.raises(LightningDiTError, match="seed (4294967296|-1) is out of range; 0 to 4294967295 are expected"):
        generator_for(*seeds)
    assert generator_for(SEEDS - 1).initial_seed() != generator_for(0).initial_seed()


@pytest.mark.parametrize("indices", [[4, 0], (4, 0), np.array([4, 0]), torch.tensor([4, 0]), (k for k in (4, 0))])
def test_indices_come_as_any_list(indices: Any) -> None:
    assert seeds_of(np.int64(3), indices, 2) == [(3, 4), (3, 0)]
    assert seeds_of(torch.tensor(3), None, 3) == [(3, 0), (3, 1), (3, 2)]


@pytest.mark.parametrize(
    ("seed", "indices", "said"),
    [
        ([1, 2], None, "seed is [1, 2]; a whole number is expected"),
        ("1", None, "seed is '1'; a whole number is expected"),
        (True, None, "seed is True; a whole number is expected"),
        (1.5, None, "seed is 1.5; a whole number is expected"),
        (None, None, "seed is None; a whole number is expected"),
        (-1, None, "seed is -1; 0 to 4294967295 are expected"),
        (SEEDS, None, f"seed is {SEEDS}; 0 to 4294967295 are expected"),
        (0, [0, 1, 2], "3 indices are given for 2 images"),
        (0, [0], "1 indices are given for 2 images"),
        (0, 5, "1 indices are given for 2 images"),
        (0, [0, -1], "an index is -1; 0 to 4294967295 are expected"),
        (0, "10", "an index is '10'; a whole number is expected"),
        (0, {1, 0}, "indices are in a set; a list is expected"),
        (0, np.zeros((2, 1), int), "indices are in a ndarray of 2 dimensions; a list is expected"),
    ],
)
def test_seeds_that_cannot_be_are_named(seed: Any, indices: Any, said: str) -> None:
    with pytest.raises(LightningDiTError) as refused:
        seeds_of(seed, indices, 2)
    assert refused.value.message == said


# --- labels and latents


@pytest.mark.parametrize(
    "labels", [[2], torch.tensor(2), np.array(2), np.int64(2), torch.tensor([2]), iter([2]), {2: 0}.keys()]
)
def test_one_class_comes_as_any_number(labels: Any, pipe: LightningDiTPipeline) -> None:
    assert pipe(labels, num_inference_steps=2, output_type="latent").labels == [2]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (None, "a class is None; a whole number is expected"),
        (1.0, "a class is 1.0; a whole number is expected"),
        ([0, True], "a class is True; a whole number is expected"),
        (b"Bag", "a class is b'Bag'; a whole number is expected"),
        ({0, 1}, "class_labels are in a set; a list is expected"),
        ({0: 1}, "class_labels are in a dict; a list is expected"),
        (torch.zeros(2, 2, dtype=torch.long), "class_labels are in a Tensor of 2 dimensions; a list is expected"),
    ],
)
def test_labels_that_cannot_be_are_named(labels: Any, said: str, pipe: LightningDiTPipeline) -> None:
    with pytest.raises(LightningDiTError) as refused:
        pipe(labels)
    assert refused.value.message == said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.zeros(1, 4, 8, 8, dtype=torch.complex64), "latents are of torch.complex64; real numbers are expected"),
        (torch.zeros(1, 4, 8, 8, dtype=torch.bool), "latents are of torch.bool; real numbers are expected"),
        (torch.zeros(4, 8, 8), "latents have the shape [4, 8, 8]; [1, 4, 8, 8] is expected"),
        ("noise", "latents are of type str; a tensor is expected"),
    ],
)
def test_latents_that_are_no_noise_are_named(given: Any, said: str) -> None:
    with pytest.raises(LightningDiTError, match=re.escape(said)):
        checked_noise(given, (1, 4, 8, 8), reverse=False)


def test_settings_are_checked_by_whatever_way_they_come(pipe: LightningDiTPipeline) -> None:
    sample = pipe.config.sample
    with pytest.raises(LightningDiTError, match=r"sample.cfg_scale is -3.0; a scale from 0 to below 10000 is expected"):
        pipe.with_sample(dataclasses.replace(sample, cfg_scale=-3.0))
    with pytest.raises(LightningDiTError, match=r"sample.timestep_shift is None; float is expected"):
        pipe.with_sample(dataclasses.replace(sample, timestep_shift=None))
    with pytest.raises(LightningDiTError, match=r"sample.cfg_interval_start is 0.5, after cfg_interval_end 0.2"):
        pipe.with_sample(dataclasses.replace(sample, cfg_interval_start=0.5, cfg_interval_end=0.2))
    with pytest.raises(LightningDiTError, match="guidance_scale is 1e[+]30; a scale from 0 to below 10000 is expected"):
        pipe([0], guidance_scale=1e30)
    assert torch.equal(latents(pipe, guidance_scale=np.float32(2)), latents(pipe, guidance_scale=2.0))


# --- the state around a call


def test_the_default_dtype_and_autocast_of_the_caller_change_nothing(pipe: LightningDiTPipeline) -> None:
    plain = latents(pipe)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(latents(pipe), plain)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(latents(pipe), plain)
        assert torch.is_autocast_enabled("cpu") if torch.__version__ >= "2.4" else torch.is_autocast_cpu_enabled()


def test_a_network_in_training_samples_as_in_evaluation_and_goes_on_training(tiny_source: Path) -> None:
    pipe = LightningDiTPipeline.from_config(tiny_source / "config.yaml", device="cpu")
    plain = latents(pipe)
    pipe.transformer.train()
    pipe.transformer.final_layer.eval()
    state = torch.get_rng_state()
    seen: list[bool] = []
    assert torch.equal(latents(pipe, callback=lambda *_: seen.append(pipe.transformer.training)), plain)
    assert seen == [False, False]
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.transformer.training and pipe.transformer.y_embedder.training
    assert not pipe.transformer.final_layer.training


@pytest.mark.parametrize("kind", ["pt", "latent"])
def test_tensors_of_a_call_serve_autograd_and_may_be_changed(kind: str, pipe: LightningDiTPipeline) -> None:
    made = pipe([0, 1, 2], num_inference_steps=2, output_type=kind, batch_size=2).images
    factor = torch.ones((), requires_grad=True)
    (factor * made).sum().backward()
    torch.testing.assert_close(factor.grad, made.sum())
    assert made.clone().add_(1).sum() == (made + 1).sum()
    made.mul_(0)
    assert made.count_nonzero() == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_of_a_pipeline_samples_the_same(copied: Any, pipe: LightningDiTPipeline) -> None:
    other = copied(pipe)
    assert torch.equal(latents(other, seed=4), latents(pipe, seed=4))
    assert other._networks.lock is not pipe._networks.lock
    other.transformer.final_layer.linear.weight.data.mul_(2)
    assert not torch.equal(latents(other, seed=4), latents(pipe, seed=4))


def test_a_device_that_cannot_be_used_leaves_the_pipeline_where_it_is(pipe: LightningDiTPipeline) -> None:
    with pytest.raises(LightningDiTError, match="device 'xla' cannot be used"):
        pipe.to("xla")
    assert pipe.device == torch.device("cpu")
    assert latents(pipe).isfinite().all()
