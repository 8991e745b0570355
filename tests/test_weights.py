"""The registry of weights: names, sets, and the search by file name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import step3_setup_configs as step3
from LightningDiT.errors import LightningDiTError
from setup_steps import weights

DIT = weights.DIT["800ep"]
COPIES = [weights.converted_name(DIT.name, precision) for precision in weights.PRECISIONS]


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_sets_and_roles() -> None:
    assert weights.files_of("800ep") == (weights.VAVAE, weights.STATS, DIT)
    assert weights.files_of("all", "dit") == (DIT, weights.DIT["64ep"])
    assert weights.files_of("bundled") == ()


def test_names_of_converted_copies() -> None:
    assert weights.converted_name("a.b.pt", "fp16") == "a.b.fp16.safetensors"
    fp32, bf16, fp16 = COPIES
    assert weights.usable_names(DIT) == (fp32, DIT.name, bf16, fp16)
    assert weights.usable_names(weights.VAVAE) == (weights.VAVAE.name,)


def test_search_finds_at_any_depth_in_order(tmp_path: Path) -> None:
    deep, flat = put(tmp_path / "b" / "c" / "d" / "one.pt"), put(tmp_path / "a" / "one.pt")
    folder = tmp_path / "two.pt"
    folder.mkdir()
    put(tmp_path / "none.pt")
    assert weights.search(tmp_path, ["two.pt", "one.pt", "three.pt"]) == {
        "two.pt": [folder],
        "one.pt": [flat, deep],
        "three.pt": [],
    }
    assert weights.search(tmp_path / "absent", ["one.pt"]) == {"one.pt": []}
    assert weights.search(flat, ["one.pt"]) == {"one.pt": []}


OWNER = "models/hustvl/vavae/pyTorch/default"


@pytest.mark.parametrize(
    ("places", "newest"),
    [
        ([f"{OWNER}/2", f"{OWNER}/10", f"{OWNER}/9"], f"{OWNER}/10"),  # attached models
        (["vavae/pytorch/default/1", "vavae/pytorch/default/3/inner"], "vavae/pytorch/default/3/inner"),
        (["datasets/me/weights", "datasets/you/weights"], "datasets/me/weights"),  # attached data sets
        (["datasets/me/weights/versions/9", "datasets/me/weights/versions/12"], "datasets/me/weights/versions/12"),
        (["set-v2", "set-v10"], "set-v10"),  # no version that Kaggle numbers: by name
    ],
)
def test_the_highest_version_comes_first(tmp_path: Path, places: list[str], newest: str) -> None:
    """The shapes of /kaggle/input and of kagglehub's folder elsewhere."""
    for place in places:
        put(tmp_path / place / DIT.name)
    assert weights.Tree(tmp_path).paths(DIT)[0] == tmp_path / newest / DIT.name


def test_a_newer_version_is_the_same_file_in_a_folder_of_a_higher_number(tmp_path: Path) -> None:
    paths = {number: put(tmp_path / OWNER / number / "inner" / DIT.name) for number in ("2", "9", "10")}
    for other in ("11/elsewhere", "old/inner", "12"):
        put(tmp_path / OWNER / other / DIT.name)
    assert weights.newer_version(paths["2"]) == weights.newer_version(paths["9"]) == paths["10"]
    assert weights.newer_version(paths["10"]) is None
    assert weights.newer_version(put(tmp_path / "flat" / DIT.name)) is None


def test_search_follows_links_once(tmp_path: Path) -> None:
    """A data set may be a link, and a link may lead back up."""
    put(tmp_path / "elsewhere" / "one.pt")
    attached = tmp_path / "attached"
    attached.mkdir()
    (attached / "set").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(attached)
    assert weights.search(attached, ["one.pt"]) == {"one.pt": [attached / "set" / "one.pt"]}


def test_find_file_takes_models_first_and_the_best_name_first(tmp_path: Path) -> None:
    models, attached = tmp_path / "models", tmp_path / "attached"
    assert weights.find_file(DIT, models, weights.Tree(attached)) is None
    assert weights.find_file(DIT, models, None) is None
    rounded = put(attached / "x" / COPIES[2])
    assert weights.find_file(DIT, models, weights.Tree(attached)) == rounded
    original = put(attached / "y" / "z" / DIT.name)
    assert weights.find_file(DIT, models, weights.Tree(attached)) == original
    exact = put(attached / "z" / COPIES[0])
    assert weights.find_file(DIT, models, weights.Tree(attached)) == exact
    in_models = put(models / COPIES[1])
    assert weights.find_file(DIT, models, weights.Tree(attached)) == in_models


def test_find_file_explains_a_folder_unless_the_file_is_inside(tmp_path: Path) -> None:
    """Some uploads put a file into a folder of its own name."""
    (tmp_path / "latents_stats.pt").mkdir()
    with pytest.raises(LightningDiTError, match=r"is a folder, the file latents_stats.pt was expected there; fix: mv "):
        weights.find_file(weights.STATS, tmp_path / "models", weights.Tree(tmp_path))
    inside = put(tmp_path / "latents_stats.pt" / "latents_stats.pt")
    assert weights.find_file(weights.STATS, tmp_path / "models", weights.Tree(tmp_path)) == inside


def test_attached_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(weights.ATTACHED_VARIABLE, raising=False)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert weights.attached_folder() is None
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert weights.attached_folder() == Path("/kaggle/input")
    monkeypatch.setenv(weights.ATTACHED_VARIABLE, "~/data")
    assert weights.attached_folder() == Path.home() / "data"


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder tree as Kaggle's, with 4 GB in /kaggle/working that take no room here."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr(weights, "KAGGLE_WORKING", tmp_path / "working")
    with put(tmp_path / "working" / "run" / "images").open("wb") as file:
        file.truncate(4_000_000_000)
    (tmp_path / "working" / "link").symlink_to(tmp_path / "working" / "run" / "images")
    return tmp_path


def test_what_kaggle_keeps_is_said(kaggle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    working, temp = kaggle / "working" / "models", kaggle / "temp" / "models"
    said = weights.keeps_on_kaggle(working, 7_000_000_000)
    assert said.startswith(f"Save Version keeps {working}: 11.0 GB of 20.0 GB are then used; not to keep it: ")
    assert said.endswith(f"--models-dir {temp}")
    said = weights.keeps_on_kaggle(temp, 10**12)
    assert said.startswith(f"{temp} is gone when the session ends; to keep the files: ")
    assert said.endswith(f"--models-dir {working}")
    assert weights.keeps_on_kaggle(working, 16_000_000_000)
    with pytest.raises(LightningDiTError, match=f"take 16.0 GB; .* holds 4.0 GB, and Kaggle keeps 20.0 GB.*{temp}"):
        weights.keeps_on_kaggle(working, 16_000_000_001)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    assert weights.keeps_on_kaggle(working, 10**12) == ""


def test_the_folder_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The option goes before the variable, and that before models/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(weights.MODELS_VARIABLE, "")
    assert weights.models_folder(None) == weights.models_folder(weights.MODELS) == weights.MODELS
    assert capsys.readouterr().out == ""
    monkeypatch.setenv(weights.MODELS_VARIABLE, "~/权重 1")
    assert weights.models_folder(None) == tmp_path / "home" / "权重 1"
    assert weights.models_folder(Path("Li's")) == tmp_path / "Li's"
    assert capsys.readouterr().out.splitlines() == [
        f"The published weights are in {tmp_path}/home/权重 1 (LIGHTNINGDIT_MODELS).",
        f"The published weights are in {tmp_path}/Li's (--models-dir).",
    ]


@pytest.mark.parametrize(
    ("variable", "message", "fix"),
    [
        ("file", "LIGHTNINGDIT_MODELS .*/file cannot be a folder: .*/file is a file", "--models-dir /"),
        ("file/models", "models cannot be a folder: .*/file is a file", "--models-dir /"),
        ("gone", "gone is a link to nothing, which is not there: the data set is detached", "--models-dir FOLDER"),
        ('"/kaggle/temp/models"', "without quotation marks", "%env LIGHTNINGDIT_MODELS=/kaggle/temp/models, or "),
        (str(weights.BUNDLED), "is the folder of the bundled model", "--models-dir FOLDER"),
        ("two\nlines", r"is 'two.nlines', which holds characters that are none of a text", "--models-dir FOLDER"),
        ("no UTF-8 \udcff", "is 'no UTF-8 .udcff', which holds characters", "--models-dir FOLDER"),
    ],
)
def test_a_folder_that_cannot_hold_the_weights_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, message: str, fix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "file")
    (tmp_path / "gone").symlink_to("nothing")
    monkeypatch.setenv(weights.MODELS_VARIABLE, variable)
    with pytest.raises(LightningDiTError, match=f"{message}.*; fix: .*{fix}"):
        weights.models_folder(None)


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were really walked through, one entry a walk."""
    folders: list[Path] = []
    walk = weights.walk

    def noting(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
        folders.append(folder)
        return walk(folder)

    monkeypatch.setattr(weights, "walk", noting)
    return folders


def test_what_is_in_models_needs_no_walk_and_all_files_one(tmp_path: Path, walked: list[Path]) -> None:
    models, attached = tmp_path / "models", tmp_path / "attached"
    put(models / DIT.name)
    stats = put(attached / "x" / weights.STATS.name)
    assert weights.find_file(DIT, models, weights.Tree(attached)) == models / DIT.name
    assert walked == []
    tree = weights.Tree(attached)
    found = [weights.find_file(file, models, tree) for file in weights.files_of("all")]
    assert found == [None, stats, models / DIT.name, None]
    assert walked == [attached]


def test_step3_walks_once_for_all_files_and_models(tmp_path: Path, walked: list[Path]) -> None:
    attached = tmp_path / "attached"
    put(attached / "a" / weights.STATS.name)
    options = step3.parse(["--attached", str(attached)])
    options.folder = tmp_path / "models"
    for model in ("800ep", "64ep"):
        with pytest.raises(LightningDiTError, match=f"vavae.*, lightningdit-xl-imagenet256-{model}.pt; fix: "):
            step3.find_files(model, options)
    assert walked == [attached]


def test_a_long_walk_says_that_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "a" / "one.pt")
    weights.search(tmp_path, ["one.pt"])
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(weights, "SAY_EVERY", 0.0)
    weights.search(tmp_path, ["one.pt"])
    assert capsys.readouterr().out.splitlines() == [
        f"  searching {tmp_path}: {count} folders so far" for count in (1, 2)
    ]


def test_bytes_to_come(tmp_path: Path) -> None:
    tree = weights.Tree(tmp_path / "attached")
    assert weights.bytes_to_come(DIT, tmp_path, tree) == 6_000_000_000
    (tmp_path / (DIT.name + ".part")).write_bytes(b"x" * 1234)
    assert weights.bytes_to_come(DIT, tmp_path, tree) == 6_000_000_000 - 1234
    (tmp_path / (weights.STATS.name + ".part")).write_bytes(b"x" * 9999)  # the real one is larger than was thought
    assert weights.bytes_to_come(weights.STATS, tmp_path, tree) == 0
    put(tmp_path / "attached" / COPIES[1])
    assert weights.bytes_to_come(DIT, tmp_path, weights.Tree(tmp_path / "attached")) == 0
