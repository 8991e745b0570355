"""The benchmark's measurements for a GPU, on the CPU with small sizes, and its predictions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from LightningDiT.compiling import BLOCK, CODE_FOLDER, WAYS
from LightningDiT.config import load_config
from LightningDiT.errors import LightningDiTError
from LightningDiT.models import lightningdit
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.tokenizer.config import load_tokenizer_config
from LightningDiT.tools.benchmark import gpu_networks, gpu_sampling, machine, predict, rows, training
from LightningDiT.tools.benchmark.__main__ import main
from LightningDiT.tools.benchmark.forward import on_meta, published_settings
from LightningDiT.tools.benchmark.gpu_networks import (
    TrainingPlan,
    compiled_network,
    filling_batch,
    kernel_for,
    measure_gpu_decoding,
    measure_gpu_forwards,
    measure_gpu_training,
    our_forward,
    plain_inputs,
    plain_transformer,
    random_state,
)
from LightningDiT.tools.benchmark.gpu_sampling import measure_gpu_sampling, published_pictures, write_pipeline
from LightningDiT.tools.benchmark.predict import CARDS, H100, forward_ms, shares_of, work_of
from LightningDiT.tools.benchmark.rounds import Setting
from LightningDiT.tools.benchmark.rows import Row, measured
from LightningDiT.tools.benchmark.tables import mark_of, render
from LightningDiT.tools.report import marks_of
from tests.test_benchmark_training import CONFIG
from tests.test_train import SMALLEST
from tests.wheels import make_nvidia_smi

CPU = torch.device("cpu")
QUICK = Setting(CPU, torch.float32, quick=True)
SMALL = "LightningDiT-XXS/2"


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small preset, without the seconds of compiling, of many samples and of a large product."""
    monkeypatch.setitem(lightningdit.PRESETS, "XXS", SMALLEST)
    monkeypatch.setattr(torch, "compile", lambda what, **options: what)
    monkeypatch.setattr(rows, "SHORTEST", 0.0)
    monkeypatch.setattr(rows, "SAMPLES", 1)
    monkeypatch.setattr(rows, "product_rate", lambda setting: 1e12)


def test_a_row_has_the_first_run_by_itself_and_its_rate() -> None:
    def build() -> rows.Run:
        time.sleep(0.2)
        return lambda: time.sleep(0.02)

    row = measured("sleep", 4, build, QUICK, flops=1e9)
    assert row.first >= 0.22 and 0.02 <= row.seconds < 0.2
    assert row.share == pytest.approx(1e9 / row.seconds / 1e12)
    assert (row.name, row.units, row.note) == ("sleep", 4, "")


def test_a_long_row_is_measured_once() -> None:
    runs: list[float] = []

    def build() -> rows.Run:
        time.sleep(0.5)
        return lambda: runs.append(1) or time.sleep(0.05)

    row = measured("long", 1, build, QUICK, once=True)
    assert len(runs) == 1 and row.joules is None
    assert 0.05 <= row.seconds <= row.first - 0.5


def test_a_row_that_fails_says_so_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def build() -> rows.Run:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore")

    row = measured("large", 256, build, QUICK)
    assert (row.seconds, row.note) == (None, "failed: CUDA out of memory. Tried to allocate 3 GiB")
    text = render("gpu-forward", {"rows": [row], "skipped": []}, machine.machine(CPU, torch.float32))
    assert "| large | 256 |  |  |  |  |  |  |  | failed: CUDA out of memory. Tried to allocate 3 GiB |" in text
    assert "failed" in capsys.readouterr().out


def test_energy_is_the_power_that_nvidia_smi_tells_times_the_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_nvidia_smi(tmp_path, "300.0")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(rows, "WATCHED_SECONDS", 0.3)
    row = measured("sleep", 2, lambda: lambda: time.sleep(0.05), QUICK)
    assert row.joules == pytest.approx(300 * 0.05 / 2, rel=0.3)
    make_nvidia_smi(tmp_path, "300.0", "250.0")  # of which GPU is not known
    assert measured("sleep", 2, lambda: lambda: None, QUICK).joules is None
    make_nvidia_smi(tmp_path, "[N/A]")
    assert measured("sleep", 2, lambda: lambda: None, QUICK).joules is None


def test_every_way_computes_the_published_forward() -> None:
    settings = published_settings(SMALL)
    weights = random_state(settings)
    plain = plain_transformer(settings, weights, CPU)
    network = on_meta(settings).eval()
    network.load_state_dict(weights, assign=True)
    expected = compiled_network(plain, torch.float32, tf32=True)(*plain_inputs(plain, 2))
    with torch.no_grad():
        for way in (way for way in WAYS if not way.graphs):
            torch.testing.assert_close(our_forward(network, way, 2)(), expected, rtol=1e-4, atol=1e-5)
    assert kernel_for(network) is None


class Recorded:
    """Stands for `device.Recording`."""

    def __init__(self, function: object, inputs: tuple[Tensor, ...]) -> None:
        self.function, self.shape = function, inputs[0].shape

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def test_forwards_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_networks, "Recording", Recorded)
    monkeypatch.setattr(gpu_networks, "possible", lambda way, device: way.graphs or way.compiled != BLOCK)
    monkeypatch.setattr(gpu_networks, "QUICK_BATCHES", (1, 2))
    monkeypatch.setattr(gpu_networks, "WHOLE_BATCHES", (2,))
    found = measure_gpu_forwards(QUICK, SMALL)
    assert [(row.name, row.units) for row in found["rows"]] == [
        ("published, bf16 autocast, layers compiled", 1),
        ("published, bf16 autocast, layers compiled", 2),
        ("published, float32 with TF32, layers compiled", 1),
        ("published, float32 with TF32, layers compiled", 2),
        ("ours, eager", 1),
        ("ours, eager", 2),
        ("ours, whole forward compiled", 2),
        ("ours, graphs", 1),
        ("ours, graphs", 2),
        ("ours, one block compiled and graphs", 1),
        ("ours, one block compiled and graphs", 2),
        ("ours, whole forward compiled and graphs", 2),
    ]
    assert all(row.seconds and row.share for row in found["rows"]), [row.note for row in found["rows"]]
    assert found["skipped"][0].startswith("one block compiled: ")


def test_decodings_state_their_error(tiny_tokenizer: Path) -> None:
    found = {row.name: row for row in measure_gpu_decoding(QUICK, load_tokenizer_config(tiny_tokenizer))["rows"]}
    assert set(found) == {"fp32, exact", "fp32 from TF32", "fp16"}
    assert found["fp32, exact"].note == "0.000 levels, 0 at most"
    if found["fp16"].seconds is None:  # the CPU of an older torch
        pytest.skip(f"fp16: {found['fp16'].note}")
    mean, largest = found["fp16"].note.split(" levels, ")
    assert float(mean) < 1 and largest in ("0 at most", "1 at most", "2 at most")
    assert all(row.seconds for row in found.values())


def test_training_steps_of_both_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.replace("XS/2", "XXS/2"))
    monkeypatch.setattr(training, "LATENTS", 8)
    found = measure_gpu_training(QUICK, [TrainingPlan("tiny", path, 2)])["rows"]
    loops = ("ours, compiled", "published, layers compiled")
    assert [row.name for row in found] == [f"tiny, fp32: {loop}" for loop in loops]
    assert all(row.seconds for row in found), [row.note for row in found]
    need = gpu_networks.training_need(published_settings("LightningDiT-B/1"), torch.float32, False)
    monkeypatch.setattr(gpu_networks, "gpu_free_bytes", lambda device: need.peak(100))
    plan = TrainingPlan("B/1", gpu_networks.B1)
    assert filling_batch(plan, QUICK) == 64


@pytest.fixture
def small_pipeline(tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_sampling, "TOKENIZER", tiny_tokenizer)
    return write_pipeline(tmp_path, SMALL)


def test_the_published_procedure_gives_our_pictures(small_pipeline: Path) -> None:
    """With the settings `published` ours are the same, to a level of 255."""
    config = load_config(small_pipeline)
    sample = replace(config.sample, sampling_method="published")
    pipe = LightningDiTPipeline.from_config(replace(config, sample=sample), CPU)
    theirs, ours = published_pictures(pipe, 2)(), gpu_sampling.our_pictures(pipe, 2)().images
    assert theirs.shape == ours.shape == (2, 16, 16, 3)
    assert (theirs.int() - torch.from_numpy(ours).int()).abs().max() <= 1


def test_sampling_by_both_procedures(small_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sampling, "QUICK_COUNT", 2)
    monkeypatch.setattr("LightningDiT.tools.benchmark.sampling.PUBLISHED_EVALUATIONS", 9)
    with pytest.warns(UserWarning, match="tf32 computes as fp32 here"):
        found = measure_gpu_sampling(QUICK, SMALL)["rows"]
    fast = [f"ours, fast, auto, compile {wish}" for wish in ("on", "on", "off")]
    assert [row.name for row in found[1:]] == ["ours, published, tf32, compile auto", *fast]
    assert [row.units for row in found] == [2, 2, 2, 1, 1]
    assert all(row.seconds for row in found), [row.note for row in found]


def test_a_fresh_process_prints_the_seconds_of_its_first_images(
    small_pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_sampling", str(small_pipeline), "off", "1"])
    assert gpu_sampling.main() == 0
    seconds = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(seconds) == {"loading", "first", "second"} and min(seconds.values()) > 0
    line = {"images": 1, "compile": "off", "code": "none"}
    part = {"firsts": [line | seconds, line | {"failed": "no memory"}]}
    text = render("gpu-first", part, machine.machine(CPU, torch.float32))
    assert f"| 1 images at once, compile off, code none | {seconds['loading']:.1f} | {seconds['first']:.1f} |" in text
    assert "| no memory | no memory | no memory |" in text


def test_fresh_processes_find_the_code_of_the_one_before(
    small_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wish begins with an empty folder for compiled code; a process that fails says why."""
    folders: list[tuple[str, ...]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        *_, config, wish, images = command
        assert (config, options["cwd"]) == (str(small_pipeline), gpu_sampling.PROJECT)
        code = Path(os.environ[CODE_FOLDER])
        folders.append((wish, images, "warm" if (code / "code").exists() else "cold"))
        (code / "code").touch()
        if images == "4":
            return subprocess.CompletedProcess(command, 1, "", "Error\nno memory\n")
        return subprocess.CompletedProcess(command, 0, 'said\n{"loading": 1.0, "first": 2.0, "second": 3.0}\n', "")

    monkeypatch.setattr(subprocess, "run", run)
    found = gpu_sampling.first_results(small_pipeline, 4)
    cold_and_warm = [("on", count, code) for count in ("1", "4") for code in ("cold", "warm")]
    assert folders == [("off", "1", "cold"), *cold_and_warm]
    assert [one["code"] for one in found] == ["none", "cold", "warm", "cold", "warm"]
    assert [one.get("first") for one in found] == [2.0, 2.0, 2.0, None, None]
    assert [one.get("failed") for one in found] == [None, None, None, "no memory", "no memory"]


def test_a_part_of_a_gpu_goes_to_page_and_file(
    tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_networks, "TOKENIZER", tiny_tokenizer)
    monkeypatch.setattr("LightningDiT.tools.benchmark.__main__.chosen_parts", lambda asked, device: asked)
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text("\n".join(marks_of(mark_of("gpu-decode"))))
    assert main(["--part", "gpu-decode", "--quick", "--json", str(figures), "--output", str(page)]) == 0
    written = json.loads(figures.read_text())["gpu-decode"]["rows"]
    lines = page.read_text().splitlines()
    for row in (one for one in written if one["seconds"]):
        assert any(
            line.startswith(f"| {row['name']} | {row['units']} | {1e3 * row['seconds']:,.2f} |") for line in lines
        )


def test_parts_for_a_gpu_are_refused_without_one() -> None:
    with pytest.raises(LightningDiTError, match="gpu-decode, gpu-training: a GPU is needed, and none works here"):
        main(["--part", "gpu-decode", "load", "gpu-training"])


def test_the_table_of_a_gpu_shows_every_figure() -> None:
    row = Row("ours, graphs", 16, 0.02, 1.25, 5_000_000_000, 0.5, 1.5, "noted")
    part = {"rows": [row], "skipped": ["one block compiled: Triton is not installed"]}
    lines = render("gpu-forward", part, machine.machine(CPU, torch.float32)).splitlines()
    assert "| ours, graphs | 16 | 20.00 | 1.250 | 48,000 | 0.50 | 1.2 | 5.0 | 1.50 | noted |" in lines
    assert "Left out: one block compiled: Triton is not installed." in lines


# --- the prediction


def test_the_prediction_returns_what_it_was_fitted_to_and_the_other_rows_by_hand() -> None:
    work, ways = work_of(), {way.name: way for way in predict.WAYS}
    assert work.products + work.attention == pytest.approx(237.25e9, rel=1e-4)
    assert work.weights == 2 * 675_256_736
    assert forward_ms(H100, ways["eager"], 128, work) == pytest.approx(140.3)
    assert forward_ms(H100, ways["compiled"], 128, work) == pytest.approx(68.5)
    # without the weights, which every forward reads once, the time grows with the states
    weights = 1e3 * work.weights / 3.35e12
    assert forward_ms(H100, ways["graphs"], 16, work) == pytest.approx((140.3 - weights) / 8 + weights)
    assert forward_ms(H100, ways["eager"], 2, work) == 14.8


def test_a_card_of_half_the_peaks_takes_twice_as_long() -> None:
    work, compiled = work_of(), predict.WAYS[2]
    half = replace(H100, tflops=H100.tflops / 2, bandwidth=H100.bandwidth / 2)
    assert forward_ms(half, compiled, 64, work) == pytest.approx(2 * forward_ms(H100, compiled, 64, work))
    products, attention = shares_of(H100, work)
    assert 0 < attention < products < 1
    assert shares_of(replace(H100, flash=False), work)[1] < attention


def test_the_table_marks_what_is_predicted_and_what_was_fitted() -> None:
    lines = predict.predicted_table(work_of())
    assert sum("| predicted |" in line for line in lines) == 2 * len(CARDS)
    assert any(line.startswith("| eager, 128 states | 140.30 | 140.30 | fitted |") for line in lines)
    assert any(line.startswith("| eager, 16 states | 20.40 |") and line.endswith("-12% |") for line in lines)
    assert not any("P100" in line and "compiled" in line for line in lines)
