"""What the studies share: numbers of images, and figures kept part by part."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from LightningDiT.errors import LightningDiTError
from studies import evaluate_bundled, guidance_study, pages, precision_study, solver_study
from studies.convergence import __main__ as convergence
from studies.convergence import evaluate_checkpoints
from tests.test_evaluate_bundled import model_folder  # noqa: F401 - a fixture

Main = Callable[[list[str]], int]


def test_parts_are_kept_beside_one_another(tmp_path: Path) -> None:
    kept = tmp_path / "new" / "study.json"
    assert pages.keep_part(kept, "first", [1]) == {"first": [1]}
    assert pages.keep_part(kept, "second", 2) == json.loads(kept.read_text()) == {"first": [1], "second": 2}


def test_a_page_shows_every_known_part_in_the_order_of_the_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def part(name: str) -> pages.Part:
        return lambda args: {"figure": f"{name} {args.version}"}, lambda figures: [figures["figure"]]

    parts = {"first": part("one"), "second": part("two")}
    for version, asked in enumerate((["second"], ["first"], ["second"])):
        pages.run_parts(argparse.Namespace(output=str(tmp_path), part=asked, version=version), "study", parts)
    page = (tmp_path / "study.md").read_text().splitlines()
    assert [line for line in page if line and not line.startswith("<")] == ["# Study", "one 1", "two 2"]
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("wrote")]
    assert shown == ["two 0", "one 1", "two 2"]


@pytest.mark.parametrize("tool", ["precision", "sampling", "guidance"])
@pytest.mark.parametrize("content", ['{"bundled": {"rows": [', "[]", "\udcff"])
def test_a_damaged_study_is_named_before_anything_is_measured(
    tool: str,
    content: str,
    model_folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The folder of photographs is missing too, which is seen later."""
    kept = tmp_path / tool / "study.json"
    kept.parent.mkdir()
    kept.write_bytes(content.encode("utf-8", "surrogateescape"))
    main = {"precision": precision_study, "sampling": solver_study, "guidance": guidance_study}[tool].main
    with pytest.raises(LightningDiTError, match=r"study.json cannot be read .*; fix: git restore .*, or remove it"):
        main(["--output", str(tmp_path), "--model", str(model_folder), "--data-root", str(tmp_path / "none")])
    assert kept.read_bytes() == content.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("count", ["0", "10", "25", "-20", "many"])
@pytest.mark.parametrize(
    "main",
    [
        evaluate_bundled.main,
        guidance_study.main,
        precision_study.main,
        solver_study.main,
        convergence.main,
        evaluate_checkpoints.main,
    ],
)
def test_classes_need_equal_numbers(main: Main, count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([f"--count={count}"])
    assert stopped.value.code == 2
    assert f"--count: {count} images; a multiple of 10 from 20 on is expected" in capsys.readouterr().err
