"""Step 5 from a folder to its split: the audit of windows with known structure, and what it writes."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import step5_prepare_spectrograms as step5
import step6_adapt_models as step6
from LightningDiT import extract_features, train, train_tokenizer
from LightningDiT.config import load_config
from LightningDiT.console import run_main
from LightningDiT.radar.arrays import read_raw
from LightningDiT.radar.augmentation import NAMES
from LightningDiT.radar.colour_maps import coloured
from LightningDiT.radar.split import load_split
from LightningDiT.radar.training_file import is_fitting
from tests.conftest import PROJECT
from tests.walkers import NATIVE, SIDE, enlarged, render, windows_of

PASSES = {"1": [6, 7, 5], "2": [9, 6], "4": [5]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(tmp_path_factory.mktemp("walkers"), PASSES)


def run(capsys: pytest.CaptureFixture[str], *options: object, code: int = 0) -> str:
    assert run_main(lambda: step5.main([str(option) for option in options])) == code
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_the_audit_names_what_the_folder_was_made_of(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(capsys, "--data", folder, "--output", tmp_path / "out", "--people", "5")
    for line in (
        "3 people, 38 windows, 6 passes",
        "missing        ID_3, ID_5 (2 in all)",
        "colour map     jet; pixels are",
        f"native columns {NATIVE} of time",
        f"neighbours share 75 %: window {SIDE}, stride 32 columns",
        "windows share pixels up to a distance of 3",
        "people with one pass train only and are in no verdict (1): ID_4",
        "Next: networks take squares",
    ):
        assert line in said
    split = load_split(tmp_path / "out" / "split.json")
    assert len(split.rows) == 38
    assert {(row.person, row.pass_number) for row in split.rows if row.fold is not None} == {
        *(("ID_1", at) for at in (1, 2, 3)),
        *(("ID_2", at) for at in (1, 2)),
    }
    listed = list(csv.reader((tmp_path / "out" / "training.csv").read_text().splitlines()))[1:]
    assert [row[0] for row in listed] == [str(folder / row.file) for row in split.part("training")]
    assert [row[1] for row in listed] == [row.person for row in split.part("training")]


def test_levels_are_written_in_one_channel(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The native columns of the texture come back from its JPEG files, and a second run writes the same."""
    options = ("--data", folder, "--output", tmp_path / "out", "--write", tmp_path / "w", "--db-range", -60, 0)
    for _ in (1, 2):
        run(capsys, *options)
    manifest = json.loads((tmp_path / "w" / "manifest.json").read_text())
    assert manifest["db_range"] == [-60, 0]
    assert manifest["native_columns"] == NATIVE
    made = windows_of(1000, 6)[2]
    file = manifest["files"]["ID_1/ID1_case1_1_Doppler3.jpg"]
    found = read_raw(tmp_path / "w" / "levels" / file, None).values
    assert found is not None
    assert found.shape == (SIDE, NATIVE)
    assert float(np.sqrt(((found - made) ** 2).mean())) < 0.04
    assert Image.open(tmp_path / "w" / "levels" / file).mode.startswith("I")
    assert Image.open(tmp_path / "w" / "views" / file).mode == "RGB"
    assert "lies within the data" in run(capsys, *options[:4], "--write", folder / "w", code=1)
    foreign = render(tmp_path / "foreign", {"1": [1]})
    assert "has files of other programs" in run(capsys, *options[:4], "--write", foreign, code=1)
    assert sorted(path.name for path in folder.iterdir()) == ["ID_1", "ID_2", "ID_4"]


def test_next_come_the_commands_from_square_levels_to_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them is taken by the module that it names, with a configuration that has the data's numbers."""
    monkeypatch.setenv("LIGHTNINGDIT_LANG", "zh")
    data = render(tmp_path / "data", {"1": [3, 3, 3], "2": [3]})
    own = ("--data", data, "--output", tmp_path / "out", "--write", tmp_path / "w")
    said = run(capsys, *own)
    assert f"the levels have {NATIVE}x{SIDE} pixels: networks take squares" in said
    assert "网络只接受正方形的窗口" in said
    assert not (tmp_path / "out" / "training.yaml").exists()
    assert not is_fitting(60, 60)  # no multiple of 8
    said = run(capsys, *own, "--size", "64")
    assert "提取潜变量" in said
    adapt, *commands = [shlex.split(line)[1:] for line in said.splitlines() if line.startswith("  ")][-5:]
    assert adapt[0] == "step6_adapt_models.py"
    adapting = step6.parse(adapt[1:])
    assert (adapting.levels, adapting.split_file) == (tmp_path / "w", tmp_path / "out" / "split.json")
    parsers = (train_tokenizer, extract_features, extract_features, train)
    tokenizer, latents, valid, training = (
        module.parse(command[2:]) for module, command in zip(parsers, commands, strict=True)
    )
    assert [command[:2] for command in commands] == [["-m", module.__name__] for module in parsers]
    config = load_config(tmp_path / "out" / "training.yaml")
    assert (config.data.image_size, config.data.num_classes, config.data.num_conditions) == (64, 2, 0)
    assert (config.data.data_path, config.data.valid_path) == (latents.output, valid.output)
    assert (config.data.levels_path, config.data.split_file) == (str(tmp_path / "w"), latents.split_file)
    assert str(Path(config.vae.ckpt_path or "").parent) == tokenizer.output
    assert (latents.draws, valid.part, training.config) == (8, "validation", latents.config)
    assert Path(config.train.weight_init or "").is_file()
    assert config.model.augmentation == len(NAMES)
    with (tmp_path / "out" / "training.yaml").open("a") as file:
        file.write("# mine")
    said = run(capsys, *own, "--size", "64")
    assert "training.yaml is kept as it is" in said
    assert (tmp_path / "out" / "training.yaml").read_text().endswith("# mine")


def test_people_of_one_pass_have_a_training_without_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = render(tmp_path / "alone", {"1": [4], "2": [3]})
    said = run(capsys, "--data", alone, "--output", tmp_path / "out", "--write", tmp_path / "w", "--size", "16")
    assert "nobody has two passes" in said
    assert "--part validation" not in said
    config = load_config(tmp_path / "out" / "training.yaml")
    assert (config.data.valid_path, config.train.valid_every, config.train.judge_every) == (None, 0, 0)
    one = render(tmp_path / "one", {"1": [2, 2]})
    with_one = run(capsys, "--data", one, "--output", tmp_path / "o", "--write", tmp_path / "v", "--size", "16")
    for spoken in (said, with_one):  # nobody is tested, or there is nobody to be taken for another
        assert "By hand:" in spoken
        assert "step6_adapt_models.py" not in spoken


def test_a_map_that_the_pixels_are_not_in_is_named_and_chinese_names_stand_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = render(tmp_path / "data", {"1": [3, 3]}, name="张三/{number}.png", colour_map="viridis")
    said = run(capsys, "--data", data, "--dry-run", "--colour-map", "jet")
    assert "warning: the pixels are much nearer to viridis than to jet" in said
    said = run(capsys, "--data", data, "--dry-run")
    assert "colour map     viridis" in said
    assert "much nearer" not in said
    head, row = (line for line in said.splitlines() if line.startswith(("person ", "张三")))
    assert len(row) == len(head) - 2  # two characters that are twice as wide


def test_bad_files_are_one_line_each_and_nothing_else_is_lost(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(folder, tmp_path / "data")
    (data / "ID_9").mkdir()
    name = "ID_1/ID1_case1_1_Doppler{}.jpg"
    (data / name.format(90)).write_bytes(b"no image")
    shutil.copy(data / name.format(1), data / "ID_2" / "ID2_case1_1_Doppler99.jpg")
    photo = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(photo).save(data / "ID_1" / "ID1_case1_1_Doppler70.png")
    Image.fromarray(coloured(enlarged(windows_of(7, 1)[0]), "viridis")).save(data / name.format(80))
    Image.fromarray(coloured(enlarged(windows_of(8, 1)[0], 200), "jet")).save(data / name.format(110))
    said = run(capsys, "--data", data, "--output", tmp_path / "out")
    for line in (
        "empty folders (1): ID_9",
        "Doppler90.jpg cannot be read: cannot identify image file",
        "2 windows are left out, since several people have the same pixels: ID_1 1, ID_2 1",
        "Doppler70.png is in no known colour map",
        "colour maps are mixed: jet 38, viridis 1",
        "windows have 2 sizes",
    ):
        assert said.count(line) == 1, line
    split = load_split(tmp_path / "out" / "split.json")
    assert len(split.rows) + len(split.settings["left_out"]) == 38 + 5
    refused = run(capsys, "--data", data, "--output", tmp_path / "out", "--write", tmp_path / "w", code=1)
    assert "written ones have one; fix: give --size" in refused
    run(capsys, "--data", data, "--output", tmp_path / "out", "--write", tmp_path / "w", "--size", "48x64")
    sizes = {Image.open(file).size for file in (tmp_path / "w").rglob("*.png")}
    assert sizes == {(48, 64)}


def test_a_name_is_one_line_of_the_table_and_a_long_one_is_shortened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each person has 6 windows in 2 passes, of which 3 are tested."""
    people = ["ID_1\nID_9\x1b[31m\u2028x", "ID\t2", "ID_" + "9" * 5000]
    values = np.concatenate([windows_of(seed, 3) for seed in range(6)])
    owners, numbers = np.repeat(people, 6), np.tile([1, 2, 3, 21, 22, 23], 3)
    np.savez(tmp_path / "all.npz", w=60 * values - 60, person=owners, number=numbers)
    lines = run(capsys, "--data", tmp_path / "all.npz", "--dry-run").splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("person "))
    table = [line.split() for line in lines[start + 1 : start + 4]]
    assert [row[1:3] for row in table] == [["6", "2"]] * 3
    long = f"ID_{'9' * 27}...{'9' * 30}"  # 60 letters and the dots
    assert {row[0] for row in table} == {"ID_1?ID_9?[31m?x", "ID?2", long}
    assert max(map(len, lines)) < 500


def test_many_missing_people_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1, 2 and 4 of 400 are there."""
    said = run(capsys, "--data", folder, "--dry-run", "--people", 400)
    assert "missing        ID_3, ID_5, ID_6, ID_7, ID_8, " in said
    assert "ID_12, ID_13 and 387 more (397 in all)" in said


def test_images_that_viewers_turn_are_counted_and_read_as_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = render(tmp_path / "data", {"1": [3, 3], "2": [3, 3]})
    plain = run(capsys, "--data", data, "--dry-run")
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation, of TIFF 6.0
    for file in sorted(data.glob("ID_2/*.jpg")):
        Image.open(file).save(file, quality="keep", exif=exif)
    turned = run(capsys, "--data", data, "--dry-run")
    assert "EXIF" not in plain
    [line] = [line for line in turned.splitlines() if "EXIF" in line]
    assert line.startswith("warning: 6 images such as ID_2/ID2_case1_1_Doppler1.jpg have an EXIF orientation other")
    assert line.endswith("their pixels are read as stored, time from left to right")


def test_time_that_runs_downwards_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures turned on their diagonal share rows; the same ones without common pixels pass, with a warning."""
    for file in folder.glob("ID_*/*.jpg"):
        (tmp_path / "turned" / file.parent.name).mkdir(parents=True, exist_ok=True)
        turned = Image.open(file).transpose(Image.Transpose.TRANSPOSE)
        turned.save(tmp_path / "turned" / file.parent.name / file.name, quality=95)
    said = run(capsys, "--data", tmp_path / "turned", "--output", tmp_path / "out", code=1)
    assert "share pixels from top to bottom (stride 32 of 128 rows)" in said
    assert "fix: turn the windows by 90 degrees counterclockwise" in said
    assert not (tmp_path / "out").exists()
    for file in folder.glob("ID_*/*.jpg"):
        if int(file.stem.rpartition("Doppler")[2]) % 5 == 0:  # every fifth: 5 strides of a quarter
            (tmp_path / "apart" / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "apart" / file.parent.name)
    said = run(capsys, "--data", tmp_path / "apart", "--dry-run")
    assert "overlap        none found in the pixels of" in said


def test_what_could_not_be_measured_is_no_share_of_0_percent(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names without a running number: nothing is compared, and two recordings of one walk are found by their pixels."""
    rng = np.random.default_rng(0)
    for file in folder.glob("ID_*/*.jpg"):
        (tmp_path / "data" / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "data" / file.parent.name / f"{file.stem}x{rng.integers(10**9)}.jpg")
    said = run(capsys, "--data", tmp_path / "data", "--dry-run", "--pattern", r"(?P<person>ID_\d+).*x(?P<number>\d+)")
    assert "warning: the overlap could not be measured: no two windows of a recording have neighbouring" in said
    assert "0.0 %" not in said
    pattern = r"(?P<person>ID_\d+)/(?P<recording>.*)x(?P<number>\d+)\.jpg"
    said = run(capsys, "--data", tmp_path / "data", "--dry-run", "--pattern", pattern)
    assert "warning: windows of different recordings share pixels (" in said


def test_a_window_of_several_people_is_said_apart_from_copies(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(folder, tmp_path / "data")
    shutil.copy(data / "ID_1" / "ID1_case1_1_Doppler1.jpg", data / "ID_1" / "ID1_case1_1_Doppler901.jpg")
    for number in (2, 3):
        shutil.copy(
            data / "ID_1" / f"ID1_case1_1_Doppler{number}.jpg", data / "ID_4" / f"ID4_case1_1_Doppler9{number}.jpg"
        )
    said = run(capsys, "--data", data, "--dry-run")
    assert "warning: 4 windows are left out, since several people have the same pixels: ID_1 2, ID_4 2" in said
    assert "Doppler901.jpg has the pixels of ID_1/ID1_case1_1_Doppler1.jpg\n" in said


def test_each_person_has_a_folder_of_levels_and_the_removed_ones_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names that are one after signs and case are taken away; files that this program did not write stay."""
    data = tmp_path / "data"
    names = ("Li Wei", "Li_Wei", "li_wei", "李.伟", "李_伟")
    for person, name in enumerate(names, 1):
        render(data, {str(person): [3, 3]}, name=f"{name}/{{number}}.png")
    own = ("--data", data, "--output", tmp_path / "out", "--write", tmp_path / "w", "--size", "16")
    said = run(capsys, *own)
    assert "warning: Li Wei, Li_Wei, li_wei may be one person" in said
    files = json.loads((tmp_path / "w" / "manifest.json").read_text())["files"]
    folders = {name.partition("/")[0]: file.partition("/")[0] for name, file in files.items()}
    assert sorted(folders) == sorted(names)
    assert len({folder.casefold() for folder in folders.values()}) == len(names)
    assert len({file.casefold() for file in files.values()}) == len(files) == 30
    (tmp_path / "w" / "levels" / folders["Li_Wei"] / "mine.txt").touch()
    shutil.rmtree(data / "Li_Wei")
    shutil.rmtree(data / "李_伟")
    said = run(capsys, *own)
    assert "removed the files of 12 windows of an earlier run" in said
    now = json.loads((tmp_path / "w" / "manifest.json").read_text())
    for kind in ("levels", "views"):
        there = {file.relative_to(tmp_path / "w" / kind).as_posix() for file in (tmp_path / "w" / kind).rglob("*.png")}
        assert there == {*now["files"].values()}
    assert "former" not in now
    assert (tmp_path / "w" / "levels" / folders["Li_Wei"] / "mine.txt").exists()
    assert "removed" not in run(capsys, *own)


def test_a_name_in_the_manifest_that_leads_elsewhere_is_not_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = render(tmp_path / "data", {"1": [3, 3]})
    own = ("--data", data, "--output", tmp_path / "out", "--write", tmp_path / "w", "--size", "16")
    run(capsys, *own)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "pass1_1.png").touch()
    (tmp_path / "w" / "levels" / "linked").symlink_to(tmp_path / "precious")
    manifest = tmp_path / "w" / "manifest.json"
    content = json.loads(manifest.read_text())
    former = ["../../precious/pass1_1.png", "linked/pass1_1.png", str(tmp_path / "precious" / "pass1_1.png"), 7]
    manifest.write_text(json.dumps(content | {"former": former}))
    assert "removed" not in run(capsys, *own)
    assert (tmp_path / "precious" / "pass1_1.png").exists()


def test_decibels_of_arrays_are_scaled_by_training_passes_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays, people, numbers, number = [], [], [], 0
    for person in (1, 2):
        for pass_number, count in enumerate((6, 6, 6)):
            for window in windows_of(10 * person + pass_number, count):
                arrays.append(window * 50 - 60)
                people.append(f"p{person}")
                numbers.append(number)
                number += 1
            number += 9
    values = np.stack(arrays).astype(np.float32)
    values[3, 0, 0], values[4, 0, 0], values[20, :, 0] = np.nan, np.inf, -np.inf
    np.savez(tmp_path / "x.npz", dB=values, person=people, number=numbers)
    said = run(capsys, "--data", tmp_path / "x.npz", "--output", tmp_path / "out")
    assert "x.npz[3] has 1 values that are NaN or infinite, and 1 more" in said
    assert f"{SIDE} values of minus infinity count as the low end" in said
    split = load_split(tmp_path / "out" / "split.json")
    tested = [row.index for row in split.part("test")]
    values[tested] += 30  # what is tested moves nothing
    np.savez(tmp_path / "x.npz", dB=values, person=people, number=numbers)
    run(capsys, "--data", tmp_path / "x.npz", "--output", tmp_path / "out")
    again = load_split(tmp_path / "out" / "split.json")
    assert again.settings["db_range"] == split.settings["db_range"]
    assert {row.digest for row in again.rows} != {row.digest for row in split.rows}


def test_a_list_of_an_earlier_split_is_not_left(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "--data", folder, "--output", tmp_path / "out")
    alone = render(tmp_path / "alone", {"1": [4]})
    said = run(capsys, "--data", alone, "--output", tmp_path / "out")
    assert "nothing can be tested" in said
    assert (tmp_path / "out" / "test.csv").read_text().count("\n") == 1


def test_options_that_do_not_go_together_and_data_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (["--size", "64"], ["--folds", "1"], ["--db-range", "0", "-60"], ["--fit", "pad"], ["--size", "4x4"]):
        with pytest.raises(SystemExit) as stopped:
            step5.main(["--data", str(tmp_path), *wrong])
        assert stopped.value.code == 2
    assert "no images in" in run(capsys, "--data", tmp_path, "--output", tmp_path / "out", code=1)
    for name in ("a.zip", "b.tar.gz"):
        (tmp_path / name).touch()
        said = run(capsys, "--data", tmp_path / name, "--output", tmp_path / "out", code=1)
        assert "fix: unpack it, and name that folder" in said
    assert "fix: unpack it" in run(capsys, "--data", tmp_path, "--output", tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


def test_the_audit_needs_no_torch_and_a_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None; import step5_prepare_spectrograms as s;"
        f"sys.exit(s.main(['--data', {str(folder)!r}, '--output', {str(tmp_path / 'out')!r}, '--dry-run']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "6 passes" in done.stdout
    assert not (tmp_path / "out").exists()
