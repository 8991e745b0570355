"""Find the guidance that suits radar windows: `python -m LightningDiT.tools.sweep_guidance --config C`.

Scales and starts of the interval are compared on the validation passes of data.split_file: what a classifier learns
from the samples, how many a judge sees as asked, and how many are copies. A sweep that was stopped goes on when the
same command is run again. The smallest scale within one standard error of the best is recommended, since guidance takes
variety from the samples and evaluations from the time.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from LightningDiT.console import Progress, duration, importing, positive, run_main, seed_number

with importing(__name__):
    from LightningDiT.config import (
        TRAINING_FIX,
        Config,
        SampleConfig,
        describe_solver,
        load_config,
        setting_differences,
        typed,
        with_overrides,
    )
    from LightningDiT.errors import LightningDiTError, first_line
    from LightningDiT.files import check_target, fingerprint, held_folder, read_json, write_text
    from LightningDiT.loading import required
    from LightningDiT.metrics.copies import CopyRates
    from LightningDiT.metrics.sample_worth import Worth
    from LightningDiT.radar.split import load_split
    from LightningDiT.reference.option import add_help_config
    from LightningDiT.sampling.calibrated import weights_fingerprint
    from LightningDiT.sampling.null_row import check_guidance
    from LightningDiT.sampling.pipeline import LightningDiTPipeline
    from LightningDiT.tools.report import table
    from LightningDiT.training.judged_samples import JudgedSamples, windows_of

FORMAT = "sweep of guidance, 1"
SCALES, STARTS = (1.0, 1.5, 2.0, 3.0), (0.0, 0.1, 0.3)
NAMES = {"cfg_scale": "--scales", "cfg_interval_start": "--starts"}
HEAD = ("scale", "from t", "utility", "standard error", "seen as asked", "copies", "of real windows")


@dataclass(frozen=True)
class Setting:
    """Guidance to try: its scale, and the time before which it does not act."""

    scale: float
    start: float


@dataclass(frozen=True)
class Result:
    """What samples of one setting are worth, means over the draws; see `metrics.sample_worth.Worth`."""

    scale: float
    start: float
    utility: float
    error: float
    judge_accuracy: float
    copies: float
    copies_real: float

    @classmethod
    def of(cls, setting: Setting, worths: Sequence[Worth]) -> Result:
        """Return the means over draws of the same setting."""
        return cls(
            setting.scale,
            setting.start,
            fmean(worth.utility for worth in worths),
            fmean(0.0 if math.isnan(worth.error) else worth.error for worth in worths),  # one pass has none
            fmean(worth.judge_accuracy for worth in worths),
            fmean(worth.copies.samples for worth in worths),
            fmean(worth.copies.held_out for worth in worths),
        )

    @property
    def setting(self) -> Setting:
        return Setting(self.scale, self.start)

    @property
    def few_copies(self) -> bool:
        """Whether samples are copies at most twice as often as held-out windows."""
        return CopyRates(self.copies, self.copies_real, math.nan).passes

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table."""
        start = "-" if self.scale == 1 else f"{self.start:g}"
        shares = (self.utility, self.error, self.judge_accuracy, self.copies, self.copies_real)
        return (f"{self.scale:g}", start, *(f"{share:.1%}" for share in shares))


@dataclass(frozen=True)
class Advice:
    """The recommended result, with the reason."""

    result: Result
    reason: str

    def text(self) -> str:
        """Return the reason and the lines of YAML that set it."""
        lines = [self.reason, "in the configuration:", "sample:", f"  cfg_scale: {self.result.scale:g}"]
        if self.result.scale != 1:
            lines.append(f"  cfg_interval_start: {self.result.start:g}")
        return "\n".join(lines)


def recommended(results: Sequence[Result]) -> Advice:
    """Return the smallest scale whose utility is within one standard error of the best (Breiman et al., 1984).

    Settings whose samples are copies more than twice as often as held-out windows do not count, unless all are such;
    then the one with the fewest copies is taken. Of equal scales the start with the best utility is taken.
    """
    allowed = [result for result in results if result.few_copies]
    if not allowed:
        fewest = min(results, key=lambda result: (result.copies, -result.utility))
        return Advice(
            fewest,
            f"scale {fewest.scale:g} has the fewest copies, {fewest.copies:.1%}; no setting has at most twice as many"
            f" as held-out windows ({fewest.copies_real:.1%}), so train less or with augmentation",
        )
    best = max(allowed, key=lambda result: result.utility)
    near = [result for result in allowed if result.utility >= best.utility - best.error]
    chosen = min(near, key=lambda result: (result.scale, -result.utility))
    left_out = len(results) - len(allowed)
    copies = f"; {left_out} of {len(results)} settings have too many copies" if left_out else ""
    return Advice(
        chosen,
        f"scale {chosen.scale:g} is the smallest whose utility ({chosen.utility:.1%}) is within one standard error"
        f" ({best.error:.1%}) of the best ({best.utility:.1%} at {best.scale:g} from t = {best.start:g}){copies}",
    )


def settings_of(scales: Sequence[float], starts: Sequence[float]) -> list[Setting]:
    """Return what is to be tried; without guidance there is no start."""
    guided = [Setting(scale, start) for scale in sorted({*scales} - {1.0}) for start in sorted({*starts})]
    return ([Setting(1.0, 0.0)] if 1.0 in scales else []) + guided


def sample_of(sample: SampleConfig, setting: Setting) -> SampleConfig:
    """Return sampling settings with another guidance.

    Raises:
        LightningDiTError: scale or start cannot be.
    """
    changed = with_overrides(sample, NAMES, cfg_scale=setting.scale, cfg_interval_start=setting.start)
    if changed.cfg_interval_start > changed.cfg_interval_end:
        raise LightningDiTError(
            f"--starts {setting.start:g} is after sample.cfg_interval_end {changed.cfg_interval_end:g}",
            "edit either value",
        )
    return changed


class Sweep:
    """The results so far, in a file that a later run goes on from.

    Args:
        path: of the file.
        settings: everything that the results depend on.

    Raises:
        LightningDiTError: the file holds a sweep of other settings, or is none.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.results: dict[Setting, Result] = {}
        check_target(path, ours=is_sweep)
        if path.exists():
            self._read()

    def _read(self) -> None:
        fix = "choose another --output"
        try:
            content = read_json(self.path)
            found = [typed(Result, entry, "results") for entry in content["results"]]
            changed = setting_differences(content["settings"], self.settings)
        except LightningDiTError as error:
            raise LightningDiTError(f"{self.path} cannot be read ({error.message})", fix) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LightningDiTError(f"{self.path} cannot be read ({first_line(error)})", fix) from error
        if changed:
            raise LightningDiTError(f"{self.path} holds a sweep of other settings ({'; '.join(changed[:3])})", fix)
        self.results = {result.setting: result for result in found}

    def add(self, result: Result) -> None:
        """Keep a result, and write all."""
        self.results[result.setting] = result
        self.write(None)

    def write(self, advice: Advice | None) -> None:
        """Write all results, and at the end the advice."""
        content: dict[str, Any] = {"format": FORMAT, "settings": self.settings}
        content["results"] = [asdict(result) for result in self.results.values()]
        if advice:
            content["recommended"] = {
                "cfg_scale": advice.result.scale,
                "cfg_interval_start": advice.result.start,
                "reason": advice.reason,
            }
        write_text(self.path, json.dumps(content, indent=1) + "\n", ours=is_sweep)


def is_sweep(path: Path) -> bool:
    """Return whether a file is one of a sweep."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def described(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Return everything that the results depend on."""
    sample = {**asdict(config.sample), "cfg_scale": None, "cfg_interval_start": None}
    return {
        "weights": weights_fingerprint(required(config, "ckpt_path"), config.adapter_path),
        "tokenizer": fingerprint(config.vae.ckpt_path) if config.vae.ckpt_path else config.vae.model_name,
        "split": load_split(Path(str(config.data.split_file))).digest,
        "fold": config.data.fold,
        "sample": {name: value for name, value in sample.items() if value is not None},
        "samples": args.samples,
        "draws": args.draws,
        "seed": args.seed,
    }


def cost_of(sample: SampleConfig) -> float:
    """Return the evaluations of a network per step of the solver: two while guidance acts."""
    return 1.0 if sample.cfg_scale == 1 else 1.0 + sample.cfg_interval_end - sample.cfg_interval_start


def seconds_left(
    pipe: LightningDiTPipeline, judged: JudgedSamples, samples: Sequence[SampleConfig], draws: int
) -> float:
    """Return the seconds that sampling by all settings takes, after one batch of the first of them."""
    count = min(len(judged.classes), pipe.batch_size(samples[0]))
    conditions = judged.conditions and judged.conditions[:count]
    one = pipe.with_sample(samples[0])
    started = time.monotonic()
    one(judged.classes[:count], output_type="pt", conditions=conditions)
    each = (time.monotonic() - started) / count / cost_of(samples[0])
    return each * draws * len(judged.classes) * sum(map(cost_of, samples))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m LightningDiT.tools.sweep_guidance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_help_config(parser)
    parser.add_argument("--config", required=True, help="YAML of the model, with data.levels_path and data.split_file")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, metavar="S", help="default: 1 1.5 2 3")
    parser.add_argument(
        "--starts", type=float, nargs="+", default=STARTS, metavar="T", help="no guidance before; default: 0 0.1 0.3"
    )
    parser.add_argument("--samples", type=positive, default=8, help="of each class in a draw; default: %(default)s")
    parser.add_argument("--draws", type=positive, default=2, help="of samples, averaged; default: %(default)s")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--output", help="file of the results; default: the configuration's name with -guidance.json")
    parser.add_argument("--dry-run", action="store_true", help="print what would be tried and how long it takes")
    return parser.parse_args(argv)


def run(config: Config, args: argparse.Namespace, sweep: Sweep, pipe: LightningDiTPipeline) -> None:
    """Take the results that are missing; with --dry-run say how long they take."""
    wanted = settings_of(args.scales, args.starts)
    missing = [setting for setting in wanted if setting not in sweep.results]
    judged = JudgedSamples(config, pipe, args.samples, args.seed)
    print(judged.text())
    samples = [sample_of(config.sample, setting) for setting in missing]
    if missing:
        seconds = seconds_left(pipe, judged, samples, args.draws)
        print(
            f"{len(missing)} of {len(wanted)} settings, {args.draws} x {len(judged.classes)} samples each by"
            f" {describe_solver(config.sample)}: about {duration(seconds)}",
            flush=True,
        )
    if args.dry_run:
        return
    with Progress(len(missing) * args.draws, "draw") as progress:
        for setting, sample in zip(missing, samples, strict=True):
            guided, worths = pipe.with_sample(sample), []
            for draw in range(args.draws):
                worths.append(judged.worth(guided, draw))
                progress.update()
            sweep.add(Result.of(setting, worths))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    config = load_config(args.config, TRAINING_FIX)
    wanted = settings_of(args.scales, args.starts)
    samples = [sample_of(config.sample, setting) for setting in wanted]
    windows_of(config, "validation")  # before anything that takes long
    path = Path(args.output or Path(config.source).with_name(f"{Path(config.source).stem}-guidance.json"))
    pipe = LightningDiTPipeline.from_config(config)
    for sample in samples:
        check_guidance(sample, pipe.null_failure)
    with held_folder(path.parent, "sweep of guidance"):
        sweep = Sweep(path, described(config, args))
        run(config, args, sweep, pipe)
        if args.dry_run:
            return 0
        results = [sweep.results[setting] for setting in wanted]
        advice = recommended(results)
        sweep.write(advice)
    print("\n".join(table(HEAD, [result.cells() for result in results])))
    print(f"{advice.text()}\nresults in {path}")
    print(f"Next: python -m LightningDiT.inference --config {shlex.quote(args.config)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
