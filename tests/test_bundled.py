"""The bundled model end to end, as a newcomer runs it: each step as a process in a clean copy of the project."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from LightningDiT.checkpoint import inspect
from LightningDiT.data.fashion_mnist import FASHION_MNIST_CLASSES
from LightningDiT.metrics.judge import load_judge
from LightningDiT.sampling.dry_run import verify_config
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.tokenizer.latents import LatentStats
from tests.conftest import BUNDLED
from tests.project_copy import copy_project, run_script

JUDGE = BUNDLED / "judge.safetensors"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy in a path with a space and Chinese characters."""
    return copy_project(tmp_path_factory.mktemp("project") / "my 项目", "models/fashion-mnist")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def sampled(project: Path, elsewhere: Path) -> subprocess.CompletedProcess[str]:
    """What steps 2 to 4 say, run from another folder."""
    for script, *options in (
        ("step2_download_models.py", "--model", "bundled"),
        ("step3_setup_configs.py", "--model", "bundled"),
        ("step4_run_inference.py",),
    ):
        done = run_script(project / script, *options, cwd=elsewhere)
        assert done.returncode == 0, done.stderr
    return done


def judged(folder: Path) -> list[int]:
    """Return the class that the judge sees in every sampled image of a run's folder."""
    paths = sorted(folder.glob("run-*/0*.png"))
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths])
    with torch.no_grad():
        return load_judge(JUDGE)(images / 127.5 - 1).argmax(1).tolist()


def test_step_4_draws_the_class_that_each_caption_names(
    sampled: subprocess.CompletedProcess[str], project: Path
) -> None:
    """A wrong class table, normalisation or tokenizer would leave the judge with chance: one of ten."""
    assert "10 of 10 images, 10 made now" in sampled.stdout
    assert "Next:" in sampled.stdout
    seen = judged(project / "LightningDiT" / "demo_images")
    right = sum(label == wanted for wanted, label in enumerate(seen))
    assert len(seen) == 10
    assert right >= 9, [FASHION_MNIST_CLASSES[label] for label in seen]
    grid = np.asarray(Image.open(project / "LightningDiT" / "demo_images" / "demo_samples.png"))
    assert grid.shape[0] > 2 * 128
    assert grid.shape[1] > 4 * 128


def test_step_4_again_makes_nothing_anew(sampled: subprocess.CompletedProcess[str], project: Path) -> None:
    done = run_script(project / "step4_run_inference.py")
    assert done.returncode == 0, done.stderr
    assert "all of them made before" in done.stdout


def test_the_simple_form_writes_pictures_grid_and_report(project: Path, elsewhere: Path) -> None:
    done = run_script(project / "step4_demo_inference.py", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    output = project / "LightningDiT" / "demo_output"
    pictures = sorted(path.name for path in output.glob("[0-9][0-9]_*.png"))
    assert len(pictures) == 10
    assert pictures[0] == "00_T_shirt_top.png"
    assert (output / "demo_grid.png").exists()
    report = (output / "report.html").read_text(encoding="utf-8")
    assert report.count('src="data:image/png;base64,') == 10  # nothing is loaded from elsewhere
    assert "http" not in report
    assert "Ankle boot" in report


def test_options_reach_the_sampler(sampled: subprocess.CompletedProcess[str], project: Path, elsewhere: Path) -> None:
    options = ["--classes", "bag", "7", "--count", "4", "--steps", "12", "--solver", "midpoint", "--seed", "5"]
    done = run_script(project / "step4_run_inference.py", *options, "--output", str(elsewhere / "bags"))
    assert done.returncode == 0, done.stderr
    assert "midpoint, 12 points" in done.stdout
    assert "22 evaluations each" in done.stdout  # two for each of eleven steps
    seen = judged(elsewhere / "bags")
    assert sum(label == wanted for wanted, label in zip((8, 7, 8, 7), seen, strict=True)) >= 3
    manifest = json.loads(next((elsewhere / "bags").glob("run-*/manifest.json")).read_text())
    assert manifest["labels"] == [8, 7, 8, 7]
    assert manifest["seed"] == 5


@pytest.mark.parametrize("script", ["step4_run_inference.py", "step4_demo_inference.py"])
def test_help_and_dry_run_make_nothing(script: str, project: Path, elsewhere: Path) -> None:
    assert "usage:" in run_script(project / script, "--help").stdout
    output = elsewhere / f"dry-{script}"
    done = run_script(
        project / script,
        *(["--config", str(BUNDLED / "config.yaml")] if "run" in script else []),
        "--dry-run",
        "--output",
        str(output),
    )
    assert done.returncode == 0, done.stderr
    assert "LightningDiT-XS/2" in done.stdout
    assert not output.exists()


def test_another_guidance_than_the_calibrated_one_is_said_once_in_one_line(project: Path, elsewhere: Path) -> None:
    options = (
        "--config",
        str(BUNDLED / "config.yaml"),
        "--guidance-scale",
        "1.7",
        "--output",
        str(elsewhere / "other"),
    )
    done = run_script(project / "step4_run_inference.py", *options, "--dry-run")
    assert (done.returncode, done.stderr) == (
        0,
        "warning: solvers.yaml has no solver for guidance 1.7 on all channels"
        " from t = 0.1 to 1, path Linear; ab3 with 26 points is used instead\n",
    )


def test_bad_input_is_one_line(project: Path, elsewhere: Path) -> None:
    cases = {
        "does not exist; fix: python step3_setup_configs.py": ["--config", str(elsewhere / "absent.yaml")],
        "class 10 is out of range; 0 to 9 are expected": ["--config", str(BUNDLED / "config.yaml"), "--classes", "10"],
        "near to it: Sneaker": ["--config", str(BUNDLED / "config.yaml"), "--classes", "sneeker"],
    }
    for message, options in cases.items():
        done = run_script(project / "step4_run_inference.py", *options, cwd=elsewhere)
        assert done.returncode == 1
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_shipped_files_belong_together() -> None:
    lines = verify_config(BUNDLED / "config.yaml")
    assert lines[0].endswith("LightningDiT-XS/2, 10 classes")
    size = sum(path.stat().st_size for path in BUNDLED.iterdir())
    assert size <= 16_000_000
    stats = LatentStats.load(BUNDLED / "latents_stats.pt", 6)
    carried = LatentStats.from_metadata(inspect(BUNDLED / "tokenizer.safetensors").metadata, "tokenizer")
    torch.testing.assert_close(stats.mean, carried.mean)
    torch.testing.assert_close(stats.std, carried.std)


def test_guidance_and_class_matter() -> None:
    """The same noise with another class is another garment, and guidance moves the picture."""
    pipe = LightningDiTPipeline.from_pretrained(BUNDLED, device="cpu")
    noise = torch.randn(1, *pipe.latent_shape, generator=torch.Generator().manual_seed(1)).expand(3, -1, -1, -1)
    trousers, bag, boot = pipe(["Trouser", "Bag", "Ankle boot"], latents=noise, output_type="pt").images
    judge = load_judge(JUDGE)
    with torch.no_grad():
        assert judge(torch.stack([trousers, bag, boot])).argmax(1).tolist() == [1, 8, 9]
    plain = pipe(["Bag"], latents=noise[:1], guidance_scale=1.0, output_type="pt").images[0]
    assert (plain - bag).abs().mean() > 0.01
