"""The study of convergence: equal arms, the order of jobs, checkpoints, and the page of known curves."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from LightningDiT.checkpoint import save_training_state
from LightningDiT.config import load_config
from LightningDiT.console import run_main
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import model_settings
from LightningDiT.models.lightningdit import LightningDiT
from LightningDiT.tokenizer.config import load_tokenizer_config, tokenizer_training
from LightningDiT.tokenizer.vavae import autoencoder_settings
from LightningDiT.verdict.jobs import Job, run_jobs
from studies.convergence import arms, evaluate_checkpoints, jobs, page
from studies.convergence.__main__ import parse
from tests.conftest import BUNDLED, PROJECT
from tests.test_evaluate_bundled import data_root  # noqa: F401 - a fixture


@pytest.fixture
def plan(tmp_path: Path) -> arms.Plan:
    return arms.Plan(tmp_path / "study", str(tmp_path / "data"), steps=40, every=10, count=20, seeds=(0, 3))


def test_the_arms_have_equal_parameters_batches_and_networks(plan: arms.Plan) -> None:
    arms.write_configs(plan)
    configs = {arm.name: load_config(plan.folder / f"{arm.name}-3.yaml") for arm in arms.ARMS}
    counts = {}
    for name, config in configs.items():
        with torch.device("meta"):
            model = LightningDiT(model_settings(config))
        counts[name] = sum(value.numel() for value in model.parameters())
        assert config.train.global_seed == 3
    assert max(counts.values()) / min(counts.values()) < 1.002
    trainings = [replace(config.train, output_dir="") for config in configs.values()]
    assert all(training == trainings[0] for training in trainings)
    plain, aligned = (load_tokenizer_config(plan.folder / f"tokenizer-{name}.yaml") for name in ("plain", "aligned"))
    assert autoencoder_settings(plain) == autoencoder_settings(aligned)
    unaligned = replace(tokenizer_training(aligned), vf_weight=0.0, vision_model=None, vision_weights=None)
    assert unaligned == tokenizer_training(plain)
    assert tokenizer_training(aligned).vf_weight > 0


def test_the_start_of_a_quick_arm_is_that_of_its_training(plan: arms.Plan) -> None:
    arms.write_configs(plan)
    whole, start = (load_config(plan.folder / f"lightning-aligned-3{end}.yaml") for end in ("", "-start"))
    assert (start.train.max_steps, start.train.ckpt_every, start.train.keep_every) == (10, 2, 2)
    same = {"max_steps": whole.train.max_steps, "ckpt_every": 10, "keep_every": 10}
    assert start.train.decay_steps == 0  # else the rate would follow the number of steps
    assert replace(start, train=replace(start.train, **same), ckpt_path="", source="") == replace(
        whole, ckpt_path="", source=""
    )


def test_another_plan_does_not_take_the_folder(plan: arms.Plan) -> None:
    arms.write_configs(plan)
    arms.write_configs(plan)  # the same again
    with pytest.raises(LightningDiTError, match=r"dit-0\.yaml is of a study with other settings; fix: choose another"):
        arms.write_configs(replace(plan, steps=50))


def test_every_job_comes_after_what_it_needs(plan: arms.Plan) -> None:
    found = [job.name for job in jobs.jobs_of(plan)]
    assert len(set(found)) == len(found) == 1 + 2 * 3 + (len(arms.ARMS) + 1) * 2 * 2
    for name in ("plain", "aligned"):
        needed = [found.index(f"{what}-{name}") for what in ("tokenizer", "latents", "evaluation")]
        assert found.index("vision") < needed[0] < min(needed[1:])
    for arm in arms.ARMS:
        for run in [f"{arm.name}-{seed}{end}" for seed in plan.seeds for end in ("", "-start")[: 1 + arm.quick]]:
            assert found.index(f"latents-{arm.tokenizer}") < found.index(run) < found.index(f"{run}-evaluated")


def copy_job(name: str, source: Path, target: Path) -> Job:
    """A job of the standard library: `json.tool` writes what it reads."""
    return Job(name, ("json.tool", str(source), str(target)), target)


def test_jobs_run_in_order_and_are_not_done_twice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    start, middle, end = (tmp_path / f"{name}.json" for name in ("start", "middle", "end"))
    start.write_text("[1]")
    chain = [copy_job("first", start, middle), copy_job("second", middle, end)]
    run_jobs(chain)
    assert json.loads(end.read_text()) == [1]
    assert "0 of 2 parts are there" in capsys.readouterr().out
    end.write_text("[2]")
    run_jobs(chain)
    assert json.loads(end.read_text()) == [2]
    assert "2 of 2 parts are there" in capsys.readouterr().out


def test_a_job_that_fails_is_named(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    job = Job("broken", ("no_module_of_this_name",), tmp_path / "never")
    with pytest.raises(
        LightningDiTError, match=r"broken failed with exit code 1; fix: see above, and give the command"
    ):
        run_jobs([job])
    assert "No module named no_module_of_this" in capfd.readouterr().err
    silent = Job("silent", ("this", "--nothing"), tmp_path / "never")  # ends well, and makes no file
    with pytest.raises(LightningDiTError, match="silent failed with exit code 0"):
        run_jobs([silent])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_reaches_the_job_under_way(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(
        "import sys, time\nfrom pathlib import Path\nfrom LightningDiT.console import run_main\n"
        "def main():\n    Path(sys.argv[1]).touch()\n    time.sleep(60)\n"
        "sys.exit(run_main(main))\n"
    )
    code = (
        "import sys; from pathlib import Path; from LightningDiT.console import run_main\n"
        "from LightningDiT.verdict.jobs import Job, run_jobs\n"
        f"job = Job('waiting', ('waiting', {str(tmp_path / 'began')!r}), Path({str(tmp_path / 'never')!r}))\n"
        "sys.exit(run_main(lambda: run_jobs([job]) or 0))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    study = subprocess.Popen(
        [sys.executable, "-c", code], cwd=PROJECT, env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "began").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    child = children_of(study.pid)[0]
    study.send_signal(number)
    _, errors = study.communicate(timeout=60)
    assert study.returncode == 130
    assert [line.split(";")[0] for line in errors.splitlines()] == ["stopped", "stopped"]  # the job's, and the study's
    assert not Path(f"/proc/{child}").exists()


def children_of(pid: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def curve(*values: float) -> page.Curve:
    return page.Curve(tuple(100 * number for number in range(1, len(values) + 1)), values)


def test_images_to_a_level_are_read_between_two_checkpoints() -> None:
    falling = curve(8.0, 4.0, 2.0, 2.5)
    assert falling.reached(4.0) == 200
    assert falling.reached(math.sqrt(8.0)) == pytest.approx(250)  # half of the way from 4 to 2 in logarithms
    assert falling.reached(9.0) == 100
    assert falling.reached(1.0) is None
    assert page.images_saved(curve(9.0, 6.0, 5.0, 4.0), falling) == "2.0"
    assert page.images_saved(curve(9.0, 9.0, 9.0, 8.5), falling) == "4.0 or more"
    assert page.images_saved(curve(1.0), falling) == "not reached"


def write_results(plan: arms.Plan) -> None:
    """Write figures of four checkpoints: each arm is twice as good as the one before, the second seed a tenth worse."""
    plan.folder.mkdir()
    for number, arm in enumerate(arms.ARMS):
        for seed in plan.seeds:
            files = {arms.run_name(arm, seed): (10, 20, 30, 40)}
            files |= {arms.start_name(arm, seed): (2, 4, 6, 8, 10)} if arm.quick else {}
            for name, steps in files.items():
                values = {step: 80.0 / 2**number / step * (1.1 if seed else 1.0) for step in steps}
                figures = {
                    str(step): {"frechet": value, "frechet_pixels": value / 2, "accuracy": 0.75}
                    for step, value in values.items()
                }
                real = {"frechet": 0.125, "frechet_pixels": 0.0625, "accuracy": 0.9}
                (plan.folder / f"{name}.json").write_text(json.dumps({**figures, "real": real}))
    for name, psnr in (("plain", 30.0), ("aligned", 29.0)):
        folder = plan.folder / f"evaluation-{name}"
        folder.mkdir(exist_ok=True)
        report = {"psnr_mean": psnr, "frechet_distance": 0.25, "latents": {"uniformity": -3.5}}
        (folder / "evaluation.json").write_text(json.dumps(report))


def test_the_page_holds_figures_ratios_and_curves(plan: arms.Plan, tmp_path: Path) -> None:
    write_results(plan)
    document = tmp_path / "docs" / "training.md"
    document.parent.mkdir()
    document.write_text("# Training\n\nProse.\n\n<!-- convergence: begin -->\n<!-- convergence: end -->\n\nMore.\n")
    curves = page.write_page(plan, document)
    text = document.read_text()
    assert text.startswith("# Training\n\nProse.\n")
    assert text.endswith("<!-- convergence: end -->\n\nMore.\n")
    assert "**5,120 images a training, 20 images of each checkpoint, seeds 0 / 3:**" in text
    assert "| DiT, plain VAE | 2.00 / 2.20 |  | not reached |" in text
    assert "| LightningDiT, aligned VAE | 0.25 / 0.28 | 7.8 | 4.0 |" in text
    assert "| LightningDiT, plain VAE | 0.50 / 0.55 | 4.0 or more | 2.0 |" in text
    assert "| 20 real training photographs | 0.12 |  |  |" in text
    assert "| aligned | 29.0 | 0.250 | -3.50 |" in text
    assert curves == tmp_path / "docs" / "training" / "convergence.png"
    assert curves.read_bytes().startswith(b"\x89PNG")
    first = json.loads(curves.with_suffix(".json").read_text())["dit-0"]
    assert first["images"] == [1280, 2560, 3840, 5120]
    assert first["frechet"] == [8.0, 4.0, 80 / 30, 2.0]


def test_checkpoints_are_evaluated_once(
    tmp_path: Path,
    data_root: Path,  # noqa: F811
    capsys: pytest.CaptureFixture,
) -> None:
    """The bundled weights as the average of a checkpoint have the figures that the same weights have by themselves."""
    from LightningDiT.checkpoint import load_weights

    run, output = tmp_path / "run", tmp_path / "run.json"
    weights = {name: value.float() for name, value in load_weights(BUNDLED / "transformer.safetensors").items()}
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    save_training_state({"step": 0, "ema": zeros}, run / "checkpoint-0000000.pt")
    for step, average in ((10, zeros), (20, weights)):
        save_training_state({"step": step, "model": zeros, "ema": average}, run / f"checkpoint-{step:07d}.pt")
    arguments = ["--config", str(BUNDLED / "config.yaml"), "--run", str(run), "--data-root", str(data_root)]
    arguments += ["--count", "20", "--output", str(output)]
    assert run_main(lambda: evaluate_checkpoints.main(arguments)) == 0
    figures = json.loads(output.read_text())
    assert set(figures) == {"10", "20", "real"}
    assert figures["20"]["accuracy"] >= 0.9  # the model card has 96 %
    assert figures["10"]["accuracy"] == pytest.approx(0.1, abs=0.11)  # noise, whatever class was asked for
    (run / "evaluated-20.json").write_text(json.dumps({"10": {}, "20": {"accuracy": 7}}))
    capsys.readouterr()
    assert run_main(lambda: evaluate_checkpoints.main(arguments)) == 0
    assert json.loads(output.read_text())["20"] == {"accuracy": 7}
    assert "checkpoint-" not in capsys.readouterr().out


def test_a_run_without_checkpoints_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--config", "a.yaml", "--run", str(tmp_path), "--output", str(tmp_path / "a.json")]
    assert run_main(lambda: evaluate_checkpoints.main(arguments)) == 1
    fix = f"python -m LightningDiT.train --config a.yaml --output {tmp_path}"
    assert f"holds no checkpoint after a step; fix: {fix}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (
            ["--steps", "10", "--every", "3"],
            "--every is 3 and --steps 10; a multiple of 5, and a multiple of that, are",
        ),
        (["--seeds", "1", "1"], "different ones of 0 or more are expected"),
    ],
)
def test_what_cannot_be_is_a_usage_error(option: list[str], reason: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(option)
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err
