#!/usr/bin/env python3
"""Step 3: find the weights, write kaggle_inference_config.yaml and open all that it names."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from setup_steps import configs, console, machine, weights

OUTPUT = console.PROJECT / "kaggle_inference_config.yaml"
ROLE_OPTIONS = {"dit": "checkpoint", "vavae": "tokenizer", "stats": "stats"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        choices=["auto", "bundled", "800ep", "64ep"],
        default="auto",
        help="auto: published weights where they and a GPU are there, else the bundled model",
    )
    parser.add_argument("--models-dir", type=Path, default=weights.MODELS, metavar="FOLDER")
    parser.add_argument(
        "--attached",
        type=Path,
        default=weights.attached_folder(),
        metavar="FOLDER",
        help="searched by file name at any depth (on Kaggle: /kaggle/input)",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="the transformer's weights")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="the tokenizer's weights")
    parser.add_argument("--stats", type=Path, metavar="FILE", help="a file named latents_stats.pt")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE")
    parser.add_argument("--print", action="store_true", dest="show", help="show the YAML too")
    parser.add_argument("--dry-run", action="store_true", help="check all, write nothing")
    options = parser.parse_args(argv)
    given = [name for name in ROLE_OPTIONS.values() if getattr(options, name)]
    if given and options.model not in ("800ep", "64ep"):
        parser.error(f"--{given[0]} goes with --model 800ep or --model 64ep")
    return options


def named_file(path: Path, role: str) -> Path:
    """A file that an option names, made absolute; explains a folder, an absence, a wrong name."""
    path, option = path.expanduser().resolve(), ROLE_OPTIONS[role]
    if path.is_dir():
        inside = path / weights.STATS.name if role == "stats" else path / "NAME"
        raise console.StepError(
            f"--{option} {path} is a folder, a file was expected",
            f"{configs.AGAIN} --{option} {inside}",
        )
    if not path.is_file():
        raise console.StepError(f"--{option} {path} is not there", "python step2_download_models.py")
    if role == "stats" and path.name != weights.STATS.name:
        raise console.StepError(
            f"--stats {path} is not called {weights.STATS.name}, and a configuration names folders",
            f"cp '{path}' '{path.with_name(weights.STATS.name)}'",
        )
    return path


def find_files(model: str, options: argparse.Namespace) -> dict[str, Path]:
    """The files of a published model by role.

    Raises:
        StepError: some are absent; all of them are named.
    """
    folder = options.models_dir.expanduser().resolve()
    if folder.is_file():
        raise console.StepError(
            f"--models-dir {folder} is a file, the folder that holds the weights was expected",
            f"{configs.AGAIN} --models-dir {folder.parent}",
        )
    found, missing = {}, []
    for file in weights.files_of(model):
        given = getattr(options, ROLE_OPTIONS[file.role])
        path = named_file(given, file.role) if given else weights.find_file(file, folder, options.attached)
        if path:
            found[file.role] = path
        else:
            missing.append(file.name)
    if missing:
        raise console.StepError(
            f"not in {folder}: {', '.join(missing)}",
            f"python step2_download_models.py --model {model}",
        )
    return found


def candidates(model: str, torch: machine.TorchFacts) -> list[str]:
    """The models to try, the best first."""
    if model != "auto":
        return [model]
    return ["800ep", "64ep", "bundled"] if torch.device_memory else ["bundled"]


def build(model: str, options: argparse.Namespace, torch: machine.TorchFacts) -> configs.Config:
    """Settings for one model on this machine."""
    if model == "bundled":
        return configs.bundled_config(configs.choose_batch("bundled", torch))
    return configs.published_config(find_files(model, options), configs.choose_batch("published", torch))


def settle(model: str, options: argparse.Namespace, torch: machine.TorchFacts) -> None:
    """Build, check and write the configuration of one model."""
    from LightningDiT.pipeline import verify_config

    config = build(model, options, torch)
    target = options.output.expanduser().resolve()
    if options.show:
        print(configs.render(config))
    console.require_writable(target.parent)
    if options.dry_run:
        lines = configs.check(config, target, verify_config)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = configs.write(config, target, verify_config)
    for line in lines:
        print(f"  {line}")
    if options.dry_run:
        print(f"All is right; would write the configuration of the model '{model}' to {target}")
        return
    where = f"{torch.device} ({torch.device_name})" if torch.device_memory else "the processor"
    steps, batch = (config["sample"][key] for key in ("num_sampling_steps", "per_proc_batch_size"))
    print(f"Model '{model}' on {where}, {steps} steps, {batch} pictures at a time.")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    print("Step 3: configuration of the sampling")
    torch = machine.torch_facts()
    if not torch.works:
        raise console.StepError(torch.note, console.mend_packages())
    names = candidates(options.model, torch)
    if options.model == "auto" and names == ["bundled"]:
        print("  no GPU: the bundled model (--model 800ep takes the published weights all the same)")
    for name in names:
        try:
            settle(name, options, torch)
            break
        except console.StepError as error:
            if name == names[-1]:
                raise
            print(f"  model '{name}' is passed over: {error}")
    print("Next: python step4_run_inference.py")
    return console.OK


if __name__ == "__main__":
    console.run(main)
