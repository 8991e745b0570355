"""Compare the solvers on the bundled model: `python -m studies.solver_study --data-root FOLDER`.

Three parts. `errors`: for guidance from t = 0.125 on and throughout, and for time shifts 0 and 0.3, how far the final
latents of every solver lie from a converged reference. `clock`: the wall clock of the published procedure, which
computes both halves of guidance at every step, beside the named solvers. `images`: Frechet distance and class
accuracy. Each part is kept in docs/sampling/study.json as soon as it is done, and the tables between the marks in
docs/sampling.md and the plot are renewed from there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from LightningDiT.config import NAMED_SOLVERS, SampleConfig
from LightningDiT.console import Progress, run_main
from LightningDiT.data.images import FASHION_MNIST_CLASSES
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import atomic_path
from LightningDiT.metrics.formulas import frechet_distance
from LightningDiT.metrics.judge import load_judge
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.sampling.solver_choice import CALIBRATED, FAST, PUBLISHED, Callback
from LightningDiT.seeds import generator_for
from LightningDiT.tools.calibrate_solver import relative_error
from LightningDiT.tools.report import keep_part, kept_parts, put_between_marks
from LightningDiT.transport import draw_noise, graded_grid, integrate_ode, jumps_of, linear_multistep, time_grid
from studies.evaluate_bundled import JUDGE_NAME, judged, real_images, recognised

CLASSES = len(FASHION_MNIST_CLASSES)
STARTS = (0.125, 0.0)  # guidance as published in kind, and constant; the model's own comes besides
SHIFTS = (0.0, 0.3)
REFERENCE = ("ab3", 320)  # method and evaluations, on a graded grid; its error is against half as many
SEED = 11  # noises that no fit has seen
#: Methods of the study with the evaluations a step; the torchdiffeq ones know nothing of nodes.
METHODS = {
    "euler": 1,
    "heun2": 2,
    "heun": 2,
    "explicit_adams": 1,
    "ab2": 1,
    "ab3": 1,
    "ab4": 1,
    "dpmpp2m": 1,
    "dpmpp3m": 1,
    "unipc2": 1,
    "unipc3": 1,
}
GRADED = ("ab2", "ab3", "unipc2")  # also on `graded_grid`
BUDGETS = (10, 15, 25)  # evaluations
EULER_BUDGETS = (15, 49, 249)
CALIBRATED_BUDGETS = (6, 8, 10, 12, 14, 15)
ROUNDS = 3  # of the wall clock
PAUSE = 16  # steps of the published procedure between two runs of the others
CLOCK_BUDGETS = (10, 12, 14)  # evaluations of the calibrated solvers beside the named ones
PARTS = ("errors", "clock", "images")


@dataclass(frozen=True)
class Row:
    """One solver at one setting."""

    solver: str
    grid: str  # shift 0, shift 0.3, graded, fitted
    evaluations: int
    error: float  # mean relative error of the final latents
    seconds: float  # of all noises


@dataclass(frozen=True)
class Setting:
    """Guidance of one table: the start of its interval, and the accuracy of its reference."""

    start: float
    noises: int
    reference_error: float
    rows: list[Row]


class Experiment:
    """The same noises and classes for every solver."""

    def __init__(self, pipe: LightningDiTPipeline, sample: SampleConfig, noises: int) -> None:
        self.pipe, self.sample = pipe, sample
        self.labels = [index % pipe.config.data.num_classes for index in range(noises)]
        self.noise = draw_noise((noises, *pipe.latent_shape), [generator_for(SEED, i) for i in range(noises)])
        guided = pipe.guided(self.labels, sample)
        self.jumps = jumps_of(guided.settings)
        self.calls = 0

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            self.calls += 1
            return pipe.transport.velocity(guided, x, t)

        self.velocity = velocity

    def follow(self, method: str, times: Tensor) -> Tensor:
        """Return the final latents (N, C, h, w) of a method on a grid."""
        return integrate_ode(self.velocity, self.noise, times, method, jumps=self.jumps)

    def calibrated(self, evaluations: int) -> Tensor | None:
        """Return the final latents of the calibrated solver of so many evaluations, or None without one."""
        sample = replace(self.sample, sampling_method=CALIBRATED, num_sampling_steps=evaluations + 1)
        try:
            solver = self.pipe.procedure(sample).solver
        except LightningDiTError:
            return None
        if solver is None or solver.evaluations != evaluations:
            return None
        times, coefficients = (tensor.to(self.noise) for tensor in solver.tensors())
        return linear_multistep(self.velocity, self.noise, times, coefficients)


def solvers_of(experiment: Experiment) -> list[tuple[str, str, Callable[[], Tensor | None]]]:
    """Return name, grid and a function to the final latents for every row of a table."""
    found: list[tuple[str, str, Callable[[], Tensor | None]]] = []
    for shift in SHIFTS:
        for method, cost in METHODS.items():
            for budget in BUDGETS if method != "euler" else EULER_BUDGETS:
                times = time_grid(budget // cost + 1, timestep_shift=shift)
                found.append((method, f"shift {shift:g}", lambda m=method, t=times: experiment.follow(m, t)))
    for method in GRADED:
        for budget in BUDGETS:
            times = graded_grid(budget + 1, experiment.jumps)[0]
            found.append((method, "graded", lambda m=method, t=times: experiment.follow(m, t)))
    for budget in CALIBRATED_BUDGETS:
        found.append((CALIBRATED, "fitted", lambda b=budget: experiment.calibrated(b)))
    return found


@torch.inference_mode()
def measure_errors(pipe: LightningDiTPipeline, sample: SampleConfig, noises: int) -> Setting:
    """Return one table: the error of every solver against the reference."""
    experiment = Experiment(pipe, sample, noises)
    method, steps = REFERENCE
    print(f"Guidance from {sample.cfg_interval_start:g} on: the reference, {steps} steps of {method}", flush=True)
    reference = experiment.follow(method, graded_grid(steps + 1, experiment.jumps)[0])
    half = experiment.follow(method, graded_grid(steps // 2 + 1, experiment.jumps)[0])
    rows, listed = [], solvers_of(experiment)
    progress = Progress(len(listed), "solver")
    for solver, grid, run in listed:
        experiment.calls, started = 0, time.perf_counter()
        last = run()
        seconds = time.perf_counter() - started
        if last is not None:
            rows.append(Row(solver, grid, experiment.calls, float(relative_error(last, reference)), seconds))
        progress.update()
    progress.close()
    return Setting(sample.cfg_interval_start, noises, float(relative_error(half, reference)), rows)


@torch.inference_mode()
def published_procedure(
    pipe: LightningDiTPipeline,
    sample: SampleConfig,
    noise: Tensor,
    labels: Sequence[int],
    callback: Callback | None = None,
) -> Tensor:
    """Return the final latents of Euler with 250 points and both halves of guidance at each, wanted or not."""
    conditional = torch.tensor(labels, device=pipe.device)
    y = torch.cat([conditional, torch.full_like(conditional, pipe.transformer.null_class)])
    settings = pipe.guided(labels, sample).settings
    channels = noise.shape[1] if settings.guided_channels is None else settings.guided_channels

    def both_halves(x: Tensor, t: Tensor) -> Tensor:
        cond, null = pipe.transformer(torch.cat([x, x]), torch.cat([t, t]), y).float().chunk(2)
        if not settings.acts_at(t):
            return cond
        mixed = null + settings.scale * (cond - null)
        return torch.cat([mixed[:, :channels], cond[:, channels:]], dim=1)

    method, points, _ = NAMED_SOLVERS[PUBLISHED]
    times = time_grid(points, timestep_shift=sample.timestep_shift)
    return integrate_ode(both_halves, noise, times, method, callback=callback)


def wall_clock(pipe: LightningDiTPipeline, images: int) -> list[dict[str, Any]]:
    """Return seconds and evaluations of sampling `images` latents by the published procedure and by other solvers.

    The published procedure pauses after every `PAUSE` steps for one run of each of the others, so that what else the
    machine does falls on all alike. Mean seconds over `ROUNDS` rounds; no file is read meanwhile.
    """
    labels = [index % pipe.config.data.num_classes for index in range(images)]
    noise = draw_noise((images, *pipe.latent_shape), [generator_for(SEED, i) for i in range(images)]).to(pipe.device)
    changes = [{"sampling_method": FAST}]
    changes += [{"sampling_method": CALIBRATED, "num_sampling_steps": n + 1} for n in CLOCK_BUDGETS]
    others = [pipe.with_sample(replace(pipe.config.sample, **change)) for change in changes]
    taken: dict[tuple[str, int], list[float]] = {}

    def run(solver: LightningDiTPipeline) -> None:
        output = solver(labels, latents=noise, output_type="latent", batch_size=images)
        taken.setdefault((solver.config.sample.sampling_method, output.nfe), []).append(output.seconds)

    for solver in others:  # reads the solver file, and the first evaluation is slow
        run(solver)
    taken.clear()
    slowest = []
    for _ in range(ROUNDS):
        stopwatch = Stopwatch()

        def pause(step: int, t: float, state: Tensor, stopwatch: Stopwatch = stopwatch) -> None:
            if (step + 1) % PAUSE == 0:
                stopwatch.stop()
                for solver in others:
                    run(solver)
                stopwatch.start()

        published_procedure(pipe, pipe.config.sample, noise, labels, pause)
        slowest.append(stopwatch.stop())
        run(pipe.with_sample(replace(pipe.config.sample, sampling_method=PUBLISHED)))
    rows = {("published procedure, both halves always", NAMED_SOLVERS[PUBLISHED][1] - 1): slowest} | taken
    return [
        {"name": name, "evaluations": count, "seconds": sum(seconds) / len(seconds)}
        for (name, count), seconds in sorted(rows.items(), key=lambda row: -sum(row[1]) / len(row[1]))
    ]


class Stopwatch:
    """Adds up the seconds in which it runs; it starts at once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.start()

    def start(self) -> None:
        """Go on."""
        self._since = time.perf_counter()

    def stop(self) -> float:
        """Return the seconds so far."""
        self.seconds += time.perf_counter() - self._since
        return self.seconds


def points_of(name: str) -> int:
    """Return the points of the grid in `solver:points`; a named solver has its own."""
    method, _, points = name.partition(":")
    return int(points) if points else NAMED_SOLVERS[method][1]


def image_figures(pipe: LightningDiTPipeline, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return Frechet distance, accuracy and seconds of `args.count` images for some solvers."""
    sample = pipe.config.sample
    judge = load_judge(Path(args.model) / JUDGE_NAME)
    test = real_images(judge, args.data_root, train=False)
    labels = torch.arange(CLASSES).repeat_interleave(args.count // CLASSES)
    figures = []
    rows = [
        (name.partition(":")[0], {"sampling_method": name.partition(":")[0], "num_sampling_steps": points_of(name)})
        for name in args.image_solvers
    ]
    for name, change in rows:
        print(f"Generating {args.count} images: {name}", flush=True)
        output = pipe.with_sample(replace(sample, **change))(labels.tolist(), seed=0, output_type="np", batch_size=100)
        made = judged(judge, torch.from_numpy(np.asarray(output.images)), labels)
        figures.append(
            {
                "solver": name,
                "evaluations": output.nfe,
                "seconds": output.seconds,
                "frechet": frechet_distance(made.features, test.features),
                "accuracy": recognised(made)["accuracy"],
            }
        )
    return figures


def error_table(setting: dict[str, Any]) -> list[str]:
    """Return the Markdown table of one guidance: a solver and grid a row, evaluations across."""
    rows = [Row(**row) for row in setting["rows"]]
    columns = sorted({row.evaluations for row in rows})
    lines = [
        f"**Guidance from t = {setting['start']:g} on**: mean relative error of the final latents of "
        f"{setting['noises']} noises, in %; the reference's own is {setting['reference_error']:.3%}.",
        "",
        "| solver | grid | " + " | ".join(str(column) for column in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for solver, grid in dict.fromkeys((row.solver, row.grid) for row in rows):
        errors = {row.evaluations: row.error for row in rows if (row.solver, row.grid) == (solver, grid)}
        cells = (f"{100 * errors[column]:.2f}" if column in errors else "" for column in columns)
        lines.append(f"| {solver} | {grid} | {' | '.join(cells)} |")
    return [*lines, ""]


def clock_table(clock: dict[str, Any]) -> list[str]:
    """Return the Markdown table of wall clocks, each beside the published procedure's."""
    slowest = max(row["seconds"] for row in clock["rows"])
    lines = [
        f"**Wall clock** of sampling {clock['images']} latents in one run, in turns, means of {ROUNDS} rounds;"
        f" {clock['machine']}:",
        "",
        "| procedure | evaluations | seconds | times faster |",
        "|---|---|---|---|",
    ]
    for row in clock["rows"]:
        ratio = slowest / row["seconds"]
        lines.append(f"| {row['name']} | {row['evaluations']} | {row['seconds']:.2f} | {ratio:.1f} |")
    return [*lines, ""]


def image_table(images: dict[str, Any]) -> list[str]:
    """Return the Markdown table of Frechet distances and accuracies."""
    lines = [
        f"**{images['count']} images** with the bundled guidance, seed 0, by the judge of the model card:",
        "",
        "| solver | evaluations | Fréchet distance | seen as asked | seconds |",
        "|---|---|---|---|---|",
    ]
    for row in images["rows"]:
        lines.append(
            f"| {row['solver']} | {row['evaluations']} | {row['frechet']:.3f} | {row['accuracy']:.2%} |"
            f" {row['seconds']:.0f} |"
        )
    return [*lines, ""]


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "errors": lambda part: [line for setting in part["settings"] for line in error_table(setting)],
    "clock": clock_table,
    "images": image_table,
}


def write_tables(study: dict[str, Any], page: Path) -> None:
    """Put the tables of the study between the marks of a Markdown page; a page without them gets them at its end."""
    put_between_marks(page, [line for part in PARTS if part in study for line in TABLES[part](study[part])], "Sampling")


def draw_errors(part: dict[str, Any], path: Path) -> None:
    """Draw error against evaluations and against milliseconds an image, a column for each guidance."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = part["settings"]
    figure = Figure(figsize=(6.4 * len(settings), 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(settings), squeeze=False)
    for setting, (above, below) in zip(settings, panels.T, strict=True):
        rows = [Row(**row) for row in setting["rows"] if row["grid"] != f"shift {SHIFTS[1]:g}"]
        costs = (lambda row: row.evaluations, lambda row, n=setting["noises"]: 1000 * row.seconds / n)
        for axes, cost, label in zip((above, below), costs, ("evaluations", "milliseconds an image"), strict=True):
            axes.set_prop_cycle(color=colormaps["tab20"].colors)
            for solver, grid in dict.fromkeys((row.solver, row.grid) for row in rows):
                points = sorted((cost(r), r.error) for r in rows if (r.solver, r.grid) == (solver, grid))
                style = {"graded": "o--", "fitted": "k*-"}.get(grid, ".-")
                axes.loglog(*zip(*points, strict=True), style, label=f"{solver}, {grid}", linewidth=1)
            axes.set(xlabel=label, ylabel="mean relative error", ylim=(min(row.error for row in rows) / 2, 1))
        above.set_title(
            f"guidance from t = {setting['start']:g}; the reference's own error {setting['reference_error']:.0e}"
        )
        below.legend(fontsize=6, ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def measure(part: str, pipe: LightningDiTPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one part."""
    if part == "errors":
        own = pipe.config.sample
        starts = dict.fromkeys((own.cfg_interval_start, *STARTS))
        samples = (replace(own, cfg_interval_start=start) for start in starts)
        return {"settings": [asdict(measure_errors(pipe, sample, args.noises)) for sample in samples]}
    if part == "clock":
        machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        return {"images": args.noises, "machine": machine, "rows": wall_clock(pipe, args.noises)}
    return {"count": args.count, "rows": image_figures(pipe, args)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.solver_study", description=__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure; default all")
    parser.add_argument("--data-root", default="data/fashion-mnist", help="folder of Fashion-MNIST, for the images")
    parser.add_argument("--model", default="models/fashion-mnist", help="folder of model, tokenizer and judge")
    parser.add_argument("--noises", type=int, default=100, help="of the errors and of the wall clock")
    parser.add_argument("--count", type=int, default=2000, help="judged images, the same number a class")
    parser.add_argument(
        "--image-solvers",
        nargs="+",
        metavar="SOLVER[:POINTS]",
        default=["calibrated:9", "calibrated:11", "calibrated:13", "calibrated:15", FAST, "euler:50", PUBLISHED],
        help="whose images are judged; fast and published have their own number of points",
    )
    parser.add_argument("--output", default="docs", help="folder of sampling.md and sampling/")
    args = parser.parse_args(argv)
    if args.noises < 1:
        parser.error(f"--noises is {args.noises}; 1 or more is expected")
    for name in args.image_solvers:
        if not (name in NAMED_SOLVERS or name.partition(":")[2].isdigit()):
            parser.error(f"--image-solvers {name} is unknown; fast, published or SOLVER:POINTS is expected")
    if args.count < 2 * CLASSES or args.count % CLASSES:
        parser.error(f"--count is {args.count}; a multiple of {CLASSES} from {2 * CLASSES} on is expected")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    folder = Path(args.output) / "sampling"
    kept_parts(folder / "study.json")
    folder.mkdir(parents=True, exist_ok=True)
    pipe = LightningDiTPipeline.from_pretrained(args.model)
    for part in args.part:
        figures = measure(part, pipe, args)
        study = keep_part(folder / "study.json", part, figures)
        write_tables(study, Path(args.output) / "sampling.md")
        if part == "errors":
            draw_errors(figures, folder / "errors.png")
        print("\n".join(TABLES[part](figures)), flush=True)
    print(f"wrote {folder / 'study.json'} and the tables in {Path(args.output) / 'sampling.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
