"""Scripts written for the published repository run on this one, in a fresh process and on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tests.conftest import PACKAGE

SCRIPT = """
import sys
sys.path.insert(0, PACKAGE)
import torch
from models.lightningdit import LightningDiT_models
from tokenizer.vavae import VA_VAE
from transport import Sampler, create_transport

assert not any(name == "LightningDiT.models" for name in sys.modules)
vae = VA_VAE(TOKENIZER)
model = LightningDiT_models["LightningDiT-XS/2"](
    input_size=8, num_classes=3, in_channels=4, use_qknorm=False, use_swiglu=True, use_rope=True,
    use_rmsnorm=True, wo_shift=False, use_checkpoint=False,
).eval()
images = torch.stack([vae.img_transform(p_hflip=0.0, img_size=16)(image) for image in pictures()])
z = vae.encode_images(images)
assert z.shape == (2, 4, 8, 8)
transport = create_transport("Linear", "velocity", None, None, None, use_cosine_loss=True, use_lognorm=True)
terms = transport.training_losses(model, z, dict(y=torch.tensor([0, 1])))
assert terms["loss"].shape == terms["cos_loss"].shape == (2,)
sampler = Sampler(transport)
both = torch.cat([z, z])
y = torch.tensor([0, 1, 3, 3])
kwargs = dict(y=y, cfg_scale=4.0, cfg_interval=True, cfg_interval_start=0.1)
ode = sampler.sample_ode(
    sampling_method="euler", num_steps=5, atol=1e-6, rtol=1e-3, reverse=False, timestep_shift=0.3
)
with torch.no_grad():
    states = ode(both, model.forward_with_cfg, **kwargs)
    assert states.shape[0] == 5 and torch.equal(states[-1][:2], states[-1][2:])
    sde = sampler.sample_sde(
        sampling_method="Euler", diffusion_form="SBDM", diffusion_norm=1.0, last_step="Mean",
        last_step_size=0.04, num_steps=5,
    )
    assert sde(z, model.forward, y=y[:2])[-1].shape == z.shape
logp, latent = sampler.sample_ode_likelihood(sampling_method="euler", num_steps=4)(z, model.forward, y=y[:2])
assert logp.shape == (2,) and latent.shape == z.shape
pixels = vae.decode_to_images(states[-1].chunk(2)[0])
assert pixels.shape == (2, 16, 16, 3) and str(pixels.dtype) == "uint8"
print("all of it ran")
"""
PICTURES = """
from PIL import Image
def pictures():
    return [Image.new("RGB", (20, 16), (200, 30, 90)), Image.new("L", (16, 40), 128)]
"""


def test_a_script_for_the_published_layout_runs(tiny_tokenizer: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    names = f"PACKAGE = {str(PACKAGE)!r}\nTOKENIZER = {str(tiny_tokenizer)!r}\n"
    script.write_text(PICTURES + names + SCRIPT)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all of it ran"


def test_the_published_call_samples_inside_the_package(tiny_folder: Path) -> None:
    command = [sys.executable, "inference.py", "--config", str(tiny_folder / "config.yaml"), "--demo"]
    command += ["--output", str(tiny_folder / "out")]
    done = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tiny_folder / "out" / "demo_samples.png").stat().st_size > 1000


def test_importing_the_library_costs_nothing() -> None:
    code = (
        "import sys, LightningDiT, LightningDiT.config, LightningDiT.sampling.options;"
        "assert 'torch' not in sys.modules; print('free')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "free", done.stderr


def test_gradients_stay_on_for_the_caller(tiny_tokenizer: Path) -> None:
    import LightningDiT.inference
    import LightningDiT.sampling.pipeline  # noqa: F401

    assert torch.is_grad_enabled()
