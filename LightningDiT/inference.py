"""Sample images: `python -m LightningDiT.inference --config C [--demo]`.

`--demo` writes one grid of a few classes to demo_images/demo_samples.png beside this file, or below the working
directory if the package is installed. Without it, `--num-samples` images of random classes go to a folder; the same
command continues a run that was stopped. `python inference.py` inside this folder does the same. All GPUs that work
share the images; `torchrun` and `accelerate launch` share them among the processes that they start.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
if __package__ in (None, ""):
    sys.path.append(str(HERE.parent))  # run as a script, as the published repository does

from LightningDiT.config import LABELS, Config, load_config, with_overrides  # noqa: E402
from LightningDiT.console import duration, positive, program, run_main  # noqa: E402
from LightningDiT.files import check_space  # noqa: E402
from LightningDiT.hub.bundled import config_file, results_folder  # noqa: E402
from LightningDiT.reference.option import add_help_config  # noqa: E402
from LightningDiT.sampling.options import (  # noqa: E402
    add_class_options,
    add_sampling_options,
    apply_options,
    chosen_classes,
    chosen_conditions,
    classes_of,
    describe_settings,
    grid_of,
    in_rounds,
    read_label_file,
)

if TYPE_CHECKING:
    from LightningDiT.data.labels import Labels
    from LightningDiT.distributed import Processes
    from LightningDiT.sampling.preview import Preview
    from LightningDiT.sampling.resumable_run import RunResult

DEMO_NAME = "demo_samples.png"
PREVIEW_NAME = "demo_preview.png"
MOST_DRAWN = 100_000  # labels that a dry run draws


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog=program("inference"), description=__doc__)
    add_help_config(parser)
    parser.add_argument("--config", required=True, type=config_file, help="YAML of the published schema, or `bundled`")
    parser.add_argument("--demo", action="store_true", help="one grid of a few classes")
    parser.add_argument("--num-samples", type=positive, help="images without --demo; default: sample.fid_num")
    parser.add_argument("--output", help="folder of the images")
    parser.add_argument("--by-class", action="store_true", help="a subfolder for each class, named after it")
    parser.add_argument(
        "--labels",
        metavar="random|balanced|FILE",
        help="classes drawn at random (default), each equally often, or those of a CSV: `class`, or `class,condition`",
    )
    parser.add_argument(
        "--npz",
        nargs="?",
        const="",
        metavar="FILE",
        help="also write all images into one file of ADM's layout at the end; default: OUTPUT.npz",
    )
    parser.add_argument(
        "--preview",
        type=positive,
        metavar="N",
        help="write a strip of the first images: the model's prediction of them after every N-th step",
    )
    add_class_options(parser)
    add_sampling_options(parser)
    args = parser.parse_args(argv)
    args.draw = args.labels if args.labels in LABELS else None
    if args.draw and args.classes:
        parser.error(f"--labels {args.draw} draws among all classes: omit --classes, which take turns")
    if args.demo and args.npz is not None:
        parser.error("--npz goes with a folder of images, not with --demo")
    if args.demo and args.by_class:
        parser.error("--by-class goes with a folder of images, not with --demo")
    if args.demo and args.labels:
        parser.error("--labels goes with a folder of images, not with --demo")
    args.labels = None if args.draw else args.labels
    if args.labels and (args.classes or args.conditions or args.num_samples or args.count):
        parser.error("--labels says class, condition and number of the images: omit the other options of these")
    if args.demo and args.num_samples:
        parser.error("--num-samples goes with a folder of images; --demo takes --count")
    if args.num_samples and args.count:
        parser.error("--num-samples and --count both set the number of images; give one of them")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    from LightningDiT.distributed import launched_processes
    from LightningDiT.sampling.all_gpus import run_on_all_gpus

    command = ["-m", "LightningDiT.inference", *(sys.argv[1:] if argv is None else argv)]
    code = run_on_all_gpus(command, args, lambda: planned(args))
    if code is not None:
        return code
    with launched_processes() as processes:
        config, count = processes.agree(lambda: planned(args))
        return run_demo(config, args, processes) if args.demo else run_folder(config, args, processes, count)


def planned(args: argparse.Namespace) -> tuple[Config, int]:
    """Return the settings and the number of images."""
    config = apply_options(load_config(args.config), args)
    given = args.classes or args.labels or args.demo
    if given and config.sample.labels != LABELS[0] and not args.demo:
        config = replace(config, notes=(*config.notes, "sample.labels: no effect with --classes or --labels FILE"))
    drawn = LABELS[0] if given else args.draw
    config = replace(config, sample=with_overrides(config.sample, {"labels": "--labels"}, labels=drawn))
    if args.labels:
        return config, len(read_label_file(args.labels)[0])
    count = args.num_samples or args.count  # asked for first: no list of as many classes is made
    if args.demo and not count:
        count = len(grid_of(args, config)[0])
    return config, count or config.sample.fid_num


def run_demo(config: Config, args: argparse.Namespace, processes: Processes) -> int:
    """Sample the demonstration's classes and write their grid."""
    from LightningDiT.sampling.demo import sample_demo
    from LightningDiT.sampling.dry_run import check_run
    from LightningDiT.sampling.preview import MANIFEST, Preview, check_preview

    folder = Path(args.output or results_folder(HERE) / "demo_images")
    processes.from_main(lambda: check_space(folder, args.count or 0, config.data.image_size))
    classes, conditions = grid_of(args, config)
    processes.say(describe_settings(config, len(classes), folder / DEMO_NAME))
    if args.preview:
        processes.from_main(lambda: check_preview(folder / PREVIEW_NAME, folder, f"run-*/{MANIFEST}"))
    if args.dry_run:
        return processes.from_main(lambda: check_run(config, classes, conditions))
    preview = Preview(args.preview, folder / PREVIEW_NAME) if args.preview else None
    demo = sample_demo(config, classes, args.seed, folder, DEMO_NAME, args.time_budget, processes, preview, conditions)
    processes.say(demo.summary() + _about(preview, demo.run))
    return 0


def run_folder(config: Config, args: argparse.Namespace, processes: Processes, count: int) -> int:
    """Sample many images into a folder, from where an earlier run stopped."""
    from LightningDiT.sampling.pipeline import LightningDiTPipeline
    from LightningDiT.sampling.preview import Preview, check_preview
    from LightningDiT.sampling.resumable_run import UNFINISHED, sample_run, write_samples

    output = Path(args.output or results_folder(HERE.parent) / "output" / "samples")
    file = Path(args.npz or _beside(output, ".npz")) if args.npz is not None else None
    processes.say(describe_settings(config, count, output))
    processes.from_main(lambda: check_space(output, count, config.data.image_size))
    if file is not None:
        processes.from_main(lambda: _check_npz(file))
    strip = _beside(output, "_preview.png")
    if args.preview:
        processes.from_main(lambda: check_preview(strip, output))
    if args.dry_run:
        return processes.from_main(lambda: _dry_run(config, args, count))
    pipe = processes.agree(lambda: LightningDiTPipeline.from_config(config))
    labels = processes.agree(lambda: labels_of(config, pipe.labels, args, count))
    preview = Preview(args.preview, strip) if args.preview else None
    conditions = processes.agree(lambda: conditions_of(config, pipe.conditions, args, count, pipe.null_failure))
    for line in label_lines(config, args, (pipe.labels, labels), (pipe.conditions, conditions)):
        processes.say(line)
    result = sample_run(
        pipe, labels, args.seed, output, args.time_budget, processes, preview, args.by_class, conditions
    )
    done = sum(path is not None for path in result.paths)
    processes.say(
        f"{done} of {count} images in {output}, {result.made} of them made now in {duration(result.seconds)}"
        + _about(preview, result)
    )
    if result.interrupted:
        processes.end_by_interrupt()
    if not result.complete:
        processes.say(UNFINISHED)
    elif file is not None:
        processes.from_main(lambda: write_samples(result, labels, config.data.image_size, file))
        processes.say(f"all of them in {file}")
    return 0


def _dry_run(config: Config, args: argparse.Namespace, count: int) -> int:
    """Print the lines of a run about its labels, check its files, and return the exit code of success."""
    from LightningDiT.data.labels import Labels
    from LightningDiT.sampling.dry_run import verify

    first, second = Labels.of(config), Labels.conditions_of(config)
    if count > MOST_DRAWN and not (args.classes or args.labels):
        lines = [f"labels         {config.sample.labels}, drawn when the run begins"]
    else:
        labels, conditions = labels_of(config, first, args, count), conditions_of(config, second, args, count)
        lines = list(label_lines(config, args, (first, labels), (second, conditions)))
    print("\n".join([*lines, *verify(config)]))
    return 0


def label_lines(
    config: Config,
    args: argparse.Namespace,
    classes: tuple[Labels, list[int]],
    conditions: tuple[Labels | None, list[int | None] | None],
) -> Iterator[str]:
    """Yield lines that say which classes and conditions a run has.

    Args:
        classes, conditions: all of them, and the number of each image.
    """
    from LightningDiT.data.labels import balance_of
    from LightningDiT.sampling.conditions import condition_text

    (first, labels), (second, chosen) = classes, conditions
    if args.classes:
        yield f"classes        {first.listing(labels)}"
    yield f"labels         {balance_of(labels, first.count)}"
    if rest := remainder(config, args, len(labels)):
        yield f"note           {rest}"
    if second and chosen:
        yield f"conditions     {condition_text(second, chosen, bool(args.conditions or args.labels))}"


def labels_of(config: Config, labels: Labels, args: argparse.Namespace, count: int) -> list[int]:
    """Return the class of each image: those of a file, those of the command line in turn, or drawn ones."""
    if args.labels:
        return labels.numbers(read_label_file(args.labels)[0])
    from LightningDiT.sampling.label_draws import drawn_labels

    if not args.classes:
        return drawn_labels(config.sample.labels, count, config.data.num_classes, args.seed)
    chosen = labels.numbers(classes_of(args, config.data.num_classes))
    return [chosen[index % len(chosen)] for index in range(count)]


def remainder(config: Config, args: argparse.Namespace, count: int) -> str:
    """Return a line if balanced labels do not come out even for this number of images; else nothing."""
    from LightningDiT.sampling.label_draws import BALANCED, remainder_line

    if config.sample.labels != BALANCED:
        return ""
    conditions = chosen_conditions(args, config.data.num_conditions)
    return remainder_line(count, config.data.num_classes, len(conditions or [0]))


def conditions_of(
    config: Config, conditions: Labels | None, args: argparse.Namespace, count: int, null_failure: str = ""
) -> list[int | None] | None:
    """Return the condition of each image, None for a model without conditions.

    Those of the command line take turns: each stays for a round of the classes, with random classes for one image.

    Args:
        conditions: the model's, None if it has none.
        null_failure: why the null condition means nothing; empty if it was trained.
    """
    from LightningDiT.sampling.conditions import numbers_of_conditions
    from LightningDiT.sampling.label_draws import BALANCED

    if args.labels:
        return numbers_of_conditions(conditions, read_label_file(args.labels)[1], count, null_failure)
    classes, chosen = config.data.num_classes, chosen_conditions(args, config.data.num_conditions)
    turn = classes if config.sample.labels == BALANCED else 1
    turn = len(chosen_classes(args, classes)) if args.classes else turn
    given = in_rounds(chosen, turn, count) if chosen else None
    return numbers_of_conditions(conditions, given, count, null_failure)


def _check_npz(file: Path) -> None:
    from LightningDiT.data.npz import check_npz_target

    check_npz_target(file)


def _beside(folder: Path, ending: str) -> Path:
    """Return a file next to the folder of the images, so that tools which read the folder see images alone."""
    return folder.absolute().with_name(folder.absolute().name + ending)


def _about(preview: Preview | None, run: RunResult) -> str:
    if preview is None:
        return ""
    return f"\npreview: {preview.path}" if run.made else "\nno preview: every image was there, so none was sampled"


if __name__ == "__main__":
    sys.exit(run_main(main))
