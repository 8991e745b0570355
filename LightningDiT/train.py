"""Train LightningDiT on latent shards: `python -m LightningDiT.train --config C`.

The run lies in `train.output_dir`/`train.exp_name`: checkpoints, log, curves, and at the end the averaged weights, or
those that `train.choose` prefers with the last ones beside them. A run that was stopped or killed goes on from its
newest undamaged checkpoint when the same command is run again. Several processes:
`torchrun --nproc-per-node 2 -m LightningDiT.train --config C`, or on GPUs `accelerate launch`, which starts one process
on a CPU whatever number it is given.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from LightningDiT.console import importing, positive, program, run_main

with importing(__name__):
    from LightningDiT.config import TRAINING_FIX, Config, load_config
    from LightningDiT.device import best_device
    from LightningDiT.distributed import launched_processes
    from LightningDiT.reference.option import add_help_config
    from LightningDiT.training.choice import CHOICE_NAME, LAST_NAME, choice_of
    from LightningDiT.training.judged_samples import check_windows
    from LightningDiT.training.loop import train as run_loop
    from LightningDiT.training.monitors import configured_monitors
    from LightningDiT.training.run_dir import RunDir
    from LightningDiT.training.transformer_training import (
        Trainer,
        check_data,
        loop_settings,
        settings_text,
        weights_name,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog=program("train"), description=__doc__)
    add_help_config(parser)
    parser.add_argument("--config", required=True, help="YAML of the published schema")
    parser.add_argument("--data-path", help="folder of shards and statistics, in place of data.data_path")
    parser.add_argument("--output", help="folder of the run, in place of train.output_dir/exp_name")
    parser.add_argument("--max-steps", type=positive, help="end earlier than train.max_steps; the schedule stays")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the settings and the plan of train.weight_init, check the latents, and end",
    )
    return parser.parse_args(argv)


def read_config(args: argparse.Namespace) -> Config:
    """Return the configuration with the command line's data folder in it."""
    config = load_config(args.config, TRAINING_FIX)
    return replace(config, data=replace(config.data, data_path=args.data_path)) if args.data_path else config


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    with launched_processes(on_gpus=best_device().type != "cpu") as processes:
        config = processes.agree(lambda: read_config(args))
        train = config.train
        path = args.output or Path(train.output_dir) / train.exp_name
        choice = processes.agree(lambda: choice_of(config))
        results = [weights_name(config), *((LAST_NAME, CHOICE_NAME) if choice else ())]
        run = RunDir(path, train.keep_checkpoints, train.keep_every, train.ckpt_every, results)
        if args.dry_run:
            processes.say(processes.from_main(lambda: settings_text(config, True, args.max_steps)))
            processes.from_main(lambda: check_data(config, run))
            processes.from_main(lambda: check_windows(config))
            return 0
        starts = processes.from_main(lambda: run.newest() is None)
        trainer = processes.agree(lambda: Trainer(config, processes, starts))
        monitors = processes.agree(
            lambda: configured_monitors(config, trainer.data, trainer.averaged_model, run.path, processes)
        )
        processes.say(settings_text(config, False, args.max_steps) + "\n" + trainer.summary())
        weights = run_loop(
            trainer, run, loop_settings(config, args.max_steps), weights_name(config), processes, monitors, choice
        )
        processes.say(f"wrote {weights}\n{next_command(config, args.config, weights)}")
    return 0


def next_command(config: Config, path: str, weights: Path) -> str:
    """Return what to do with the weights, which are a whole network's or an adapter's."""
    keys = f"ckpt_path: {weights}"
    if config.train.trainable != "all":
        keys = f"ckpt_path: {config.train.weight_init} and adapter_path: {weights}"
    return f"Next: set {keys} in {path}, and python -m LightningDiT.inference --config {shlex.quote(path)} --demo"


if __name__ == "__main__":
    sys.exit(run_main(main))
