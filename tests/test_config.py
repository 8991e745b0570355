"""The YAML schema: what loads, what is refused, and with which words."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import yaml

import LightningDiT.config as settings
from LightningDiT.config import (
    PRESET_WORDS,
    PRESETS,
    Config,
    SampleConfig,
    as_dict,
    as_yaml,
    load_config,
    resolved_solver,
    with_overrides,
    with_preset,
)
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import guidance_of
from LightningDiT.tokenizer.config import load_tokenizer_config, tokenizer_config_path, tokenizer_training
from LightningDiT.transport import GuidanceSettings, SdeSettings
from LightningDiT.transport.sampler import ATOL, RTOL
from tests.conftest import PACKAGE

#: Every key of the published schema, with values of the kinds that the published files hold.
PUBLISHED = """
ckpt_path: /weights/lightningdit-xl-imagenet256-800ep.pt
data: {data_path: /latents, fid_reference_file: /ref.npz, valid_path: /valid, image_size: 256, num_classes: 1000,
  num_workers: 8, latent_norm: true, latent_multiplier: 1.0}
vae: {model_name: vavae_f16d32, downsample_ratio: 16}
model: {model_type: LightningDiT-XL/1, use_qknorm: false, use_swiglu: true, use_rope: true, use_rmsnorm: true,
  wo_shift: false, in_chans: 32, learn_sigma: false, use_checkpoint: true}
train: {max_steps: 80000, global_batch_size: 1024, global_seed: 0, output_dir: output, exp_name: xl, ckpt: null,
  log_every: 100, ckpt_every: 20000, resume: true, weight_init: null, use_checkpoint: true}
optimizer: {lr: 2e-4, beta2: 0.95, max_grad_norm: 1.0}
transport: {path_type: Linear, prediction: velocity, loss_weight: null, sample_eps: null, train_eps: null,
  use_cosine_loss: true, use_lognorm: true}
sample: {mode: ODE, sampling_method: euler, atol: 1e-6, rtol: 0.001, reverse: false, likelihood: true,
  num_sampling_steps: 250, cfg_scale: 6.7, per_proc_batch_size: 4, fid_num: 50000, cfg_interval_start: 0.125,
  timestep_shift: 0.3}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_the_published_schema_loads_unmodified(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, PUBLISHED))
    assert config.optimizer.lr == 2e-4  # YAML 1.1 reads this spelling as a string
    assert config.sample.cfg_interval_start == 0.125
    assert config.model.use_checkpoint is True
    ignored = ("data.fid_reference_file", "data.num_workers", "sample.likelihood")
    assert config.notes == tuple(f"{key} is accepted and has no effect" for key in ignored)


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "ckpt_path: weights.pt\nsample:\n  cfg_scale: 2\n"))
    assert config.sample.num_sampling_steps == Config().sample.num_sampling_steps
    assert config.sample.cfg_scale == 2.0
    assert config.ckpt_path == str(tmp_path / "weights.pt")  # relative to the file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample: {cfg_scal: 2}", r"sample: unknown key 'cfg_scal'; did you mean 'cfg_scale'\?"),
        ("smaple: {}", "unknown key 'smaple'; did you mean 'sample'"),
        ("zzz: 1", "unknown key 'zzz'; known keys: ckpt_path"),
        ("sample: {cfg_scale: strong}", "sample: cfg_scale is 'strong'; float is expected"),
        ("data: {num_classes: 10.5}", "data: num_classes is 10.5; int is expected"),
        ("data: {latent_norm: 1}", "latent_norm is 1; bool is expected"),
        ("data: [1, 2]", "is .1, 2.; a mapping"),
        ("data: {num_classes: 0}", "data.num_classes is 0; a positive number"),
        ("data: {num_classes: 2, class_names: [one]}", "1 names for 2 classes; fix: remove data.class_names"),
        (
            "data: {num_classes: 2, class_names: [a, No]}",
            "class_names is False; str is expected; fix: put it in quotes",
        ),
        ("data: {num_classes: 2, class_names: [1, 2]}", "class_names is 1; str is expected; fix: put it in quotes"),
        ("data: {image_size: 250}", "image_size 250 is no multiple of vae.downsample_ratio 16"),
        ("sample: {num_sampling_steps: 1}", "num_sampling_steps is 1; 2 or more"),
        ("sample: {time_grid: curved}", "time_grid is 'curved'; shifted, graded or kumaraswamy"),
        (
            "sample: {cfg_interval_start: 0.9, cfg_interval_end: 0.5}",
            "cfg_interval_start is 0.9, after cfg_interval_end 0.5",
        ),
        ("sample: {mode: DDIM}", "sample.mode is 'DDIM'; ODE or SDE"),
        ("sample: {precision: fp8}", "sample.precision is 'fp8'"),
        ("sample: {guided_channels: some}", "sample.guided_channels is 'some'"),
        ("sample: {cfg_scale: .nan}", "sample.cfg_scale is nan"),
        *(
            (f"{key.replace('.', ': {', 1)}: {value}}}", f"{key} is .*; {expected}")
            for key, values, expected in (
                ("data.latent_multiplier", (".inf", ".nan", "0", "-1", "1.0e-30", "1.0e+300", "1.0e-320"), "a factor"),
                ("sample.atol", (".inf", ".nan", "-1"), "a tolerance of 0 or more"),
                ("sample.rtol", (".inf", ".nan", "-1"), "a tolerance of 0 or more"),
                ("sample.timestep_shift", (".inf", ".nan", "-1"), "0 .off. or a positive shift below 10000"),
                ("train.spike_factor", (".inf", ".nan", "1", "-1"), "0 .off. or a factor above 1"),
                ("optimizer.max_grad_norm", (".inf", ".nan", "0"), "a positive norm, or null"),
            )
            for value in values
        ),
        ("sample: {atol: 0, rtol: 0}", "sample.atol and rtol are both 0, which no step meets; fix: edit either value"),
        ("a: [1", "no valid YAML"),
        ("just words", "unknown key 'just words'; known keys"),
    ],
)
def test_mistakes_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factor", ["1.0e-6", "0.5", "1.0e+6"])
def test_a_factor_in_range_and_one_tolerance_are_enough(factor: str, tmp_path: Path) -> None:
    config = load_config(write(tmp_path, f"data: {{latent_multiplier: {factor}}}\nsample: {{atol: 0, rtol: 0.1}}"))
    assert (config.data.latent_multiplier, config.sample.atol) == (float(factor), 0.0)
    assert load_config(write(tmp_path, "sample: {atol: 0.1, rtol: 0}")).sample.rtol == 0.0


def test_absent_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError, match=r"does not exist; fix: python step3_setup_configs.py"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(LightningDiTError, match="is a folder"):
        load_config(tmp_path)
    with pytest.raises(LightningDiTError, match=r"does not exist; fix: name a tokenizer YAML, such as those in .*conf"):
        load_tokenizer_config(tmp_path / "absent.yaml")


def test_an_unknown_tokenizer_names_the_known_ones(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "vae: {model_name: vavae_f8}"))
    with pytest.raises(LightningDiTError, match=r"'vavae_f8' is neither one of levels_f4d6, vavae_f16d32 nor"):
        tokenizer_config_path(config)


@pytest.mark.parametrize("name", ["lightningdit_xl_800ep", "lightningdit_xl_64ep", "demo"])
def test_the_shipped_configurations_load(name: str) -> None:
    config = load_config(PACKAGE / "configs" / f"{name}.yaml")
    assert config.model.model_type == "LightningDiT-XL/1"
    assert tokenizer_config_path(config).name == "vavae_f16d32.yaml"
    published = {"lightningdit_xl_800ep": 6.7, "lightningdit_xl_64ep": 10.0, "demo": 9.0}
    assert config.sample.cfg_scale == published[name]
    assert config.sample.precision == "tf32"  # as the published sampler allows it


def test_as_dict_holds_what_differs_and_loads_again(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "data: {num_classes: 2, class_names: [a, b]}\nsample: {cfg_scale: 3}"))
    values = as_dict(config)
    assert values["data"] == {"num_classes": 2, "class_names": ["a", "b"]}
    assert values["sample"] == {"cfg_scale": 3.0}


@pytest.mark.parametrize("nothing", ["none", "None", "null", "~"])
def test_nothing_has_several_spellings(nothing: str, tmp_path: Path) -> None:
    text = f"sample: {{mode: SDE, last_step: {nothing}}}\ntransport: {{loss_weight: {nothing}}}"
    config = load_config(write(tmp_path, text))
    assert (config.sample.last_step, config.transport.loss_weight) == (None, None)


def test_overrides_are_held_to_the_rules_and_named_as_the_caller_does() -> None:
    sample = SampleConfig(sampling_method="fast", timestep_shift=0.3)
    assert with_overrides(sample, cfg_scale=None) == sample
    assert with_overrides(sample, cfg_scale=3).cfg_scale == 3.0
    with_points = with_overrides(sample, num_sampling_steps=9)
    assert (with_points.sampling_method, with_points.num_sampling_steps, with_points.time_grid) == ("ab3", 9, "graded")
    for names, called in (({}, "sample.num_sampling_steps"), ({"num_sampling_steps": "--steps"}, "--steps")):
        with pytest.raises(LightningDiTError, match=f"^{called} is 1; 2 or more is expected; fix: choose another"):
            with_overrides(sample, names, num_sampling_steps=1)
        with pytest.raises(LightningDiTError, match=f"^{called} is 1.5; int is expected"):
            with_overrides(sample, names, num_sampling_steps=1.5)


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("demo", "demo"),
        ("64ep", "lightningdit_xl_64ep"),
        ("800ep", "lightningdit_xl_800ep"),
        ("ucgm", "lightningdit_xl_800ep_ucgm"),
    ],
)
def test_a_preset_is_what_the_configuration_of_its_name_samples_by(preset: str, name: str) -> None:
    shipped = resolved_solver(load_config(PACKAGE / "configs" / f"{name}.yaml").sample)
    changed = SampleConfig(cfg_scale=2.0, guided_channels="all", time_grid="graded", mode="SDE", cfg_interval_end=0.9)
    found = resolved_solver(with_preset(dataclasses.replace(changed, precision="tf32"), preset))
    assert dataclasses.replace(found, sampling_method=shipped.sampling_method) == shipped


def test_ucgm_is_50_evaluations_and_a_preset_must_exist() -> None:
    found = resolved_solver(with_preset(SampleConfig(), "ucgm"))
    assert (found.sampling_method, found.num_sampling_steps, found.time_grid) == ("extrapolated", 51, "kumaraswamy")
    assert guidance_of(found) == GuidanceSettings(6.7, 0.125, 1.0, 3)
    assert PRESETS.keys() == PRESET_WORDS.keys()
    with pytest.raises(LightningDiTError, match="preset 'fast' is unknown; demo, 64ep, 800ep, ucgm are expected"):
        with_preset(SampleConfig(), "fast")


@pytest.mark.parametrize(
    ("text", "wish"),
    [("true", "on"), ("false", "off"), ("on", "on"), ("off", "off"), ("'on'", "on"), ("auto", "auto"), (None, "auto")],
)
def test_compile_is_a_wish_and_was_a_switch(text: str | None, wish: str, tmp_path: Path) -> None:
    """YAML reads an unquoted `on` as true; what is written keeps the wish."""
    path = tmp_path / "c.yaml"
    path.write_text("sample: {}" if text is None else f"sample: {{compile: {text}}}")
    config = load_config(path)
    assert config.sample.compile == wish
    path.write_text(as_yaml(as_dict(config)))
    assert load_config(path).sample.compile == wish


def test_no_other_wish_is_taken(tmp_path: Path) -> None:
    for value in ("fast", "1", "null"):
        (tmp_path / "c.yaml").write_text(f"sample: {{compile: {value}}}")
        with pytest.raises(LightningDiTError, match=r"compile is .*(auto, on or off|bool or str) is expected"):
            load_config(tmp_path / "c.yaml")
    assert [with_overrides(SampleConfig(), compile=value).compile for value in ("off", True)] == ["off", "on"]


def test_the_defaults_of_sampling_are_those_of_the_published_calls() -> None:
    ours, sde, guidance = SampleConfig(), SdeSettings(), GuidanceSettings()
    assert (ours.atol, ours.rtol) == (ATOL, RTOL)
    for name in ("diffusion_form", "diffusion_norm", "last_step", "last_step_size"):
        assert getattr(ours, name) == getattr(sde, name)
    assert ours.num_sampling_steps == sde.num_steps
    assert guidance_of(ours) == guidance


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("seed", value) for value in ("-1", "9223372036854775808")),
        *((key, value) for key in ("beta1", "beta2") for value in ("-0.1", "1.0")),
        *(("lr", value) for value in ("0.0", "1.0", ".nan", ".inf")),
        *(("max_grad_norm", value) for value in ("0.0", "-1.0")),  # a negative one would turn every step around
        *(("ema_decay", "1.1"), ("decay_steps", "-1"), ("logvar_init", ".nan"), ("l1_weight", ".inf")),
    ],
)
def test_values_that_no_training_of_a_tokenizer_could_use(key: str, value: str, tmp_path: Path) -> None:
    text = f"model: {{params: {{embed_dim: 4, ddconfig: {{ch: 32}}}}}}\ntrain: {{{key}: {value}}}"
    with pytest.raises(LightningDiTError, match=rf"train.{key} is .* is expected; fix: edit that value"):
        tokenizer_training(load_tokenizer_config(write(tmp_path, text)))


def test_a_tokenizer_file_refuses_unknown_keys(tmp_path: Path) -> None:
    text = "model: {params: {embed_dim: 4, ddconfig: {ch: 32}}}\ntrain: {max_stepz: 5}"
    with pytest.raises(LightningDiTError, match="'max_stepz'; did you mean 'max_steps'"):
        load_tokenizer_config(write(tmp_path, text))


def test_text_is_literal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's configuration reads neither the environment nor another key."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    path = tmp_path / "config.yaml"
    names = ["${oc.env:HF_TOKEN}", "${ckpt_path}", "${unknown:1}", "???", "2024-01-01"]
    path.write_text(as_yaml({"ckpt_path": "a.pt", "data": {"num_classes": len(names), "class_names": names}}))
    assert list(settings.load_config(path).data.class_names) == names
    assert settings.read_yaml(path)["data"]["class_names"] == names


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['true']",
        "a: !!python/name:os.system",
        "a: 1\na: 2",
        "a: &a [*a]",
        "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]),
        "[" * 100_000,
        "\n".join(" " * level + "a:" for level in range(1300)),
        "a: " + "9" * 5000,
        "a: '" + "x" * (settings.MOST_YAML + 1) + "'",
        "a: [",
        "a: '${'",
        "[1, 2]",
    ],
    ids=lambda text: text[:20],
)
def test_what_runs_or_grows_or_is_no_mapping_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(LightningDiTError) as refusal:
        settings.read_yaml(path)
    assert len(str(refusal.value)) < 1000
    assert "\n" not in str(refusal.value)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    values = {
        "texts": ["1e-4", "1.5e3", "No", "null", "12", "${a}", " x ", "图", "a: b", "", "2024-01-01"],
        "numbers": [1e-4, 1.5e3, 12, -1.0, float("inf"), 1e-30],
        "others": [None, True, {"a": [], "b": {}}],
        "same": [shared := [1, 2], shared],
    }
    path.write_text(as_yaml(values), encoding="utf-8")
    assert settings.read_yaml(path) == values
    path.write_text("")
    assert settings.read_yaml(path) == {}


def test_numbers_with_exponents_and_merged_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {lr: 2e-4, x: 1.5e3}\nb: {<<: *a, x: 1}\n")
    assert settings.read_yaml(path)["b"] == {"lr": 2e-4, "x": 1}
    assert yaml.safe_load(path.read_text())["b"]["lr"] == "2e-4"  # as YAML 1.1 has it


@pytest.mark.skipif(sys.platform == "win32", reason="links of a POSIX file system")
def test_a_configuration_in_the_cache_of_the_hub_names_files_beside_its_link(tmp_path: Path) -> None:
    """The cache keeps files under their hashes; any other link counts as the folder of its target."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for name, blob in (("config.yaml", "ab12"), ("a.safetensors", "cd34")):
        (tmp_path / "blobs" / blob).write_text("ckpt_path: a.safetensors\n")
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / blob)
    (tmp_path / "plain.yaml").write_text("ckpt_path: a.safetensors\n")
    (tmp_path / "snapshot" / "linked.yaml").symlink_to(tmp_path / "plain.yaml")
    config = load_config(tmp_path / "snapshot" / "config.yaml")
    assert config.source == str(tmp_path / "snapshot" / "config.yaml")
    assert config.ckpt_path == str(tmp_path / "snapshot" / "a.safetensors")
    assert load_config(tmp_path / "snapshot" / "linked.yaml").ckpt_path == str(tmp_path / "a.safetensors")
