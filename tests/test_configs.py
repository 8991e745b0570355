"""What step 3 writes: a comment per key, numbers that come back, a batch that fits the memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from LightningDiT.config import NAMED_SOLVERS, load_config
from LightningDiT.sampling import memory_model
from LightningDiT.sampling.memory_model import GPU_SHARE
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.transport import ODE_METHODS
from setup_steps import configs, weights
from setup_steps.configs import CPU_SHARE, LARGEST_BATCH
from setup_steps.machine import Gpu, TorchFacts

GB = 1_000_000_000


def gpu(memory: int, capability: tuple[int, int] | None = None) -> TorchFacts:
    """A machine with one GPU that works."""
    gpus = (Gpu("Tesla", capability, memory, fault=""),) if capability else ()
    return TorchFacts("2", True, "cuda", "Tesla", memory, gpus=gpus)


@pytest.fixture
def published_files(tmp_path: Path, published: dict[str, bytes]) -> dict[str, Path]:
    """The three files by role."""
    files = {role: tmp_path / f"{role}.pt" for role in published}
    for role, path in files.items():
        path.write_bytes(published[role])
    return files


def settings(kind: str, files: dict[str, Path]) -> configs.Config:
    return configs.bundled_config() if kind == "bundled" else configs.published_config(files)


@pytest.mark.parametrize("kind", ["published", "bundled"])
def test_every_key_has_a_comment_and_comes_back(kind: str, published_files: dict[str, Path], tmp_path: Path) -> None:
    config = settings(kind, published_files)
    configs.fit_to_machine(config, kind, gpu(16 * GB))
    text = configs.render(config)
    assert yaml.safe_load(text) == config
    keys = [line for line in text.splitlines() if line and not line.startswith("#") and not line.endswith(":")]
    assert len(keys) == sum(len(value) if isinstance(value, dict) else 1 for value in config.values())
    for line in keys:
        assert len(line.partition("  # ")[2]) > 4, line
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert load_config(path).sample.precision == "auto"


def test_every_key_that_a_bundled_model_could_have_has_a_comment() -> None:
    """A key of the library's schema in the written sections; the rest is for training."""
    import dataclasses

    from LightningDiT.config import Config

    default = dataclasses.asdict(Config())
    known = {key for key, value in default.items() if key in configs.SECTIONS and not isinstance(value, dict)}
    known |= {f"{key}.{name}" for key in configs.SECTIONS if isinstance(default[key], dict) for name in default[key]}
    assert set(configs.COMMENTS) == known


def test_solvers_that_are_offered_exist() -> None:
    comment = configs.COMMENTS["sample.sampling_method"]
    offered = comment.partition(": ")[2].removesuffix(", ...").split(", ")
    assert offered == ["euler", "ab3", "heun", "dopri5"]
    assert set(offered) <= set(ODE_METHODS)
    assert comment.startswith("fast, published (Euler, 250 points)")
    assert NAMED_SOLVERS["published"][:2] == ("euler", 250)


# bytes of sampling in half precision: 1 GB of context, 675,256,736 x 2 and 69,836,067 x 4 of weights; a decode of one
# image at a time takes 8 maps of 128 x 256 x 256 float32, a step 2 rows of 256 tokens for each
FIXED = 1_000_000_000 + 675_256_736 * 2 + 69_836_067 * 4
STEP = 2 * 256 * (19 * 1152 + 4 * 3072) * 3
IMAGE = 8 * 128 * 256 * 256 * 4


@pytest.mark.parametrize(
    ("memory", "batch"),
    [
        (80 * GB, 256),  # H100
        (24 * GB, 135),  # L4
        (15_843_721_216, 82),  # T4: 14.75 GiB
        (8 * GB, 31),
        (4 * GB, 3),  # 0.8 GB for the decoder's maps of 235 MB an image
    ],
)
def test_the_batch_is_the_largest_that_fits_the_gpu(memory: int, batch: int, published_files: dict[str, Path]) -> None:
    """2.5 steps, or the maps of the fp16 decoder for 16 images: 28 bytes for each of 128 x 256 x 256 positions."""
    config = settings("published", published_files)
    reason = configs.fit_to_machine(config, "published", gpu(memory))
    assert config["sample"]["per_proc_batch_size"] == batch
    room = GPU_SHARE * memory - FIXED
    fits = [max(2.5 * STEP * n, min(n, 16) * 28 * 128 * 256 * 256) <= room for n in (batch, batch + 1)]
    assert fits == [True, batch == 256]
    assert f"batch size {batch} takes at most " in reason
    assert "WARNING" not in reason
    assert "\n" not in reason


def test_a_device_that_is_too_small_is_said(published_files: dict[str, Path]) -> None:
    config = settings("published", published_files)
    reason = configs.fit_to_machine(config, "published", gpu(2 * GB))
    assert config["sample"]["per_proc_batch_size"] == 1
    assert "WARNING: even batch size 1 may take 2.9 GB, more than the 1.7 GB usable (85% of the GPU's memory)" in reason


# On a CPU, of half the machine's memory: 0.7 GB of framework, a portion of 64 MiB, 4 or 2 bytes a parameter.
FP32, BF16 = (700_000_000 + 2**26 + 675_256_736 * size + 69_836_067 * 4 for size in (4, 2))
SHARE = "usable (50% of the machine's memory)"
TOO_MUCH = "precision bf16: on the CPU one image in fp32 takes 4.0 GB, which does not fit; "
NEITHER = (
    "precision auto: fp32 on the CPU, since bf16 does not fit either; WARNING: even batch size 1 may take 4.0 GB, "
)


def fit_to_cpu(kind: str, files: dict[str, Path], memory: int | None, patch: pytest.MonkeyPatch) -> tuple:
    """Precision, batch and the line that says why, on a machine with so much memory and no GPU."""
    patch.setattr(configs, "memory_bytes", lambda: memory)
    config = settings(kind, files)
    reason = configs.fit_to_machine(config, kind, TorchFacts("2", True))
    assert "\n" not in reason
    return config["sample"]["precision"], config["sample"]["per_proc_batch_size"], reason


@pytest.mark.parametrize(
    ("memory", "precision", "batch", "words"),
    [
        (
            64 * GB,
            "auto",
            16,
            f"precision auto: fp32 on the CPU; batch size 16 takes at most 4.9 GB of the 32.0 GB {SHARE}",
        ),
        (
            9 * GB,
            "auto",
            10,
            f"precision auto: fp32 on the CPU; batch size 10 takes at most 4.4 GB of the 4.5 GB {SHARE}",
        ),
        (
            2 * (FP32 + IMAGE),
            "auto",
            3,
            f"precision auto: fp32 on the CPU; batch size 3 takes at most 4.0 GB of the 4.0 GB {SHARE}",
        ),
        (
            2 * (FP32 + IMAGE) - 2,
            "bf16",
            16,
            f"{TOO_MUCH}batch size 16 takes at most 3.2 GB of the 4.0 GB {SHARE}",
        ),
        (6 * GB, "bf16", 11, f"{TOO_MUCH}batch size 11 takes at most 3.0 GB of the 3.0 GB {SHARE}"),
        (2 * (BF16 + IMAGE), "bf16", 5, f"{TOO_MUCH}batch size 5 takes at most 2.7 GB of the 2.7 GB {SHARE}"),
        (2 * (BF16 + IMAGE) - 2, "auto", 1, f"{NEITHER}more than the 2.7 GB {SHARE}"),
        (
            None,
            "auto",
            1,
            "precision auto: fp32 on the CPU; batch size 1 needs 4.0 GB, the memory is unknown",
        ),
    ],
)
def test_precision_and_batch_size_on_a_cpu(
    memory: int | None,
    precision: str,
    batch: int,
    words: str,
    published_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to the byte: float32 as long as one image fits, else bf16 where that fits; no number that nobody knows."""
    assert fit_to_cpu("published", published_files, memory, monkeypatch) == (precision, batch, words)


def test_the_bundled_model_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    precision, batch, reason = fit_to_cpu("bundled", {}, 8 * GB, monkeypatch)
    assert (precision, batch) == ("auto", LARGEST_BATCH["bundled"])
    assert reason.endswith(f"of the {CPU_SHARE * 8:.1f} GB {SHARE}")


def test_bf16_that_is_chosen_samples_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model on a machine that holds it in bf16 alone: the same images but for the rounding."""
    images = {}
    for size in (memory_model.FLOAT32, memory_model.HALF):
        config = configs.bundled_config()
        need = configs._need(config, False, size)
        monkeypatch.setattr(configs, "memory_bytes", lambda need=need: 2 * need.peak(1))
        configs.fit_to_machine(config, "bundled", TorchFacts("2", True))
        path = tmp_path / f"{size}.yaml"
        path.write_text(configs.render(config))
        done = LightningDiTPipeline.from_config(path, "cpu")([0, 8], num_inference_steps=4, output_type="pt")
        images[done.dtype] = done.images
    full, half = images[torch.float32], images[torch.bfloat16]
    assert 0 < (full - half).abs().mean() < 0.05 * full.std()


@pytest.mark.parametrize(
    ("capability", "words"),
    [
        ((7, 5), "precision auto: fp16, since Tesla (7.5) only emulates bf16; "),
        ((8, 0), "precision auto: bf16, which Tesla (8.0) computes; "),
        (None, "precision auto: bf16 if the GPU computes it natively, else fp16; "),
    ],
)
def test_the_precision_is_explained(
    capability: tuple[int, int] | None, words: str, published_files: dict[str, Path]
) -> None:
    config = settings("published", published_files)
    assert configs.fit_to_machine(config, "published", gpu(16 * GB, capability)).startswith(words)


def test_bundled_settings_with_absolute_paths() -> None:
    weights.require_bundled()
    config = configs.bundled_config()
    for path in (config["ckpt_path"], config["vae"]["ckpt_path"], config["vae"]["model_name"]):
        assert Path(path).is_absolute()
        assert Path(path).is_file()
    assert config["data"]["num_classes"] == 10
    assert "train" not in config


def test_numbers_come_back_from_yaml() -> None:
    values = [1e-06, 9.0, 1e22, 0, True, None, "a: b", "none", [1, "x y"], "微多普勒"]
    text = "".join(f"k{i}: {configs._scalar(value)}\n" for i, value in enumerate(values))
    assert list(yaml.safe_load(text).values()) == values
