"""Sample images: `python -m LightningDiT.inference --config C [--demo]`.

`--demo` writes one grid of a few classes to demo_images/demo_samples.png beside this file; without it
`--num-samples` images of random classes go to a folder, and a run that was stopped goes on when the command is
given again. `python inference.py` inside this folder is the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __package__ in (None, ""):
    sys.path.append(str(HERE.parent))  # run as a script, as the published repository does

from LightningDiT.cli import (  # noqa: E402
    add_class_options,
    add_sampling_options,
    apply_options,
    check_space,
    classes_of,
    describe_settings,
    positive,
)
from LightningDiT.config import Config, load_config  # noqa: E402
from LightningDiT.console import duration, run_main  # noqa: E402

DEMO_FOLDER = HERE / "demo_images"
DEMO_NAME = "demo_samples.png"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.inference", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML of the published schema")
    parser.add_argument("--demo", action="store_true", help="one grid of a few classes")
    parser.add_argument("--num-samples", type=positive, help="images without --demo; sample.fid_num where left out")
    parser.add_argument("--output", help="folder of the images")
    add_class_options(parser)
    add_sampling_options(parser)
    return parser.parse_args(argv)


def random_labels(count: int, num_classes: int, seed: int) -> list[int]:
    """Return a class per image; that of image i depends on (seed, i) alone."""
    import torch

    from LightningDiT.seeds import generator_for

    draws = (torch.randint(num_classes, (), generator=generator_for(seed, index, 1)) for index in range(count))
    return [int(draw) for draw in draws]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    config = apply_options(load_config(args.config), args)
    return run_demo(config, args) if args.demo else run_folder(config, args)


def run_demo(config: Config, args: argparse.Namespace) -> int:
    """Sample the demonstration's classes and write their grid."""
    from LightningDiT.demo import check_run, sample_demo

    folder = Path(args.output or DEMO_FOLDER)
    check_space(folder, args.count or 0, config.data.image_size)
    classes = classes_of(args, config.data.num_classes)
    print(describe_settings(config, len(classes), folder / DEMO_NAME))
    if args.dry_run:
        return check_run(config, classes)
    demo = sample_demo(config, classes, args.seed, folder, DEMO_NAME, args.time_budget)
    print(demo.summary())
    return 0


def run_folder(config: Config, args: argparse.Namespace) -> int:
    """Sample many images into a folder, going on where an earlier run stopped."""
    from LightningDiT.demo import check_run
    from LightningDiT.pipeline import LightningDiTPipeline
    from LightningDiT.runs import sample_run

    count = args.num_samples or args.count or config.sample.fid_num
    output = Path(args.output or HERE.parent / "output" / "samples")
    print(describe_settings(config, count, output))
    check_space(output, count, config.data.image_size)
    if args.dry_run:
        return check_run(config, classes_of(args, config.data.num_classes))
    pipe = LightningDiTPipeline.from_config(config)
    if args.classes:
        chosen = pipe.labels.numbers(classes_of(args, config.data.num_classes))
        labels = [chosen[index % len(chosen)] for index in range(count)]
    else:
        labels = random_labels(count, config.data.num_classes, args.seed)
    result = sample_run(pipe, labels, args.seed, output, args.time_budget)
    done = sum(path is not None for path in result.paths)
    print(f"{done} of {count} images in {output}, {result.made} of them made now in {duration(result.seconds)}")
    if not result.complete:
        print("The time budget is over; give the same command again to go on.")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
