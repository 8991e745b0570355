"""The memory model: its shapes by hand, and real peaks of real processes beside it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from LightningDiT.config import load_config
from LightningDiT.errors import LightningDiTError
from LightningDiT.models.lightningdit import LightningDiTSettings
from LightningDiT.tokenizer.autoencoder import AutoencoderSettings
from LightningDiT.tools import measure_memory
from setup_steps import memory_model
from setup_steps.memory_model import Need


def config_of(folder: Path, model_type: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(f"ckpt_path: x.pt\nmodel: {{model_type: {model_type}}}\n")
    return path


def test_parameters_are_those_of_the_published_model(tmp_path: Path) -> None:
    counts = memory_model.parameters_of(load_config(config_of(tmp_path, "LightningDiT-XL/1")))
    assert counts == (675_256_736, 69_836_067)


def test_the_block_by_hand() -> None:
    """4 tokens of width 48; SwiGLU's hidden width is int(2 / 3 * 4 * 48) = 128, the plain one 192."""
    sizes = {"input_size": 4, "patch_size": 2, "in_channels": 3, "hidden_size": 48, "num_heads": 4}
    gated = LightningDiTSettings(**sizes, use_swiglu=True)
    assert memory_model.block_bytes(gated, 2, 4) == 2 * 4 * (19 * 48 + 4 * 128) * 4
    assert memory_model.block_bytes(LightningDiTSettings(**sizes), 2, 2) == 2 * 4 * (19 * 48 + 2 * 192) * 2


@pytest.mark.parametrize(
    ("multipliers", "largest"),
    [
        ((1, 1, 2, 2, 4), 128 * 256 * 256),  # the full resolution
        ((1, 4), 512 * 256 * 256),  # the upsampling into it
    ],
)
def test_the_largest_map_by_hand(multipliers: tuple[int, ...], largest: int) -> None:
    settings = AutoencoderSettings(ch_mult=multipliers)
    assert memory_model.decode_bytes(settings, 3, 256) == 3 * 8 * largest * 4


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    need = Need(framework=100, weights=50, loading=30, per_image=7)
    assert need.peak(1) == 180  # loading is the worst moment
    assert need.peak(10) == 220
    for memory in range(157, 400):
        batch = need.largest_batch(memory, 1000)
        assert 150 + 7 * batch <= memory < 150 + 7 * (batch + 1)
    assert need.largest_batch(10_000, 16) == 16
    assert need.largest_batch(10, 16) == 1


def test_a_file_in_half_precision_lies_beside_the_converted_weights(tmp_path: Path) -> None:
    config = load_config(config_of(tmp_path, "LightningDiT-XL/1"))
    parameters = 675_256_736
    for file_bytes, on_gpu, loading in (
        (2 * parameters, False, 2 * parameters),
        (4 * parameters, False, 0),
        (6_000_000_000, False, 0),
        (2 * parameters, True, 0),
    ):
        assert memory_model.sampling_need(config, on_gpu, file_bytes).loading == loading


needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is read from /proc")


@needs_linux
def test_the_largest_resident_size_is_that_of_this_process() -> None:
    before = measure_memory.largest_resident_bytes()
    block = torch.ones(before // 4 + 25_000_000)  # float32: more than all that there was, and 100 MB
    after = measure_memory.largest_resident_bytes()
    assert after >= block.numel() * 4


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Seeded weights of LightningDiT-S/1 and VA-VAE f16d32, 0.4 GB, for as long as the tests run."""
    folder = tmp_path_factory.mktemp("memory")
    yield measure_memory.write_model(folder, "LightningDiT-S/1")
    for path in folder.glob("*.safetensors"):
        path.unlink()


@needs_linux
def test_the_model_bounds_the_peak_of_sampling(small_model: Path) -> None:
    """A process loads real weights, samples and decodes: its peak is below the model's, and not far below."""
    row = measure_memory.measure(small_model, "sampling", 1)
    assert row.measured > sum(path.stat().st_size for path in small_model.parent.glob("*.safetensors"))
    assert row.measured <= row.modelled <= 1.6 * row.measured


@needs_linux
def test_what_grows_with_the_batch_is_bounded_too(small_model: Path) -> None:
    """Between 1 and 8 images of a step, where framework and weights cancel: 164 MB by the model."""
    small, large = (measure_memory.measure(small_model, "step", batch) for batch in (1, 8))
    for row in (small, large):
        assert row.measured <= row.modelled <= 1.6 * row.measured
    grown = (large.measured - small.measured) / (large.modelled - small.modelled)
    assert 0.4 < grown < 1.0


def test_a_case_that_fails_is_said(tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError, match=r"case step with 1 images failed: error: .*x.pt does not exist"):
        measure_memory.measure(config_of(tmp_path, "LightningDiT-S/1"), "step", 1)


@pytest.mark.parametrize("options", [["--case", "step"], ["--batches", "0"], ["--case", "x", "--config", "y"]])
def test_wrong_options_are_usage_errors(options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        measure_memory.parse(options)
    assert ended.value.code == 2


def test_the_table_in_the_documents_bounds_every_sampling_row() -> None:
    """docs/memory.md as the tool printed it: no modelled peak below the measured one, none 20 % above."""
    lines = (Path(__file__).parents[1] / "docs" / "memory.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| LightningDiT-")]
    ratios = [float(row[6]) for row in rows]
    assert len(rows) >= 20
    assert all(1.0 <= ratio <= 1.2 for ratio in ratios)
