"""Step 4 finds the published weights where they are now."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from LightningDiT.config import Config, load_config
from LightningDiT.errors import LightningDiTError
from setup_steps import samples, weights

FILES = weights.files_of("64ep")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Settings as step 3 writes them, whose files are in tmp_path/old; models/ is empty."""
    monkeypatch.setattr(weights, "MODELS", tmp_path / "models")
    monkeypatch.delenv(weights.MODELS_VARIABLE, raising=False)
    put(tmp_path / "old")
    path = tmp_path / "c.yaml"
    path.write_text(
        f"ckpt_path: old/{FILES[2].name}\ndata: {{data_path: old}}\nvae: {{ckpt_path: old/{FILES[0].name}}}\n"
    )
    return load_config(path)


def put(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for file in FILES:
        (folder / file.name).touch()
    return folder


def folders(config: Config) -> set[Path]:
    """The folders of the three files."""
    return {
        Path(str(config.ckpt_path)).parent,
        Path(str(config.vae.ckpt_path)).parent,
        Path(str(config.data.data_path)),
    }


def test_files_stay_where_the_settings_say(config: Config, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    put(tmp_path / "models")
    assert samples.located(config, None) == config
    assert folders(config) == {tmp_path / "old"}
    assert not recwarn


@pytest.mark.parametrize("how", ["models", "variable", "option"])
def test_files_that_moved_are_found(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The option holds even if the old files are there still."""
    new = put(tmp_path / ("models" if how == "models" else "new"))
    if how == "variable":
        monkeypatch.setenv(weights.MODELS_VARIABLE, str(new))
    if how != "option":
        (tmp_path / "old").rename(tmp_path / "elsewhere")
    with pytest.warns(UserWarning) as said:
        found = samples.located(config, new if how == "option" else None)
    dit, old = FILES[2].name, tmp_path / "old"
    assert f"{new / dit} is taken for {old / dit}, which {config.source} names" in [str(row.message) for row in said]
    assert folders(found) == {new}
    assert dataclasses.replace(found, ckpt_path="", vae=config.vae, data=config.data) == dataclasses.replace(
        config, ckpt_path=""
    )


def test_files_that_are_gone_are_one_line(config: Config, tmp_path: Path) -> None:
    (tmp_path / "old" / weights.STATS.name).unlink()
    lost = re.escape(f"{tmp_path / 'old' / weights.STATS.name}, which {config.source} names, is neither there nor in ")
    with pytest.raises(LightningDiTError, match=f"{lost}.*step2.* 64ep; or, .*step3.* 64ep --models-dir FOLDER"):
        samples.located(config, None)
    with pytest.raises(
        LightningDiTError, match=f"is not in {tmp_path / 'new'}; fix: .*step2.*--models-dir {tmp_path}/new"
    ):
        samples.located(config, tmp_path / "new")


def test_other_weights_know_no_folder(tmp_path: Path) -> None:
    config = load_config(weights.BUNDLED / "config.yaml")
    with pytest.warns(UserWarning, match="--models-dir has no effect: .*config.yaml names none of the published"):
        assert samples.located(config, tmp_path) == config
