"""What the YAML keys mean: the page is that of the code, and every key is explained and read."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest
import yaml

import step3_setup_configs as step3
import step4_run_inference as step4
from LightningDiT.command import config as command
from LightningDiT.config import NAMED_SOLVERS, PRESETS, Config, as_dict, load_config
from LightningDiT.errors import LightningDiTError
from LightningDiT.reference import keys
from LightningDiT.reference.page import page
from LightningDiT.tokenizer.autoencoder import AutoencoderSettings
from LightningDiT.tokenizer.config import load_tokenizer_config
from LightningDiT.transport import create_transport
from tests.conftest import PACKAGE, PROJECT

ENTRIES = ("inference", "train", "train_tokenizer", "extract_features", "evaluate", "evaluate_tokenizer")
TOOLS = ("calibrate_solver", "choose_tokenizer", "match_guidance", "sweep_guidance", "training_memory")


def nested(file: str) -> dict[str, object]:
    """Return the defaults of all keys that a file of this kind may set, as YAML reads them."""
    values: dict[str, object] = {}
    for key in keys.all_keys():
        if key.file == file and key.meaning != keys.UNREAD:
            *sections, name = key.name.split(".")
            place = values
            for section in sections:
                place = place.setdefault(section, {})  # type: ignore[assignment]
            place[name] = yaml.safe_load("null" if key.default == "none" else key.default)
    return values


def test_the_page_is_up_to_date() -> None:
    assert (PROJECT / "docs" / "config.md").read_text(encoding="utf-8") == page(), (
        "lightningdit config --write-reference renews it"
    )


def test_every_key_is_explained_and_read() -> None:
    for key in keys.all_keys():
        assert len(key.meaning) > 5, key.name
        assert bool(key.readers) != (key.meaning == keys.UNREAD), key.name
    assert keys.readers_of("sample.no_such_key") == () == keys.tokenizer_readers("no_such_key")
    assert set(keys.readers_of("sample.labels")) >= {"inference.py"}
    assert "training/tokenizer_training.py" in keys.tokenizer_readers("disc_layers")


def test_sections_that_are_read_whole_and_keys_that_are_read_by_name_are_there() -> None:
    parameters = inspect.signature(create_transport).parameters
    assert {field.name for field in dataclasses.fields(Config().transport)} <= parameters.keys()
    assert "create_transport(**dataclasses.asdict(config.transport)" in (PACKAGE / keys.WHOLE["transport"]).read_text()
    for name, modules in keys.READ_BY_NAME.items():
        for module in modules:
            word = name.rpartition(".")[2].removeprefix("class_").removeprefix("condition_")
            assert word in (PACKAGE / module).read_text()


def test_the_defaults_of_a_configuration_are_those_that_it_loads(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump(nested(keys.TRANSFORMER)))
    found = dataclasses.replace(load_config(file), source="")
    output = dataclasses.replace(found.train, output_dir="output")  # made absolute
    assert dataclasses.replace(found, train=output) == Config()
    assert as_dict(Config()) == {}


def test_the_defaults_of_a_tokenizer_are_those_that_it_loads(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    values = nested(keys.TOKENIZER)
    params = values["model"]["params"]  # type: ignore[index]
    file.write_text(yaml.safe_dump({**values, "model": {"params": {**params, "lossconfig": {}}}}))
    found, usual = load_tokenizer_config(file), AutoencoderSettings()
    assert found.train == dataclasses.replace(type(found.train)()) and found.embed_dim == usual.embed_dim
    expected = {name: value for name, value in dataclasses.asdict(usual).items() if name != "embed_dim"}
    assert {name: tuple(v) if isinstance(v, list) else v for name, v in found.ddconfig.items()} == expected
    published = params["lossconfig"]["params"]
    assert published["kl_weight"] == 1.0 and published["vf_weight"] == 100.0  # as in latent diffusion and VA-VAE


def test_keys_are_found_by_name_and_by_section() -> None:
    assert [key.name for key in keys.find_keys("sample.cfg_scale")] == ["sample.cfg_scale"]
    assert [key.name for key in keys.find_keys("ckpt_every")] == ["train.ckpt_every"] * 2
    assert [key.name for key in keys.find_keys("vae")] == ["vae.model_name", "vae.downsample_ratio", "vae.ckpt_path"]
    with pytest.raises(LightningDiTError, match="no YAML key is called 'cfg_scal'; did you mean cfg_scale"):
        keys.find_keys("cfg_scal")
    text = "\n".join(keys.find_keys("sample.sampling_method")[0].lines())
    assert all(name in text for name in NAMED_SOLVERS) and "default  euler" in text
    assert "UNet-S" in keys.find_keys("model_type")[0].meaning


@pytest.mark.parametrize("name", [*ENTRIES, *(f"tools.{name}" for name in TOOLS), "step3", "step4"])
def test_every_entry_point_explains_a_key(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    steps = {"step3": step3, "step4": step4}
    parse = (steps[name] if name in steps else importlib.import_module(f"LightningDiT.{name}")).parse
    with pytest.raises(SystemExit) as ended:
        parse(["--help-config", "sample.cfg_scale"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "default  1\n" in said and "loading.py" in said
    with pytest.raises(SystemExit) as ended:
        parse(["--help-config", "nothing_like_it"])
    assert ended.value.code == 2 and "no YAML key is called" in capsys.readouterr().err


def test_presets_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for parse in (importlib.import_module("LightningDiT.inference").parse, step3.parse, step4.parse):
        with pytest.raises(SystemExit):
            parse(["--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert all(f"{name}: " in said for name in PRESETS)


def test_the_command_lists_explains_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    assert "  sample.labels" in capsys.readouterr().out
    assert command.main(["sample.labels"]) == 0
    assert "read by  inference.py" in capsys.readouterr().out
    assert command.main(["--write-reference", str(tmp_path / "page.md")]) == 0
    assert "### `sample`" in (tmp_path / "page.md").read_text(encoding="utf-8")
    with pytest.raises(LightningDiTError, match="is not there"):
        command.main(["--write-reference", str(tmp_path / "none" / "page.md")])
