"""Pipelines of the hub: the real client against a hub on 127.0.0.1, to it and from it."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.config import PATHS, load_config, read_yaml
from LightningDiT.errors import LightningDiTError
from LightningDiT.hub import repository
from LightningDiT.hub.card import CARD_NAME, PICTURE_NAME
from LightningDiT.hub.registry import DIT, MODELS_VARIABLE, STATS, VAVAE, converted_name
from LightningDiT.hub.repository import LAYOUT, WINDOWS_NAME, pretrained_config
from LightningDiT.sampling import pipeline
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from tests.conftest import PACKAGE, PROJECT
from tests.hub_server import WRITER, Fault, Hub, running_hub

NAME = "someone/tiny"
WEIGHTS = "transformer.safetensors"
#: For tests that push from this process: below 1 the client knows the address of the hub from its import on.
pushes = pytest.mark.skipif(version("huggingface_hub").startswith("0."), reason="the test of the lowest client does so")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, no models, no login, and large files by git LFS, which the hub of the tests speaks."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv(MODELS_VARIABLE, str(tmp_path / "models"))
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


@pytest.fixture
def pipe(tiny_source: Path) -> LightningDiTPipeline:
    return LightningDiTPipeline.from_pretrained(tiny_source, device="cpu")


@pytest.fixture
def pushed(hub: Hub, tiny_source: Path) -> Hub:
    """A hub with the small pipeline, put there as somebody does by hand."""
    for path in tiny_source.iterdir():
        hub.put(NAME, path.name, path.read_bytes(), large=path.suffix != ".yaml")
    return hub


def load(name: str, cache: Path, **how: str) -> LightningDiTPipeline:
    return LightningDiTPipeline.from_pretrained(name, "cpu", cache_dir=cache, **how)


def picture(pipe: LightningDiTPipeline) -> np.ndarray:
    return pipe([0, 2], seed=3, output_type="np").images


def fetched(hub: Hub) -> list[str]:
    """The names of the files that were sent, in order of their names."""
    found = [seen.path.partition("?")[0].rpartition("/")[2] for seen in hub.log if seen.method == "GET"]
    return sorted(name for name in found if name in (*LAYOUT, CARD_NAME, PICTURE_NAME, *EXTRA))


EXTRA = ("train.py", "other.safetensors")
ABSENT = {"guide.safetensors", "solvers.yaml", WINDOWS_NAME}  # that the small pipeline does not have


@pushes
def test_what_is_pushed_comes_back_with_the_same_bytes_and_images(
    hub: Hub, pipe: LightningDiTPipeline, tmp_path: Path
) -> None:
    address = pipe.push_to_hub(NAME, token=WRITER, private=True)
    assert (NAME in hub.private, address) == (True, f"{hub.endpoint}/{NAME}/commit/{hub.commits[NAME][-1]}")
    again = load(NAME, tmp_path / "cache", token=WRITER)
    folder = Path(str(again.config.ckpt_path)).parent
    assert folder.name == hub.commits[NAME][-1]
    stored = {name: kept.data for (_, name), kept in hub.files.items()}
    expected = {*LAYOUT} - ABSENT
    assert stored.keys() == {*expected, CARD_NAME, PICTURE_NAME, ".gitattributes"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: stored[name] for name in expected}
    np.testing.assert_array_equal(picture(again), picture(pipe))

    sent, hub.log = hub.sent, []
    np.testing.assert_array_equal(picture(load(NAME, tmp_path / "cache", token=WRITER)), picture(pipe))
    assert (hub.sent, fetched(hub)) == (sent, [])


@pushes
def test_the_pushed_settings_name_no_file_of_this_machine(hub: Hub, pipe: LightningDiTPipeline, tmp_path: Path) -> None:
    paths = {"valid_path": "v", "split_file": "s", "levels_path": "l"}
    data = dataclasses.replace(pipe.config.data, **{key: str(tmp_path / name) for key, name in paths.items()})
    train = dataclasses.replace(pipe.config.train, output_dir=str(tmp_path), weight_init=str(tmp_path / "w.pt"))
    pipe.config = dataclasses.replace(pipe.config, data=data, train=train)
    pipe.push_to_hub(NAME, token=WRITER, picture=False)
    folder = tmp_path / "read"
    folder.mkdir()
    for name in ("config.yaml", "tokenizer.yaml", CARD_NAME):
        text = hub.files[NAME, name].data.decode()
        assert str(tmp_path.parent) not in text, name
        (folder / name).write_text(text)
    values, flat = read_yaml(folder / "config.yaml"), {}
    for key in (*PATHS, "vae.model_name"):
        section, _, name = key.rpartition(".")
        flat[key] = (values.get(section, {}) if section else values).get(name)
    assert {key: value for key, value in flat.items() if value} == {
        "ckpt_path": WEIGHTS,
        "data.data_path": ".",
        "vae.model_name": "tokenizer.yaml",
    }
    assert read_yaml(folder / "tokenizer.yaml")["ckpt_path"] == "tokenizer.safetensors"


@pushes
def test_a_second_push_takes_away_what_the_pipeline_no_longer_has_and_leaves_a_card_of_somebody(
    hub: Hub, pipe: LightningDiTPipeline, tmp_path: Path
) -> None:
    pipe.push_to_hub(NAME, token=WRITER, picture=False)
    first, before = hub.commits[NAME][-1], picture(pipe)
    for name, content in ((CARD_NAME, b"# mine\n"), ("guide.safetensors", b"old"), ("notes.txt", b"mine")):
        hub.put(NAME, name, content, large=False)
    with torch.no_grad():
        pipe.transformer.final_layer.linear.weight.mul_(1.5)
    with pytest.warns(UserWarning, match="README.md that this program did not write; it stays"):
        pipe.push_to_hub(NAME, token=WRITER, picture=False)
    names = {name for repo, name in hub.files if repo == NAME}
    assert {"notes.txt", CARD_NAME} < names
    assert "guide.safetensors" not in names
    assert hub.files[NAME, CARD_NAME].data == b"# mine\n"
    np.testing.assert_array_equal(picture(load(NAME, tmp_path / "cache")), picture(pipe))
    np.testing.assert_array_equal(picture(load(NAME, tmp_path / "cache", revision=first)), before)
    assert (picture(pipe) != before).any()


def test_a_hub_that_is_gone_leaves_what_the_cache_has(pushed: Hub, tmp_path: Path, pipe: LightningDiTPipeline) -> None:
    load(NAME, tmp_path / "cache")
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # the fixture restores it
    with pytest.warns(UserWarning, match=f"127.0.0.1:9 does not answer: config.yaml of {NAME} comes from the cache"):
        again = load(NAME, tmp_path / "cache")
    np.testing.assert_array_equal(picture(again), picture(pipe))
    expected = "someone/other on http://127.0.0.1:9 cannot be had .it does not answer, and .*; fix: check the internet"
    with pytest.raises(LightningDiTError, match=expected):
        load("someone/other", tmp_path / "cache")


def test_a_folder_wins_and_models_is_never_asked_of_the_hub(
    pushed: Hub, place: Path, tmp_path: Path, tiny_source: Path
) -> None:
    pushed.put("models/tiny", "config.yaml", b"{}", large=False)
    for name in ("models/tiny", "./models/tiny", Path("models/tiny"), "models", "models\\tiny"):
        with pytest.raises(LightningDiTError, match=r"never asked of the hub; fix: python step2_download_models\.py$"):
            LightningDiTPipeline.from_pretrained(name)
    shutil.copytree(tiny_source, place / NAME)
    with pytest.warns(UserWarning, match=f"revision main has no effect: {NAME} is a folder"):
        config = pretrained_config(NAME, revision="main")
    assert config.ckpt_path == str(place / NAME / WEIGHTS)
    assert pretrained_config(Path(NAME)).ckpt_path == config.ckpt_path
    for name in ("tiny", "a/b/c", "../someone/tiny", "/someone/tiny", "some one/tiny", "?"):
        with pytest.raises(LightningDiTError, match=re.escape(f"{name!r} is neither a folder nor owner/name")):
            LightningDiTPipeline.from_pretrained(name)
    assert pushed.log == []


@pytest.mark.parametrize(
    ("name", "how", "expected"),
    [
        (
            "someone/none",
            {},
            "someone/none on .* does not exist, or is private .*; fix: check the name, or run hf auth",
        ),
        ("someone/closed", {}, "someone/closed on .* does not exist, or is private and not open to this token; fix: "),
        ("someone/gated", {}, r"is gated: its owner .*; fix: ask for access at http.*/someone/gated, then run hf auth"),
        (NAME, {"revision": "v9"}, "has no revision v9; fix: name a branch, a tag or a commit, or leave out revision="),
        ("someone/other", {}, r"holds no config\.yaml; fix: name a repository that push_to_hub wrote, or name hustvl/"),
        ("a--b/..c", {}, "a--b/..c.* is neither a folder nor owner/name"),
        ("some..one/tiny", {}, "some..one/tiny is no name of a repository .*; fix: name it as owner/name"),
        (
            VAVAE.repo,
            {},
            "holds the tokenizer and its statistics alone; fix: name hustvl/lightningdit-xl-imagenet256-8",
        ),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    name: str, how: dict[str, str], expected: str, pushed: Hub, tmp_path: Path
) -> None:
    for repo, file in (("someone/closed", "config.yaml"), ("someone/gated", "config.yaml"), ("someone/other", "a.bin")):
        pushed.put(repo, file, b"{}")
    pushed.private, pushed.gated = {"someone/closed"}, {"someone/gated"}
    with pytest.raises(LightningDiTError, match=expected) as raised:
        load(name, tmp_path / "cache", **how)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("token", [False, "hf_reader"])
def test_a_token_that_may_not_write_is_one_line(token: str | bool, hub: Hub, pipe: LightningDiTPipeline) -> None:
    with pytest.raises(
        LightningDiTError, match=r"someone/tiny on .* needs a token that may write .*; fix: run hf auth"
    ):
        pipe.push_to_hub(NAME, token=token, picture=False)
    with pytest.raises(LightningDiTError, match="'tiny' is no repository on the hub; fix: name it as owner/name"):
        pipe.push_to_hub("tiny")
    assert hub.files == {}


@pushes
def test_a_mirror_without_xet_is_named(hub: Hub, pipe: LightningDiTPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(LightningDiTError, match="has no Xet .*; fix: export HF_HUB_DISABLE_XET=1$"):
        pipe.push_to_hub(NAME, token=WRITER, picture=False)


def test_offline_mode_asks_nobody_and_is_named(pushed: Hub, tmp_path: Path) -> None:
    """In a process of its own, since clients read the variable once."""
    program = f"from LightningDiT.hub.repository import pretrained_config; pretrained_config({NAME!r})"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": path_of_packages()}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert f"{NAME} is not in the cache, and HF_HUB_OFFLINE is set; fix: unset HF_HUB_OFFLINE" in done.stderr
    assert pushed.log == []


def path_of_packages() -> str:
    return os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))


def test_a_login_in_the_address_of_a_mirror_is_neither_sent_nor_shown(
    pushed: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", pushed.endpoint.replace("//", "//me:secret@"))
    with pytest.raises(LightningDiTError, match="HF_ENDPOINT is an address with a login; .*; fix: unset") as raised:
        load(NAME, tmp_path / "cache")
    assert "secret" not in str(raised.value)
    assert pushed.log == []


def test_a_server_answers_whatever_it_says(hub: Hub) -> None:
    hub.hub_faults = [Fault(status=503), Fault(drop_after=0), Fault(status=200)]
    assert [repository.answers(hub.endpoint) for _ in range(3)] == [True] * 3
    assert [repository.answers(address) for address in ("http://127.0.0.1:9", "http://nowhere.invalid")] == [False] * 2


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("config.yaml", "ckpt_path: transformer", "ckpt_path: ../transformer"),
        ("config.yaml", "ckpt_path: transformer.safetensors", "ckpt_path: /etc/passwd"),
        ("config.yaml", "ckpt_path: transformer.safetensors", "ckpt_path: other.safetensors"),
        ("config.yaml", "ckpt_path: transformer.safetensors", "ckpt_path: [transformer.safetensors]"),
        ("config.yaml", "ckpt_path: transformer", "adapter_path: ~/a.safetensors\nckpt_path: transformer"),
        ("config.yaml", "data_path: .", "data_path: .."),
        ("config.yaml", "data_path: .", "data_path: ., valid_path: /data"),
        ("config.yaml", "model_name: tokenizer.yaml, ", ""),
        ("config.yaml", "model_name: tokenizer.yaml", "model_name: vavae_f16d32"),
        ("config.yaml", "model_name: tokenizer.yaml", "ckpt_path: a/b.pt, model_name: tokenizer.yaml"),
        ("config.yaml", "guided_channels: all", "guided_channels: all, guide_ckpt: ../../g.pt"),
        ("config.yaml", "guided_channels: all", "guided_channels: all, solver_file: /s.yaml"),
        ("tokenizer.yaml", "ckpt_path: tokenizer.safetensors", "ckpt_path: /etc/passwd"),
        ("tokenizer.yaml", "ckpt_path: tokenizer", "train: {weight_init: /w.pt}\nckpt_path: tokenizer"),
    ],
)
def test_settings_from_the_hub_do_not_leave_their_folder(
    file: str, old: str, new: str, pushed: Hub, tmp_path: Path
) -> None:
    text = pushed.files[NAME, file].data.decode()
    assert old in text
    pushed.put(NAME, file, text.replace(old, new).encode(), large=False)
    expected = (
        rf"someone/tiny: {re.escape(file)} sets .*, which is no file of a pushed pipeline; fix: name a repository"
    )
    with pytest.raises(LightningDiTError, match=expected):
        load(NAME, tmp_path / "cache")
    assert (WEIGHTS in fetched(pushed)) == (file != "config.yaml")


def test_a_repository_without_its_files_is_one_line(pushed: Hub, tmp_path: Path) -> None:
    del pushed.files[NAME, "tokenizer.safetensors"]
    with pytest.raises(LightningDiTError, match=f"{NAME} lacks tokenizer.safetensors, which its YAML names; fix: "):
        load(NAME, tmp_path / "cache")
    del pushed.files[NAME, "tokenizer.yaml"]
    with pytest.raises(LightningDiTError, match=f"{NAME} holds no tokenizer.yaml; fix: "):
        load(NAME, tmp_path / "other")


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("ran",)


def test_files_from_the_hub_are_data_and_others_stay_there(pushed: Hub, place: Path, tmp_path: Path) -> None:
    for name in EXTRA:
        pushed.put(NAME, name, b"x")
    load(NAME, tmp_path / "cache")
    kept = sorted(path.name for path in (tmp_path / "cache").rglob("snapshots/*/*"))
    assert kept == fetched(pushed) == sorted({*LAYOUT} - ABSENT)
    for name in (WEIGHTS, STATS.name):
        pushed.put(NAME, name, pickle.dumps({"mean": Evil(), "std": Evil()}))
        with pytest.raises(LightningDiTError, match=re.escape(name)):
            load(NAME, tmp_path / f"cache of {name}")
    assert not (place / "ran").exists()


@pytest.fixture
def published(hub: Hub, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The published repositories, with the small pipeline's weights in the files of the 64-epoch model."""
    config = tmp_path / "tiny.yaml"
    text = (tiny_source / "config.yaml").read_text().replace("tokenizer.yaml", str(tiny_source / "tokenizer.yaml"))
    config.write_text(text)
    monkeypatch.setitem(repository.CONFIGS, "64ep", str(config))
    for file, name, key in ((DIT["64ep"], WEIGHTS, "ema"), (VAVAE, "tokenizer.safetensors", "state_dict")):
        torch.save({key: load_weights(tiny_source / name)}, tmp_path / file.name)
        hub.put(file.repo, file.name, (tmp_path / file.name).read_bytes())
    hub.put(STATS.repo, STATS.name, (tiny_source / STATS.name).read_bytes())
    return hub


def test_a_published_transformer_comes_with_the_tokenizer_of_another_repository(
    published: Hub, pipe: LightningDiTPipeline, tmp_path: Path
) -> None:
    again = load(DIT["64ep"].repo, tmp_path / "cache")
    np.testing.assert_array_equal(picture(again), picture(pipe))
    sent = published.sent
    load(DIT["64ep"].repo, tmp_path / "cache")
    assert published.sent == sent


def test_files_of_step_2_come_before_the_hub(published: Hub, tiny_source: Path, tmp_path: Path) -> None:
    models, dit = tmp_path / "models", DIT["64ep"]
    models.mkdir()
    for file in (dit, VAVAE):
        shutil.copy(tmp_path / file.name, models)
    shutil.copy(tiny_source / STATS.name, models)
    copy = models / converted_name(dit.name, "fp32")
    save_weights(load_weights(tiny_source / WEIGHTS), copy)
    config = pretrained_config(dit.repo)
    assert (config.ckpt_path, config.vae.ckpt_path) == (str(copy), str(models / VAVAE.name))
    assert (config.data.data_path, published.log) == (str(models), [])
    copy.write_bytes(b"")
    assert pretrained_config(dit.repo).ckpt_path == str(models / dit.name)
    config = pretrained_config(dit.repo, revision="main", cache_dir=tmp_path / "cache")
    assert Path(str(config.ckpt_path)).is_relative_to(tmp_path / "cache")
    assert config.vae.ckpt_path == str(models / VAVAE.name)


@pytest.mark.parametrize(("model", "scale", "start"), [("800ep", 6.7, 0.125), ("64ep", 10.0, 0.1)])
def test_published_settings_are_those_of_the_published_figures(
    model: str, scale: float, start: float, hub: Hub, tmp_path: Path
) -> None:
    """The guidance and the shift of arXiv 2501.01423, with 250 points of Euler."""
    for file in (DIT[model], VAVAE, STATS):
        hub.put(file.repo, file.name, b"x")
    config = pretrained_config(DIT[model].repo, cache_dir=tmp_path)
    sample = config.sample
    assert (sample.cfg_scale, sample.cfg_interval_start, sample.timestep_shift) == (scale, start, 0.3)
    assert (sample.sampling_method, sample.num_sampling_steps, sample.guided_channels) == ("euler", 250, 3)
    assert Path(str(config.ckpt_path)).name == DIT[model].name
    assert (Path(str(config.data.data_path)) / STATS.name).read_bytes() == b"x"
    own = load_config(PACKAGE / "configs" / f"lightningdit_xl_{model}.yaml")
    assert dataclasses.replace(config, ckpt_path=None, vae=own.vae, data=own.data) == dataclasses.replace(
        own, ckpt_path=None
    )


def test_models_lie_beside_a_clone_or_in_the_working_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert repository.models_folder() == tmp_path / "models"
    monkeypatch.delenv(MODELS_VARIABLE)
    assert repository.models_folder() == PROJECT / "models"
    monkeypatch.setattr(repository, "PACKAGE", tmp_path / "site-packages" / "LightningDiT")
    assert repository.models_folder() == Path("models")


BOTH_WAYS = f"""
import sys
from LightningDiT import LightningDiTPipeline
pipe = LightningDiTPipeline.from_pretrained(sys.argv[1], "cpu")
pipe.push_to_hub({NAME!r}, token={WRITER!r}, picture=False)
again = LightningDiTPipeline.from_pretrained({NAME!r}, "cpu")
images = [one([0], output_type="np").images for one in (pipe, again)]
assert (images[0] == images[1]).all()
try:
    LightningDiTPipeline.from_pretrained("someone/none")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_the_lowest_client_pushes_and_loads(hub: Hub, tiny_source: Path, tmp_path: Path, other_python: Path) -> None:
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": path_of_packages()}
    command = [str(other_python), "-c", BOTH_WAYS, str(tiny_source)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.match("LightningDiTError someone/none on .* does not exist, or is private", done.stdout)


def test_nothing_of_the_hub_is_imported_before_it_is_asked() -> None:
    program = "import LightningDiT.hub.repository, sys; print('huggingface_hub' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_the_axes_of_spectrograms_go_with_the_weights(
    pipe: LightningDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the split of the training, which stays where it is; then of the saved folder, from folder to folder."""
    known = {"native_columns": 57, "colour_maps": {"jet": 1}}
    monkeypatch.setattr(pipeline, "load_split", lambda _: SimpleNamespace(settings={**known, "seed": 3}))
    (tmp_path / "split.json").touch()
    data = dataclasses.replace(pipe.config.data, split_file=str(tmp_path / "split.json"))
    pipe.config = dataclasses.replace(pipe.config, data=data)
    pipe.save_pretrained(tmp_path / "a", picture=False)
    LightningDiTPipeline.from_pretrained(tmp_path / "a", "cpu").save_pretrained(tmp_path / "b", picture=False)
    assert [json.loads((tmp_path / name / WINDOWS_NAME).read_text()) for name in "ab"] == [known] * 2
