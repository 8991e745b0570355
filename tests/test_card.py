"""The model card: what the pipeline shows of itself, what its author states, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from LightningDiT.config import as_yaml
from LightningDiT.errors import LightningDiTError
from LightningDiT.hub.card import (
    CARD_NAME,
    KNOWN,
    MARK,
    MOST_NAMES,
    NOT_STATED,
    PICTURE_NAME,
    Facts,
    Subject,
    is_own_card,
    model_card,
)
from LightningDiT.hub.registry import DIT
from LightningDiT.images import image_grid
from LightningDiT.sampling.pipeline import LightningDiTPipeline, captions_of
from tests.conftest import BUNDLED, PROJECT

SUBJECT = Subject("me/small", "LightningDiT-S/2", 123_456, "KL autoencoder", 32, 3, ["a", "b"], [], "euler", "2")


@pytest.fixture
def pipe(tiny_source: Path) -> LightningDiTPipeline:
    return LightningDiTPipeline.from_pretrained(tiny_source, device="cpu")


def sections(card: str) -> dict[str, str]:
    """The text below each heading, and of the front matter under an empty name."""
    parts = re.split(r"^#+ (.+)\n", card, flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], (part.strip() for part in parts[::2]), strict=True))


def matter(card: str) -> str:
    return card.split("---\n")[1]


def test_what_nobody_states_is_called_so() -> None:
    found = sections(model_card(SUBJECT, Facts()))
    assert {name: found[name] for name in ("Data", "Licence", "Figures")} == dict.fromkeys(
        ("Data", "Licence", "Figures"), NOT_STATED
    )
    assert "license" not in matter(model_card(SUBJECT, Facts()))
    assert PICTURE_NAME not in model_card(SUBJECT, Facts())
    assert "conditions" not in model_card(SUBJECT, Facts())


def test_what_the_author_states_and_the_pipeline_shows_is_there() -> None:
    facts = Facts("[Windows](https://example.org) of 31 people.", "cc-by-4.0", {"FID, 10 | 20": "12.3"})
    subject = dataclasses.replace(SUBJECT, conditions=["bag"], shown=[0, 1], shown_conditions=[0, 0])
    card = model_card(subject, facts)
    found = sections(card)
    assert matter(card).startswith("license: cc-by-4.0\n")
    assert (found["Data"], found["Licence"]) == (facts.data, facts.licence)
    assert found["Figures"].splitlines()[-1] == r"| FID, 10 \| 20 | 12.3 |"
    assert "One image each of a, b (seed 0)." in found["Model card: small"]
    assert "| network | LightningDiT-S/2, 123,456 parameters |" in found["What it is"]
    assert "| conditions, the second label | 1: bag |" in found["What it is"]
    assert "images = pipe([0, 1], seed=0, conditions=[0, 0]).images  # those above" in found["Use"]
    assert matter(model_card(SUBJECT, Facts(licence="Ask me: no"))).startswith("license: other\n")


def test_names_of_classes_stay_in_their_cell() -> None:
    names = ["a|b\nc", "<img src=x>", "[x](http://y)", "`*_", *map(str, range(MOST_NAMES))]
    card = model_card(dataclasses.replace(SUBJECT, classes=names), Facts())
    row = next(line for line in card.splitlines() if line.startswith("| classes"))
    assert row.startswith(r"| classes | 24: a\|b c, \<img src=x\>, \[x\](http://y), \`\*\_, 0, 1,")
    assert row.endswith("15 and 4 more |")


def test_levels_are_said_to_be_coloured() -> None:
    card = model_card(dataclasses.replace(SUBJECT, channels=1, shown=[0]), Facts())
    assert "One image each of a (seed 0; levels in the colour map jet)." in card
    assert "those above" not in card


def test_the_snippet_makes_the_images_of_the_picture(
    pipe: LightningDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / CARD_NAME).read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippet
    monkeypatch.chdir(tmp_path)
    names: dict[str, list[Image.Image]] = {}
    exec(snippet[1], names)  # type: ignore[arg-type]
    expected = image_grid(names["images"], captions_of(pipe, [0, 1, 2], None))
    with Image.open(tmp_path / "saved" / PICTURE_NAME) as drawn:
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(expected))
    with Image.open(tmp_path / "image.png") as first:
        np.testing.assert_array_equal(np.asarray(first), pipe([0], output_type="np").images[0])


def test_a_picture_is_made_where_it_is_asked_for_or_cheap(
    pipe: LightningDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.save_pretrained(tmp_path / "without", picture=False)
    assert not (tmp_path / "without" / PICTURE_NAME).exists()
    monkeypatch.setattr("LightningDiT.sampling.pipeline.SHOWN_PARAMETERS", 10)
    pipe.save_pretrained(tmp_path / "large")
    assert not (tmp_path / "large" / PICTURE_NAME).exists()

    def refuse(*_: object, **__: object) -> None:
        raise LightningDiTError("no null class", "train one")

    monkeypatch.setattr(LightningDiTPipeline, "__call__", refuse)
    with pytest.warns(UserWarning, match="the model card has no picture: no null class"):
        pipe.save_pretrained(tmp_path / "refused", picture=True)
    assert PICTURE_NAME not in (tmp_path / "refused" / CARD_NAME).read_text(encoding="utf-8")


def test_a_card_of_somebody_stays_and_an_own_one_is_renewed(pipe: LightningDiTPipeline, tmp_path: Path) -> None:
    card = tmp_path / CARD_NAME
    card.write_text("# Mine\n")
    with pytest.warns(UserWarning, match=f"this program did not write {re.escape(str(card))}; it stays"):
        pipe.save_pretrained(tmp_path, picture=False)
    assert card.read_text() == "# Mine\n"
    assert not is_own_card(card)
    card.write_text(f"old\n{MARK}\n")
    pipe.save_pretrained(tmp_path, Facts(licence="mit"), picture=False)
    assert is_own_card(card)
    assert "## Licence\n\nmit\n" in card.read_text(encoding="utf-8")


def test_what_is_known_of_a_model_is_told_of_its_own_weights_alone(tmp_path: Path) -> None:
    pipe = LightningDiTPipeline.from_pretrained(BUNDLED, device="cpu")
    assert pipe._known_facts() == KNOWN["fashion-mnist"]
    with torch.no_grad():
        next(pipe.transformer.parameters()).view(-1)[0] += 1
    assert pipe._known_facts() == Facts()


def test_the_figures_are_those_that_were_measured_or_published() -> None:
    measured = json.loads((PROJECT / "docs" / "bundled" / "evaluation.json").read_text())
    distances = measured["frechet_distance_to_test_images"]
    assert list(KNOWN["fashion-mnist"].figures.values()) == [
        f"{100 * measured['generated']['accuracy']:.1f} %",
        f"{distances['generated']:.2f}",
        f"{distances['real_training_images']:.2f}",
    ]
    assert [*KNOWN] == [*DIT, "fashion-mnist"]
    published = {model: list(KNOWN[model].figures.values()) for model in DIT}
    assert published == {"800ep": ["1.35", "2.17"], "64ep": ["2.11", "5.14"]}  # arXiv 2501.01423


def test_the_front_matter_is_plain_yaml() -> None:
    assert as_yaml({"license": "mit"}) in matter(model_card(SUBJECT, Facts(licence="mit")))
