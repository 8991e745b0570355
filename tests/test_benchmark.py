"""The benchmark: operations against a hand count, and its parts on small things."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from LightningDiT.errors import LightningDiTError
from LightningDiT.models.lightningdit import LightningDiT, LightningDiTSettings
from LightningDiT.tokenizer.autoencoder import AutoencoderKL, AutoencoderSettings
from LightningDiT.tools.benchmark import (
    Case,
    demo_samples_bundled_model,
    gemm_case,
    machine,
    measure,
    model_flops,
    model_inputs,
    processor_name,
    product_flops,
    random_weights,
    table,
    time_demo,
)

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


def on_meta(settings: LightningDiTSettings) -> LightningDiT:
    with torch.device("meta"):
        return LightningDiT(settings)


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
    assert product_flops(tokenizer, lambda: tokenizer.decode(latent)) == 2 * expected


def test_counting_leaves_no_hooks_behind() -> None:
    layer = nn.Linear(3, 5)
    assert product_flops(layer, lambda: layer(torch.zeros(7, 3))) == 2 * 7 * 3 * 5
    with pytest.raises(RuntimeError):
        product_flops(layer, lambda: layer(torch.zeros(7, 4)))
    assert not layer._forward_hooks


def test_random_weights_are_the_same_each_time_and_nowhere_zero() -> None:
    first, second = random_weights(on_meta(SMALL)), random_weights(on_meta(SMALL))
    inputs = model_inputs(first, 2)
    with torch.no_grad():
        out = first(*inputs)
        assert torch.equal(out, second(*inputs))
    assert out.shape == (2, 3, 4, 4)
    assert (first.final_layer.linear.weight != 0).all()
    assert torch.isfinite(out).all()


def test_measure_states_medians_and_shares_of_the_matrix_product() -> None:
    gemm = gemm_case()
    assert gemm.flops == 2 * 2048**3
    # the same product counted as half the operations must come out at about half the rate
    results = measure([Case("half", gemm.flops / 2, gemm.run), Case("sleep", 1.0, lambda: time.sleep(0.05))], 3)
    assert [result.name for result in results] == ["matrix product", "half", "sleep"]
    assert results[0].share == 1.0
    assert 0.2 < results[1].share < 1.25
    assert 0.05 <= results[2].seconds < 0.5
    lines = table(machine(), results, {"first_step": 1.25, "picture": 10.0})
    assert lines[0].startswith(processor_name())
    assert lines[-1] == "| step4_demo_inference.py: start to picture | 10.0 | | |"


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


def test_timed_script_passes_the_exit_code_on(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import sys\nprint(sys.argv[1:])\nsys.exit(3)\n")
    tool = [sys.executable, "-m", "LightningDiT.tools.timed_script", str(tmp_path / "t.json")]
    done = subprocess.run([*tool, str(script), "a", "-b"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "['a', '-b']\n")
    assert not (tmp_path / "t.json").exists()
