"""Compare the solvers on the bundled model: `python -m studies.solver_study --data-root FOLDER`.

Four parts. `errors`: the distance of every solver's final latents from a converged reference, for guidance from
t = 0.125 on and throughout, and for time shifts 0 and 0.3. `clock`: the wall clock of the published procedure, which
computes both halves of guidance at every step, and of other solvers. `images`: Frechet distance and class accuracy.
`ucgm`: all three of the sampler and the preset of UCGM beside ours, for fewer images.
Each part is kept in docs/sampling/study.json as soon as it is done, and the tables between the marks in
docs/sampling.md and the plot are renewed from there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from LightningDiT.config import SampleConfig, preset_values
from LightningDiT.console import Progress, positive, run_main
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import guidance_of
from LightningDiT.sampling.pipeline import LightningDiTPipeline, PipelineOutput
from LightningDiT.sampling.solver_choice import CALIBRATED, FAST, PUBLISHED, UCGM
from LightningDiT.seeds import generator_for
from LightningDiT.tools.benchmark.rounds import Case, measure
from LightningDiT.tools.benchmark.sampling import PUBLISHED_EVALUATIONS, published_procedure
from LightningDiT.tools.calibrate_solver import relative_error
from LightningDiT.tools.report import table
from LightningDiT.transport import draw_noise, graded_grid, integrate_ode, jumps_of, time_grid
from studies.judged import distance_and_accuracy, equal_labels, judge_of, judged, real_images, sample_images
from studies.pages import Figures, Part, add_study_options, plot, run_parts

STARTS = (0.125, 0.0)  # guidance from the published start, and throughout; the model's own start comes first
SHIFTS = (0.0, 0.3)
REFERENCE = ("ab3", 320)  # method and evaluations, on a graded grid; half as many give its error
SEED = 11  # of noises that no fit has seen
METHODS = ["euler", "heun2", "heun", "explicit_adams", "ab2", "ab3", "ab4", "dpmpp2m", "dpmpp3m", "unipc2", "unipc3"]
COSTS = {"heun2": 2, "heun": 2}  # evaluations a step; the other methods take 1
GRADED = ("ab2", "ab3", "unipc2")  # also on `graded_grid`
BUDGETS = (10, 15, 25)  # evaluations
EULER_BUDGETS = (15, 49, 249)
CALIBRATED_BUDGETS = (6, 8, 10, 12, 14, 15)
ROUNDS = 3  # of the wall clock
#: Solvers that are timed beside the published procedure, as settings of `sample`.
CLOCK_SOLVERS = (
    {"sampling_method": PUBLISHED},
    {"sampling_method": FAST},
    *({"sampling_method": CALIBRATED, "num_sampling_steps": evaluations + 1} for evaluations in (10, 12, 14)),
)

#: Solvers whose images the judge sees.
IMAGE_SOLVERS = (
    {"sampling_method": FAST},
    {"sampling_method": CALIBRATED, "num_sampling_steps": 11},
    {"sampling_method": CALIBRATED, "num_sampling_steps": 15},
    {"sampling_method": "euler", "num_sampling_steps": 50},
)


#: Names and settings of the samplers in the comparison with UCGM's, and whether the judge sees images of it: under the
#: model's own guidance, then under that of the preset.
UCGM_SOLVERS: tuple[tuple[str, Figures, bool], ...] = (
    ("fast", {"sampling_method": FAST}, True),
    ("euler", {"sampling_method": "euler", "num_sampling_steps": 51}, False),
    ("ab3, graded", {"sampling_method": "ab3", "num_sampling_steps": 51, "time_grid": "graded"}, False),
    ("ucgm", {"sampling_method": UCGM}, True),
    ("preset ucgm", preset_values(UCGM), True),
    ("fast", preset_values(UCGM) | {"sampling_method": FAST, "solver_file": None}, False),
)
UCGM_COUNT = 500  # images at most


class Experiment:
    """The same noises and classes for every solver.

    Attributes:
        evaluations: of the velocity since it was last set to 0.
    """

    def __init__(self, pipe: LightningDiTPipeline, sample: SampleConfig, noises: int) -> None:
        self.pipe, self.evaluations = pipe.with_sample(sample), 0
        self.labels, self.noise = labels_and_noise(pipe, noises)
        guided = pipe.guided(self.labels, sample)
        self.jumps = jumps_of(guided.settings)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            self.evaluations += 1
            return pipe.transport.velocity(guided, x, t)

        self.velocity = velocity

    def follow(self, method: str, times: Tensor) -> Tensor:
        """Return the final latents (N, C, h, w) of a method on a grid."""
        return integrate_ode(self.velocity, self.noise, times, method, jumps=self.jumps)

    def graded(self, method: str, evaluations: int) -> Tensor:
        """Return the final latents (N, C, h, w) of a method on a graded grid."""
        return self.follow(method, graded_grid(evaluations + 1, self.jumps)[0])

    def calibrated(self, evaluations: int) -> Tensor | None:
        """Return the final latents of the calibrated solver with `evaluations`, or None if there is none."""
        sample = replace(self.pipe.config.sample, sampling_method=CALIBRATED, num_sampling_steps=evaluations + 1)
        try:
            output = latents_of(self.pipe.with_sample(sample), self.labels, self.noise)
        except LightningDiTError:
            return None
        self.evaluations = output.nfe
        return output.images if output.nfe == evaluations else None


def labels_and_noise(pipe: LightningDiTPipeline, count: int) -> tuple[list[int], Tensor]:
    """Return classes dealt in turn and the noise (N, C, h, w) of each."""
    noise = draw_noise((count, *pipe.latent_shape), [generator_for(SEED, index) for index in range(count)])
    return [index % pipe.config.data.num_classes for index in range(count)], noise.to(pipe.device)


def latents_of(pipe: LightningDiTPipeline, labels: list[int], noise: Tensor) -> PipelineOutput:
    """Return what the pipeline makes of noise (N, C, h, w) in one batch."""
    return pipe(labels, latents=noise, output_type="latent", batch_size=len(labels))


def solvers_of(experiment: Experiment) -> list[tuple[str, str, Callable[[], Tensor | None]]]:
    """Return name, grid and a function to the final latents for every row of a table."""
    found: list[tuple[str, str, Callable[[], Tensor | None]]] = []
    for shift in SHIFTS:
        for method in METHODS:
            for budget in BUDGETS if method != "euler" else EULER_BUDGETS:
                times = time_grid(budget // COSTS.get(method, 1) + 1, timestep_shift=shift)
                found.append((method, f"shift {shift:g}", partial(experiment.follow, method, times)))
    found += [(method, "graded", partial(experiment.graded, method, n)) for method in GRADED for n in BUDGETS]
    return found + [(CALIBRATED, "fitted", partial(experiment.calibrated, n)) for n in CALIBRATED_BUDGETS]


@torch.inference_mode()
def errors_of(pipe: LightningDiTPipeline, sample: SampleConfig, noises: int) -> Figures:
    """Return the figures of one table: the error of every solver against the reference."""
    experiment, (method, steps) = Experiment(pipe, sample, noises), REFERENCE
    print(f"Guidance from {sample.cfg_interval_start:g} on: the reference, {steps} steps of {method}", flush=True)
    reference, half = experiment.graded(method, steps), experiment.graded(method, steps // 2)
    rows, listed = list[Figures](), solvers_of(experiment)
    progress = Progress(len(listed), "solver")
    for solver, grid, run in listed:
        experiment.evaluations, started = 0, time.perf_counter()
        last = run()
        seconds = time.perf_counter() - started
        if last is not None:
            named = {"solver": solver, "grid": grid, "evaluations": experiment.evaluations}
            rows.append({**named, "error": float(relative_error(last, reference)), "seconds": seconds})
        progress.update()
    progress.close()
    own_error = float(relative_error(half, reference))
    return {"start": sample.cfg_interval_start, "noises": noises, "reference_error": own_error, "rows": rows}


def measure_errors(args: argparse.Namespace) -> Figures:
    """Return the errors under the model's own guidance, and under guidance from each of `STARTS`."""
    pipe = LightningDiTPipeline.from_pretrained(args.model)
    own = pipe.config.sample
    starts = dict.fromkeys((own.cfg_interval_start, *STARTS))
    return {
        "settings": [errors_of(pipe, replace(own, cfg_interval_start=start), args.noises) for start in starts],
    }


def measure_clock(args: argparse.Namespace) -> Figures:
    """Return seconds and evaluations of sampling latents by the published procedure and by other solvers, in turn."""
    pipe = LightningDiTPipeline.from_pretrained(args.model)
    labels, noise = labels_and_noise(pipe, args.noises)

    def case(change: Figures) -> Case:
        solver = pipe.with_sample(replace(pipe.config.sample, **change))
        evaluations = latents_of(solver, labels, noise).nfe
        return Case(change["sampling_method"], lambda: latents_of(solver, labels, noise), units=evaluations)

    slowest = Case(
        "published procedure, both halves always",
        lambda: published_procedure(pipe, pipe.config.sample, noise, labels),
        units=PUBLISHED_EVALUATIONS,
    )
    results = measure([slowest, *map(case, CLOCK_SOLVERS)], ROUNDS, pipe.device)[2:]
    return {
        "images": args.noises,
        "machine": f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        "rows": [
            {"name": result.name, "evaluations": result.units, "seconds": result.seconds}
            for result in sorted(results, key=lambda result: -result.seconds)
        ],
    }


def measure_images(args: argparse.Namespace) -> Figures:
    """Return Frechet distance, accuracy and seconds of `args.count` images for each of `IMAGE_SOLVERS`."""
    pipe, judge = LightningDiTPipeline.from_pretrained(args.model), judge_of(args.model)
    test, labels = real_images(judge, args.data_root, train=False), equal_labels(args.count)
    rows = []
    for change in IMAGE_SOLVERS:
        samples = sample_images(pipe.with_sample(replace(pipe.config.sample, **change)), labels, seed=0)
        figures = distance_and_accuracy(judged(judge, samples.images, labels), test)
        rows.append(
            {
                "solver": change["sampling_method"],
                "evaluations": samples.nfe,
                "seconds": samples.seconds,
                **figures,
            }
        )
    return {"count": args.count, "rows": rows}


@torch.inference_mode()
def measure_ucgm(args: argparse.Namespace) -> Figures:
    """Return the error of each of `UCGM_SOLVERS`, and distance and accuracy of some.

    The error of a row is that to a converged solution under the row's own guidance.
    """
    pipe, judge = LightningDiTPipeline.from_pretrained(args.model), judge_of(args.model)
    count = min(args.count, UCGM_COUNT)
    test, labels = real_images(judge, args.data_root, train=False), equal_labels(count)
    rows, references = [], dict[Any, Tensor]()
    for name, change, judges in UCGM_SOLVERS:
        sample = replace(pipe.config.sample, **change)
        solver, experiment = pipe.with_sample(sample), Experiment(pipe, sample, args.noises)
        guidance = guidance_of(sample)
        if guidance not in references:
            references[guidance] = experiment.graded(*REFERENCE)
        last = latents_of(solver, experiment.labels, experiment.noise)
        error = float(relative_error(last.images, references[guidance]))
        row = {"solver": name, "guidance": str(guidance), "evaluations": last.nfe, "error": error}
        if judges:
            samples = sample_images(solver, labels, seed=0)
            row |= distance_and_accuracy(judged(judge, samples.images, labels), test)
        rows.append(row)
    return {"count": count, "noises": args.noises, "rows": rows}


def ucgm_table(figures: Figures) -> list[str]:
    """Return the Markdown table of the comparison with UCGM's sampler."""
    rows = [
        (
            row["solver"],
            row["guidance"],
            str(row["evaluations"]),
            f"{100 * row['error']:.2f}",
            f"{row['frechet']:.2f}" if "frechet" in row else "",
            f"{row['accuracy']:.0%}" if "accuracy" in row else "",
        )
        for row in figures["rows"]
    ]
    title = (
        f"**The sampler of UCGM** on the bundled model: relative error in % of the final latents of {figures['noises']}"
        f" noises, and {figures['count']} images with balanced labels, seed 0, by the judge of the model card:"
    )
    header = ("solver", "guidance", "evaluations", "error", "Fréchet distance", "seen as asked")
    return [title, "", *table(header, rows)]


def error_table(setting: Figures) -> list[str]:
    """Return the Markdown table of one guidance: a solver and grid a row, evaluations across."""
    errors: dict[tuple[str, str], dict[int, str]] = {}
    for row in setting["rows"]:
        errors.setdefault((row["solver"], row["grid"]), {})[row["evaluations"]] = f"{100 * row['error']:.2f}"
    columns = sorted({row["evaluations"] for row in setting["rows"]})
    title = (
        f"**Guidance from t = {setting['start']:g} on**: mean relative error of the final latents of "
        f"{setting['noises']} noises, in %; the reference's own is {setting['reference_error']:.3%}."
    )
    rows = [[*solver, *(known.get(column, "") for column in columns)] for solver, known in errors.items()]
    return [title, "", *table(("solver", "grid", *map(str, columns)), rows)]


def clock_table(clock: Figures) -> list[str]:
    """Return the Markdown table of wall clocks, each beside the published procedure's."""
    slowest = max(row["seconds"] for row in clock["rows"])
    rows = [
        (row["name"], str(row["evaluations"]), f"{row['seconds']:.2f}", f"{slowest / row['seconds']:.1f}")
        for row in clock["rows"]
    ]
    title = (
        f"**Wall clock** of sampling {clock['images']} latents in one run, in turns, {ROUNDS} rounds;"
        f" {clock['machine']}:"
    )
    return [title, "", *table(("procedure", "evaluations", "seconds", "times faster"), rows)]


def image_table(images: Figures) -> list[str]:
    """Return the Markdown table of Frechet distances and accuracies."""
    rows = [
        (
            row["solver"],
            str(row["evaluations"]),
            f"{row['frechet']:.3f}",
            f"{row['accuracy']:.2%}",
            f"{row['seconds']:.0f}",
        )
        for row in images["rows"]
    ]
    title = f"**{images['count']} images** with the bundled guidance, seed 0, by the judge of the model card:"
    return [title, "", *table(("solver", "evaluations", "Fréchet distance", "seen as asked", "seconds"), rows)]


PARTS: dict[str, Part] = {
    "errors": (measure_errors, lambda part: [line for setting in part["settings"] for line in error_table(setting)]),
    "clock": (measure_clock, clock_table),
    "images": (measure_images, image_table),
    "ucgm": (measure_ucgm, ucgm_table),
}


def draw_errors(settings: Sequence[Figures], path: Path) -> None:
    """Draw error against evaluations and against milliseconds an image, a column for each guidance."""
    from matplotlib import colormaps

    with plot(path, 2, len(settings), (6.4, 4.3)) as figure:
        for number, axes in enumerate(figure.axes):
            setting, shows_time = settings[number % len(settings)], number >= len(settings)
            rows = [row for row in setting["rows"] if row["grid"] != f"shift {SHIFTS[1]:g}"]
            axes.set_prop_cycle(color=colormaps["tab20"].colors)
            lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
            for row in rows:
                cost = 1000 * row["seconds"] / setting["noises"] if shows_time else row["evaluations"]
                lines.setdefault((row["solver"], row["grid"]), []).append((cost, row["error"]))
            for (solver, grid), points in lines.items():
                style = {"graded": "o--", "fitted": "k*-"}.get(grid, ".-")
                axes.loglog(*zip(*sorted(points), strict=True), style, label=f"{solver}, {grid}", linewidth=1)
            axes.set(xlabel="milliseconds an image" if shows_time else "evaluations", ylabel="mean relative error")
            axes.set_ylim(min(row["error"] for row in rows) / 2, 1)
            if shows_time:
                axes.legend(fontsize=6, ncols=3)
            else:
                own_error = f"the reference's own error {setting['reference_error']:.0e}"
                axes.set_title(f"guidance from t = {setting['start']:g}; {own_error}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.solver_study", description=__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure; default: all")
    add_study_options(parser, count=2000)
    parser.add_argument("--noises", type=positive, default=40, help="of the errors and of the wall clock")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    study = run_parts(args, "sampling", PARTS)
    if "errors" in args.part:
        draw_errors(study["errors"]["settings"], Path(args.output) / "sampling" / "errors.png")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
