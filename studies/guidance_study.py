"""Compare kinds of guidance on the bundled model: `python -m studies.guidance_study --guide CHECKPOINT`.

Class accuracy by the judge, diversity and Frechet distance against the scale, for classifier-free guidance on all
channels, for autoguidance (Karras et al., arXiv 2406.02507) by each guide, and for classifier-free guidance on the
first few channels beside the scale on all of them that `match_guidance` finds for it. All images start from the same
noises and take the same solver. Each row is kept in docs/guidance/study.json as soon as it is done, a rerun goes on,
and the tables between the marks in docs/guidance.md and the plot are renewed from there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from LightningDiT.config import Config, SampleConfig, load_config, setting_differences
from LightningDiT.console import run_main
from LightningDiT.data.images import FASHION_MNIST_CLASSES
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import atomic_path
from LightningDiT.loading import verify
from LightningDiT.metrics.formulas import frechet_distance
from LightningDiT.metrics.judge import load_judge
from LightningDiT.sampling.calibrated import weights_fingerprint
from LightningDiT.sampling.options import positive
from LightningDiT.sampling.pipeline import CONFIG_NAME, LightningDiTPipeline
from LightningDiT.tools.match_guidance import match
from LightningDiT.tools.report import put_between_marks
from studies.evaluate_bundled import (
    JUDGE_NAME,
    ImageSet,
    diversity_figures,
    generated,
    real_images,
    recognised,
    some_of_each_class,
)

CLASSES = len(FASHION_MNIST_CLASSES)
REAL, NONE, CLASSIFIER_FREE, AUTOGUIDANCE = "real images", "none", "classifier-free", "autoguidance"
ALL = "all"
SOLVER = {"sampling_method": "ab3", "num_sampling_steps": 26, "time_grid": "graded", "timestep_shift": 0.0}
SEED = 0
MATCH_NOISES, MATCH_POINTS = 20, 26
#: Figures with their title in plot and table, and how a table writes them.
FIGURES = {
    "accuracy": ("seen as asked", "{:.2%}"),
    "diversity": ("pairwise distance over real", "{:.3f}"),
    "frechet": ("Fréchet distance", "{:.3f}"),
}


@dataclass(frozen=True)
class Case:
    """One setting, a line of the table."""

    kind: str
    guide: str = ""  # name of the guide's file
    channels: int | str = ALL
    scale: float = 1.0


class Study:
    """The rows measured so far, in a folder that belongs to one set of settings."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Open what `folder` has, or start there.

        Raises:
            LightningDiTError: it has a study of other settings, or a file that cannot be read.
        """
        self.file, self.page = folder / "guidance" / "study.json", folder / "guidance.md"
        self.plot = folder / "guidance" / "scales.png"
        self.data: dict[str, Any] = {"settings": settings, "guides": {}, "matches": [], "rows": []}
        if self.file.exists():
            try:
                there = json.loads(self.file.read_text(encoding="utf-8"))
                if not (isinstance(there, dict) and there.keys() == self.data.keys()):
                    raise ValueError(f"a mapping with {', '.join(self.data)} is expected")
            except (OSError, ValueError) as error:
                raise LightningDiTError(f"{self.file} cannot be read ({error})", "choose another --output") from error
            self.data = there
            self._refuse("settings", setting_differences(there["settings"], settings))

    def add_guides(self, guides: dict[str, str]) -> None:
        """Note the fingerprints of guides by name.

        Raises:
            LightningDiTError: the study has another guide under one of these names.
        """
        known = self.data["guides"]
        self._refuse("guides", setting_differences(known, {name: guides.get(name, known[name]) for name in known}))
        known.update(guides)

    def _refuse(self, part: str, changed: Sequence[str]) -> None:
        if changed:
            raise LightningDiTError(
                f"{self.file} holds a study of other {part} ({'; '.join(changed)})", "choose another --output"
            )

    def has(self, case: Case) -> bool:
        """Whether the row of `case` is there."""
        return any(row["case"] == asdict(case) for row in self.data["rows"])

    def keep(self, case: Case, figures: dict[str, float]) -> None:
        """Add a row and renew file, tables and plot."""
        self.data["rows"].append({"case": asdict(case), **figures})
        self.save()

    def save(self) -> None:
        """Write file, tables and plot, each whole."""
        with atomic_path(self.file) as temporary:
            temporary.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        write_page(self.data, self.page)
        draw(self.data, self.plot)


def study_config(path: Path) -> Config:
    """Return the bundled model's settings with the solver of the study; guidance is set by each case."""
    config = load_config(path)
    return replace(config, sample=replace(config.sample, **SOLVER, solver_file=None, guide_ckpt=None))


def settings_of(config: Config, count: int) -> dict[str, Any]:
    """Return what all rows of a study have in common, as plain values."""
    sample = config.sample
    return {
        "count": count,
        "seed": SEED,
        "weights": weights_fingerprint(config.ckpt_path or ""),
        "solver": {name: getattr(sample, name) for name in SOLVER},
        "interval": [sample.cfg_interval_start, sample.cfg_interval_end],
    }


def guides_of(config: Config, paths: Sequence[str]) -> dict[str, Path]:
    """Return the guides' files by name, after a check of each.

    Raises:
        LightningDiTError: one is missing or does not fit, or two have one name.
    """
    guides = {Path(path).stem: Path(path) for path in paths}
    if len(guides) < len(paths):
        raise LightningDiTError(f"two of the guides {', '.join(paths)} have one name", "rename one of the files")
    for path in guides.values():
        verify(replace(config, sample=replace(config.sample, guide_ckpt=str(path))))
    return guides


def sample_of(case: Case, sample: SampleConfig, guides: dict[str, Path]) -> SampleConfig:
    """Return the sampling settings of a case."""
    guide = str(guides[case.guide]) if case.guide else None
    return replace(sample, cfg_scale=case.scale, guided_channels=case.channels, guide_ckpt=guide)


def cases_of(guides: Sequence[str], scales: Sequence[float], matches: Sequence[dict[str, Any]]) -> list[Case]:
    """Return every case of a study, the ones that others are compared with first."""
    few = [Case(CLASSIFIER_FREE, channels=pair["channels"], scale=pair["scale"]) for pair in matches]
    matched = [Case(CLASSIFIER_FREE, scale=pair["matched"]) for pair in matches]
    cases = [Case(REAL), Case(NONE), *(Case(CLASSIFIER_FREE, scale=scale) for scale in scales)]
    cases += [Case(AUTOGUIDANCE, guide, scale=scale) for guide in guides for scale in scales]
    return list(dict.fromkeys([*cases, *few, *matched]))


def measure_matches(
    pipe: LightningDiTPipeline, channels: int, scales: Sequence[float], known: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return for each scale on the first channels the matched one, to two digits; those that are known first."""
    found = list(known)
    for scale in scales:
        if any((pair["channels"], pair["scale"]) == (channels, scale) for pair in known):
            continue
        print(f"Matching scale {scale:g} on {channels} channels", flush=True)
        sample = replace(pipe.config.sample, cfg_scale=scale, guided_channels=channels)
        result = match(pipe, sample, MATCH_NOISES, MATCH_POINTS, SEED)
        spread = {
            name: [round(float(values.min()), 2), round(float(values.max()), 2)]
            for name, values in (("noises", result.by_noise), ("times", result.by_time))
        }
        found.append({"channels": channels, "scale": scale, "matched": round(result.matched, 2), **spread})
    return found


def figures_of(made: ImageSet, test: ImageSet) -> dict[str, float]:
    """Return the judge's accuracy, and diversity and Frechet distance against the real test images."""
    return {
        "accuracy": recognised(made)["accuracy"],
        "diversity": diversity_figures(made, test)["mean"],
        "frechet": frechet_distance(made.features, test.features),
    }


def measure(
    study: Study, cases: Sequence[Case], base: LightningDiTPipeline, guides: dict[str, Path], root: str
) -> None:
    """Add the rows of `cases` to the study, one after the other."""
    count = study.data["settings"]["count"]
    judge = load_judge(Path(base.config.source).parent / JUDGE_NAME)
    test = real_images(judge, root, train=False)
    for case in cases:
        print(f"{case.kind} {case.guide} scale {case.scale:g} on {case.channels} channels", flush=True)
        if case.kind == REAL:
            made = some_of_each_class(real_images(judge, root, train=True), count // CLASSES, SEED)
        else:
            pipe = base.with_sample(sample_of(case, base.config.sample, guides))
            options = argparse.Namespace(count=count, seed=SEED, guidance_scale=None, steps=None)
            made = generated(pipe, judge, options)[0]
        study.keep(case, figures_of(made, test))


def sorted_rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows by kind, guide, channels and scale."""
    kinds = (REAL, NONE, CLASSIFIER_FREE, AUTOGUIDANCE)

    def key(row: dict[str, Any]) -> tuple[int, str, str, float]:
        case = row["case"]
        return kinds.index(case["kind"]), case["guide"], str(case["channels"]), case["scale"]

    return sorted(data["rows"], key=key)


def rows_table(data: dict[str, Any]) -> list[str]:
    """Return the Markdown table of all rows."""
    settings = data["settings"]
    solver, (start, end) = settings["solver"], settings["interval"]
    lines = [
        f"**{settings['count']} images a row**, seed {settings['seed']}, {solver['sampling_method']} with"
        f" {solver['num_sampling_steps']} points ({solver['time_grid']} grid), guidance from t = {start:g} to {end:g}:",
        "",
        f"| guidance | guide | channels | scale | {' | '.join(title for title, _ in FIGURES.values())} |",
        "|---" * (4 + len(FIGURES)) + "|",
    ]
    for row in sorted_rows(data):
        case = row["case"]
        where = [case["guide"], str(case["channels"]), f"{case['scale']:g}"]
        cells = [case["kind"], *(where if case["kind"] in (CLASSIFIER_FREE, AUTOGUIDANCE) else ["", "", ""])]
        cells += [written.format(row[name]) for name, (_, written) in FIGURES.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def matches_table(data: dict[str, Any]) -> list[str]:
    """Return the Markdown table of matched scales."""
    lines = [
        "| channels | scale there | matched on all | from single noises | from single times |",
        "|---|---|---|---|---|",
    ]
    for pair in data["matches"]:
        spreads = (f"{low:g} to {high:g}" for low, high in (pair["noises"], pair["times"]))
        lines.append(f"| first {pair['channels']} | {pair['scale']:g} | {pair['matched']:g} | {' | '.join(spreads)} |")
    return [*lines, ""]


def write_page(data: dict[str, Any], page: Path) -> None:
    """Put the tables between the marks of a Markdown page."""
    put_between_marks(page, [*rows_table(data), *(matches_table(data) if data["matches"] else [])], "Guidance")


def draw(data: dict[str, Any], path: Path) -> None:
    """Draw each figure against the scale, a line for each kind, guide and number of channels; all start unguided."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted_rows(data)
    alone = {row["case"]["kind"]: row for row in rows if row["case"]["kind"] in (REAL, NONE)}
    figure = Figure(figsize=(5 * len(FIGURES), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, (title, _)) in enumerate(FIGURES.items(), 1):
        axes = figure.add_subplot(1, len(FIGURES), place)
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            case = row["case"]
            if case["kind"] not in alone:
                which = case["guide"] or f"{case['channels']} channels"
                lines.setdefault(f"{case['kind']}, {which}", []).append((case["scale"], row[name]))
        for label, points in lines.items():
            start = [(1.0, alone[NONE][name])] if NONE in alone else []
            axes.plot(*zip(*start, *points, strict=True), ".-", label=label)
        if REAL in alone:
            axes.axhline(alone[REAL][name], color="grey", linestyle=":", label=REAL)
        axes.set(title=title, xlabel="scale")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.guidance_study", description=__doc__)
    parser.add_argument("--guide", nargs="+", default=[], metavar="CHECKPOINT", help="weaker weights of the same shape")
    parser.add_argument("--data-root", default="data/fashion-mnist", help="folder of Fashion-MNIST")
    parser.add_argument("--model", default="models/fashion-mnist", help="folder of model, tokenizer and judge")
    parser.add_argument("--count", type=int, default=1000, help="images a row, the same number a class")
    parser.add_argument("--scales", nargs="*", type=float, default=[1.5, 2, 3, 5], help="on all channels")
    parser.add_argument("--channels", type=positive, default=3, help="the few channels")
    parser.add_argument("--channel-scales", nargs="*", type=float, default=[3, 5], help="on the few channels")
    parser.add_argument("--output", default="docs", help="folder of guidance.md and guidance/")
    args = parser.parse_args(argv)
    if args.count < 2 * CLASSES or args.count % CLASSES:
        parser.error(f"--count is {args.count}; a multiple of {CLASSES} from {2 * CLASSES} on is expected")
    for scale in (*args.scales, *args.channel_scales):
        if not 0 <= scale < 1e4 or scale == 1:
            parser.error(f"the scale {scale:g} is no guidance, or none that can be; 0 or more, and not 1, is expected")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    config = study_config(Path(args.model) / CONFIG_NAME)
    guides = guides_of(config, args.guide)
    study = Study(Path(args.output), settings_of(config, args.count))
    study.add_guides({name: weights_fingerprint(path) for name, path in guides.items()})
    pipe = LightningDiTPipeline.from_config(config)
    study.data["matches"] = measure_matches(pipe, args.channels, args.channel_scales, study.data["matches"])
    cases = cases_of(list(guides), args.scales, study.data["matches"])
    missing = [case for case in cases if not study.has(case)]
    print(f"{len(cases) - len(missing)} of {len(cases)} rows are there", flush=True)
    if missing:
        measure(study, missing, pipe, guides, args.data_root)
    study.save()
    print("\n".join([*rows_table(study.data), *matches_table(study.data)]))
    print(f"wrote {study.file}, {study.plot} and the tables in {study.page}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
