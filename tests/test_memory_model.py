"""The memory model: its shapes by hand, and real peaks of real processes beside it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from LightningDiT.checkpoint import PORTION_BYTES
from LightningDiT.config import load_config
from LightningDiT.errors import LightningDiTError
from LightningDiT.models.lightningdit import LightningDiTSettings
from LightningDiT.sampling import memory_model
from LightningDiT.sampling.memory_model import FLOAT32, HALF, Need
from LightningDiT.tokenizer.autoencoder import AutoencoderSettings
from studies import measure_memory


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
    # in fp16: input, two copies, two convolutions and the sum in half, twice norm and SiLU in float32
    assert memory_model.decode_bytes(settings, 3, 256, HALF) == 3 * largest * (6 * 2 + 4 * 4)


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    """Up to two images a decode of 20 each is the worst moment, from six on the steps of 7 an image are."""
    need = Need(framework=90, weights=50, loading=10, step=7, decode=20, chunk=2)
    assert [need.peak(batch) for batch in (1, 2, 5, 6, 10)] == [170, 190, 190, 192, 220]
    for memory in range(170, 400):
        batch = need.largest_batch(memory, 1000)
        assert need.peak(batch) <= memory < need.peak(batch + 1)
    assert need.largest_batch(10_000, 16) == 16
    assert need.largest_batch(10, 16) == 1


PARAMETERS, TOKENIZER = 675_256_736, 69_836_067


@pytest.mark.parametrize(("side", "chunk"), [(128, 4), (256, 1), (512, 1)])
def test_the_parts_of_a_need(side: int, chunk: int, tmp_path: Path) -> None:
    path = config_of(tmp_path, "LightningDiT-XL/1")
    path.write_text(path.read_text() + f"data: {{image_size: {side}}}\n")
    table = (side // 16) ** 2 * 1152 * 2  # the positions' table and the RoPE's two: tokens x width, tokens x 72 each
    cases = ((False, FLOAT32, 4, 32), (False, HALF, 3, 32), (True, HALF, 2.5 * 3, 28), (True, FLOAT32, 2.5 * 4, 32))
    for on_gpu, value_bytes, step_bytes, map_bytes in cases:
        need = memory_model.sampling_need(load_config(path), on_gpu, value_bytes)
        assert need.weights == pytest.approx(value_bytes * PARAMETERS + 4 * TOKENIZER, abs=2 * table * value_bytes)
        assert need.loading == (0 if on_gpu else PORTION_BYTES)
        assert (need.chunk, need.decode) == (chunk if not on_gpu else 16 * 256**2 // side**2, 128 * side**2 * map_bytes)
        assert need.step == 2 * (side // 16) ** 2 * (19 * 1152 + 4 * 3072) * step_bytes


def test_a_guide_is_a_second_transformer(tmp_path: Path) -> None:
    path = config_of(tmp_path, "LightningDiT-S/1")
    alone = memory_model.sampling_need(load_config(path), False, HALF)
    path.write_text(path.read_text() + "sample: {guide_ckpt: weaker.pt}\n")
    guided = memory_model.sampling_need(load_config(path), False, HALF)
    transformer, _ = memory_model.parameters_of(load_config(path))
    assert guided == replace(alone, weights=alone.weights + HALF * transformer)


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
    path = measure_memory.write_model(folder, "LightningDiT-S/1")
    measure_memory.write_official(path)
    yield path
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.pt")):
        file.unlink()


@needs_linux
@pytest.mark.parametrize(("precision", "case"), [("bf16", "sampling"), ("fp32", measure_memory.OFFICIAL)])
def test_the_model_bounds_the_peak_of_sampling(precision: str, case: str, small_model: Path) -> None:
    """A process loads real weights, samples and decodes; its weights are the least that it can take."""
    row = measure_memory.measure(small_model, precision, case, 1)
    config = measure_memory.config_of(small_model, precision, case)
    weights = memory_model.sampling_need(config, False, measure_memory.PRECISIONS[precision]).weights
    assert weights < row.measured <= row.modelled


@needs_linux
def test_what_grows_with_the_batch_is_bounded_too(small_model: Path) -> None:
    """A step of 16 images takes more than the model gives one, so the term of the batch is put to the test."""
    one, many = (measure_memory.measure(small_model, "fp32", "step", batch) for batch in (1, 16))
    assert one.measured <= one.modelled < many.measured <= many.modelled


def test_a_case_that_fails_is_said(tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError, match=r"case step with 1 images failed: error: .*x.pt does not exist"):
        measure_memory.measure(config_of(tmp_path, "LightningDiT-S/1"), "fp32", "step", 1)


@pytest.mark.parametrize("options", [["--case", "step"], ["--batches", "0"], ["--case", "x", "--config", "y"]])
def test_wrong_options_are_usage_errors(options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        measure_memory.parse(options)
    assert ended.value.code == 2


DOCUMENT = (Path(__file__).parents[1] / "docs" / "memory.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in DOCUMENT.splitlines()
    if line.startswith("| LightningDiT-")
]


def megabytes(cell: str) -> float:
    return float(cell.removesuffix(" MB").replace(",", ""))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:4]))
def test_the_table_in_the_documents_is_that_of_the_model(row: list[str], tmp_path: Path) -> None:
    """Every modelled peak comes out of the code again, none is below the measured one, none 20 % above."""
    model, precision, case, batch, measured, modelled, ratio = row
    path = tmp_path / "config.yaml"
    path.write_text(f"ckpt_path: weights\nmodel: {{model_type: {model}}}\n")
    config = measure_memory.config_of(path, precision, case)
    expected = measure_memory.modelled(config, case, int(batch))
    assert abs(megabytes(modelled) - expected / 1e6) <= 1.0
    if case == "framework":
        assert expected == memory_model.FRAMEWORK_BYTES
    assert float(ratio) == pytest.approx(megabytes(modelled) / megabytes(measured), abs=0.006)
    assert 1.0 <= float(ratio) <= 1.2


def test_the_documents_hold_every_model_case_and_precision() -> None:
    measured = {tuple(row[:3]) for row in ROWS}
    for model in measure_memory.MODELS:
        assert {(model, "fp32", case) for case in measure_memory.CASES} <= measured
        assert {(model, "bf16", case) for case in ("step", "sampling", measure_memory.OFFICIAL)} <= measured
    measured = {round(megabytes(row[4]), -2) for row in ROWS if row[2] == "framework"}
    allowed = memory_model.FRAMEWORK_BYTES / 1e6
    assert f"{allowed:.0f} MB allowed on the CPU, about {measured.pop():.0f} MB measured" in DOCUMENT
    assert not measured  # one figure for all of them
    assert f"{TOKENIZER:,} times 4" in DOCUMENT
