"""Encode images into latent shards and their statistics: `python -m LightningDiT.extract_features --help`.

Images come from a folder with one subfolder per class (`--images`), a list file with `path class` in each line
(`--list`), a data set of torchvision (`--dataset NAME --data-root FOLDER`; `--data-root` alone is Fashion-MNIST), or
the levels of spectrograms that step 5 wrote (`--levels FOLDER --split-file split.json`), part by part of their split.
The output folder is the one for `data.data_path`: shards, `latents_stats.pt` and a manifest with the class names that
the pipeline shows.

After Ctrl-C or a kill, the same command goes on. Several processes share the work when started by
`torchrun --nproc-per-node 2 -m LightningDiT.extract_features ...` or by accelerate.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LightningDiT.console import duration, importing, natural, positive, program, run_main, seed_number

with importing(__name__):
    from LightningDiT.config import TRAINING_FIX, Config, load_config
    from LightningDiT.data.labels import CONDITION_NAMES
    from LightningDiT.errors import LightningDiTError
    from LightningDiT.images import FITS
    from LightningDiT.radar.augmentation import EXAMPLE, parsed
    from LightningDiT.reference.option import add_help_config
    from LightningDiT.tokenizer.config import TokenizerConfig, load_tokenizer_config, tokenizer_config_path

if TYPE_CHECKING:
    from LightningDiT.data.image_sets import ImageSet
    from LightningDiT.training.extraction import ExtractionResult, ExtractionSettings

LISTED_FILES = 5
PARTS = ("training", "validation")  # of a split that latents are made of; the test stays unseen
VALIDATION = PARTS[1]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog=program("extract_features"), description=__doc__)
    add_help_config(parser)
    parser.add_argument("--config", required=True, help="YAML of the published schema; its tokenizer encodes")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--images", metavar="FOLDER", help="folder with one subfolder of images per class")
    source.add_argument(
        "--list", metavar="FILE", help="`path class` in each line, separated by a tab or a space; or CSV"
    )
    source.add_argument("--dataset", metavar="NAME", help="of torchvision, such as CIFAR10; needs --data-root")
    source.add_argument("--levels", metavar="FOLDER", help="levels that step 5 wrote; needs --split-file")
    parser.add_argument("--data-root", metavar="FOLDER", help="of --dataset; alone: folder of Fashion-MNIST")
    parser.add_argument("--split", default="train", help="of --dataset: train (default), test, or its own name")
    parser.add_argument("--output", required=True, help="folder for the shards, latents_stats.pt and the manifest")
    parser.add_argument("--shard-size", type=positive, default=10_000, help="images in a shard; default 10000")
    parser.add_argument("--posterior", choices=("sample", "mode"), default="sample", help="default sample")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the posterior's noise; default 0")
    parser.add_argument(
        "--flip", action="store_true", help="also store mirrored images, as published; not for spectrograms or text"
    )
    parser.add_argument(
        "--fit", choices=FITS, help="how images become squares: crop (default) cuts both ends of the longer side"
    )
    _add_windows(parser)
    parser.add_argument("--batch-size", type=positive, default=64, help="images encoded at once; changes no latent")
    reading = parser.add_mutually_exclusive_group()
    reading.add_argument(
        "--workers", type=natural, help="processes that read image files; default: one a core but one on a GPU, else 0"
    )
    reading.add_argument(
        "--read-threads", type=positive, help="that read images in place of processes; default: one a core, at most 16"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "tf32"), default="fp32", help="of the encoder on a GPU; default fp32, exact"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the settings, check what they name, and end")
    args = parser.parse_args(argv)
    if not (args.images or args.list or args.data_root or args.levels):
        parser.error(
            "one of --images, --list, --levels and --data-root (with --dataset, or alone for Fashion-MNIST) is needed"
        )
    if args.data_root and (args.images or args.list or args.levels):
        parser.error("--data-root goes with --dataset, not with --images, --list or --levels")
    if args.seed < 0:
        parser.error(f"argument --seed: {args.seed} is below 0")
    for wrong, message in _misuses_of_windows(args):
        if wrong:
            parser.error(message)
    return args


def _add_windows(parser: argparse.ArgumentParser) -> None:
    """Add the options that go with --levels."""
    add = parser.add_argument_group("with --levels").add_argument
    add("--split-file", metavar="FILE", help="split.json of step 5")
    add("--part", choices=PARTS, help="of that split; default training")
    add("--fold", type=natural, help="of that split; default 0")
    add("--draws", type=positive, help="of each training window, the first of which is the window itself; default 1")
    add("--augment", metavar="TEXT", help=f"what the other draws change; default {EXAMPLE}")
    add("--zero-doppler", type=float, metavar="ROW", help="row of velocity 0, from 0 at the top; default: the middle")


def _misuses_of_windows(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Return whether each wrong use of the options of `_add_windows` is there, and what to say of it."""
    names = ("split_file", "part", "fold", "draws", "augment", "zero_doppler")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    single = args.draws in (None, 1)
    return [
        (not args.levels and bool(given), f"{', '.join(given)} goes with --levels"),
        (bool(args.levels) and not args.split_file, "--levels needs --split-file, the split.json of step 5"),
        (bool(args.levels) and args.flip, "--flip does not go with --levels: a mirrored spectrogram is another walk"),
        (bool(args.levels and args.fit), "--fit does not go with --levels: step 5 gives them their size by --size"),
        (args.part == VALIDATION and not single, "--draws goes with training windows, others are used as they are"),
        (args.augment is not None and single, "--augment has no effect without --draws 2 or more"),
        (args.zero_doppler is not None and single, "--zero-doppler has no effect without --draws 2 or more"),
        (bool(args.levels) and (args.workers is not None), "--workers does not go with --levels, which threads read"),
    ]


def source_of(args: argparse.Namespace) -> str:
    """Return where the images come from."""
    if args.levels:
        return f"{args.part or PARTS[0]} windows of {args.levels}"
    return args.images or args.list or f"{args.dataset or 'FashionMNIST'} {args.split} in {args.data_root}"


def open_images(args: argparse.Namespace) -> ImageSet:
    """Return the image set of the command line."""
    from LightningDiT.data.image_sets import FASHION_MNIST, open_folder
    from LightningDiT.data.list_files import open_list
    from LightningDiT.data.torchvision_sets import open_torchvision

    if args.levels:
        return _open_levels(args)
    if args.images:
        return open_folder(args.images)
    if args.list:
        return open_list(args.list)
    return open_torchvision(args.dataset or FASHION_MNIST, args.data_root, args.split)


def _open_levels(args: argparse.Namespace) -> ImageSet:
    from LightningDiT.radar.level_images import open_levels

    augmentation = parsed(args.augment or EXAMPLE, args.zero_doppler)
    levels, split, part, fold = Path(args.levels), Path(args.split_file), args.part or PARTS[0], args.fold or 0
    return open_levels(levels, split, part, fold, args.draws or 1, args.seed, augmentation)


def description(images: ImageSet) -> list[str]:
    """Return lines about an opened set: what was passed over, the number of images, and its classes with counts."""
    classes = f" of {len(images.class_names)} classes" if images.class_names else ""
    lines = [*(f"note: {note}" for note in images.notes), f"{images.count} images{classes}"]
    if conditions := images.facts.get("condition_names"):
        lines.append(f"conditions: {', '.join(f'{number} {name}' for number, name in enumerate(conditions))}")
    if listed := images.class_list():
        lines.append(f"classes: {listed}")
    return lines


def check_ratio(config: Config, factor: int) -> None:
    """Raise LightningDiTError if the configuration expects latents of another size than the tokenizer makes."""
    if config.vae.downsample_ratio != factor:
        raise LightningDiTError(
            f"{config.source}: vae.downsample_ratio is {config.vae.downsample_ratio}, and {factor} in the tokenizer"
            f" {config.vae.model_name}",
            f"set vae.downsample_ratio: {factor}, or name another tokenizer",
        )


def summary(result: ExtractionResult, manifest: dict[str, Any], output: Path) -> str:
    """Return a few lines about what was done."""
    lines = []
    if broken := manifest["unreadable"]:
        count = manifest["settings"]["images"]
        lines = [f"passed over {len(broken)} of {count} images that cannot be read; the manifest names all:"]
        lines += [f"  {name}: {reason}" for name, reason in broken[:LISTED_FILES]]
    if (cut := manifest["cut"])["images"]:
        lines.append(
            f"{cut['images']} of {manifest['settings']['images']} images are not square: the crop leaves out both ends"
            f" of their longer side, up to {cut['most']:.0%} of it; --fit resize or pad keeps them"
        )
    if result.made:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in result.shares.items())
        lines.append(f"encoded {result.made} images in {duration(result.seconds)}, all processes together: {shares}")
    shards = len(manifest["shards"])
    statistics = " and their statistics" if "mean" in manifest else ""
    lines.append(f"{manifest['latents']} latents in {shards} shards{statistics} are in {output}")
    if not statistics:
        lines.append("they have no statistics of their own: a training normalises them by those of data.data_path")
    return "\n".join(lines)


def next_step(args: argparse.Namespace, manifest: Mapping[str, Any], config: Config | None = None) -> str:
    """Return the line that says how a training uses the latents: those of a test split are validated on.

    Args:
        config: of the command line; settings of levels that it has already are not named.
    """
    train = f"python -m LightningDiT.train --config {shlex.quote(args.config)}"
    if args.levels:
        wanted = _settings_of_levels(args, manifest)
        missing = [f"{key}: {value}" for key, value in wanted.items() if attrgetter(key)(config or Config()) != value]
        if not missing:
            return f"Next: {train}"
        settings = ", ".join(missing)
    elif args.split != "train":
        settings = f"data.valid_path: {args.output} and train.valid_every"
    else:
        settings = f"data.data_path: {args.output} and data.num_classes: {manifest['classes']}"
    return f"Next: set {settings} in {args.config}, and {train}"


def _settings_of_levels(args: argparse.Namespace, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a training on latents of levels."""
    latents, split_file, levels = (str(Path(path).absolute()) for path in (args.output, args.split_file, args.levels))
    if args.part == VALIDATION:
        return {"data.valid_path": latents}
    return {
        "data.data_path": latents,
        "data.num_classes": manifest["classes"],
        "data.num_conditions": len(manifest.get(CONDITION_NAMES) or ()),
        "model.augmentation": len(manifest.get("augmentation") or ()),
        "data.split_file": split_file,
        "data.fold": args.fold or 0,
        "data.levels_path": levels,
    }


def checked(args: argparse.Namespace, config: Config, tokenizer: TokenizerConfig, weights: str | None) -> str:
    """Check what a run needs, but for data sets that it may download, and return a few lines about it.

    Raises:
        LightningDiTError: as the run would.
    """
    from LightningDiT.files import require_unicode, require_writable
    from LightningDiT.tokenizer.vavae import autoencoder_settings, check_tokenizer_file

    require_unicode(args.output)
    require_writable(Path(args.output))
    lines = [check_tokenizer_file(tokenizer, weights)]
    check_ratio(config, autoencoder_settings(tokenizer).downsample_factor)
    if args.images or args.list or args.levels:
        images = open_images(args)
        lines += description(images)
        images.cropped(config.data.image_size)  # refuses levels of another size
    return "\n".join(lines)


def settings_of(args: argparse.Namespace, size: int, workers: int, tf32: bool) -> ExtractionSettings:
    """Return the settings of an extraction.

    Args:
        size: side of the images in pixels.
        workers: processes that read images, unless the command line says how they are read.
    """
    from LightningDiT.training.extraction import ExtractionSettings

    if args.workers is not None or args.read_threads:
        workers = args.workers or 0
    sample, fit = args.posterior == "sample", args.fit or "crop"
    return ExtractionSettings(
        *(size, args.shard_size, sample, args.flip, args.seed, args.batch_size, workers, args.read_threads, tf32, fit)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    from LightningDiT.device import best_device, resolve_precision
    from LightningDiT.distributed import launched_processes
    from LightningDiT.tokenizer.vavae import VA_VAE
    from LightningDiT.training.extraction import default_workers, extract, in_kept_order

    with launched_processes() as processes:
        config = processes.agree(lambda: load_config(args.config, TRAINING_FIX))
        tokenizer_settings = processes.agree(lambda: load_tokenizer_config(tokenizer_config_path(config)))
        processes.say(
            f"{source_of(args)} -> {args.output} by {tokenizer_settings.source} ({config.data.image_size} pixels,"
            f" {args.posterior}, flips {'on' if args.flip else 'off'}, {args.precision})"
        )
        weights = config.vae.ckpt_path or tokenizer_settings.ckpt_path
        if args.dry_run:
            processes.say(processes.from_main(lambda: checked(args, config, tokenizer_settings, weights)))
            return 0
        tokenizer = processes.agree(
            lambda: VA_VAE(tokenizer_settings, config.data.image_size, weights, device=best_device())
        )
        processes.agree(lambda: check_ratio(config, tokenizer.downsample_factor))
        processes.from_main(lambda: open_images(args).count)  # first and alone, since it may download
        images, output = processes.agree(lambda: open_images(args)), Path(args.output)
        images = in_kept_order(images, output)
        processes.say("\n".join(description(images)))
        if args.workers and not images.is_files:
            processes.say("note: --workers has no effect: these images are no files that processes could read")
        precision = resolve_precision(args.precision, tokenizer.device)
        if precision.note:
            processes.say(f"note: {precision.note}")
        workers = default_workers(tokenizer.device, processes.count)
        settings = settings_of(args, config.data.image_size, workers, precision.tf32)
        result = extract(images, tokenizer, weights, output, settings, processes)
        if result.manifest is None:
            processes.end_by_interrupt()
        processes.say(summary(result, result.manifest, output))
        processes.say(next_step(args, result.manifest, config))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
