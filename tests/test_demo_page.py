"""The page's functions, without gradio and without a browser."""

from __future__ import annotations

import re
import shlex
import string
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from LightningDiT import inference
from LightningDiT.command import demo
from LightningDiT.config import load_config
from LightningDiT.console import called_as, run_main
from LightningDiT.data.labels import Labels
from LightningDiT.demo.choices import Model, Wish, find_models, typed_name, wish_of
from LightningDiT.demo.page import Page
from LightningDiT.demo.pictures import frame_html
from LightningDiT.demo.session import DONE, SAMPLING, Frame, People, StoppedError, Studio, Turns, _Work
from LightningDiT.demo.texts import CHINESE, ENGLISH, TEXTS, error_text, say
from LightningDiT.errors import LightningDiTError
from LightningDiT.radar.colour_maps import colours
from LightningDiT.radar.sensor import Sensor
from LightningDiT.sampling.options import in_rounds
from tests.test_views import levels_folder as levels_folder


@pytest.fixture
def model(tiny_folder: Path) -> Model:
    return next(iter(find_models([], [tiny_folder / "config.yaml"])[0].values()))


def wish(model: Model, classes: Any = (0, 1, 2), each: Any = 1, seed: Any = 5, steps: Any = 0, **more: Any) -> Wish:
    values = {"conditions": [], "guidance": 2.0, "solver": "euler", **more}
    return wish_of(model, classes, values["conditions"], each, seed, values["guidance"], values["solver"], steps)


def folder_of(command: str) -> Path:
    words = shlex.split(command)
    return Path(words[words.index("--output") + 1])


def test_models_are_found_where_projects_keep_them(tiny_folder: Path, tmp_path: Path) -> None:
    mine, cell = (tmp_path / "p" / place for place in ("models/mine", "adapted/fold0-30"))
    mine.parent.mkdir(parents=True)
    tiny_folder.rename(mine)
    cell.mkdir(parents=True)
    (cell / "transformer.yaml").write_text("ckpt_path: absent.safetensors\n")
    models, left_out = find_models([tmp_path / "p"])
    assert list(models) == ["mine", "fashion-mnist"]
    assert len(left_out) == 1
    assert "absent.safetensors are not there" in left_out[0]
    (cell / "transformer.yaml").write_text((mine / "config.yaml").read_text())
    for name in ("transformer.safetensors", "tokenizer.yaml"):
        (cell / name).write_bytes((mine / name).read_bytes())
    assert list(find_models([tmp_path / "p"])[0]) == ["mine", "fold0-30/transformer", "fashion-mnist"]
    with pytest.raises(LightningDiTError, match="no.yaml does not exist"):
        find_models([], [tmp_path / "no.yaml"])


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("classes", [], "no class is chosen"),
        ("classes", ["cow"], "class 'cow' is unknown; "),
        ("classes", [3], "class 3 is out of range; 0 to 2"),
        ("each", None, "images of each class is empty; a whole number from 1 to 64"),
        ("each", 0, "images of each class is 0;"),
        ("each", 1.5, "images of each class is 1.5; a whole number"),
        ("each", 22, "66 images are asked for; at most 64"),
        ("seed", -1, "seed is -1; a whole number from 0 to 9007199254740991"),
        ("seed", float("nan"), "seed is nan;"),
        ("seed", "x", "seed is 'x';"),
        ("seed", True, "seed is True;"),
        ("steps", 1, "steps is 1; a whole number from 2 to 1000"),
        ("guidance", float("inf"), "guidance is inf; a number from 0 to 20"),
        ("solver", "magic", "magic"),
    ],
)
def test_a_bad_value_is_a_message_that_names_it(model: Model, field: str, value: Any, words: str) -> None:
    with pytest.raises(LightningDiTError, match=re.escape(words)):
        wish(model, **{field: value})


def test_classes_have_names_that_mean_them_alone() -> None:
    labels = Labels(5, ("crane, bird", "crane, machine", "all", "-x", "ice cream, dessert"))
    names = [typed_name(labels, number) for number in range(5)]
    assert names == ["crane, bird", "crane, machine", "2", "3", "ice cream"]
    assert labels.numbers(names) == list(range(5))
    decimal = Labels(3, ("7", "8", "9"))
    assert decimal.numbers([typed_name(decimal, number) for number in range(3)]) == [0, 1, 2]


@pytest.mark.parametrize(("solver", "steps"), [("euler", 0), ("ab3", 6)])
def test_the_command_makes_the_same_images(model: Model, tmp_path: Path, solver: str, steps: int) -> None:
    """Byte for byte: the page and `lightningdit sample` cut the images into the same batches."""
    page = Page(Studio({"tiny": model}, tmp_path / "out"))
    seen = list(page.sample(ENGLISH, "tiny", [2, "dog"], [], 2, 7, 3.5, solver, steps))
    command = seen[-1][2]
    made = sorted(next((tmp_path / "out").iterdir()).iterdir())
    with called_as("lightningdit demo"):
        assert wish(model).command("x").startswith("lightningdit sample --config ")
    assert command.startswith("python -m LightningDiT.inference --config ")
    assert inference.main(shlex.split(command)[3:]) == 0
    assert [path.name for path in made] == [f"{index:06d}.png" for index in range(4)]
    for path in made:
        assert (folder_of(command) / path.name).read_bytes() == path.read_bytes()


def test_images_form_step_by_step(model: Model, tmp_path: Path) -> None:
    frames: list[Frame] = []
    asked = wish(model)
    _Work(Studio({}, tmp_path), asked, threading.Event(), frames.append).run()  # type: ignore[arg-type]
    steps = [(frame.finished, frame.step) for frame in frames if frame.state == SAMPLING]
    # 4 points are 3 steps; batches of two and of one image
    assert [pair for index, pair in enumerate(steps) if pair not in steps[:index]] == [
        *((0, step) for step in range(4)),
        *((2, step) for step in (3, 0, 1, 2)),
        (3, 3),
    ]
    last = frames[-1]
    assert (last.state, last.finished, last.nfe, last.steps) == (DONE, 3, 3, 3)
    first = next(frame for frame in frames if frame.step == 1)
    assert first.pictures[0] is not None
    assert first.pictures[2] is None
    final = np.asarray(last.pictures[0])
    assert (np.asarray(first.pictures[0]) != final).any()
    assert (np.asarray(Image.open(last.folder / "000000.png").convert("RGB")) == final).all()
    html = frame_html(first, ENGLISH)
    assert (html.count("forming"), html.count('class="gap"')) == (2, 1)
    assert "cat" in html
    assert frame_html(last, ENGLISH).count("download=") == 3


def test_stop_stops_within_a_step_and_keeps_what_is_finished(model: Model, tmp_path: Path) -> None:
    stop, frames = threading.Event(), list[Frame]()

    def tell(frame: Any) -> None:
        frames.append(frame)
        if frame.finished == 2 and frame.step == 1:
            stop.set()

    with pytest.raises(StoppedError):
        _Work(Studio({}, tmp_path), wish(model), stop, tell).run()
    assert (frames[-1].finished, frames[-1].step) == (2, 1)
    assert len(list(frames[-1].folder.iterdir())) == 2


def test_a_stopped_wish_ends_with_words(model: Model, tmp_path: Path) -> None:
    page = Page(Studio({"tiny": model}, tmp_path))
    seen = []
    for words, images, _ in page.sample(CHINESE, "tiny", [0], [], 1, 0, 2.0, "euler", 900, person="a"):
        seen.append(words)
        if "forming" in images:
            page.stop("a")
    assert "已停止；完成 0 / 1 张图像" in seen[-1]


def test_two_people_at_once_get_their_own_images(model: Model, tmp_path: Path) -> None:
    page = Page(Studio({"tiny": model}, tmp_path))
    asked = {"a": ([0, 1, 2], 1), "b": (["dog", 2, 0], 2)}
    results: dict[str, tuple[str, str, str]] = {}

    def run(person: str) -> None:
        classes, seed = asked[person]
        for result in page.sample(ENGLISH, "tiny", classes, [], 1, seed, 2.0, "euler", 0, person=person):
            results[person] = result

    threads = [threading.Thread(target=run, args=(person,)) for person in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for person, (classes, seed) in asked.items():
        *_, alone = page.sample(ENGLISH, "tiny", classes, [], 1, seed, 2.0, "euler", 0, person="alone")
        pictures = [re.findall(r"base64,([^\"]+)", found[1]) for found in (results[person], alone)]
        assert len(pictures[0]) == 3
        assert pictures[0] == pictures[1]


def test_turns_go_in_the_order_of_asking_and_who_stops_gives_way() -> None:
    turns, order, waits = Turns(), list[str](), dict[str, list[int]]()
    stops = {name: threading.Event() for name in "abcd"}
    asked = {name: threading.Event() for name in "abcd"}

    def wait(name: str) -> None:
        def note(ahead: int) -> None:
            waits.setdefault(name, []).append(ahead)
            asked[name].set()

        try:
            with turns.taken(stops[name], note):
                order.append(name)
        except StoppedError:
            order.append(f"{name} stopped")

    with turns.taken(stops["a"], lambda ahead: None):
        threads = {name: threading.Thread(target=wait, args=(name,)) for name in "bcd"}
        for name, thread in threads.items():
            thread.start()
            assert asked[name].wait(20)
        stops["c"].set()
        threads["c"].join(20)
        assert order == ["c stopped"]
    for thread in threads.values():
        thread.join(20)
    assert order == ["c stopped", "b", "d"]
    assert waits["d"][0] == 3


def test_a_person_has_one_wish_at_a_time() -> None:
    people = People()
    first, other = people.begin("a"), people.begin("b")
    second = people.begin("a")
    assert (first.is_set(), second.is_set(), other.is_set()) == (True, False, False)
    people.stop("a")
    people.stop("nobody")
    assert (second.is_set(), other.is_set()) == (True, False)
    people.stop_all()
    assert other.is_set()


def test_errors_are_words_and_no_traceback(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = Page(Studio({"tiny": model}, tmp_path / "file"))
    fields = ([], 1, 0, 2.0, "euler", 0)
    ((words, images, command),) = page.sample(CHINESE, "tiny", ["<b>"], *fields)
    assert 'role="alert"' in words
    assert "&lt;b&gt;" in words
    assert (images, command) == ("", "")
    ((words, _, _),) = page.sample(ENGLISH, "other", [0], *fields)
    assert "model 'other' is unknown" in words.replace("&#x27;", "'")
    (tmp_path / "file").write_text("")
    *_, (words, _, _) = page.sample(ENGLISH, "tiny", [0], *fields)
    assert "Not possible: " in words
    assert capsys.readouterr().err == ""
    Path(str(model.config.ckpt_path)).write_bytes(b"no weights")
    *_, (words, _, _) = Page(Studio({"tiny": model}, tmp_path / "out")).sample(ENGLISH, "tiny", [0], *fields)
    assert "transformer.safetensors" in words


def test_what_nobody_foresaw_is_said_and_its_traceback_is_on_the_console(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Page(Studio({"tiny": model}, tmp_path))
    monkeypatch.setattr(Studio, "pipeline", lambda self, model: 1 / 0)
    *_, (words, _, _) = page.sample(ENGLISH, "tiny", [0], [], 1, 0, 2.0, "euler", 0)
    assert "An unexpected error (division by zero)" in words
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_fields_of_a_model(model: Model, tiny_folder: Path) -> None:
    fields = Page(Studio({"tiny": model}, tiny_folder)).fields_of("tiny", ENGLISH)
    assert fields["classes"]["choices"] == [("0 cat, house cat", 0), ("1 dog", 1), ("2 sea lion", 2)]
    assert fields["classes"]["value"] == [0, 1, 2]
    assert fields["conditions"]["visible"] is False
    assert (fields["guidance"]["value"], fields["solver"]["value"]) == (2.0, "euler")
    assert "calibrated" not in fields["solver"]["choices"]
    assert {"fast", "euler", "ab3", "dopri5"} <= set(fields["solver"]["choices"])


def test_conditions_take_turns_as_on_the_command_line(tiny_folder: Path) -> None:
    file = tiny_folder / "config.yaml"
    file.write_text(file.read_text().replace("num_classes: 3,", "num_classes: 3, num_conditions: 2, "))
    model = Model("tiny", load_config(file), str(file))
    asked = wish(model, classes=[1, 2], conditions=[1, "none"], each=2)
    assert (asked.labels, asked.conditions) == ([1, 2] * 4, [1, 1, None, None] * 2)
    args = inference.parse(shlex.split(asked.command("x"))[3:])
    assert args.count == 8
    assert in_rounds(args.conditions, len(args.classes), 8) == ["1", "1", "none", "none"] * 2
    assert asked.captions[:3] == ["dog, condition 1", "sea lion, condition 1", "dog"]


def test_spectrograms_have_axes_and_their_colours(levels_folder: Path, tmp_path: Path) -> None:
    (levels_folder / "spectrograms.json").write_text('{"native_columns": 80, "colour_maps": {"viridis": 3}}')
    model = Model("levels", load_config(levels_folder / "config.yaml"), "config.yaml")
    *_, last = Studio({}, tmp_path).sample(wish(model, classes=[0]), threading.Event())
    shown = np.asarray(last.pictures[0]).reshape(-1, 3)
    assert {tuple(pixel) for pixel in shown} <= {tuple(colour) for colour in colours("viridis")}
    html = frame_html(last, CHINESE)
    assert "时间，s" in html
    assert "速度，m/s" in html
    sensor = Sensor()
    # a second lies where 80 columns of 25 ms have it
    assert f'left:{100 / (80 * sensor.column_seconds):.2f}%">1<' in html
    half = sensor.rows / 2 * sensor.speed_step
    assert f'top:{100 * (half + 2) / (2 * half):.2f}%">2<' in html
    (levels_folder / "spectrograms.json").write_text("[")
    with pytest.raises(LightningDiTError, match=r"spectrograms.json cannot be read"):
        _ = Model("levels", model.config, "").axes


def test_every_text_is_there_in_both_languages() -> None:
    for key, (english, chinese) in TEXTS.items():
        fields = [{name for _, name, _, _ in string.Formatter().parse(text) if name} for text in (english, chinese)]
        assert fields[0] == fields[1], key
        assert english != chinese, key
        assert re.search("[一-鿿]", chinese) or key == "title", key
    assert say("waiting", CHINESE, ahead=2) == "等待中：前面还有 2 人。"
    error = LightningDiTError("x is 1", "choose another value")
    assert error_text(error, ENGLISH) == "Not possible: x is 1. What helps: choose another value."
    assert error_text(error, CHINESE).startswith("无法进行：x is 1。 解决办法：")
    assert "choose" not in error_text(error, CHINESE)


def test_a_name_is_text_on_the_page(model: Model, tmp_path: Path) -> None:
    file = Path(model.config.source)
    file.write_text(file.read_text().replace("dog", '"<script>x</script>"'))
    odd = Model("odd", load_config(file), str(file))
    frame = Frame(wish(odd, classes=[1]), SAMPLING, tmp_path, (None,))
    assert "<script>" not in frame_html(frame, ENGLISH)
    assert "&lt;script&gt;x" in frame_html(frame, ENGLISH)


def test_without_gradio_one_line_says_what_to_install(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.chdir(tmp_path)
    assert run_main(lambda: demo.main(["--config", model.config.source])) == 1
    found = capsys.readouterr()
    assert f"model          {model.name}: LightningDiT-XS/2" in found.out
    assert re.fullmatch(r"error: the page needs gradio, .*; fix: pip install gradio\n", found.err)
    assert demo.main(["--config", model.config.source, "--dry-run"]) == 0
