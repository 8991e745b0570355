"""Compare kinds of guidance on the bundled model: `python -m studies.guidance_study --guide CHECKPOINT`.

Class accuracy by the judge, diversity and Frechet distance against the scale, for classifier-free guidance on all
channels, for autoguidance (Karras et al., arXiv 2406.02507) by each guide, and for classifier-free guidance on the
first few channels beside the scale on all of them that `match_guidance` finds for it. All images start from the same
noises, by the same solver. Each row is kept in docs/guidance/study.json as soon as it is done, and a rerun goes on; the
tables between the marks in docs/guidance.md and the plot are renewed from there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from LightningDiT.config import Config, SampleConfig, load_config, setting_differences
from LightningDiT.console import positive, run_main
from LightningDiT.errors import LightningDiTError
from LightningDiT.sampling.calibrated import weights_fingerprint
from LightningDiT.sampling.dry_run import verify
from LightningDiT.sampling.pipeline import CONFIG_NAME, LightningDiTPipeline
from LightningDiT.tools.match_guidance import match
from LightningDiT.tools.report import put_between_marks, table
from studies.judged import distance_and_accuracy, diversity, generated, judge_of, real_images, some_of_each_class
from studies.pages import CLASSES, Figures, add_study_options, kept_parts, plot, write_json

REAL, NONE, CLASSIFIER_FREE, AUTOGUIDANCE = "real images", "none", "classifier-free", "autoguidance"
SOLVER = {"sampling_method": "ab3", "num_sampling_steps": 26, "time_grid": "graded", "timestep_shift": 0.0}
SEED = 0
MATCH_NOISES, MATCH_POINTS = 20, 26
#: Figures with their title and their format in a table.
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
    channels: int | str = "all"
    scale: float = 1.0


class Study:
    """The rows measured so far, in a folder that belongs to one set of settings.

    Raises:
        LightningDiTError: the folder has a study of other settings, or a file that cannot be read.
    """

    def __init__(self, folder: Path, settings: Figures) -> None:
        self.file, self.page = folder / "guidance" / "study.json", folder / "guidance.md"
        self.plot = folder / "guidance" / "scales.png"
        self.data = {"settings": settings, "guides": {}, "matches": [], "rows": []} | kept_parts(self.file)
        self._refuse("settings", setting_differences(self.data["settings"], settings))

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
        write_json(self.file, self.data)
        put_between_marks(self.page, tables(self.data), "Guidance")
        draw(self.data, self.plot)


def study_config(path: Path) -> Config:
    """Return the bundled model's settings with the solver of the study; guidance is set by each case."""
    config = load_config(path)
    return replace(config, sample=replace(config.sample, **SOLVER, solver_file=None, guide_ckpt=None))


def settings_of(config: Config, count: int) -> Figures:
    """Return the settings that all rows of a study share, as plain values."""
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


def cases_of(guides: Sequence[str], scales: Sequence[float], matches: Sequence[Figures]) -> list[Case]:
    """Return every case of a study, the baselines first."""
    few = [Case(CLASSIFIER_FREE, channels=pair["channels"], scale=pair["scale"]) for pair in matches]
    matched = [Case(CLASSIFIER_FREE, scale=pair["matched"]) for pair in matches]
    cases = [Case(REAL), Case(NONE), *(Case(CLASSIFIER_FREE, scale=scale) for scale in scales)]
    cases += [Case(AUTOGUIDANCE, guide, scale=scale) for guide in guides for scale in scales]
    return list(dict.fromkeys([*cases, *few, *matched]))


def measure_matches(
    pipe: LightningDiTPipeline, channels: int, scales: Sequence[float], known: Sequence[Figures]
) -> list[Figures]:
    """Return the known matches, then one for each other scale on the first channels, to two digits."""
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


def measure(
    study: Study, cases: Sequence[Case], base: LightningDiTPipeline, guides: dict[str, Path], root: str
) -> None:
    """Add the rows of `cases` to the study, one after the other."""
    count, judge = study.data["settings"]["count"], judge_of(Path(base.config.source).parent)
    test = real_images(judge, root, train=False)
    for case in cases:
        print(f"{case.kind} {case.guide} scale {case.scale:g} on {case.channels} channels", flush=True)
        if case.kind == REAL:
            made = some_of_each_class(real_images(judge, root, train=True), count // CLASSES, SEED)
        else:
            made = generated(base.with_sample(sample_of(case, base.config.sample, guides)), judge, count, SEED)
        study.keep(case, {"diversity": diversity(made, test)["mean"], **distance_and_accuracy(made, test)})


def sorted_rows(data: Figures) -> list[Figures]:
    """Return the rows by kind, guide, channels and scale."""
    kinds = (REAL, NONE, CLASSIFIER_FREE, AUTOGUIDANCE)

    def key(row: Figures) -> tuple[int, str, str, float]:
        case = row["case"]
        return kinds.index(case["kind"]), case["guide"], str(case["channels"]), case["scale"]

    return sorted(data["rows"], key=key)


def rows_table(data: Figures) -> list[str]:
    """Return the Markdown table of all rows."""
    settings = data["settings"]
    solver, (start, end) = settings["solver"], settings["interval"]
    title = (
        f"**{settings['count']} images a row**, seed {settings['seed']}, {solver['sampling_method']} with"
        f" {solver['num_sampling_steps']} points ({solver['time_grid']} grid), guidance from t = {start:g} to {end:g}:"
    )
    rows = []
    for row in sorted_rows(data):
        case = row["case"]
        where = [case["guide"], str(case["channels"]), f"{case['scale']:g}"]
        cells = [case["kind"], *(where if case["kind"] in (CLASSIFIER_FREE, AUTOGUIDANCE) else ["", "", ""])]
        rows.append([*cells, *(written.format(row[name]) for name, (_, written) in FIGURES.items())])
    head = ("guidance", "guide", "channels", "scale", *(title for title, _ in FIGURES.values()))
    return [title, "", *table(head, rows)]


def matches_table(data: Figures) -> list[str]:
    """Return the Markdown table of matched scales."""
    rows = []
    for pair in data["matches"]:
        spreads = (f"{low:g} to {high:g}" for low, high in (pair["noises"], pair["times"]))
        rows.append([f"first {pair['channels']}", f"{pair['scale']:g}", f"{pair['matched']:g}", *spreads])
    return table(("channels", "scale there", "matched on all", "from single noises", "from single times"), rows)


def tables(data: Figures) -> list[str]:
    """Return the lines between the marks of the page."""
    return [*rows_table(data), *(matches_table(data) if data["matches"] else [])]


def draw(data: Figures, path: Path) -> None:
    """Draw each figure against the scale, a line for each kind, guide and number of channels; all start unguided."""
    alone: dict[str, Figures] = {}
    lines: dict[str, list[Figures]] = {}
    for row in sorted_rows(data):
        case = row["case"]
        if case["kind"] in (REAL, NONE):
            alone[case["kind"]] = row
        else:
            lines.setdefault(f"{case['kind']}, {case['guide'] or str(case['channels']) + ' channels'}", []).append(row)
    with plot(path, 1, len(FIGURES), (5, 4.2)) as figure:
        for axes, (name, (title, _)) in zip(figure.axes, FIGURES.items(), strict=True):
            for label, rows in lines.items():
                rows = [alone[NONE], *rows] if NONE in alone else rows
                axes.plot([row["case"]["scale"] for row in rows], [row[name] for row in rows], ".-", label=label)
            if REAL in alone:
                axes.axhline(alone[REAL][name], color="grey", linestyle=":", label=REAL)
            axes.set(title=title, xlabel="scale")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.guidance_study", description=__doc__)
    parser.add_argument("--guide", nargs="+", default=[], metavar="CHECKPOINT", help="weaker weights of the same shape")
    add_study_options(parser, count=1000)
    parser.add_argument("--scales", nargs="*", type=float, default=[1.5, 2, 3, 5], help="on all channels")
    parser.add_argument("--channels", type=positive, default=3, help="the few channels")
    parser.add_argument("--channel-scales", nargs="*", type=float, default=[3, 5], help="on the few channels")
    args = parser.parse_args(argv)
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
    print("\n".join(tables(study.data)))
    print(f"wrote {study.file}, {study.plot} and the tables in {study.page}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
