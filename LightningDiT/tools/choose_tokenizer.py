"""Choose a tokenizer for windows of spectrograms: `python -m LightningDiT.tools.choose_tokenizer --levels L ...`.

The candidates, the cheapest first: the starting weights as they are; their decoder fine-tuned, which keeps latents that
were extracted before; all of them fine-tuned; training from scratch. Each reconstructs the validation windows, and the
cheapest one that passes all thresholds is taken. A judge, trained on real training windows, says whether people can
still be told apart. After Ctrl-C or a kill, the same command goes on; with other thresholds it chooses anew from the
figures that it has.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from LightningDiT.console import duration, importing, natural, positive, run_main, seed_number

with importing(__name__):
    import numpy as np
    import torch
    from PIL import Image
    from torch import Tensor

    from LightningDiT.checkpoint import BUNDLED_FOLDER, load_into, save_weights
    from LightningDiT.config import as_yaml, setting_differences
    from LightningDiT.data.image_sets import evenly_spaced
    from LightningDiT.errors import LightningDiTError
    from LightningDiT.files import check_target, fingerprint, held_folder, json_with, read_json, write_text
    from LightningDiT.images import image_grid, save_png
    from LightningDiT.metrics.reconstruction import (
        SMALLEST_SSIM_SIDE,
        Measures,
        ReconstructionScores,
        structural_similarity,
    )
    from LightningDiT.metrics.window_judge import share_right, train_judge
    from LightningDiT.radar.colour_maps import coloured
    from LightningDiT.radar.level_images import LevelImages, Windows, load_windows, open_levels
    from LightningDiT.reference.option import add_help_config
    from LightningDiT.tokenizer.autoencoder import AutoencoderKL
    from LightningDiT.tokenizer.config import (
        TOKENIZER_CONFIGS,
        TokenizerConfig,
        TokenizerTrainConfig,
        load_tokenizer_config,
        tokenizer_training,
    )
    from LightningDiT.tokenizer.starting_weights import one_channel, read_starting_weights
    from LightningDiT.tokenizer.vavae import VA_VAE, autoencoder_settings
    from LightningDiT.training.run_dir import RunDir, step_of
    from LightningDiT.training.tokenizer_training import (
        AVERAGE,
        Stage,
        TokenizerTrainer,
        build_networks,
        check_windows,
        train_stage,
    )

CONFIG = TOKENIZER_CONFIGS / "levels_f4d6.yaml"
BUNDLED = Path(__file__).resolve().parents[2] / "models" / BUNDLED_FOLDER
REPORT, CHOSEN = "choice.json", "chosen.yaml"
OF_STEP_5 = "training.yaml"  # a configuration beside the split
#: Figures of `ReconstructionScores` that are kept.
MEASURED = (
    *("images", "psnr_mean", "psnr_pooled", "ssim", "ridge_error"),
    *("high_pass_std", "high_pass_std_of_originals", "high_pass_ratio"),
)
EXACT = 100.0  # dB that stand for an exact copy
SHOWN, VIEWED_IN = 8, "jet"  # windows of a picture, and its colour map
LOOKS = 4  # validations of a training
BATCH = 32  # windows reconstructed at once
TIMED_STEPS = 2  # of a training, after a first one


@dataclass(frozen=True)
class Candidate:
    """One way to a tokenizer: what it is, whether it starts from weights, and what it trains."""

    title: str
    starts: bool = True
    trainable: str | None = "all"  # None: nothing


#: By their names, the cheapest first: without training, without new latents, with a start, without one.
CANDIDATES = {
    "as_it_is": Candidate("the starting weights as they are", trainable=None),
    "decoder": Candidate("their decoder fine-tuned", trainable="decoder"),
    "fine_tuned": Candidate("all of them fine-tuned"),
    "scratch": Candidate("from scratch", starts=False),
}


@dataclass(frozen=True)
class Thresholds:
    """What a tokenizer must reach on validation windows."""

    least_psnr: float = 24.0  # dB, mean over windows
    most_ridge: float = 2.0  # percent of the rows that the strongest row of a column moves, on average
    least_texture: float = 0.8  # standard deviations of high-passed windows and reconstructions: smaller over larger
    most_lost: float = 0.05  # share of windows that the judge recognises, real minus reconstructed

    def failures(self, figures: Mapping[str, Any]) -> list[str]:
        """Return a text for each figure that does not reach its threshold."""
        least = (("PSNR", "psnr_mean", self.least_psnr), ("texture", "texture", self.least_texture))
        most = (("ridge", "ridge_percent", self.most_ridge), ("lost by the judge", "judge_lost", self.most_lost))
        rows = [(*row, "more", figures[row[1]] < row[2]) for row in least]
        rows += [(*row, "less", figures[row[1]] > row[2]) for row in most]
        return [
            f"{title} {figures[key]:.3g}, {limit:g} or {side} asked" for title, key, limit, side, fails in rows if fails
        ]


@dataclass(frozen=True)
class Search:
    """What is searched, and on what.

    Attributes:
        training, valid: image sets; pixels: the same windows in memory.
    """

    tokenizer: TokenizerConfig
    init: Path
    steps: int
    judge_steps: int
    seed: int
    texture_weight: float
    training: LevelImages
    valid: LevelImages
    training_pixels: Windows
    valid_pixels: Windows
    split_file: Path
    output: Path

    def judge(self, steps: int | None = None) -> torch.nn.Module:
        """Return a judge trained on the real training windows."""
        windows = self.training_pixels
        classes = len(windows.class_names)
        return train_judge(windows.pixels, windows.people, classes, steps or self.judge_steps, self.seed)

    def settings(self) -> dict[str, Any]:
        """Return what a rerun must have in common with the figures that are there."""
        split = self.training.opened.split
        return {
            "tokenizer": {"embed_dim": self.tokenizer.embed_dim, **self.tokenizer.ddconfig},
            "training": asdict(replace(self.train_config("fine_tuned"), weight_init=None)),
            "init": fingerprint(self.init / AVERAGE if self.init.is_dir() else self.init),
            "judge_steps": self.judge_steps,
            "windows": {"training": self.training.key, "validation": self.valid.key},
            "split": {"digest": split.digest, "fold": self.training.fold},
        }

    def train_config(self, name: str) -> TokenizerTrainConfig:
        """Return how a candidate is trained."""
        candidate = CANDIDATES[name]
        train = replace(
            self.tokenizer.train,
            max_steps=self.steps,
            epochs=None,
            seed=self.seed,
            texture_weight=self.texture_weight,
            trainable=candidate.trainable or "all",
            weight_init=str(self.init) if candidate.starts else None,
            ckpt_every=max(1, self.steps // LOOKS),
            batch_size=min(self.tokenizer.train.batch_size, self.training.count),
        )
        return tokenizer_training(replace(self.tokenizer, train=train))

    def stage(self, name: str) -> Stage:
        """Return the training of a candidate."""
        return Stage(self.tokenizer, self.train_config(name), self.training, self.output / name, valid=self.valid)


# ---- the work


def weights_of(search: Search, name: str) -> Path:
    """Return the weights of a candidate, trained if they are not there; its training goes on where it ended."""
    folder = search.output / name
    if CANDIDATES[name].trainable is not None:
        train_stage(search.stage(name))
        return folder / AVERAGE
    model = AutoencoderKL(autoencoder_settings(search.tokenizer))
    start = read_starting_weights(search.init)
    tensors, plan = one_channel(start.autoencoder, model)
    load_into(model, {key: tensor.float().clone() for key, tensor in tensors.items()}, start.path)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model.state_dict(), folder / AVERAGE)
    print("\n".join(plan) or f"{start.path} fits {search.tokenizer.source}", flush=True)
    return folder / AVERAGE


def measured(search: Search, weights: Path, judge: torch.nn.Module, real: float, picture: Path) -> dict[str, Any]:
    """Return the figures of a tokenizer on the validation windows, and draw some above their reconstructions."""
    windows, measures = search.valid_pixels, Measures()
    height, width = windows.pixels.shape[2:]
    measures.ssim = measures.made("SSIM", structural_similarity, False, min(height, width), SMALLEST_SSIM_SIDE)
    scores = ReconstructionScores(VA_VAE(search.tokenizer, ckpt_path=weights), measures)
    copies = torch.cat([scores.add(batch) for batch in windows.pixels.split(BATCH)])  # (N, 1, H, W)
    figures = scores.report()
    figures = {name: figures[name] for name in MEASURED} | {"psnr_mean": figures["psnr_mean"] or EXACT}
    accuracy = share_right(judge, copies, windows.people)
    save_pairs(windows.pixels, copies, picture)
    ratio = figures["high_pass_ratio"]
    return figures | {
        "texture": min(ratio, 1 / ratio) if ratio else 0.0,
        "ridge_percent": 100 * figures["ridge_error"] / height,
        "judge": accuracy,
        "judge_lost": real - accuracy,
        "weights": str(weights.relative_to(search.output)),
        "notes": measures.notes,
    }


def save_pairs(windows: Tensor, copies: Tensor, path: Path) -> None:
    """Draw evenly spaced windows (N, 1, H, W) in [-1, 1] above their reconstructions, in colours."""
    chosen = evenly_spaced(len(windows), SHOWN)
    rows = torch.cat([windows[chosen], copies[chosen]])[:, 0].numpy()
    pictures = [Image.fromarray(np.ascontiguousarray(coloured((row + 1) / 2, VIEWED_IN))) for row in rows]
    save_png(image_grid(pictures, None, len(chosen)), path)


def estimate(search: Search, missing: Sequence[str]) -> float:
    """Return the seconds that the missing candidates and the judge take, from a few steps of each kind."""
    paces, total = dict[str, float](), 0.0
    for name in missing:
        kind = CANDIDATES[name].trainable
        if kind is None:
            continue
        if kind not in paces:
            config = search.train_config(name)
            networks = build_networks(search.tokenizer, config, starts=False)  # random weights take as long
            paces[kind] = _pace(TokenizerTrainer(config, networks, search.training).step)
        newest = RunDir(search.output / name).newest()
        total += paces[kind] * max(0, search.steps - (step_of(newest) if newest else 0))
    began = time.monotonic()
    search.judge(TIMED_STEPS)
    return total + search.judge_steps * (time.monotonic() - began) / TIMED_STEPS


def _pace(step: Callable[[int], object]) -> float:
    """Return the seconds of a step, after a first one."""
    step(0)
    began = time.monotonic()
    for number in range(TIMED_STEPS):
        step(1 + number)
    return (time.monotonic() - began) / TIMED_STEPS


def figures_of_all(search: Search, names: Sequence[str]) -> dict[str, Any]:
    """Return the report with the figures of all candidates; those that are in the output are not measured again.

    Raises:
        LightningDiTError: the output holds another choice.
    """
    report = _earlier(search.output / REPORT, search.settings())
    require_own_files(search.output)
    missing = [name for name in names if name not in report["candidates"]]
    if not missing:
        return report
    write_text(search.output / REPORT, json.dumps(report, indent=1) + "\n")  # by which the other files are known
    print(f"about {duration(estimate(search, missing))} for {', '.join(missing)}", flush=True)
    judge = search.judge()
    windows = search.valid_pixels
    report["judge_of_real"] = share_right(judge, windows.pixels, windows.people)
    print(f"the judge recognises {report['judge_of_real']:.1%} of the real validation windows", flush=True)
    for number, name in enumerate(missing, 1):
        print(f"candidate {number} of {len(missing)}: {name}, {CANDIDATES[name].title}", flush=True)
        began = time.monotonic()
        weights, picture = weights_of(search, name), search.output / f"{name}.png"
        figures = measured(search, weights, judge, report["judge_of_real"], picture)
        report["candidates"][name] = figures | {"seconds": round(time.monotonic() - began, 1)}
        write_text(search.output / REPORT, json.dumps(report, indent=1) + "\n")
        print("\n".join(table({name: figures})[1:]), flush=True)
    return report


def require_own_files(folder: Path) -> None:
    """Raise LightningDiTError if this command would replace a file there that it did not write.

    Its report comes first, so that the other files belong to it where it is there. Trainings look after their own.
    """
    untrained = [f"{name}/{AVERAGE}" for name, candidate in CANDIDATES.items() if candidate.trainable is None]
    for name in (CHOSEN, *untrained, *(f"{name}.png" for name in CANDIDATES)):
        check_target(folder / name, lambda _: json_with("settings", "candidates")(folder / REPORT))


def _earlier(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the report that is there, or a new one."""
    now = json.loads(json.dumps(settings))
    if not path.exists():
        return {"settings": now, "judge_of_real": None, "candidates": {}}
    try:
        report = read_json(path)
        changed = setting_differences(report["settings"], now)
        candidates = report["candidates"]
        known = {name: figures for name, figures in candidates.items() if _are_whole(figures)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LightningDiTError(f"{path} is no report of this command ({error})", "choose another --output") from error
    if changed:
        raise LightningDiTError(
            f"{path.parent} holds a choice with other settings ({'; '.join(changed[:3])})", "choose another --output"
        )
    return report | {"candidates": known}


def _are_whole(figures: Mapping[str, Any]) -> bool:
    """Return whether the figures of a candidate are all there, and numbers; windows may be too small for an SSIM."""
    numbers = {"psnr_mean", "ridge_error", "high_pass_ratio", "ridge_percent", "texture", "judge", "judge_lost"}
    return (
        figures.keys() >= {*MEASURED}
        and all(isinstance(figures.get(name), int | float) for name in numbers)
        and isinstance(figures.get("weights"), str)
    )


# ---- the choice


def choose(candidates: Mapping[str, Mapping[str, Any]], thresholds: Thresholds) -> tuple[str, bool]:
    """Return the cheapest candidate that passes, and True; where none does, the one that misses fewest thresholds, of
    several the one with the highest PSNR, and False.
    """
    order = [name for name in CANDIDATES if name in candidates]
    failures = {name: len(thresholds.failures(candidates[name])) for name in order}
    passing = [name for name in order if not failures[name]]
    if passing:
        return passing[0], True
    return min(order, key=lambda name: (failures[name], -candidates[name]["psnr_mean"])), False


def table(candidates: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each candidate, below a line of titles."""
    lines = [f"{'':<12}{'PSNR dB':>8}{'SSIM':>7}{'ridge rows':>12}{'texture':>9}{'judge':>8}"]
    for name in (name for name in CANDIDATES if name in candidates):
        one = candidates[name]
        ssim = "-" if one["ssim"] is None else f"{one['ssim']:.3f}"
        lines.append(
            f"{name:<12}{one['psnr_mean']:>8.2f}{ssim:>7}{one['ridge_error']:>12.2f}{one['high_pass_ratio']:>9.2f}"
            f"{one['judge']:>8.1%}"
        )
    return lines


def verdict(search: Search, report: dict[str, Any], thresholds: Thresholds) -> list[str]:
    """Write the choice and its YAML, and return lines about it."""
    candidates = report["candidates"]
    name, passes = choose(candidates, thresholds)
    yaml = search.output / CHOSEN
    params = {"embed_dim": search.tokenizer.embed_dim, "ddconfig": search.tokenizer.ddconfig}
    write_text(yaml, as_yaml({"ckpt_path": candidates[name]["weights"], "model": {"params": params}}))
    failures = {key: thresholds.failures(candidates[key]) for key in CANDIDATES if key in candidates}
    report |= {"thresholds": asdict(thresholds), "failures": failures, "chosen": name, "passes": passes}
    write_text(search.output / REPORT, json.dumps(report, indent=1) + "\n")
    lines = [*table(candidates), f"judge on the real windows: {report['judge_of_real']:.1%}"]
    lines += [f"{key} does not pass: {'; '.join(texts)}" for key, texts in failures.items() if texts]
    reason = "the cheapest that passes" if passes else "warning: none passes, and it comes nearest; give more --steps"
    lines.append(f"chosen: {name}, {CANDIDATES[name].title} ({reason})")
    return [*lines, *next_lines(search, name)]


def next_lines(search: Search, name: str) -> list[str]:
    """Return what a configuration of a training says to use the chosen tokenizer, and the command for the latents."""
    settings, side = autoencoder_settings(search.tokenizer), search.training.opened.size[0]
    written = search.split_file.parent / OF_STEP_5
    config = shlex.quote(str(written)) if written.is_file() else "YAML"
    files = (shlex.quote(str(file)) for file in (search.training.opened.folder, search.split_file))
    fold = f" --fold {search.training.fold}" if search.training.fold else ""
    yaml, weights = (search.output.resolve() / file for file in (CHOSEN, f"{name}/{AVERAGE}"))
    return [
        f"Next: set vae.model_name: {yaml}, vae.ckpt_path: {weights}, vae.downsample_ratio:"
        f" {settings.downsample_factor}, model.in_chans: {settings.embed_dim} and data.image_size: {side} in {config},"
        " then",
        "  python -m LightningDiT.extract_features --config {} --levels {} --split-file {}{} --output LATENTS".format(
            config, *files, fold
        ),
    ]


# ---- the command


def open_search(args: argparse.Namespace) -> Search:
    """Return the search of the command line.

    Raises:
        LightningDiTError: windows, settings or starting weights cannot be had, or do not go together.
    """
    tokenizer, init = load_tokenizer_config(args.config), Path(args.init)
    if not (init / AVERAGE if init.is_dir() else init).is_file():
        raise LightningDiTError(f"{init} has no weights to start from", "give --init FILE")
    where = Path(args.levels), Path(args.split_file)
    sets = {part: open_levels(*where, part, args.fold) for part in ("training", "validation")}
    windows = {part: load_windows(*where, part, args.fold) for part in sets}
    search = Search(
        tokenizer,
        init,
        args.steps,
        args.judge_steps,
        args.seed,
        tokenizer.train.texture_weight if args.texture_weight is None else args.texture_weight,
        *sets.values(),
        *windows.values(),
        where[1],
        Path(args.output),
    )
    check_windows(autoencoder_settings(tokenizer), search.train_config("fine_tuned"), search.training)
    return search


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.tools.choose_tokenizer", description=__doc__)
    add_help_config(parser)
    parser.add_argument("--levels", required=True, help="windows written by step5_prepare_spectrograms.py --write")
    parser.add_argument("--split-file", required=True, help="split.json of step 5")
    parser.add_argument("--fold", type=natural, default=0, help="of the split; default: 0")
    parser.add_argument("--output", default="output/tokenizer_choice", help="folder of all results")
    parser.add_argument("--config", default=str(CONFIG), help=f"tokenizer YAML; default: {CONFIG.name} of the package")
    parser.add_argument("--init", default=str(BUNDLED), help="weights to start from; default: the bundled tokenizer's")
    parser.add_argument("--steps", type=positive, default=400, help="of each training; default: %(default)s")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), help="default: all")
    parser.add_argument("--texture-weight", type=float, help="in place of train.texture_weight")
    parser.add_argument("--judge-steps", type=positive, default=300, help="of its training; default: %(default)s")
    parser.add_argument("--seed", type=seed_number, default=0)
    usual = Thresholds()
    for name, text in (
        ("least_psnr", "dB"),
        ("most_ridge", "percent of the rows by which the strongest row of a column moves"),
        ("least_texture", "standard deviations of high-passed windows and reconstructions, smaller over larger"),
        ("most_lost", "share of windows that the judge no longer recognises"),
    ):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=float, default=getattr(usual, name), help=f"{text}; default: %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    thresholds = Thresholds(**{name: getattr(args, name) for name in Thresholds.__dataclass_fields__})
    search = open_search(args)
    with held_folder(search.output, "choice of a tokenizer"):
        training, valid = search.training, search.valid
        notes = [f"note: {note}" for note in dict.fromkeys((*training.notes, *valid.notes))]
        counts = f"{training.count} training windows, {valid.count} validation windows; test windows are not read"
        print("\n".join([*notes, counts]), flush=True)
        report = figures_of_all(search, args.candidates)
        print("\n".join(verdict(search, report, thresholds)))
        print(f"wrote {search.output / REPORT}, {CHOSEN} and a picture of each candidate")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
