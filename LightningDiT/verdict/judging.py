"""From folders of generated windows to the report: trials, filter, fidelity, pictures, and the sentence."""

from __future__ import annotations

import functools
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from LightningDiT.errors import LightningDiTError
from LightningDiT.files import check_target
from LightningDiT.metrics.window_judge import STEPS as FILTER_STEPS
from LightningDiT.radar.level_images import (
    LevelFiles,
    Windows,
    has_windows,
    listed_windows,
    load_windows,
    open_level_files,
)
from LightningDiT.radar.sensor import Sensor
from LightningDiT.radar.split import Split
from LightningDiT.verdict.classifiers import Recipe
from LightningDiT.verdict.fidelity import Fidelity, fidelity
from LightningDiT.verdict.filter import Filter, fit_filter, shares_kept
from LightningDiT.verdict.gait import Axes, axes_of
from LightningDiT.verdict.generated import lacking, read_generated
from LightningDiT.verdict.intervals import WANTED
from LightningDiT.verdict.pictures import Triple, colour_map_of, triples
from LightningDiT.verdict.report import FilterReport, Report, check_report, mean_filter, of_images, write_report
from LightningDiT.verdict.results import Results, summarise
from LightningDiT.verdict.rows import PAIRS, ROWS, USUAL, Generated, Scenario, scenario_of, spread, subset
from LightningDiT.verdict.sentences import Text, certainty, copied, headline
from LightningDiT.verdict.speckle import fit_speckle, put_back, reconstructed
from LightningDiT.verdict.trials import FoldData, Plan, Trial, announce, is_trials, run_trials

TRIALS = "trials.json"
FILTERED = "filtered-1x"  # the row that reports the filter
SEEDS = 3
LOOK_SECONDS = 300.0  # for fidelity and pictures: further folds are left out, which the report says
FIRST_SHOWN, SHOWN = 6, 2  # people in the pictures of the first fold, and of each other one
Cell = tuple[int, int | None]  # fold, and images a person
Fact = tuple[str, str, str]  # English, Chinese, value


@dataclass(frozen=True)
class Judged:
    """Real windows, and the generated ones of one model in all folds and numbers of images.

    Attributes:
        levels, split_file: of step 5.
        folds, images: which cells there are; images a person, None: all.
        folders: of the generated windows, by fold and images.
        trained: rows of the split that their generator saw; nothing where that is unknown.
        facts: how they were made.
        seeds: trainings of each row, unless others are asked for.
        unseen: what their generators did not see, see `rows.scenario_of`.
        tokenizers: settings and weights of their tokenizer, by fold and images.
    """

    levels: Path
    split_file: Path
    folds: tuple[int, ...]
    images: tuple[int | None, ...]
    folders: Mapping[Cell, Path]
    trained: Mapping[Cell, frozenset[int]] = field(default_factory=dict)
    facts: tuple[Fact, ...] = ()
    seeds: int = SEEDS
    unseen: str | None = None
    tokenizers: Mapping[Cell, tuple[Path, Path]] = field(default_factory=dict)


def folder_of_windows(folder: Path, levels: Path, split_file: Path, fold: int = 0, images: int | None = None) -> Judged:
    """Return what is judged of a folder that any generator wrote; what that saw is unknown.

    Args:
        images: of a person that the generator saw, and that classifiers are to see; None: all training windows.
    """
    return Judged(
        levels,
        split_file,
        (fold,),
        (images,),
        {(fold, images): folder},
        facts=(("Generated", "生成窗口", str(folder)),),
    )


@dataclass(frozen=True)
class Asked:
    """What is trained and asked for.

    Attributes:
        rows: names of `ROWS`; None: the usual ones, and a filtered one where a filter can be learnt.
        seeds: trainings of each row; None: those of `Judged`.
        wanted: difference in accuracy that is worth the effort.
        unseen: `PAIRS`, or a condition, that training must lack; None: that of `Judged`.
        known_sensor: whether axes are those of the simulator's sensor; else rows and columns.
        command: that repeats it.
        verdicts: how many are asked for together, see `intervals.conclude`; None: those of one `Judged`.
        call: when the call began, which all its reports share.
        earlier: whether the output held verdicts of other calls.
    """

    rows: tuple[str, ...] | None = None
    seeds: int | None = None
    recipe: Recipe = field(default_factory=Recipe)
    wanted: float = WANTED
    unseen: str | None = None
    known_sensor: bool = True
    command: str = ""
    verdicts: int | None = None
    call: str = ""
    earlier: bool = False


@dataclass(frozen=True)
class Outcome:
    """What was found, in English and Chinese, and where it is written.

    Attributes:
        results: of each number of images; the page begins with the first.
        sentences: of each number of images.
        tried: what to try next.
    """

    results: Sequence[Results]
    sentences: Sequence[Text]
    tried: Sequence[Text]
    page: Path


class Loader:
    """Gives the windows of folds to trials; keeps what the filter did, for the report."""

    def __init__(self, judged: Judged, asked: Asked) -> None:
        self.judged, self.unseen, self.steps = judged, asked.unseen or judged.unseen, asked.recipe.steps
        self.opened: LevelFiles = open_level_files(judged.levels, judged.split_file)
        self.filters: dict[Cell, FilterReport] = {}

    @property
    def split(self) -> Split:
        return self.opened.split

    def part(self, name: str, fold: int) -> Windows:
        """Return the windows of a part; of validation there may be none."""
        if name == "validation" and not has_windows(self.judged.split_file, name, fold):
            training = self.part("training", fold)
            return subset(training, torch.empty(0, dtype=torch.long))
        return load_windows(self.judged.levels, self.judged.split_file, name, fold)

    def scenario(self, fold: int) -> Scenario:
        """Return what is held out of training in a fold."""
        return scenario_of(self.unseen, *(listed_windows(self.split, part, fold) for part in ("training", "test")))

    def __call__(self, fold: int) -> FoldData:
        """Return the windows of a fold, the generated ones read when they are first asked for."""
        training = self.scenario(fold).seen(self.part("training", fold))
        validation, test = self.part("validation", fold), self.part("test", fold)

        @functools.cache
        def generated(images: int | None) -> Generated | None:
            folder = self.judged.folders.get((fold, images))
            if folder is None:
                return None
            self._check_trained(training, fold, images)
            return read_generated(folder, self.opened, fold)

        @functools.cache
        def filtered(images: int | None) -> Generated | None:
            made = generated(images)
            if made is None:
                return None
            learnt = fit_filter(subset(training, spread(training, images)), min(FILTER_STEPS, self.steps))
            keeps = learnt.keeps(made)
            self.filters[fold, images] = _filter_report(learnt, keeps, made)
            return made[torch.nonzero(keeps)[:, 0]]

        @functools.cache
        def speckled(images: int | None) -> Generated | None:
            made = generated(images)
            if made is None:
                return None
            seen = training.pixels[spread(training, images)]
            lost = fit_speckle(seen, reconstructed(*self._tokenizer(fold, images), seen))
            return replace(made, pixels=put_back(lost, made.pixels, fold))

        return FoldData(training, validation, test, generated, filtered, speckled)

    def _tokenizer(self, fold: int, images: int | None) -> tuple[Path, Path]:
        """Return settings and weights of the tokenizer whose windows lack speckle."""
        found = self.judged.tokenizers.get((fold, images))
        if found is None:
            raise LightningDiTError(
                f"rows with speckle put back need the tokenizer of step 6, and that of fold {fold} is unknown",
                "judge a folder of step 6 by --adapted, or leave out these rows",
            )
        return found

    def _check_trained(self, training: Windows, fold: int, images: int | None) -> None:
        """Raise LightningDiTError unless the generator of a cell saw just the images that its classifiers see."""
        saw, seen = self.judged.trained.get((fold, images)), training.rows[spread(training, images)].tolist()
        if saw is None or saw == frozenset(seen):
            return
        name = self.split.rows[min(saw.symmetric_difference(seen))].name
        unseen = f" without what is unseen ({self.unseen})" if self.unseen else ""
        raise LightningDiTError(
            f"the generator of fold {fold} saw {len(saw)} images, the classifiers see {len(seen)}{unseen}, and {name}"
            " is not among both",
            adapt_again(self.unseen),
        )


def adapt_again(unseen: str | None) -> str:
    """Return what makes generators that see what the classifiers see."""
    option = f" --unseen {shlex.quote(unseen)}" if unseen else ""
    return (
        f"run step6_adapt_models.py{option} with the same images and another --output, or name rows without generated"
        " windows by --rows"
    )


def _filter_report(learnt: Filter, keeps: torch.Tensor, made: Generated) -> FilterReport:
    people = shares_kept(keeps, made.people)
    return FilterReport(float(keeps.double().mean()), people, learnt.real_kept, learnt.confidence, learnt.margin)


def rows_of(asked: Asked, judged: Judged, split: Split) -> tuple[str, ...]:
    """Return the rows that are trained: those that were asked for, or the usual ones.

    The filtered one is left out, which is said, where nobody has two training passes in a fold, or one image is taken.
    """
    if asked.rows is not None:
        return asked.rows
    for fold in judged.folds:
        passes: dict[str, set[int]] = {}
        for row in split.part("training", fold):
            passes.setdefault(row.person, set()).add(row.pass_number)
        if max(map(len, passes.values()), default=0) < 2 or 1 in judged.images:
            print("note: a filter is learnt across training passes, of which nobody has two: no filtered row")
            return USUAL
    return (*USUAL, FILTERED)


def plans_of(asked: Asked, judged: Judged, loader: Loader) -> list[Plan]:
    """Return what is trained; unseen pairs are others in each fold."""
    rows = rows_of(asked, judged, loader.split)
    folds = [(fold,) for fold in judged.folds] if loader.unseen == PAIRS else [judged.folds]
    seeds = asked.seeds or judged.seeds
    return [Plan(part, judged.images, rows, seeds, asked.recipe, loader.scenario(part[0])) for part in folds]


def preview(judged: Judged, asked: Asked) -> None:
    """Read everything once, and say what would be trained and about how long it takes."""
    loader = Loader(judged, asked)
    for plan in _checked_plans(asked, judged, loader):
        announce(plan, loader)


def _checked_plans(asked: Asked, judged: Judged, loader: Loader) -> list[Plan]:
    """Return what is trained, after all generated windows were read once: a bad one costs no training."""
    plans = plans_of(asked, judged, loader)
    for plan in plans:
        for fold in plan.folds:
            data = loader(fold)
            for images in plan.images:
                made = _generated(data, images, plan.rows)
                if made is not None and (note := _lacking(data, images, plan.rows, made)):
                    print(note, flush=True)
    return plans


def judge(judged: Judged, asked: Asked, folder: Path, known: Sequence[Trial] = ()) -> tuple[Outcome, list[Trial]]:
    """Train what is not trained yet, and write report.html and report.json into a folder.

    Args:
        known: finished trials of another model; those without generated windows are the same here.

    Raises:
        LightningDiTError: see `open_level_files`, `read_generated` and `run_trials`.
    """
    loader = Loader(judged, asked)
    trials: list[Trial] = []
    for plan in _checked_plans(asked, judged, loader):
        trials += run_trials(plan, loader, folder / TRIALS, known)
    results = summarise(trials, asked.wanted, verdicts=asked.verdicts or verdicts_of([judged]))
    report = _report(judged, asked, loader, results)
    page, _ = write_report(report, folder)
    found = [_sentence(one, len(results) > 1) for one in results]
    if (copies := copied(report.mean_fidelity))[0]:
        found.append(copies)
    return Outcome(results, found, report.tried, page), trials


def check_files(folder: Path) -> None:
    """Raise LightningDiTError if `judge` would replace a file in a folder that no step 7 wrote."""
    check_report(folder)
    check_target(folder / TRIALS, is_trials)


def verdicts_of(judged: Iterable[Judged]) -> int:
    """Return the number of verdicts: one for each network and number of images."""
    return sum(len(one.images) for one in judged)


def _sentence(results: Results, is_one_of_several: bool) -> Text:
    """Return the verdict in words, and of how many images it is if there are several."""
    english, chinese = zip(headline(results), certainty(results), strict=True)
    before = of_images(results) if is_one_of_several else ("", "")
    parts = [part for part in (f"{before[0]}:" * bool(before[0]), *english) if part]
    return " ".join(parts), f"{before[1]}：" * bool(before[1]) + "".join(chinese)


def _report(judged: Judged, asked: Asked, loader: Loader, results: Sequence[Results]) -> Report:
    """Return the report, whose fidelity, filter and pictures are of the first number of images."""
    data, settings, images = loader(judged.folds[0]), loader.split.settings, judged.images[0]
    axes = axes_of(settings, loader.opened.size, Sensor() if asked.known_sensor else None)
    looks = _looks(judged, asked, loader, axes) if _most([row.row for row in results[0].rows]) else {}
    filters = [loader.filters[fold, images] for fold in judged.folds if (fold, images) in loader.filters]
    return Report(
        results,
        data.test.class_names,
        data.test.condition_names,
        axes,
        colour_map_of(settings),
        {fold: found for fold, (found, _) in looks.items()},
        mean_filter(filters) if filters else None,
        {fold: shown for fold, (_, shown) in looks.items()},
        (*judged.facts, *_facts(judged, asked, results, list(looks))),
        asked.command,
        wider_folds(judged, loader.split),
        asked.call,
        asked.earlier,
    )


def wider_folds(judged: Judged, split: Split) -> tuple[int, ...]:
    """Return the folds of step 6 and those that it could add; nothing if it has all, or is not the generator."""
    others = [fold for fold in range(split.folds) if fold not in judged.folds]
    left = tuple(fold for fold in others if split.part("training", fold) and split.part("test", fold))
    return (*judged.folds, *left) if left and judged.trained else ()


def _looks(judged: Judged, asked: Asked, loader: Loader, axes: Axes) -> dict[int, tuple[Fidelity, Sequence[Triple]]]:
    """Return fidelity and pictures of each fold, as many as `LOOK_SECONDS` are enough for, and one at least."""
    looks: dict[int, tuple[Fidelity, Sequence[Triple]]] = {}
    images, began = judged.images[0], time.monotonic()
    for at, fold in enumerate(judged.folds):
        if at and (time.monotonic() - began) * (at + 1) / at > LOOK_SECONDS:
            break
        data = loader(fold)
        made = data.generated(images)
        if made is not None:
            seen = subset(data.training, spread(data.training, images))
            found = fidelity(made, data.test, seen, axes, asked.recipe)
            looks[fold] = found, triples(made, data.test, seen, SHOWN if looks else FIRST_SHOWN, at)
    return looks


def _most(rows: Sequence[str]) -> int:
    """Return how many generated windows for each real one some of the rows take at most."""
    return max((ROWS[row].generated for row in rows if row in ROWS), default=0)


def _generated(data: FoldData, images: int | None, rows: Sequence[str]) -> Generated | None:
    """Return the generated windows if one of the rows has some."""
    return data.generated(images) if _most(rows) else None


def _lacking(data: FoldData, images: int | None, rows: Sequence[str], made: Generated) -> str:
    """Return a line about people with fewer generated windows than rows take; empty without any."""
    real = data.training.people[spread(data.training, images)]
    return lacking(made.people, real, _most(rows), data.training.class_names)


def _facts(judged: Judged, asked: Asked, results: Sequence[Results], looked: Sequence[int]) -> list[Fact]:
    recipe = asked.recipe
    validation = results[0].rows[0].validation
    numbers = ", ".join("all" if images is None else str(images) for images in judged.images)
    folds, shown = (", ".join(map(str, part)) for part in (judged.folds, looked))
    of = "" if len(looked) == len(judged.folds) else f" ({len(judged.folds)}; {LOOK_SECONDS / 60:g} min)"
    return [
        ("Real windows", "真实窗口", f"{judged.levels}, {judged.split_file}"),
        ("Folds", "折", folds),
        ("Images a person", "每人图像数", numbers),
        ("Classifier", "分类器", f"{recipe.classifier}; {recipe.steps} x {recipe.batch}"),
        ("Looks at the validation windows", "验证次数", f"{recipe.looks}; {validation:.0f}"),
        *(
            [("Fidelity and pictures: folds (of; time limit)", "相似程度与图片所用的折（总数；时间上限）", shown + of)]
            if looked
            else []
        ),
    ]
