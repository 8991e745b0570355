"""What step 3 writes: a comment per key, numbers that come back, a batch that fits the memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from LightningDiT.config import load_config
from LightningDiT.transport import ADAPTIVE_METHODS, FIXED_METHODS
from setup_steps import configs, weights
from setup_steps.configs import CPU_SHARE, GPU_SHARE, LARGEST_BATCH
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
    assert len(keys) == len(configs._flat(config))
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
    offered = configs.COMMENTS["sample.sampling_method"].partition(": ")[2].removesuffix(", ...").split(", ")
    assert offered == ["euler", "heun2", "dopri5"]
    assert set(offered) <= {*FIXED_METHODS, *ADAPTIVE_METHODS}


# bytes of sampling in half precision: 1 GB of context, 675,256,736 x 2 and 69,836,067 x 4 of weights,
# and 8 maps of 128 x 256 x 256 float32 a picture
FIXED = 1_000_000_000 + 675_256_736 * 2 + 69_836_067 * 4
PICTURE = 8 * 128 * 256 * 256 * 4


@pytest.mark.parametrize("memory", [80 * GB, 16 * GB, 8 * GB, 6 * GB, 4 * GB])
def test_the_batch_is_the_largest_that_fits_the_gpu(memory: int, published_files: dict[str, Path]) -> None:
    config = settings("published", published_files)
    reason = configs.fit_to_machine(config, "published", gpu(memory))
    batch = config["sample"]["per_proc_batch_size"]
    assert batch == min(16, int((GPU_SHARE * memory - FIXED) // PICTURE))
    assert f"{batch} picture" in reason
    assert "WARNING" not in reason
    assert "\n" not in reason


def test_a_device_that_is_too_small_is_said(published_files: dict[str, Path]) -> None:
    config = settings("published", published_files)
    reason = configs.fit_to_machine(config, "published", gpu(2 * GB))
    assert config["sample"]["per_proc_batch_size"] == 1
    assert "WARNING: even 1 picture may take 2.9 GB, more than the 1.7 GB usable (85% of the GPU's memory)" in reason


@pytest.mark.parametrize(
    ("kind", "memory", "batch"),
    # in float32: 0.85 GB of framework, 4 bytes a parameter: 3.83 GB, of half the machine's memory
    [("published", 64 * GB, 16), ("published", 12 * GB, 8), ("published", 8 * GB, 1), ("bundled", 8 * GB, 64)],
)
def test_the_batch_on_a_processor(
    kind: str, memory: int, batch: int, published_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "memory_bytes", lambda: memory)
    config = settings(kind, published_files)
    reason = configs.fit_to_machine(config, kind, TorchFacts("2", True))
    assert config["sample"]["per_proc_batch_size"] == batch <= LARGEST_BATCH[kind]
    assert reason.startswith("precision auto: fp32 on the processor; ")
    assert reason.endswith(f"{CPU_SHARE * memory / GB:.1f} GB usable (50% of the machine's memory)")


def test_unknown_memory_gives_the_smallest_batch(
    published_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "memory_bytes", lambda: None)
    config = settings("published", published_files)
    configs.fit_to_machine(config, "published", TorchFacts("2", True))
    assert config["sample"]["per_proc_batch_size"] == 1


@pytest.mark.parametrize(
    ("capability", "words"),
    [
        ((7, 5), "precision auto: fp16, since Tesla (7.5) only emulates bf16; "),
        ((8, 0), "precision auto: bf16, which Tesla (8.0) computes; "),
        (None, "precision auto: bf16 where the GPU computes it natively, else fp16; "),
    ],
)
def test_the_precision_is_explained(
    capability: tuple[int, int] | None, words: str, published_files: dict[str, Path]
) -> None:
    config = settings("published", published_files)
    assert configs.fit_to_machine(config, "published", gpu(16 * GB, capability)).startswith(words)


def test_bundled_settings_with_absolute_paths() -> None:
    assert not weights.missing_bundled()
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
