"""Train the tokenizer: `python -m LightningDiT.train_tokenizer --config tokenizer.yaml --data-root FOLDER`.

The loss is that of VA-VAE: L1, L2, LPIPS, KL, an adversarial term and the alignment with a vision model, each with its
weight in the YAML's `train` section or in the published `lossconfig`. Several YAMLs are stages, each of which starts
from the weights of the stage before; `--stages` means the three published ones. `--levels` trains on the training
windows of spectrograms and says how well validation windows come back. After Ctrl-C or a kill, the same command goes on
from the newest checkpoint. docs/tokenizer.md says more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from LightningDiT.console import importing, natural, positive, program, run_main

with importing(__name__):
    from LightningDiT.data.fashion_mnist import holds_fashion_mnist
    from LightningDiT.data.image_sets import ImageSet, Unreadable, evenly_spaced, open_fashion_mnist, open_files
    from LightningDiT.device import best_device
    from LightningDiT.distributed import launched_processes
    from LightningDiT.errors import LightningDiTError
    from LightningDiT.radar.level_images import has_windows, open_levels
    from LightningDiT.reference.option import add_help_config
    from LightningDiT.tokenizer.config import (
        TOKENIZER_CONFIGS,
        TRAINABLE,
        TokenizerConfig,
        idle_tokenizer_settings,
        load_tokenizer_config,
        tokenizer_training,
    )
    from LightningDiT.tokenizer.vavae import autoencoder_settings
    from LightningDiT.training.tokenizer_training import AVERAGE, TRAINED, Stage, check_windows, train_stage

STAGES = tuple(TOKENIZER_CONFIGS / f"vavae_f16d32_stage{number}.yaml" for number in (1, 2, 3))
#: Fields that the command line sets for all stages.
OPTIONS = ("batch_size", "lpips_weights", "vision_weights", "trainable", "texture_weight")
LOOKED_AT = 64  # images whose shape is looked at before the training
FASHION_MNIST_SIDE = 32  # pixels, with the border


def open_images(args: argparse.Namespace, side: int) -> ImageSet:
    """Return the training images of the command line, cropped to `side` pixels.

    Raises:
        LightningDiTError: there are none, or those of Fashion-MNIST have another size.
    """
    if args.levels:
        return open_levels(Path(args.levels), Path(args.split_file), "training", args.fold)
    if args.images:
        return open_files(args.images).cropped(side)
    if side != FASHION_MNIST_SIDE:
        raise LightningDiTError(
            f"the tokenizer is for images of {side} pixels, those of Fashion-MNIST have {FASHION_MNIST_SIDE}",
            "name a folder of images by --images, or set ddconfig.resolution: 32",
        )
    return open_fashion_mnist(args.data_root, "train")


def check_images(args: argparse.Namespace, tokenizers: Sequence[TokenizerConfig]) -> list[str]:
    """Open the training images of every stage, read one, and return lines about them; nothing is downloaded.

    Raises:
        LightningDiTError: see `open_images`; or none can be read.
    """
    if not (args.images or args.levels) and not holds_fashion_mnist(Path(args.data_root)):
        return [f"{args.data_root} has no photographs of Fashion-MNIST yet; training downloads them"]
    lines: dict[str, None] = {}
    for tokenizer in tokenizers:
        settings = autoencoder_settings(tokenizer)
        images = open_images(args, settings.resolution)
        if args.levels:
            check_windows(settings, tokenizer_training(tokenizer), images)
            if not has_windows(Path(args.split_file), "validation", args.fold):
                lines[f"note: fold {args.fold} has no validation windows, so the last weights are all there are"] = None
        elif settings.in_channels == 1:
            lines["note: colours are averaged, since the tokenizer has one channel"] = None
        looked_at = images.batch(evenly_spaced(images.count, LOOKED_AT), Unreadable.NEXT)
        lines |= dict.fromkeys(
            (*(f"note: {note}" for note in images.notes), f"{images.count} images of {images.source}")
        )
        if cut := int((looked_at.cut > 0).sum()):
            lines[
                f"note: {cut} of {len(looked_at.cut)} images looked at are not square: the crop leaves out both ends of"
                f" their longer side, up to {float(looked_at.cut.max()):.0%} of it"
            ] = None
    return list(lines)


def make_stage(tokenizer: TokenizerConfig, args: argparse.Namespace, folder: Path, before: Path | None) -> Stage:
    """Return one stage: its YAML, the command line, and the weights of the stage before."""
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    config = tokenizer_training(replace(tokenizer, train=replace(tokenizer.train, **given)))
    if before or args.init:
        config = replace(config, weight_init=str(before or args.init))
    if args.without_lpips:
        config = replace(config, lpips_weight=0.0)
    images = open_images(args, autoencoder_settings(tokenizer).resolution)
    valid = None
    if args.levels and has_windows(Path(args.split_file), "validation", args.fold):
        valid = open_levels(Path(args.levels), Path(args.split_file), "validation", args.fold)
    if args.levels and config.flip:
        raise LightningDiTError(
            f"{tokenizer.source}: train.flip is true, and a mirrored spectrogram runs backwards in time",
            "set train.flip: false",
        )
    return Stage(tokenizer, config, images, folder, args.max_steps, valid)


def settings_text(tokenizer: TokenizerConfig) -> str:
    """Return the settings of the autoencoder and of its training as text, and those without effect."""
    lines = [f"settings: {autoencoder_settings(tokenizer)}", f"          {tokenizer_training(tokenizer)}"]
    return "\n".join([*lines, *(f"note: {note}" for note in idle_tokenizer_settings(tokenizer))])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog=program("train_tokenizer"), description=__doc__)
    add_help_config(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", nargs="+", help="tokenizer YAML (model.params and train); several are stages")
    what.add_argument("--stages", dest="config", action="store_const", const=STAGES, help="the three published stages")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data-root", default="data/fashion-mnist", help="folder of Fashion-MNIST")
    source.add_argument("--images", help="folder of images, at any depth below it")
    source.add_argument("--levels", metavar="FOLDER", help="windows written by step5_prepare_spectrograms.py --write")
    parser.add_argument("--split-file", metavar="FILE", help="split.json of step 5, with --levels")
    parser.add_argument("--fold", type=natural, default=0, help="of the split; default: 0")
    parser.add_argument("--output", default="output/tokenizer", help="folder of checkpoints and log; stage1, ... in it")
    parser.add_argument(
        "--init",
        metavar="FILE",
        help="weights to start from, or a model's folder, in place of train.weight_init of the first stage",
    )
    parser.add_argument("--trainable", choices=TRAINABLE, help="in place of train.trainable; decoder keeps the latents")
    parser.add_argument("--texture-weight", type=float, help="in place of train.texture_weight")
    parser.add_argument("--batch-size", type=positive, help="in place of train.batch_size")
    parser.add_argument("--lpips-weights", metavar="FILE", help="in place of train.lpips_weights")
    parser.add_argument("--vision-weights", metavar="FILE", help="in place of train.vision_weights")
    parser.add_argument("--max-steps", type=positive, help="end each stage earlier than the YAML says")
    parser.add_argument("--without-lpips", action="store_true", help="leave LPIPS out, whatever its weight")
    parser.add_argument("--dry-run", action="store_true", help="print the settings, look at the images and end")
    args = parser.parse_args(argv)
    if bool(args.levels) != bool(args.split_file):
        parser.error("--levels and --split-file are given together")
    if args.fold and not args.levels:
        parser.error("--fold goes with --levels")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    with launched_processes(on_gpus=best_device().type != "cpu") as processes:
        tokenizers = processes.agree(lambda: [load_tokenizer_config(path) for path in args.config])
        if args.dry_run:
            processes.say("\n".join(map(settings_text, tokenizers)))
            processes.say(processes.from_main(lambda: "\n".join(check_images(args, tokenizers))))
            return 0
        if args.images or args.levels:
            processes.say(processes.from_main(lambda: "\n".join(check_images(args, tokenizers))))
        before: Path | None = None
        for number, tokenizer in enumerate(tokenizers, 1):
            folder = Path(args.output) / f"stage{number}" if len(tokenizers) > 1 else Path(args.output)
            if len(tokenizers) > 1:
                processes.say(f"stage {number} of {len(tokenizers)}: {tokenizer.source}")
            stage = processes.agree(partial(make_stage, tokenizer, args, folder, before))
            processes.say(settings_text(tokenizer))
            if number < len(tokenizers) and processes.from_main(stage.is_finished):
                processes.say(f"it is finished: {folder / TRAINED}")
                before = folder / TRAINED
                continue
            if tokenizer_training(tokenizer).lpips_weight > stage.config.lpips_weight:
                processes.say("note: training goes without LPIPS: L1 and L2 alone hold the image, and textures blur")
            before = train_stage(stage, processes)
        command = f"--config {tokenizers[-1].source} --weights {folder / AVERAGE}"
        levels = f"--levels {args.levels} --split-file {args.split_file} --fold {args.fold}"
        data = levels if args.levels else "--images FOLDER"
        processes.say(f"Next: python -m LightningDiT.evaluate_tokenizer {command} {data}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
