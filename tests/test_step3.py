"""Step 3: finding the weights, the configuration that is written, and what is kept."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import step3_setup_configs as step3
from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.config import load_config
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import load_transformer
from LightningDiT.sampling.dry_run import verify_config
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from setup_steps import configs, machine, weights
from setup_steps.checks import published_table
from setup_steps.machine import TorchFacts
from setup_steps.project import PROJECT
from tests.project_copy import PYTHON, run_script


@pytest.fixture
def models(tmp_path: Path, published: dict[str, bytes]) -> Path:
    """A folder with the three files of the 800-epoch model; its path has a space."""
    folder = tmp_path / "my models"
    folder.mkdir()
    for file in weights.files_of("800ep"):
        (folder / file.name).write_bytes(published[file.role])
    return folder


def write_config(models: Path, output: Path, *options: str) -> int:
    return step3.main(["--models-dir", str(models), "--output", str(output), "--model", "800ep", *options])


def test_step3_writes_what_the_library_reads(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "config.yaml"
    assert write_config(models, output) == 0
    config = load_config(output)
    assert config.ckpt_path == str(models / weights.DIT["800ep"].name)
    assert config.vae.ckpt_path == str(models / weights.VAVAE.name)
    assert config.data.data_path == str(models)
    sample = config.sample
    assert (sample.num_sampling_steps, sample.cfg_scale) == (50, 9.0)
    assert (sample.cfg_interval_start, sample.timestep_shift) == (0.0, 0.0)
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"Next: {PYTHON} step4_run_inference.py --config {output}"
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["config.yaml"]


def test_step3_writes_a_preset(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "config.yaml"
    assert write_config(models, output, "--preset", "ucgm") == 0
    sample = load_config(output).sample
    found = (sample.sampling_method, sample.cfg_scale, sample.cfg_interval_start, sample.guided_channels)
    assert found == ("ucgm", 6.7, 0.125, 3)
    said = capsys.readouterr().out
    assert "preset ucgm: 50 evaluations of arXiv 2505.07447" in said
    assert "solver extrapolated, 51 points, kumaraswamy grid" in said


def test_step3_again_and_after_an_edit(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "config.yaml"
    write_config(models, output)
    first = output.read_text()
    capsys.readouterr()
    write_config(models, output)
    assert f"{output} was right already" in capsys.readouterr().out
    for number, name in ((4.0, "config.yaml.bak"), (5.0, "config.yaml.bak-1")):
        edited = first.replace("cfg_scale: 9.0", f"cfg_scale: {number}")
        output.write_text(edited)
        write_config(models, output)
        said = capsys.readouterr().out
        assert f"  sample.cfg_scale: {number} there, 9.0 now\n" in said
        assert said.count(" there, ") == 1
        assert (tmp_path / name).read_text() == edited
        assert output.read_text() == first


def test_step3_keeps_the_good_file_when_the_new_one_is_refused(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "config.yaml"
    write_config(models, output)
    before = output.read_text()
    (models / "latents_stats.pt").write_bytes(b"")
    with pytest.raises(LightningDiTError, match=r"is empty \(0 bytes\); fix: python fix_latents_stats.py"):
        write_config(models, output)
    assert output.read_text() == before
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["config.yaml"]


def test_step3_names_every_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError, match=r"vavae.*latents_stats.*800ep.*--model 800ep"):
        write_config(tmp_path, tmp_path / "config.yaml")


def test_step3_takes_the_folder_that_the_variable_names(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its paths are absolute, so that step 4 runs from anywhere; a wrong folder is no reason to take another model."""
    monkeypatch.chdir(models.parent)
    output = tmp_path / "elsewhere.yaml"
    monkeypatch.setenv(weights.MODELS_VARIABLE, models.name)
    assert step3.main(["--model", "800ep", "--output", str(output)]) == 0
    assert f"The published weights are in {models} (LIGHTNINGDIT_MODELS)." in capsys.readouterr().out
    config = load_config(output)
    dit = weights.DIT["800ep"].name
    assert (config.ckpt_path, config.data.data_path) == (str(models / dit), str(models))
    monkeypatch.setenv(weights.MODELS_VARIABLE, f"{models.name}/{dit}")
    gpu = TorchFacts("2.14.1", True, "cuda", "GPU", 16_000_000_000)
    monkeypatch.setattr(machine, "torch_facts", lambda: gpu)
    with pytest.raises(LightningDiTError, match="is a file, a folder was expected"):
        step3.main(["--output", str(output)])


def test_step3_finds_attached_files_at_any_depth(models: Path, tmp_path: Path) -> None:
    attached = tmp_path / "input" / "some-set" / "v1"
    attached.mkdir(parents=True)
    dit = weights.DIT["800ep"].name
    (models / dit).rename(attached / dit)
    output = tmp_path / "config.yaml"
    assert write_config(models, output, "--attached", str(tmp_path / "input")) == 0
    assert load_config(output).ckpt_path == str(attached / dit)


def test_step3_explains_folders_and_files_in_each_others_place(models: Path, tmp_path: Path) -> None:
    """Every option that takes a path, given the other kind, nothing, or a link without a target."""
    output, stats, link = tmp_path / "config.yaml", models / "latents_stats.pt", tmp_path / "link"
    link.symlink_to(tmp_path / "detached" / "file.pt")
    detached = "link is a link to .*file.pt, which is not there: the data set is detached; fix: .*step2_download"
    cases = [
        ("--models-dir", stats, "is a file, a folder was expected; fix: .* --models-dir"),
        ("--models-dir", link, detached.replace("step2_download", "step3_setup_configs.py .*--models-dir FOLDER")),
        ("--attached", stats, "is a file, the folder that holds the attached data sets was expected; fix: "),
        ("--attached", tmp_path / "none", "--attached .*none is not there; fix: "),
        ("--attached", link, detached.replace("step2_download", "step3_setup_configs.py .*--attached FOLDER")),
        ("--stats", models, f"is a folder, a file was expected; fix: .* --stats '?.*{stats.name}'?"),
        ("--stats", models / weights.VAVAE.name, "holds no latent statistics .*; fix: name a good latents_stats.pt"),
        ("--output", models, "is a folder, a YAML file was expected; fix: "),
        ("--output", stats / "config.yaml", "latents_stats.pt is a file, the folder of config.yaml was expected; fix"),
    ]
    for option in ("--checkpoint", "--tokenizer", "--stats"):
        cases += [
            (option, models, f"{option} .*my models is a folder, a file was expected; fix: .*{option}"),
            (option, tmp_path / "none.pt", f"none.pt is not there; fix: {PYTHON} step2_download_models.py"),
            (option, link, detached),
        ]
    for option, path, words in cases:
        with pytest.raises(LightningDiTError, match=words) as caught:
            write_config(models, output, option, str(path))
        assert "\n" not in str(caught.value)
    assert not output.exists()


@pytest.mark.parametrize("file", weights.files_of("800ep"), ids=lambda file: file.role)
def test_step3_explains_what_lies_in_a_weights_files_place(
    file: weights.WeightFile, models: Path, tmp_path: Path
) -> None:
    path, output = models / file.name, tmp_path / "config.yaml"
    path.rename(tmp_path / "moved")
    path.mkdir()
    with pytest.raises(LightningDiTError, match=f"is a folder, the file {file.name} was expected"):
        write_config(models, output)
    path.rmdir()
    for name in weights.usable_names(file):
        (models / name).symlink_to("/detached/" + name)
        with pytest.raises(
            LightningDiTError, match=f"{name} is a link to /detached/{name}, which is not there: the data set"
        ):
            write_config(models, output)
        (models / name).unlink()
    path.symlink_to(tmp_path / "moved")  # as step 2 links what is attached
    assert write_config(models, output) == 0


def test_step3_mends_a_data_path_that_names_the_file(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The published code fails on it with torch.cat(); here the library explains, and step 3 fixes it."""
    output = tmp_path / "config.yaml"
    write_config(models, output)
    first, stats = output.read_text(), models / "latents_stats.pt"
    output.write_text(first.replace(f'data_path: "{models}"', f'data_path: "{stats}"'))
    with pytest.raises(LightningDiTError, match=f"is a file; the folder .* is expected; fix: set data_path: {models}"):
        verify_config(output)
    capsys.readouterr()
    assert write_config(models, output) == 0
    assert f"data.data_path: {stats} there, {models} now" in capsys.readouterr().out
    assert output.read_text() == first


def write_holed_weights(path: Path, dtype: str, value_bytes: int) -> None:
    """A safetensors file of the published transformer whose values take no room on the disk."""
    header, end = {}, 0
    for name, shape in published_table("LightningDiT-XL/1").items():
        start, end = end, end + value_bytes * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", "F16"), ("bf16", "BF16")])
def test_step3_takes_a_converted_copy(models: Path, tmp_path: Path, precision: str, dtype: str) -> None:
    """The 2.7 GB of float32 as 1.35 GB, beside the other files or attached."""
    (models / weights.DIT["800ep"].name).unlink()
    name, output = weights.converted_name(weights.DIT["800ep"].name, precision), tmp_path / "config.yaml"
    write_holed_weights(models / name, dtype, 2)
    assert write_config(models, output) == 0
    assert load_config(output).ckpt_path == str(models / name)
    (tmp_path / "input" / "set").mkdir(parents=True)
    (models / name).rename(tmp_path / "input" / "set" / name)
    assert write_config(models, output, "--attached", str(tmp_path / "input")) == 0
    assert load_config(output).ckpt_path == str(tmp_path / "input" / "set" / name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_converted_copy_samples_as_its_rounded_weights_do(tiny_folder: Path, dtype: torch.dtype) -> None:
    """Computed in float32 whatever the file holds: the same numbers as a float32 file of the rounded weights."""
    path = tiny_folder / "transformer.safetensors"
    rounded = {name: value.to(dtype) for name, value in load_weights(path).items()}
    images = []
    for cast in (dtype, torch.float32):
        save_weights({name: value.to(cast) for name, value in rounded.items()}, path)
        pipeline = LightningDiTPipeline.from_config(tiny_folder / "config.yaml", "cpu")
        assert {value.dtype for value in pipeline.transformer.state_dict().values()} == {torch.float32}
        images.append(pipeline([0, 1], output_type="pt").images)
    torch.testing.assert_close(images[0], images[1], atol=0, rtol=0)
    half = load_transformer(load_config(tiny_folder / "config.yaml"), dtype)
    assert {value.dtype for value in half.state_dict().values()} == {dtype}


def test_step3_prints_yaml_alone_on_a_pipe(tmp_path: Path) -> None:
    """`step3 --print > FILE` gives a configuration; all other lines go to stderr."""
    output, piped = tmp_path / "config.yaml", tmp_path / "piped.yaml"
    done = run_script(PROJECT / "step3_setup_configs.py", "--model", "bundled", "--print", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert done.stdout == output.read_text()
    piped.write_text(done.stdout)
    assert dataclasses.replace(load_config(piped), source="") == dataclasses.replace(load_config(output), source="")
    assert done.stderr.splitlines()[0] == "Step 3: configuration of the sampling"
    assert done.stderr.splitlines()[-1] == f"Next: {PYTHON} step4_run_inference.py --config {output}"


def test_step3_says_in_one_line_why_it_chose_precision_and_batch(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "torch_facts", lambda: TorchFacts("2", True, "cuda", "GPU", 16_000_000_000))
    output = tmp_path / "config.yaml"
    assert write_config(models, output) == 0
    sample = load_config(output).sample
    assert (sample.precision, sample.per_proc_batch_size) == ("auto", 83)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "precision auto" in line]
    assert "batch size 83 takes at most " in line
    assert line.endswith("13.6 GB usable (85% of the GPU's memory)")


def test_step3_dry_run_checks_all_and_writes_nothing(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, output = sorted(tmp_path.rglob("*")), tmp_path / "config.yaml"
    assert write_config(models, output, "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"configuration {output}: LightningDiT-XL/1, 1000 classes" in said
    assert f"would write the configuration of the model '800ep' to {output}" in said
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(LightningDiTError, match="is a folder, a YAML file was expected"):
        write_config(models, models, "--dry-run")
    (models / "latents_stats.pt").write_bytes(b"")
    with pytest.raises(LightningDiTError, match=r"is empty \(0 bytes\); fix: python fix_latents_stats.py"):
        write_config(models, output, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before


def test_step3_options_that_do_not_go_together(models: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        step3.main(["--checkpoint", str(models / "x.pt")])
    assert ended.value.code == 2


def test_step3_auto_passes_a_damaged_model_over(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a GPU: one published file is cut short, the other absent, so the bundled model is next."""
    gpu = TorchFacts("2.14.1", True, "cuda", "GPU", 16_000_000_000)
    tried: list[str] = []
    monkeypatch.setattr(machine, "torch_facts", lambda: gpu)
    whole = step3.build

    def build(model: str, *rest: object) -> configs.Config:
        tried.append(model)
        return whole("800ep" if model == "bundled" else model, *rest)

    monkeypatch.setattr(step3, "build", build)
    dit = models / weights.DIT["800ep"].name
    content = dit.read_bytes()
    dit.write_bytes(content[: len(content) // 2])
    with pytest.raises(LightningDiTError, match="cut short"):
        step3.main(["--models-dir", str(models), "--output", str(tmp_path / "config.yaml")])
    assert tried == ["800ep", "64ep", "bundled"]
    said = capsys.readouterr().out
    assert "model '800ep' is passed over: " in said
    assert "model '64ep' is passed over: " in said


def test_step3_statistics_of_another_name_go_to_a_folder_of_their_own(models: Path, tmp_path: Path) -> None:
    """The fix is run as it stands; the good file beside it is not touched."""
    good = models / "latents_stats.pt"
    other = models / "my stats.pt"
    shutil.copy2(good, other)
    before = good.stat().st_mtime_ns
    with pytest.raises(LightningDiTError, match="is not called latents_stats.pt") as caught:
        write_config(models, tmp_path / "config.yaml", "--stats", str(other))
    fix = str(caught.value.fix).rpartition(" && ")[0]
    subprocess.run(fix, shell=True, check=True)
    assert good.stat().st_mtime_ns == before
    stats = models / "my stats-folder" / "latents_stats.pt"
    assert write_config(models, tmp_path / "config.yaml", "--stats", str(stats)) == 0
    assert load_config(tmp_path / "config.yaml").data.data_path == str(stats.parent)


def test_step3_passes_a_damaged_attached_file_over(models: Path, tmp_path: Path) -> None:
    for name in ("a", "z"):
        (tmp_path / "input" / name).mkdir(parents=True)
    dit = weights.DIT["800ep"].name
    (models / dit).rename(tmp_path / "input" / "z" / dit)
    (tmp_path / "input" / "a" / dit).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert write_config(models, tmp_path / "config.yaml", "--attached", str(tmp_path / "input")) == 0
    assert load_config(tmp_path / "config.yaml").ckpt_path == str(tmp_path / "input" / "z" / dit)


def test_step3_writes_over_nothing_but_yaml(models: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(LightningDiTError, match=r"README.md is named like no YAML file, .yaml or .yml was expected"):
        write_config(models, tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="links of a POSIX file system")
def test_step3_writes_through_no_link(models: Path, tmp_path: Path) -> None:
    """Neither under the name of the YAML nor under that of the copy of an edited one."""
    precious, output = tmp_path / "precious.yaml", tmp_path / "config.yaml"
    precious.write_text("mine")
    output.symlink_to(precious)
    with pytest.raises(LightningDiTError, match=r"config.yaml cannot be written .it is a link"):
        write_config(models, output)
    output.unlink()
    output.write_text("edited: 1\n")
    output.with_name("config.yaml.bak").symlink_to(tmp_path / "elsewhere")
    assert write_config(models, output) == 0
    assert (tmp_path / "config.yaml.bak-1").read_text() == "edited: 1\n"
    assert (precious.read_text(), (tmp_path / "elsewhere").exists()) == ("mine", False)
