#!/usr/bin/env python3
"""Step 7: does generated data help a classifier on walking passes that nobody has seen? By how much, and how sure?

It trains classifiers on real windows, with and without generated ones, and tests each on the passes that the split of
step 5 holds out. report.html and report.json say by how much generated windows help and how sure that is. What is
trained is kept: the same command goes on after Ctrl-C.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))

from LightningDiT.console import OK, natural, positive
from LightningDiT.files import held_folder, require_writable
from setup_steps import project

if TYPE_CHECKING:
    from LightningDiT.verdict.judging import Asked, Judged, Outcome
    from LightningDiT.verdict.results import Results
    from LightningDiT.verdict.trials import Trial

SCRIPT = "step7_judge_generated.py"
ADAPTED, OUTPUT = project.PROJECT / "adapted", project.PROJECT / "verdict"
SPLIT, LEVELS = (project.PROJECT / "spectrograms" / name for name in ("split.json", "levels"))
STEPS = 500


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--adapted", type=Path, metavar="FOLDER", help=f"of step 6; default: {ADAPTED.name}")
    add("--generated", type=Path, metavar="FOLDER", help="in place of --adapted: any generator's, a folder a person")
    add("--split-file", type=Path, metavar="FILE", help="with --generated; default: spectrograms/split.json")
    add("--fold", type=natural, metavar="N", help="with --generated: the one whose training it saw; default: 0")
    add("--images", type=positive, metavar="N", help="with --generated: images of a person that it saw; default: all")
    add("--levels", type=Path, metavar="FOLDER", help="of step 5; default: those of step 6, or spectrograms/levels")
    add("--output", type=Path, default=OUTPUT, metavar="FOLDER", help=f"for the report; default: {OUTPUT.name}")
    add("--classifier", choices=("small", "resnet18"), default="small", help="default: small")
    add("--seeds", type=positive, metavar="N", help="trainings of each row; default: those of step 6's preset, 3")
    add("--rows", metavar="NAMES", help="such as real,augmented,2x; default: the usual ones, and filtered-1x")
    add("--steps", type=positive, default=STEPS, metavar="N", help=f"updates of each training; default: {STEPS}")
    add("--wanted", type=float, default=0.03, metavar="SHARE", help="difference in accuracy worth the effort; 0.03")
    add("--unseen", metavar="NAME", help="a condition that training must lack, or pairs; default: that of step 6")
    add("--axes", choices=("sensor", "rows"), default="sensor", help="m/s and s of a 77.5 GHz radar, or rows; sensor")
    add("--dry-run", action="store_true", help="only check what there is and estimate the time")
    options = parser.parse_args(argv)
    own = [f"--{name}" for name in ("split-file", "fold", "images") if getattr(options, name.replace("-", "_"))]
    for wrong, message in (
        (bool(options.adapted and options.generated), "--adapted and --generated exclude each other"),
        (bool(own) and not options.generated, f"{', '.join(own)} goes with --generated"),
        (not 0 < options.wanted < 1, f"--wanted takes a share such as 0.03 for 3 points, {options.wanted:g} given"),
    ):
        if wrong:
            parser.error(message)
    return options


def judged_of(options: argparse.Namespace) -> Mapping[str, Judged]:
    """Return what is judged, by the name of its model."""
    from LightningDiT.verdict.judging import folder_of_windows

    levels = project.absolute(options.levels) if options.levels else None
    if options.generated:
        split = project.absolute(options.split_file or SPLIT)
        folder = project.absolute(options.generated)
        print(
            "note: nothing shows what this generator saw; training windows of this fold alone are assumed, with the"
            " levels that they have now"
        )
        judged = folder_of_windows(folder, levels or LEVELS, split, options.fold or 0, options.images)
        return {"generated": judged}
    from LightningDiT.verdict.cells import judged_models

    return judged_models(project.absolute(options.adapted or ADAPTED), levels)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    from LightningDiT.verdict.judging import check_files, judge, preview

    print("Step 7: does generated data help?", flush=True)
    output, judged = project.absolute(options.output), judged_of(options)
    folders = {name: output / name if len(judged) > 1 else output for name in judged}
    for folder in folders.values():
        check_files(folder)
    asked = asked_of(options, judged)
    unseen = next(iter(judged.values())).unseen
    if unseen:
        print(f"unseen, by step 6: {unseen}; rows are tested on windows of it alone", flush=True)
    if options.dry_run:
        for name, one in judged.items():
            print(f"{name}:")
            preview(one, asked)
        return OK
    require_writable(output)
    trials: list[Trial] = []
    found: dict[str, Outcome] = {}
    with held_folder(output, "verdict"):
        for name, one in judged.items():
            found[name], new = judge(one, asked, folders[name], trials)
            trials += new
    lines = [line for name, outcome in found.items() for line in lines_of(name, outcome)]
    for line in (*lines, *level_lines(found, asked.earlier), *next_lines(options, judged, found)):
        print(line)
    return OK


def asked_of(options: argparse.Namespace, judged: Mapping[str, Judged]) -> Asked:
    """Return what is trained and asked for; a row that is named twice is taken once, which is said."""
    from LightningDiT.verdict.classifiers import Recipe
    from LightningDiT.verdict.judging import Asked, verdicts_of
    from LightningDiT.verdict.report import has_earlier

    named = options.rows.split(",") if options.rows else []
    rows = tuple(dict.fromkeys(named)) or None
    if rows and len(rows) < len(named):
        twice = ", ".join(row for row in rows if named.count(row) > 1)
        print(f"note: --rows names {twice} more than once; each row is trained once")
    recipe, known = Recipe(options.classifier, options.steps), options.axes == "sensor"
    command, verdicts = project.again(SCRIPT), verdicts_of(judged.values())
    call = datetime.datetime.now(datetime.timezone.utc).isoformat()
    earlier = has_earlier(project.absolute(options.output), command)
    return Asked(rows, options.seeds, recipe, options.wanted, options.unseen, known, command, verdicts, call, earlier)


def lines_of(name: str, outcome: Outcome) -> Iterator[str]:
    """Yield what was found of a model: the verdict, what to try, and where the report is."""
    yield f"{name}:"
    for text in outcome.sentences:
        yield from project.in_both(*text)
    for text in outcome.tried:
        yield from project.in_both(f"  try: {text[0]}", f"  可尝试：{text[1]}")
    yield f"wrote {outcome.page.name}, report.json and trials.json to {outcome.page.parent}"


def level_lines(found: Mapping[str, Outcome], earlier: bool = False) -> Iterator[str]:
    """Yield how sure each of several verdicts is; nothing where there is one, of this call and of earlier ones."""
    from LightningDiT.verdict.sentences import earlier_calls, shared_level

    verdicts = [one.verdict.verdicts for outcome in found.values() for one in outcome.results if one.verdict]
    if verdicts:
        for text in (shared_level(verdicts[0]), earlier_calls(verdicts[0], earlier)):
            if text[0]:
                yield from project.in_both(*text)


def most_helping(found: Mapping[str, Outcome]) -> tuple[str, Results] | None:
    """Return the model and the results of the largest gain that is supported: by the lower end of its interval."""
    from LightningDiT.verdict.intervals import HELPS

    helping = [
        (one.verdict.difference.low, name, one)
        for name, outcome in found.items()
        for one in outcome.results
        if one.verdict and one.verdict.outcome == HELPS
    ]
    return max(helping, key=lambda gain: gain[0])[1:] if helping else None


def next_lines(
    options: argparse.Namespace, judged: Mapping[str, Judged], found: Mapping[str, Outcome]
) -> Iterator[str]:
    """Yield the next steps: use the row that helps most, or train another generator."""
    from LightningDiT.verdict.rows import ROWS

    helping = most_helping(found)
    if helping:
        name, results = helping
        row = ROWS[results.judged or ""]
        folder = next(path for cell, path in judged[name].folders.items() if cell[1] == results.images)
        english = f"train your classifier on real windows and {row.generated} generated ones for each, such as {folder}"
        chinese = f"用真实窗口加每个对应 {row.generated} 个生成窗口训练分类器，如 {folder}"
        if results.verdict and results.verdict.verdicts > 1:
            english += f" of {name}, the verdict with the largest gain that is sure"
            chinese += f"（{name}，其结论的可靠增益最大）"
        if row.speckled:
            english += ", after LightningDiT.verdict.speckle has put their speckle back"
            chinese += "（先用 LightningDiT.verdict.speckle 补回散斑）"
        yield from project.in_both(f"Next: {english}", f"下一步：{chinese}")
        return
    adapted = project.step_command("step6_adapt_models.py", "--help")
    if options.generated:
        yield from project.in_both(
            f"Next: adapt a generator to these windows: {adapted}", f"下一步：在这些窗口上适配生成模型：{adapted}"
        )
        return
    yield from project.in_both(
        f"Next: look at the report; step 6 has larger presets and further settings: {adapted}",
        f"下一步：查看报告；步骤 6 有更大的预设和更多设置：{adapted}",
    )


if __name__ == "__main__":
    project.run(main)
