"""What a GPU computes, against the published outputs, against the CPU and against itself: `python -m pytest --gpu`.

Without --gpu some of them run on the CPU, where `Replay` of `test_networks` stands for recordings, so that mistakes in
the tests show there.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d

from LightningDiT import extract_features, inference
from LightningDiT.checkpoint import save_weights
from LightningDiT.compiling import BLOCK, KERNELS, PLAIN, WHOLE, Plan, compile_forward, is_compiled
from LightningDiT.config import load_config
from LightningDiT.device import (
    HAS_TF32,
    Recording,
    abilities,
    attention_by,
    attention_failure,
    best_device,
    float32_products,
    gpu_count,
)
from LightningDiT.images import to_uint8
from LightningDiT.loading import make_model
from LightningDiT.models.layers import attend
from LightningDiT.models.lightningdit import LightningDiT, preset_settings
from LightningDiT.models.unet import UNetSettings
from LightningDiT.sampling import networks
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.tokenizer.autoencoder import AutoencoderKL, AutoencoderSettings
from LightningDiT.tokenizer.config import TOKENIZER_CONFIGS
from LightningDiT.tokenizer.vavae import VA_VAE
from LightningDiT.tools.benchmark.training import trainer_of
from LightningDiT.training import transformer_training
from LightningDiT.training.guard import NotFiniteError
from LightningDiT.transport import (
    OWN_METHODS,
    GuidanceSettings,
    GuidedVelocity,
    create_transport,
    draw_noise,
    integrate_ode,
    sampling_times,
)
from tests.conftest import ALL_GPUS, GOLDEN, ON_GPU, PROJECT, VISIBLE, seed_weights
from tests.test_all_gpus import command, contents, shared
from tests.test_extract_features import command as extraction
from tests.test_extract_features import images as images
from tests.test_networks import GPU as SOME_GPU
from tests.test_networks import Replay, changed, swap_block, swap_data
from tests.test_train import configured, rows_of, run
from tests.test_train import small as small

pytestmark = pytest.mark.gpu
on_gpu_alone = pytest.mark.gpu(needed=True)

FLOAT32, HALVES = torch.float32, (torch.bfloat16, torch.float16)
ON_GPU_ALONE = [pytest.param(dtype, marks=on_gpu_alone) for dtype in HALVES]
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, *ON_GPU_ALONE], ids=str)
TF32_EPS = 2.0**-10  # 10 bits of mantissa, as in fp16
#: Largest difference of float32 results from the published ones, which a CPU computed.
ON_OTHER_HARDWARE = 1e-3
LABELS = (0, 1, 2, 1)
GRAPHS = Plan(graphs=True, batch=4)
VARIANTS = ["default", "qknorm", "wo_shift", "plain_dit_patch2", "learn_sigma"]

Build = Callable[..., LightningDiT]


def apart(values: Tensor, expected: Tensor) -> float:
    """The relative distance of two tensors on any devices."""
    expected = expected.cpu().double()
    return float((values.cpu().double() - expected).norm() / expected.norm())


def rounding(dtype: torch.dtype) -> float:
    """The relative distance that two orders of summing may have in this precision, over a whole network."""
    return 1e-5 if dtype == FLOAT32 else 8 * torch.finfo(dtype).eps


def needs_tf32(device: torch.device) -> None:
    if (abilities(device).capability or HAS_TF32) < HAS_TF32:
        pytest.skip("TF32 needs a GPU of capability 8.0")


def needs_compiler(device: torch.device) -> None:
    if abilities(device).no_compiler:
        pytest.skip(abilities(device).no_compiler)


@pytest.fixture
def graphs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings: those of the GPU, or the stand-in for them."""
    if device.type == "cpu":
        Replay.made, Replay.most, Replay.failure = [], 2**20, staticmethod(lambda: None)
        monkeypatch.setattr(networks, "Recording", Replay)
        monkeypatch.setattr(networks, "abilities", lambda device: SOME_GPU)


def opened(folder: Path, device: torch.device, dtype: torch.dtype = FLOAT32, **change: object) -> LightningDiTPipeline:
    config = load_config(folder / "config.yaml")
    sample = dataclasses.replace(config.sample, **{"per_proc_batch_size": 4, "precision": "fp32", **change})
    return LightningDiTPipeline.from_config(dataclasses.replace(config, sample=sample), device).to(device, dtype)


def latents(pipe: LightningDiTPipeline, plan: Plan, labels: Sequence[int] = LABELS, **call: Any) -> Tensor:
    with pipe.settled(plan, "the test"):
        return pipe(labels, output_type="latent", **call).images


def test_the_gpus_are_visible_to_the_tests_that_need_one_alone(device: torch.device) -> None:
    """The processes that the tests start inherit it."""
    assert gpu_count() == (1 if ON_GPU else 0)
    assert best_device().type == device.type


# --- the published outputs


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_forwards_meet_the_published_output(
    variant: str, device: torch.device, unit_model: Build, golden: dict[str, Tensor]
) -> None:
    model, expected = unit_model(variant).to(device), golden[f"forward.{variant}"]
    inputs = [golden[name].to(device) for name in ("x", "t", "y")]
    with float32_products(device, False):
        torch.testing.assert_close(model(*inputs).cpu(), expected, atol=ON_OTHER_HARDWARE, rtol=0)
    with float32_products(device, True):
        assert apart(model(*inputs), expected) < 8 * TF32_EPS
    for dtype in HALVES:
        half = copy.deepcopy(model).to(dtype)
        assert 0 < apart(half(*inputs), expected) < 8 * torch.finfo(dtype).eps


@on_gpu_alone
@torch.no_grad()
def test_tf32_rounds_and_float32_does_not(device: torch.device, unit_model: Build, golden: dict[str, Tensor]) -> None:
    needs_tf32(device)
    model, expected = unit_model("default").to(device), golden["forward.default"]
    found = []
    for tf32 in (False, True):
        with float32_products(device, tf32):
            found.append(apart(model(*(golden[name].to(device) for name in ("x", "t", "y"))), expected))
    assert found[0] < 5e-5 < found[1]


@pytest.mark.parametrize("name", ["euler11", "euler21_shift0.3_interval0.125", "euler11_gvp"])
@torch.no_grad()
def test_euler_meets_the_published_samples(
    name: str, device: torch.device, golden: dict[str, Tensor], manifest: dict[str, Any], unit_model: Build
) -> None:
    case = manifest["sample"][name]
    y, model = torch.tensor(case["labels"], device=device), unit_model("default").to(device)
    settings = GuidanceSettings(case["cfg_scale"], case["cfg_interval_start"] if case["cfg_interval"] else 0.0)
    guided = GuidedVelocity(lambda x, t, y: model(x, t.to(device), y), y, torch.full_like(y, 10), settings)
    transport = create_transport(case["path_type"], case["prediction"])
    times = sampling_times(transport, case["num_steps"], case["timestep_shift"])
    for tf32 in (False, True):
        with float32_products(device, tf32):
            last = integrate_ode(guided, golden["sample.noise"].to(device), times, "euler")
        if tf32:
            assert apart(last, golden[f"sample.{name}"]) < 8 * TF32_EPS
        else:
            torch.testing.assert_close(last.cpu(), golden[f"sample.{name}"], rtol=0, atol=ON_OTHER_HARDWARE)


@torch.no_grad()
def test_losses_meet_the_published_ones(
    device: torch.device, golden: dict[str, Tensor], manifest: dict[str, Any], unit_model: Build
) -> None:
    model = unit_model("default").to(device)
    x1, x0, t, y = (golden[f"loss.{name}"].to(device) for name in ("x1", "x0", "t", "y"))
    for case in manifest["loss"]:
        kind = case["path_type"], case["prediction"], case["loss_weight"]
        transport = create_transport(*kind, use_cosine_loss=case["use_cosine_loss"])
        with float32_products(device, False):
            loss = transport.training_losses(model, x1, {"y": y}, x0=x0, t=t)["loss"]
        torch.testing.assert_close(loss.cpu(), golden[case["key"]], rtol=1e-4, atol=ON_OTHER_HARDWARE)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The f16d32 tokenizer with the weights of the golden outputs."""
    path = tmp_path_factory.mktemp("vae") / "tokenizer.safetensors"
    save_weights(seed_weights(AutoencoderKL(AutoencoderSettings())).state_dict(), path)
    return path


def levels(images: Tensor, expected: Tensor) -> Tensor:
    """Differences of pixels."""
    return (to_uint8(images).cpu().int() - to_uint8(expected).cpu().int()).abs()


@on_gpu_alone
def test_the_tokenizer_meets_the_published_output(device: torch.device, autoencoder: Path) -> None:
    """Half precision: below one level of 255 on average, and 2 at most."""
    golden = load_file(GOLDEN / "vavae_f16d32.safetensors")
    vae = VA_VAE(TOKENIZER_CONFIGS / "vavae_f16d32.yaml", ckpt_path=autoencoder, device=device)
    exact = vae.decode_latents(golden["latent"])
    torch.testing.assert_close(exact.cpu(), golden["decoded"], atol=ON_OTHER_HARDWARE, rtol=0)
    posterior = vae.posterior(golden["image"])
    assert apart(posterior.mean, golden["mean"]) < 8 * TF32_EPS  # images are encoded as torch does it by default
    for options in ({"tf32": True}, {"half": True}):
        difference = levels(vae.decode_latents(golden["latent"], **options), golden["decoded"])
        assert difference.float().mean() < 1 and difference.max() <= 2, options


@on_gpu_alone
def test_float32_is_exact_in_products_and_convolutions(device: torch.device) -> None:
    """Against float64; torch's own choice for convolutions is TF32."""
    needs_tf32(device)
    x, square = torch.randn(4, 64, 32, 32, device=device), torch.randn(1024, 1024, device=device)
    weight = torch.randn(64, 64, 3, 3, device=device)
    exact = conv2d(x.double(), weight.double()), square.double() @ square.double()
    for tf32 in (False, True):
        with float32_products(device, tf32):
            found = conv2d(x, weight), square @ square
        errors = [apart(one, other) for one, other in zip(found, exact, strict=True)]
        assert all(1e-5 < error < 1e-2 for error in errors) if tf32 else max(errors) < 1e-5


@on_gpu_alone
def test_threads_have_the_precision_of_their_own_pipeline(device: torch.device, tiny_source: Path) -> None:
    needs_tf32(device)
    pipes = [opened(tiny_source, device, precision=precision) for precision in ("fp32", "tf32")]
    wanted = [pipe(LABELS, output_type="latent").images for pipe in pipes]
    assert apart(wanted[1], wanted[0]) > 1e-5
    made: list[list[Tensor]] = [[], []]

    def work(index: int) -> None:
        for _ in range(5):
            made[index].append(pipes[index](LABELS, output_type="latent").images)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, expected in zip(made, wanted, strict=True):
        assert len(own) == 5 and max(apart(one, expected) for one in own) < 1e-6


@on_gpu_alone
def test_the_compiled_decoder_stays_within_two_levels(device: torch.device, autoencoder: Path) -> None:
    needs_compiler(device)
    vae = VA_VAE(TOKENIZER_CONFIGS / "vavae_f16d32.yaml", ckpt_path=autoencoder, device=device)
    values = torch.randn(2, 32, 16, 16, generator=torch.Generator().manual_seed(0))
    exact = vae.decode_latents(values)
    compile_forward(vae.model.decoder)
    difference = levels(vae.decode_latents(values, half=True), exact)
    assert is_compiled(vae.model.decoder)
    assert difference.float().mean() < 1 and difference.max() <= 2


# --- graphs


@on_gpu_alone
@DTYPES
@pytest.mark.parametrize("states", [1, 2, 16])
@torch.inference_mode()
def test_a_recording_gives_the_bits_of_the_forward(
    states: int, dtype: torch.dtype, device: torch.device, unit_model: Build
) -> None:
    """With other inputs than those it was made with, and after new values were copied into the weights."""
    with torch.inference_mode(False):
        model = unit_model("default").to(device, dtype).requires_grad_(False)

    def inputs(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(10, (states,), generator=generator)
        x, t = torch.randn(states, 8, 8, 8, generator=generator), torch.rand(1, generator=generator)
        return x.to(device), t.to(device), y.to(device)

    recording = Recording(model, inputs(0))
    for seed in (1, 2):
        assert torch.equal(recording(*inputs(seed)), model(*inputs(seed)))
    with torch.inference_mode(False), torch.no_grad():
        model.final_layer.linear.weight.mul_(2.0)
    assert torch.equal(recording(*inputs(1)), model(*inputs(1)))
    kept, address = recording(*inputs(1)).clone(), recording(*inputs(2)).data_ptr()
    assert recording(*inputs(1)).data_ptr() == address  # one place for all results
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert torch.equal(recording(*inputs(1)), kept)


@DTYPES
@pytest.mark.parametrize(
    "method", ["ab3", *(pytest.param(method, marks=on_gpu_alone) for method in ("unipc2", "heun", "euler"))]
)
@pytest.mark.usefixtures("graphs")
def test_a_run_by_graphs_gives_the_latents_of_one_without(
    method: str, dtype: torch.dtype, device: torch.device, tiny_source: Path
) -> None:
    """States that a callback keeps stay what they were; guidance sets in on the way, so there are two shapes."""
    interval = {"cfg_interval_start": 0.3, "cfg_interval_end": 0.7}
    pipe = opened(tiny_source, device, dtype, sampling_method=method, num_sampling_steps=6, **interval)
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    for plan in (PLAIN, GRAPHS):
        last = latents(pipe, plan, callback=lambda step, t, state, to=seen[plan.graphs]: to.append(state))
        seen[plan.graphs].append(last)
    assert len(seen[True]) == 6
    assert len(pipe._networks._recordings) == 2
    bound = 0.0 if dtype == FLOAT32 else rounding(dtype)
    assert max(apart(*pair) for pair in zip(*seen.values(), strict=True)) <= bound


@DTYPES
@pytest.mark.parametrize("kind", ["transformer", "unet"])
@pytest.mark.usefixtures("graphs")
def test_networks_with_two_labels_are_recorded(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    sizes = {"num_classes": 3, "num_conditions": 2}
    if kind == "unet":
        pytest.importorskip("diffusers", reason="the U-Net is diffusers'")
        settings = UNetSettings(8, 4, widths=(32, 64), layers=1, attends=(False, True), **sizes)
    else:
        settings = preset_settings("LightningDiT-XS/2", input_size=8, in_channels=4, **sizes)
    network = seed_weights(make_model(settings)).to(device, dtype).requires_grad_(False)
    own, found = networks.Networks(), []
    x, t = torch.randn(3, 4, 8, 8, device=device), torch.full((3,), 0.4)
    y = torch.tensor([[0, 1], [2, 0], [3, 2]], device=device)
    for plan in (PLAIN, GRAPHS):
        with torch.inference_mode(), own.under(plan, [network]):
            found.append(own.predict(network, plan, 3, x, t, y))
    assert len(own._recordings) == 1
    assert found[0].norm() > 0 and apart(found[1], found[0]) <= rounding(dtype)


@on_gpu_alone
def test_a_graph_keeps_the_precision_of_its_plan(device: torch.device, tiny_source: Path) -> None:
    """Recordings of float32 and of TF32 lie side by side."""
    needs_tf32(device)
    pipe = opened(tiny_source, device)
    for tf32 in (False, True, False):
        plain, replayed = (latents(pipe, dataclasses.replace(plan, tf32=tf32)) for plan in (PLAIN, GRAPHS))
        assert torch.equal(plain, replayed)


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.transformer.load_state_dict(changed(pipe), assign=True),
        *(
            pytest.param(change, marks=on_gpu_alone)
            for change in (
                lambda pipe: pipe.transformer.load_state_dict(changed(pipe)),
                lambda pipe: pipe.to(pipe.device, torch.float16),
                lambda pipe: pipe.to("cpu").to(best_device()),
                swap_data,
                swap_block,
            )
        ),
    ],
)
@pytest.mark.usefixtures("graphs")
def test_a_graph_never_computes_with_old_weights(
    change: Callable[[LightningDiTPipeline], object], device: torch.device, tiny_source: Path
) -> None:
    pipe = opened(tiny_source, device)
    latents(pipe, GRAPHS)
    if device.type == "cuda":
        filled = [torch.full((1 << 18,), torch.nan, device=device) for _ in range(64)]  # where freed weights lay
        del filled
    change(pipe)
    assert apart(latents(pipe, GRAPHS), latents(pipe, PLAIN)) <= rounding(pipe.dtype)


@pytest.mark.usefixtures("graphs")
def test_two_threads_with_the_same_networks(device: torch.device, tiny_source: Path) -> None:
    pipe = opened(tiny_source, device)
    other = pipe.with_sample(dataclasses.replace(pipe.config.sample, cfg_scale=3.0))
    classes = (LABELS, LABELS[:2])  # of other shapes, so with recordings of their own
    wanted = [latents(one, PLAIN, own) for one, own in zip((pipe, other), classes, strict=True)]
    made: dict[int, list[Tensor]] = {0: [], 1: []}

    def work(index: int) -> None:
        on_stream = torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else warnings.catch_warnings()
        with on_stream:
            for _ in range(4):
                made[index].append((pipe, other)[index](classes[index], output_type="latent").images)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(wanted):
        assert len(made[index]) == 4
        assert max(apart(one, expected) for one in made[index]) <= rounding(FLOAT32)


@on_gpu_alone
@torch.inference_mode()
def test_another_thread_may_allocate_during_a_recording(device: torch.device, unit_model: Build) -> None:
    with torch.inference_mode(False):
        model = unit_model("default").to(device)
    stop, errors = threading.Event(), []

    def allocate() -> None:
        try:
            while not stop.is_set():
                torch.empty(1 << 24, device=device).fill_(1.0)
                torch.cuda.empty_cache()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=allocate)
    thread.start()
    x, t, y = torch.randn(2, 8, 8, 8, device=device), torch.ones(1, device=device), torch.ones(2, device=device).long()
    try:
        for _ in range(5):
            assert torch.equal(Recording(model, (x, t, y))(x, t, y), model(x, t, y))
    finally:
        stop.set()
        thread.join()
    assert errors == []


@on_gpu_alone
@pytest.mark.parametrize("method", [*OWN_METHODS, "euler"])
def test_no_step_waits_for_the_gpu(method: str, device: torch.device, tiny_source: Path) -> None:
    pipe = opened(tiny_source, device, sampling_method=method, num_sampling_steps=6, cfg_interval_start=0.3)
    solver = pipe.solver(pipe.config.sample)
    x = draw_noise((4, *pipe.latent_shape), [torch.Generator().manual_seed(k) for k in range(4)]).to(device)
    with torch.inference_mode(), pipe._networks.under(GRAPHS, pipe._both):
        velocity = pipe.guided(LABELS, solver.sample, GRAPHS)
        recorded = solver.integrate(velocity, x, []).clone()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            replayed = solver.integrate(velocity, x, [])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(replayed, recorded)


# --- compiled code and kernels


@on_gpu_alone
@DTYPES
@pytest.mark.parametrize("compiled", [BLOCK, WHOLE])
def test_compiled_code_meets_the_forward_and_can_be_recorded(
    compiled: str, dtype: torch.dtype, device: torch.device, unit_model: Build
) -> None:
    needs_compiler(device)
    plain = unit_model("default").to(device, dtype).requires_grad_(False)
    model = copy.deepcopy(plain)
    compile_forward(*(model.blocks if compiled == BLOCK else [model]))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", "torch.compile does not work")
        for states in (2, 16):
            x, y = torch.randn(states, 8, 8, 8, device=device), torch.arange(states, device=device) % 10
            t = torch.full((1,), 0.4, device=device)
            expected, found = plain(x, t, y), model(x, t, y)
            assert is_compiled(*(model.blocks if compiled == BLOCK else [model]))
            assert apart(found, expected) <= max(rounding(dtype), 2e-3 if dtype == FLOAT32 else 0)
            assert torch.equal(Recording(model, (x, t, y))(x, t, y), found)


@on_gpu_alone
@pytest.mark.parametrize("kernel", [row.name for row in KERNELS])
@pytest.mark.parametrize("width", [64, 72, 96])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_kernel_of_attention_gives_the_same(
    kernel: str, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    if failure := attention_failure(kernel, 16, 256, width, dtype, device):
        pytest.skip(f"{kernel} does not compute this here: {failure}")
    q, k, v = (torch.randn(2, 16, 256, width, device=device).to(dtype) for _ in range(3))
    with attention_by("math"):
        expected = attend(q.float(), k.float(), v.float())
    with attention_by(kernel):
        assert apart(attend(q, k, v), expected) < 8 * torch.finfo(dtype).eps


# --- batches


@DTYPES
@pytest.mark.usefixtures("graphs")
def test_padding_changes_no_image(dtype: torch.dtype, device: torch.device, tiny_source: Path) -> None:
    pipe = opened(tiny_source, device, dtype)
    wanted = latents(pipe, PLAIN, [1, 2, 1], seed=3)
    assert apart(latents(pipe, GRAPHS, [1, 2, 1], seed=3), wanted) <= rounding(dtype)
    with torch.no_grad():
        pipe.transformer.y_embedder.embedding_table.weight[0] = torch.nan  # the class of the padding
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latents(pipe, GRAPHS, [1, 2, 1], seed=3).isfinite().all()


@DTYPES
def test_a_deterministic_image_has_the_same_bits_in_every_row_of_every_batch(
    dtype: torch.dtype, device: torch.device, tiny_source: Path
) -> None:
    pipe = opened(tiny_source, device, dtype, deterministic=True, cfg_interval_end=0.4)
    whole = pipe(LABELS, seed=5, output_type="np").images
    for indices in ([3], [2, 3], [3, 1, 0], [2, 0, 3, 1]):
        again = pipe([LABELS[index] for index in indices], seed=5, indices=indices, output_type="np").images
        assert np.array_equal(again, whole[indices])


@pytest.mark.usefixtures("graphs")
def test_a_batch_that_overflows_fp16_is_made_again_in_float32(device: torch.device, tiny_source: Path) -> None:
    """By graphs; a second batch is in half precision again, with a recording of its own."""
    loud = opened(tiny_source, device)
    with torch.no_grad():
        loud.transformer.y_embedder.embedding_table.weight[0] *= 2e4
    exact = latents(loud.to(device, torch.float16).to(device, FLOAT32), PLAIN, [0, 1])
    loud.to(device, torch.float16)
    plan = Plan(graphs=True, batch=2)
    with pytest.warns(UserWarning, match="made again in float32"):
        made = latents(loud, plan, [0, 1])
    assert loud.dtype == torch.float16 and made.isfinite().all()
    assert apart(made[0], exact[0]) <= rounding(FLOAT32)
    quiet = latents(loud, PLAIN, [1, 1])
    assert apart(latents(loud, plan, [1, 1]), quiet) <= rounding(torch.float16)


@on_gpu_alone
@pytest.mark.parametrize("plan", [PLAIN, Plan(graphs=True, batch=512)], ids=["plain", "graphs"])
def test_memory_that_ends_halves_the_batch(plan: Plan, device: torch.device, tiny_source: Path) -> None:
    """A real allocation leaves half of the memory that the batch needs; afterwards all memory is there again."""
    labels = [index % 3 for index in range(512)]
    pipe = opened(tiny_source, device, per_proc_batch_size=512)
    latents(pipe, Plan(graphs=True, batch=4))
    pipe._networks.drop()
    wanted = latents(pipe, PLAIN, labels)  # last, as libraries keep what they allocate here
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    latents(pipe, PLAIN, labels)
    need = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.empty(free - need * 6 // 10, dtype=torch.uint8, device=device)
    with pytest.warns(UserWarning, match="memory ran out with 512 images at once"):
        made = latents(pipe, plan, labels)
    assert pipe.batch_limit.most is not None and pipe.batch_limit.most < 512
    assert apart(made, wanted) <= rounding(FLOAT32)
    del held
    pipe._networks.drop()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + 2**21


# --- processes


@on_gpu_alone
def test_two_processes_share_a_gpu(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the run's manifest: both make the images of one process, to a level of 255."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--num-samples", "6", "--precision", "fp32"]
    assert inference.main(command(tiny_folder, "one", *options)) == 0
    assert shared(*command(tiny_folder, "two", *options)) == 0
    assert_same_pictures(tiny_folder / "one", tiny_folder / "two", 6)


def assert_same_pictures(one: Path, two: Path, count: int) -> None:
    names = sorted(path.name for path in one.glob("*.png"))
    assert len(names) == count and names == sorted(path.name for path in two.glob("*.png"))
    for name in names:
        left, right = (np.asarray(Image.open(folder / name), dtype=int) for folder in (one, two))
        assert np.abs(left - right).max() <= 1, name


@on_gpu_alone
def test_a_run_of_a_gpu_is_not_continued_on_the_cpu(
    tiny_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = command(tiny_folder, "out", "--num-samples", "4", "--precision", "fp32")
    assert inference.main(options) == 0
    min((tiny_folder / "out").glob("*.png")).unlink()  # for the rerun to make
    before = contents(tiny_folder / "out")
    monkeypatch.setenv(VISIBLE, "")
    again = [sys.executable, "-m", "LightningDiT.inference", *options]
    done = subprocess.run(again, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "computes by graphs, and here graphs need a GPU" in done.stderr
    assert contents(tiny_folder / "out") == before


@on_gpu_alone
def test_all_gpus_make_the_pictures_of_one(tiny_folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != VISIBLE}
    environment |= {} if ALL_GPUS == "all" else {VISIBLE: ALL_GPUS}
    counted = [sys.executable, "-c", "from LightningDiT.device import gpu_count; print(gpu_count())"]
    there = subprocess.run(counted, cwd=PROJECT, env=environment, capture_output=True, text=True, check=True)
    if int(there.stdout) < 2:
        pytest.skip(f"needs two GPUs; there are {there.stdout.strip()}")
    for output, gpus in (("one", "1"), ("all", "all")):
        options = ["--num-samples", "12", "--batch-size", "2", "--precision", "fp32", "--gpus", gpus]
        run_all = [sys.executable, "-m", "LightningDiT.inference", *command(tiny_folder, output, *options)]
        done = subprocess.run(run_all, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert_same_pictures(tiny_folder / "one", tiny_folder / "all", 12)


# --- training


def test_a_training_step_is_that_of_the_cpu(device: torch.device, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(configured(small, "step", 2, "precision: fp32, ckpt_every: 10"))
    losses, gradients = [], []
    for where in (torch.device("cpu"), device):
        monkeypatch.setattr(transformer_training, "best_device", lambda where=where: where)
        trainer = trainer_of(config)
        row = {name: float(value) for name, value in trainer.step(0).items()}
        losses.append(row["loss"])
        gradients.append(
            {name: value.grad.cpu() for name, value in trainer.model.named_parameters() if value.grad is not None}
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert all(apart(value, gradients[0][name]) < 1e-3 for name, value in gradients[1].items())


@on_gpu_alone
def test_a_resumed_training_goes_on_as_one_without_a_break(device: torch.device, small: Path) -> None:
    """To the bit on the CPU; a GPU adds the gradients of embeddings in any order, and Adam enlarges tiny ones."""
    more = "ckpt_every: 4, precision: fp32"
    whole = run(configured(small, "whole", 12, more))
    run(configured(small, "parts", 4, more))
    resumed = run(configured(small, "parts", 12, more))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        tolerance = 0.0 if device.type == "cpu" else 1e-5
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=tolerance)


@on_gpu_alone
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_in_half_precision_has_the_loss_of_float32(precision: str, device: torch.device, small: Path) -> None:
    """fp16 begins with a loss scale that overflows, and finds one that does not; until then no weight changes."""
    losses = []
    for name in ("fp32", precision):
        trainer = trainer_of(load_config(configured(small, name, 40, f"precision: {name}, ckpt_every: 10")))
        before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        for step in range(40):
            try:
                losses.append(float(trainer.step(step)["loss"]))
                break
            except NotFiniteError:
                assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
        if step:  # another batch
            again = trainer_of(load_config(configured(small, "again", 40, "precision: fp32, ckpt_every: 10")))
            losses[0] = float(again.step(step)["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def with_decay(path: Path) -> Path:
    """Let the matrices of a configured training shrink."""
    text = path.read_text()
    assert "lr: 1.0e-3," in text
    path.write_text(text.replace("lr: 1.0e-3,", "lr: 1.0e-3, weight_decay: 0.1,"))
    return path


@on_gpu_alone
@pytest.mark.parametrize("wish", ["off", "on"])
def test_a_training_step_waits_for_the_gpu_once(
    wish: str, device: torch.device, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wish == "on":
        needs_compiler(device)

    def fetched(arriving: Callable[[], list[float]]) -> list[float]:
        torch.cuda.set_sync_debug_mode("default")
        waits.append(1)
        found = arriving()
        torch.cuda.set_sync_debug_mode("error")
        return found

    waits: list[int] = []
    path = configured(small, "waits", 20, f"compile: {wish}, ckpt_every: 10")
    trainer = trainer_of(load_config(with_decay(path)))
    for step in range(3):
        trainer.step(step)
    monkeypatch.setattr(transformer_training, "fetched", fetched)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 6):
            trainer.step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits == [1, 1, 1]


@on_gpu_alone
def test_a_step_that_is_not_finite_changes_nothing(device: torch.device, small: Path) -> None:
    """Neither weights nor moments nor the step counters of the fused optimizer; matrices do not shrink."""
    trainer = trainer_of(load_config(with_decay(configured(small, "spoilt", 20))))
    trainer.step(0)
    state = copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()["state"]))
    weight = trainer.model.final_layer.linear.weight
    with torch.no_grad():
        kept = weight.clone()
        weight.fill_(torch.nan)
    with pytest.raises(NotFiniteError):
        trainer.step(1)
    with torch.no_grad():
        weight.copy_(kept)
    after = trainer.model.state_dict(), trainer.optimizer.state_dict()["state"]
    assert all(torch.equal(value, after[0][name]) for name, value in state[0].items())
    for number, moments in state[1].items():
        assert all(torch.equal(value, after[1][number][name]) for name, value in moments.items())


@on_gpu_alone
def test_a_training_goes_on_on_another_kind_of_device(
    device: torch.device, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the CPU to the GPU and back, to the losses of a run that stayed."""
    more = "ckpt_every: 4, precision: fp32"
    run(configured(small, "stayed", 12, more))
    for steps, where in ((4, torch.device("cpu")), (8, device), (12, torch.device("cpu"))):
        monkeypatch.setattr(transformer_training, "best_device", lambda where=where: where)
        run(configured(small, "moved", steps, more))
    stayed, moved = (rows_of(small / f"{name}.yaml")[-1] for name in ("stayed", "moved"))
    assert moved["step"] == stayed["step"]
    assert moved["loss"] == pytest.approx(stayed["loss"], rel=1e-3)


@on_gpu_alone
def test_compiled_blocks_train_as_plain_ones(device: torch.device, small: Path) -> None:
    """With micro-batches of two sizes and recomputed activations: one code for each size, and no later one."""
    needs_compiler(device)
    losses = []
    for wish in ("off", "on"):
        path = configured(small, f"compiled-{wish}", 40, f"compile: {wish}, precision: fp32, micro_batch_size: 3")
        path.write_text(path.read_text().replace("in_chans: 4", "in_chans: 4, use_checkpoint: true"))
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        trainer = trainer_of(load_config(path))
        losses.append([trainer.step(step)[name] for step in range(4) for name in ("loss", "gradient_norm")])
    assert all(map(is_compiled, trainer.model.blocks))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


# --- extraction and the batch


@on_gpu_alone
def test_an_extraction_writes_the_latents_of_the_cpu_whoever_reads(
    device: torch.device, tiny_folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extracted(name: str, *more: str) -> Path:
        output = tmp_path / name
        assert extract_features.main(extraction(tiny_folder, "--images", images, "--output", output, *more)) == 0
        return output

    none, several = extracted("none", "--workers", "0"), extracted("several", "--workers", "3")
    shards = sorted(path.name for path in none.glob("*.safetensors"))
    assert shards == sorted(path.name for path in several.glob("*.safetensors"))
    assert all((none / name).read_bytes() == (several / name).read_bytes() for name in shards)
    monkeypatch.setattr("LightningDiT.device.best_device", lambda: torch.device("cpu"))
    there = extracted("cpu", "--workers", "0")
    for name in shards:
        on_gpu, on_cpu = load_file(none / name), load_file(there / name)
        for part in ("latents", "latents_flip"):
            if part in on_cpu:
                torch.testing.assert_close(on_gpu[part], on_cpu[part], rtol=0, atol=1e-4)


@on_gpu_alone
def test_the_batch_follows_from_the_memory(device: torch.device, tiny_source: Path) -> None:
    """More than a CPU's, fewer in less memory, and one that the memory holds."""
    pipe = opened(tiny_source, device, per_proc_batch_size=None)
    free = torch.cuda.mem_get_info(device)[0]
    most = pipe.batch_size(pipe.config.sample)
    assert most > 16
    held = torch.empty(free - 2**28, dtype=torch.uint8, device=device)
    less = opened(tiny_source, device, per_proc_batch_size=None)
    assert less.batch_size(less.config.sample) <= most
    del held
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that memory ran out
        made = pipe([index % 3 for index in range(most)], output_type="np").images
    assert len(made) == most


@on_gpu_alone
def test_images_that_fp16_does_not_hold_are_decoded_again_in_float32(device: torch.device, tiny_source: Path) -> None:
    pipe = opened(tiny_source, device)
    values = torch.randn(3, 4, 8, 8)
    values[1] *= 1e6
    exact = pipe.tokenizer.decode_latents(values)
    with torch.no_grad():
        pipe.tokenizer.model.decoder.conv_in.weight *= 1e4
        pipe.tokenizer.model.decoder.conv_in.bias *= 1e4
        loud = pipe.tokenizer.decode_latents(values)
        with pytest.warns(UserWarning, match="decoding in fp16 gave 1 of 3 images that are not finite"):
            half = pipe.tokenizer.decode_latents(values, half=True)
    assert exact.isfinite().all() and half.isfinite().all()
    torch.testing.assert_close(half[1], loud[1], rtol=1e-4, atol=1e-4)
