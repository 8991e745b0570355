"""The benchmark: operations against a hand count, and its parts on small things."""

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
from torch import nn

from LightningDiT.errors import LightningDiTError
from LightningDiT.models.layers import modulate
from LightningDiT.models.lightningdit import LightningDiTSettings
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.tokenizer.autoencoder import AutoencoderKL, AutoencoderSettings
from LightningDiT.tokenizer.config import load_tokenizer_config
from LightningDiT.tools.benchmark.__main__ import GPU_PARTS, PARTS, main
from LightningDiT.tools.benchmark.counting import OTHERS, kind_of, moved_bytes, product_flops, tensor_bytes
from LightningDiT.tools.benchmark.demo import demo_samples_bundled_model, time_demo
from LightningDiT.tools.benchmark.forward import (
    Plan,
    forward_cases,
    measure_forwards,
    measure_profile,
    model_flops,
    model_inputs,
    on_meta,
    products_of,
    profile_shares,
    random_weights,
    summary,
)
from LightningDiT.tools.benchmark.loading import lack_of_room, load_in_process, write_model
from LightningDiT.tools.benchmark.machine import lack_of, machine, machine_line, peak_resident_bytes, processor_name
from LightningDiT.tools.benchmark.rounds import Case, Result, Setting, measure, product_case, triad_case
from LightningDiT.tools.benchmark.sampling import (
    FAST_NAME,
    PUBLISHED_NAME,
    decode_cases,
    growth_cases,
    image_cases,
    published_procedure,
)
from LightningDiT.tools.benchmark.tables import TABLES, mark_of, render
from LightningDiT.tools.benchmark.training import Comparison, Extraction, Step, Waiting
from LightningDiT.tools.report import marks_of, put_between_marks
from LightningDiT.transport import integrate_ode, time_grid

ROOT = Path(__file__).parents[1]
SMALL = LightningDiTSettings(
    input_size=4,
    patch_size=2,
    in_channels=3,
    hidden_size=48,
    depth=2,
    num_heads=4,
    num_classes=5,
    use_swiglu=True,
    use_rope=True,
    use_rmsnorm=True,
)


CPU = torch.device("cpu")
FLOAT32 = Setting(CPU, torch.float32, quick=True)


def test_model_flops_meet_a_hand_count() -> None:
    width, tokens, hidden = 48, 4, 128  # hidden = int(2 / 3 * 4 * 48)
    per_token = (
        3 * 2 * 2 * width  # patch embedding of 2x2x3 values
        + 2 * (3 * width * width + width * width)  # two blocks: qkv and projection
        + 2 * (width * 2 * hidden + hidden * width)  # two blocks: SwiGLU
        + 2 * (2 * tokens * width)  # two blocks: q k^T and the product with v
        + width * 2 * 2 * 3  # output
    )
    per_image = 256 * width + width * width + 2 * 6 * width * width + 2 * width * width  # time, adaLN
    expected = 2 * (tokens * per_token + per_image)
    assert model_flops(on_meta(SMALL), 1) == expected
    assert model_flops(on_meta(SMALL), 3) == 3 * expected


def test_decoder_flops_meet_a_hand_count() -> None:
    settings = AutoencoderSettings(
        embed_dim=4, z_channels=4, resolution=8, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=()
    )
    with torch.device("meta"):
        tokenizer = AutoencoderKL(settings)
        latent = torch.empty(1, 4, 4, 4)
    low, high = 4 * 4, 8 * 8  # pixels
    expected = low * (4 * 4)  # post_quant_conv
    expected += low * 9 * 4 * 64  # conv_in
    expected += low * 2 * 2 * 9 * 64 * 64  # middle: two residual blocks
    expected += low * 4 * 64 * 64 + 2 * low * low * 64  # middle: attention
    expected += low * 2 * 2 * 9 * 64 * 64  # lower level: two residual blocks
    expected += high * 9 * 64 * 64  # upsampling
    expected += high * (9 * 64 * 32 + 9 * 32 * 32 + 64 * 32)  # upper level: residual block with shortcut
    expected += high * 2 * 9 * 32 * 32  # and one without
    expected += high * 9 * 32 * 3  # conv_out
    assert product_flops(lambda: tokenizer.decode(latent)) == 2 * expected


def test_random_weights_are_the_same_each_time_and_nowhere_zero() -> None:
    first, second = random_weights(on_meta(SMALL)), random_weights(on_meta(SMALL))
    inputs = model_inputs(first, 2)
    with torch.no_grad():
        out = first(*inputs)
        assert torch.equal(out, second(*inputs))
    assert out.shape == (2, 3, 4, 4)
    assert (first.final_layer.linear.weight != 0).all()
    assert torch.isfinite(out).all()


def test_operators_are_sorted_by_what_they_do() -> None:
    kinds = {
        "aten::addmm": "matrix products",
        "aten::mkldnn_convolution": "matrix products",
        "mkldnn::_linear_pointwise": "matrix products",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "aten::copy_": "copies and layout",
        "aten::cat": "copies and layout",
        "aten::_to_copy": "copies and layout",
        "aten::addcmul": OTHERS,
        "aten::_fused_rms_norm": OTHERS,
    }
    assert {name: kind_of(name) for name in kinds} == kinds


def test_bytes_of_element_wise_operators_meet_a_hand_count() -> None:
    x, row, layer = torch.ones(3, 5, 7), torch.ones(7), nn.Linear(7, 2)
    assert moved_bytes(lambda: x * x) == 3 * 4 * 105
    assert moved_bytes(lambda: x * row) == 4 * (2 * 105 + 7)
    assert moved_bytes(lambda: x * row.expand(3, 5, 7)) == 4 * (2 * 105 + 7)  # what is repeated is read once
    assert moved_bytes(lambda: torch.addcmul(x, x, x)) == 4 * 4 * 105
    assert moved_bytes(lambda: x.half()) == (4 + 2) * 105
    assert moved_bytes(lambda: x.transpose(0, 1).unflatten(-1, (7, 1))[0]) == 0  # views
    assert moved_bytes(lambda: layer(x)) == 0  # a product
    assert tensor_bytes([x, "other", None, 3]) == 4 * 105


def test_bytes_of_a_model_are_those_of_its_own_operators() -> None:
    """By hand for a block without attention and MLP around it: modulation of x (N, T, width) by (N, width) each."""
    x, shift, scale = torch.ones(2, 4, 48), torch.ones(2, 48), torch.ones(2, 48)
    tokens, vector = 4 * x.numel(), 4 * shift.numel()
    assert moved_bytes(lambda: modulate(x, shift, scale)) == 2 * vector + 2 * tokens + 2 * vector


def test_measure_states_medians_and_shares_of_product_and_triad() -> None:
    product, triad = product_case(CPU, torch.float32), triad_case(CPU, 1 << 20)
    assert product.flops == 2 * 2048**3
    assert triad.moved == 12 * 2**20
    # the same work counted as half of it must come out at about half the rate
    big = triad_case(CPU)
    cases = [
        Case("half", product.run, flops=product.flops / 2),
        Case("half triad", big.run, moved=big.moved / 2, units=3),
        Case("sleep", lambda: time.sleep(0.05), flops=1.0),
    ]
    results = measure(cases, 3, CPU)
    assert [one.name for one in results] == [product.name, "triad", "half", "half triad", "sleep"]
    assert results[0].product_share == results[1].memory_share == 1.0
    assert 0.2 < results[2].product_share < 1.25
    assert 0.2 < results[3].memory_share < 1.25
    assert results[3].units == 3
    assert 0.05 <= results[4].seconds < 0.5
    assert results[0].gflops == pytest.approx(2 * 2.048**3 / results[0].seconds)


def test_the_triad_adds_twice_the_third_array() -> None:
    assert torch.equal(triad_case(CPU, 10).run(), torch.full((10,), 3.0))


def test_products_of_a_model_are_all_that_its_forward_multiplies() -> None:
    model = on_meta(SMALL)
    products = {product.name: product for product in products_of(SMALL, 3)}
    assert sum(product.flops(model) for product in products.values()) == model_flops(model, 3)
    assert products["attn.qkv"].paths == tuple(f"blocks.{index}.attn.qkv" for index in range(SMALL.depth))
    assert products["attn.qkv"].shape == (3, 4, 48)
    assert products["attn.qkv"].flops(model) == SMALL.depth * 2 * 3 * 4 * 48 * 144
    assert products["attention"].flops(model) == SMALL.depth * 2 * 3 * (2 * 4 * 4 * 48)  # q k^T, then times v
    assert products["adaLN_modulation.1"].shape == (3, 48)
    assert not any(layer._forward_hooks for layer in model.modules())


def test_a_profile_sums_to_one_and_knows_the_kinds() -> None:
    x = torch.randn(256, 256)
    assert profile_shares(lambda: torch.mm(x, x), CPU)["matrix products"] > 0.8
    shares = profile_shares(lambda: torch.softmax(x, -1), CPU)
    assert shares["attention"] > 0.5
    assert sum(shares.values()) == pytest.approx(1.0)


def test_a_small_profile_holds_together() -> None:
    part = measure_profile(FLOAT32, SMALL, "small", 2)
    found = summary(part)
    assert {one.name for one in part["alone"]} >= {"attention", "attn.qkv", "mlp.w3", "final_layer.linear"}
    assert sum(one.flops for one in part["alone"]) == part["forward"].flops == model_flops(on_meta(SMALL), 2)
    assert found["alone"] == pytest.approx(sum(one.seconds for one in part["alone"]))
    assert found["alone"] + found["rest"] == pytest.approx(max(part["forward"].seconds, found["alone"]))
    assert part["small_triad"].moved == 12 * 2 * 4 * 48
    assert part["weights"] == 4 * sum(value.numel() for value in on_meta(SMALL).parameters())
    assert part["moved"] > 2 * SMALL.depth * 2 * 4 * (2 * 4 * 48)  # each gated addition alone reads and writes so much


def test_plans_without_batches_or_room_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = (Plan("XS/2", (4,), 9, (1, 2), 1), Plan("B/1", (1,), 3, (), 0))
    part = measure_forwards(FLOAT32, plans)
    assert [[one.name for one in group[2:]] for group in part["groups"]] == [
        ["XS/2 forward, batch 1", "XS/2 forward, batch 2"]
    ]
    assert part["skipped"] == ["B/1: not with --quick"]
    monkeypatch.setattr("LightningDiT.tools.benchmark.forward.free_memory_bytes", lambda: 10**9)
    part = measure_forwards(FLOAT32, plans[:1])
    assert part["groups"] == []
    assert part["skipped"][0].startswith("XS/2: 1.0 GB of main memory are needed, 1.0 GB are free")


def test_lack_is_stated_of_what_is_known() -> None:
    assert lack_of({"disk": (10, None), "memory": (10, 10)}) is None
    assert lack_of({"disk": (10, None), "memory": (3 * 10**9, 2 * 10**9)}) == (
        "3.0 GB of memory are needed, 2.0 GB are free"
    )


def test_forward_cases_count_the_images_of_a_batch() -> None:
    cases = forward_cases(SMALL, "small", (1, 3), FLOAT32)
    assert [(case.name, case.units) for case in cases] == [("small forward, batch 1", 1), ("small forward, batch 3", 3)]
    assert cases[1].flops == 3 * cases[0].flops
    assert cases[1].run().shape == (3, 3, 4, 4)


def test_a_tokenizer_is_decoded_as_the_library_does_it(tiny_tokenizer: Path) -> None:
    one, three = decode_cases(load_tokenizer_config(tiny_tokenizer), (1, 3), FLOAT32)
    assert (one.units, three.units, three.flops) == (1, 3, 3 * one.flops)
    assert three.run().shape == (3, 3, 16, 16)


VALUES = {"data": {"image_size": 16}, "vae": {"downsample_ratio": 2}, "model": {"model_type": "LightningDiT-XS/2"}}


def test_loading_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert lack_of_room(tmp_path, VALUES, FLOAT32) is None
    loaded = load_in_process(write_model(tmp_path, VALUES))
    assert loaded.model_type == "LightningDiT-XS/2"
    assert loaded.file == (tmp_path / "transformer.safetensors").stat().st_size
    assert loaded.seconds > 0
    if peak_resident_bytes() is not None:
        assert loaded.peak >= loaded.before > 10**8  # torch alone takes more
    (tmp_path / "transformer.safetensors").write_bytes(b"no weights")
    with pytest.raises(LightningDiTError, match=r"loading config\.yaml failed: error: .*transformer\.safetensors"):
        load_in_process(tmp_path / "config.yaml")


def test_weights_that_the_disk_cannot_hold_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("LightningDiT.tools.benchmark.loading.free_bytes", lambda folder: 10**6)
    assert "disk in" in (lack_of_room(tmp_path, VALUES, FLOAT32) or "")


def test_both_procedures_make_pictures_of_the_same_noise(tiny_folder: Path) -> None:
    pipe = LightningDiTPipeline.from_pretrained(tiny_folder, "cpu")
    sample = replace(pipe.config.sample, sampling_method="published")
    pipe.config = replace(pipe.config, sample=sample)
    published, library = image_cases(pipe, 2)
    assert (published.name, library.name, published.units) == (PUBLISHED_NAME, FAST_NAME, 2)
    with torch.inference_mode():
        theirs, ours = published.run(), torch.from_numpy(library.run().images)
    assert theirs.shape == ours.shape == (2, 16, 16, 3)
    assert (theirs.int() - ours.int()).abs().max() <= 1  # the library under the name `published`: the same pictures


@pytest.mark.parametrize("channels", ["all", 3])
def test_the_published_procedure_gives_the_same_latents(tiny_folder: Path, channels: int | str) -> None:
    pipe = LightningDiTPipeline.from_pretrained(tiny_folder)
    sample = replace(pipe.config.sample, cfg_interval_start=0.3, guided_channels=channels)
    labels, calls = [0, 2], list[int]()
    noise = torch.randn(2, *pipe.latent_shape, generator=torch.Generator().manual_seed(0))
    handle = pipe.transformer.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    ours = published_procedure(pipe, sample, noise, labels)
    handle.remove()
    assert calls == [4] * 249  # both halves of two images at every step
    guided = pipe.guided(labels, sample)
    with torch.inference_mode():
        expected = integrate_ode(guided, noise, time_grid(250), "euler")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("what", "images", "calls"), [("batch", 3, 10), ("evaluations", 8, 3), ("images", 3, 10)])
def test_only_what_is_said_grows(tiny_folder: Path, what: str, images: int, calls: int) -> None:
    pipe = LightningDiTPipeline.from_pretrained(tiny_folder, "cpu")
    [case] = growth_cases(pipe, what, [3])
    with torch.inference_mode():
        output = case.run()
    assert (len(output.labels), output.nfe) == (images, calls)
    assert case.units == 3


def result(name: str, seconds: float, **values: float) -> Result:
    given = {"flops": 0.0, "moved": 0.0, "units": 1, "product_share": 0.0, "memory_share": 0.0, **values}
    return Result(name, seconds, **given)


PRODUCT = result("matrix product of 10 x 10 in float32", 0.5, flops=5e10, product_share=1.0)
TRIAD = result("triad", 0.1, moved=12 * 2**25, memory_share=1.0)
FIGURES = {
    "forward": {
        "groups": [[PRODUCT, TRIAD, result("B/1", 2.0, flops=1e11, units=2, product_share=0.5)]],
        "skipped": ["XL/1: too large"],
    },
    "profile": {
        "forward": result("forward", 2.0, flops=1e11, product_share=0.5),
        "product": PRODUCT,
        "triad": TRIAD,
        "small_triad": result("triad of one activation", 0.01, moved=4e8),
        "alone": [
            result("proj", 0.25, flops=2e10, product_share=0.8),
            result("qkv", 1.0, flops=8e10, product_share=0.8),
        ],
        "kinds": {"matrix products": 0.25, OTHERS: 0.75},
        "moved": 3_000_000_000,
        "weights": 402_653_184,
    },
    "decode": {"results": [PRODUCT, TRIAD, result("decoding 4", 2.0, flops=1e11, units=4, product_share=0.5)]},
    "load": {
        "loaded": [
            {"model_type": "B/1", "file": 5e8, "seconds": 1.5, "before": 4e8, "peak": None, "gpu_peak": None},
        ],
        "skipped": [],
    },
    "images": {"results": [result("slow", 8.0, units=4), result("quick", 0.5, units=4)]},
    "growth": {"batch": [result("batch 4", 2.0, units=4)]},
    "demo": {"seconds": {"first_step": 1.25, "picture": 10.0}, "skipped": []},
    "training": {
        "comparisons": [Comparison("B/1", 8, [Step("ours", 4.0, 1.0), Step("published", 6.0, 1.5)], 2e-6)],
        "waiting": [Waiting("small", 20, 0.25, 0.0125)],
        "extractions": [
            Extraction("large", 50, 20.0, {"encoder": 0.9, "waiting for images": 0.05, "writing": 0.025}),
        ],
        "skipped": [],
    },
}
#: A line of each part, by hand from the figures above.
EXPECTED = {
    "forward": "| B/1 | 2.000 | 1.000 | 100.0 | 50 | 0.50 |",
    "profile": "| all of these by themselves: a bound on the share | 1250.0 | 62.5% | 80 | 0.80 |",
    "decode": "| decoding 4 | 2.000 | 0.500 | 100.0 | 50 | 0.50 |",
    "load": "| B/1 | 500 | 1.50 | 400 | not known here |",
    "images": "| quick | 4 | 0.50 | 480 | 16.0 |",
    "growth": "| batch | 4 | 2.000 | 500.00 |",
    "demo": "| start to pictures | 10.0 |",
    "training": "| B/1: published | 6.000 | 1.33 | 1.50 |",
}
#: Parts whose tables have columns of several numbers.
WIDTHS = {"profile": 2, "training": 2}


@pytest.mark.parametrize("part", FIGURES)  # those of a GPU: test_benchmark_gpu.py
def test_tables_show_the_figures(part: str) -> None:
    facts = machine(CPU, torch.float32)
    lines = render(part, FIGURES[part], facts).splitlines()
    assert lines[0] == f"**{TABLES[part][0]}** on {machine_line(facts)}:"
    assert EXPECTED[part] in lines
    tables = [line for line in lines if line.startswith("|")]
    widths = {line.count("|") for line in tables}
    assert len(widths) == WIDTHS.get(part, 1)


def test_the_profile_states_what_the_rest_moves_and_what_the_weights_take() -> None:
    text = render("profile", FIGURES["profile"], machine(CPU, torch.float32))
    assert "| everything else | 750.0 | 37.5% |  |  |" in text
    assert "Matrix product of 10 x 10 in float32: 100 GFLOP/s. Triad a = b + 2 c of 128 MiB arrays" in text
    assert "moves at least 3,000 MB: 745.1 ms at the triad's rate in memory, 75.0 ms at that of a triad of one" in text
    assert "one activation, 40.0 GB/s. The weights, 403 MB, take 100.0 ms to be read from memory." in text


def test_training_states_the_losses_the_waiting_and_the_extraction() -> None:
    lines = render("training", FIGURES["training"], machine(CPU, torch.float32)).splitlines()
    assert "The first losses of both loops differ by 2e-06 of their value at most." in lines
    assert "| small | 20 | 0.250 | 1.25% |" in lines
    assert "| large | 50 | 2.5 | 90.0% | 5.0% | 2.5% |" in lines


def test_what_is_left_out_is_said() -> None:
    assert "Left out: XL/1: too large." in render("forward", FIGURES["forward"], machine(CPU, torch.float32))
    facts = machine(CPU, torch.float32)
    assert "Left out: no model." in render("demo", {"seconds": None, "skipped": ["no model"]}, facts)


def test_the_gpu_s_peak_has_a_column_where_there_is_one() -> None:
    rows = [{"model_type": "B/1", "file": 5e8, "seconds": 1.5, "before": 4e8, "peak": 9e8, "gpu_peak": 3e8}]
    text = render("load", {"loaded": rows, "skipped": []}, machine(CPU, torch.float32))
    assert "| B/1 | 500 | 1.50 | 400 | 900 | 300 |" in text


def test_the_machine_is_named_by_its_processor() -> None:
    facts = machine(CPU, torch.float32)
    assert machine_line(facts).startswith(f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} thr")
    on_gpu = machine_line({**facts, "device": "Tesla T4"})
    assert on_gpu.startswith(f"Tesla T4 in a machine with {processor_name()}, ")


def test_a_page_keeps_what_is_outside_the_marks_of_a_part(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    load, demo = (marks_of(mark_of(part)) for part in ("load", "demo"))
    page.write_text(f"before\n{load[0]}\nold\n{load[1]}\nbetween\n{demo[0]}\nkept\n{demo[1]}\nafter\n")
    put_between_marks(page, ["new", ""], "Benchmark", mark_of("load"))
    expected = f"before\n{load[0]}\n\nnew\n\n{load[1]}\nbetween\n{demo[0]}\nkept\n{demo[1]}\nafter\n"
    assert page.read_text() == expected
    with pytest.raises(LightningDiTError, match="lacks the lines <!-- benchmark, growth: begin -->"):
        main(["--part", "load", "growth", "--output", str(page)])
    assert page.read_text() == expected
    with pytest.raises(LightningDiTError, match="is no file"):
        main(["--part", "load", "--output", str(tmp_path / "none.md")])


def test_the_page_in_docs_has_figures_and_a_place_for_every_part(tmp_path: Path) -> None:
    page = tmp_path / "benchmark.md"
    text = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    known = PARTS | GPU_PARTS
    for part in known:
        begin, end = marks_of(mark_of(part))
        measured = text.partition(begin)[2].partition(end)[0]
        rows = [line for line in measured.splitlines() if line.startswith("|")]
        # more than the head of a table
        assert len(rows) > 2 or (part in GPU_PARTS and "Not measured for this state." in measured), part
        put_between_marks(page, [f"@{part}"], "Benchmark", mark_of(part))
    put = [line for line in page.read_text().splitlines() if line.startswith("@")]
    assert sorted(put) == sorted(f"@{part}" for part in known)


def test_the_command_writes_every_figure_with_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole part on the bundled model, with smaller sizes than it has by itself."""
    monkeypatch.setattr("LightningDiT.tools.benchmark.sampling.GROWTH", {"images": ((), (1, 2))})
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text("\n".join(marks_of(mark_of("growth"))))
    assert main(["--part", "growth", "--quick", "--json", str(figures), "--output", str(page)]) == 0
    printed = capsys.readouterr().out
    content = json.loads(figures.read_text())
    assert content["machine"]["torch"] == torch.__version__
    one, two = content["growth"]["images"]
    assert (one["name"], two["name"], one["units"], two["units"]) == ("images 1", "images 2", 1, 2)
    row = f"| images | 2 | {two['seconds']:.3f} | {1e3 * two['seconds'] / 2:.2f} |"
    assert row in printed.splitlines() and row in page.read_text().splitlines()


SCRIPT = """
import sys, torch
from LightningDiT.models.lightningdit import LightningDiT, LightningDiTSettings
assert __name__ == "__main__" and sys.argv[1] == "--output", sys.argv
model = LightningDiT(LightningDiTSettings(
    input_size=4, patch_size=2, in_channels=3, hidden_size=48, depth=1, num_heads=4, num_classes=5))
for _ in range({forwards}):
    model(torch.zeros(1, 3, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.long))
"""


def test_the_demonstration_of_another_model_is_not_timed(tmp_path: Path) -> None:
    config, weights = tmp_path / "config.yaml", tmp_path / "bundled.safetensors"
    assert not demo_samples_bundled_model(config, weights)  # there is none
    weights.touch()
    assert demo_samples_bundled_model(config, weights)  # step 3 was not run
    config.write_text("ckpt_path: bundled.safetensors\n")
    assert demo_samples_bundled_model(config, weights)
    config.write_text("ckpt_path: lightningdit-xl-imagenet256-800ep.pt\n")
    assert not demo_samples_bundled_model(config, weights)


def test_time_demo_notes_the_first_forward(tmp_path: Path) -> None:
    script = tmp_path / "demo.py"
    script.write_text(SCRIPT.format(forwards=2) + "import time; time.sleep(0.3)\n")
    times = time_demo(script)
    assert 0 < times["first_step"] <= times["picture"] - 0.3


def test_time_demo_refuses_a_run_without_sampling(tmp_path: Path) -> None:
    script = tmp_path / "demo.py"
    script.write_text(SCRIPT.format(forwards=0))
    with pytest.raises(LightningDiTError, match=r"demo\.py failed: it sampled nothing"):
        time_demo(script)


def test_a_timed_script_passes_its_exit_code_on(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import sys\nprint(sys.argv[1:])\nsys.exit(3)\n")
    tool = [sys.executable, "-m", "LightningDiT.tools.benchmark.demo", str(tmp_path / "t.json")]
    done = subprocess.run([*tool, str(script), "a", "-b"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "['a', '-b']\n")
    assert not (tmp_path / "t.json").exists()
