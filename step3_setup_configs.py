#!/usr/bin/env python3
"""Step 3: find the weights, write kaggle_inference_config.yaml and open all that it names."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from setup_steps import checks, configs, console, machine, sources, weights

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
        metavar="FOLDER",
        help="searched by file name at any depth; default: LIGHTNINGDIT_ATTACHED, on Kaggle /kaggle/input",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="the transformer's weights")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="the tokenizer's weights")
    parser.add_argument("--stats", type=Path, metavar="FILE", help="a file named latents_stats.pt")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE")
    parser.add_argument(
        "--print", action="store_true", dest="show", help="print the YAML on stdout, all else on stderr"
    )
    parser.add_argument("--dry-run", action="store_true", help="check all, write nothing")
    parser.set_defaults(inputs=None)  # what is attached, read once for all models
    options = parser.parse_args(argv)
    given = [name for name in ROLE_OPTIONS.values() if getattr(options, name)]
    if given and options.model not in ("800ep", "64ep"):
        parser.error(f"--{given[0]} goes with --model 800ep or --model 64ep")
    return options


def fetch_command(model: str, options: argparse.Namespace) -> str:
    """The command that fetches a model's files to where they are looked for."""
    folder = [] if options.models_dir == weights.MODELS else ["--models-dir", str(options.models_dir)]
    return console.step_command("step2_download_models.py", "--model", model, *folder)


def named_file(path: Path, role: str, fetch_again: str) -> Path:
    """A file that an option names, made absolute; explains a folder, an absence, a wrong name."""
    option = ROLE_OPTIONS[role]
    refuse_broken_link(path, fetch_again)
    path = console.absolute(path)
    if path.is_dir():
        inside = path / weights.STATS.name if role == "stats" else path / "NAME"
        raise console.StepError(
            f"--{option} {path} is a folder, a file was expected",
            configs.again(f"--{option}", str(inside), without=[f"--{option}"]),
        )
    if not path.is_file():
        raise console.StepError(f"--{option} {path} is not there", fetch_again)
    if role == "stats" and path.name != weights.STATS.name:
        refuse_other_name(path)
    return path


def refuse_other_name(path: Path) -> None:
    """Explain statistics that are not called as a configuration, which names their folder, finds them."""
    from LightningDiT.tokenizer.latents import diagnose

    faults = diagnose(path)
    if faults:
        raise console.StepError(
            f"--stats {path} holds no latent statistics ({faults[0]})", f"name a good {weights.STATS.name}"
        )
    folder = path.with_name(f"{path.stem}-folder")
    copy = shlex.join(["cp", "-n", str(path), str(folder / weights.STATS.name)])
    raise console.StepError(
        f"--stats {path} is not called {weights.STATS.name}, and a configuration names folders",
        f"{shlex.join(['mkdir', '-p', str(folder)])} && {copy} && "
        + configs.again("--stats", str(folder / weights.STATS.name), without=["--stats"]),
    )


def named_folder(path: Path, option: str, holds: str) -> Path:
    """A folder that an option names, made absolute; explains a file and a broken link."""
    refuse_broken_link(path, configs.again(f"--{option}", "FOLDER", without=[f"--{option}"]))
    folder = console.absolute(path)
    if folder.is_file():
        raise console.StepError(
            f"--{option} {folder} is a file, the folder that holds {holds} was expected",
            configs.again(f"--{option}", str(folder.parent), without=[f"--{option}"]),
        )
    return folder


def refuse_broken_link(path: Path, fix: str) -> None:
    """Explain a link whose target is gone, as step 2 leaves behind for a data set that is detached."""
    if path.is_symlink() and not path.exists():
        raise console.StepError(
            f"{path} is a link to {path.readlink()}, which is not there: the data set is detached",
            f"attach it again, or {fix}",
        )


def find_files(model: str, options: argparse.Namespace) -> dict[str, Path]:
    """The files of a published model by role.

    Raises:
        StepError: some are absent; all of them are named.
    """
    folder = named_folder(options.models_dir, "models-dir", "the weights")
    attached = options.attached or weights.attached_folder()
    if attached:
        attached = named_folder(attached, "attached", "the attached data sets")
    if options.attached and not attached.is_dir():
        fix = configs.again("--attached", "FOLDER", without=["--attached"])
        raise console.StepError(f"--attached {attached} is not there", fix)
    options.inputs = options.inputs or sources.Source("attached", attached)
    fetch_again, found, missing = fetch_command(model, options), {}, []
    for file in weights.files_of(model):
        given = getattr(options, ROLE_OPTIONS[file.role])
        if given:
            path = named_file(given, file.role, fetch_again)
        else:
            path = weights.find_file(file, folder, None) or options.inputs.find(file, folder, checks.fault_of)
        if path:
            found[file.role] = path
        else:
            missing.append(file)
    for file in missing:
        for name in weights.usable_names(file):
            refuse_broken_link(folder / name, fetch_again)
    if missing:
        raise console.StepError(
            f"not in {folder}: {', '.join(file.name for file in missing)}",
            fetch_again,
        )
    return found


def candidates(model: str, torch: machine.TorchFacts) -> list[str]:
    """The models to try, the best first."""
    if model != "auto":
        return [model]
    return ["800ep", "64ep", "bundled"] if torch.device_memory else ["bundled"]


def build(model: str, options: argparse.Namespace) -> configs.Config:
    """Settings for one model."""
    return configs.bundled_config() if model == "bundled" else configs.published_config(find_files(model, options))


def settle(model: str, options: argparse.Namespace, torch: machine.TorchFacts) -> configs.Config:
    """Build, check and write the configuration of one model."""
    from LightningDiT.loading import verify_config

    target = configs.output_file(options.output)
    config = build(model, options)
    reason = configs.fit_to_machine(config, "bundled" if model == "bundled" else "published", torch)
    console.require_writable(target.parent)
    if options.dry_run:
        lines = configs.check(config, target, verify_config)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = configs.write(config, target, verify_config)
    for line in (*lines, reason):
        print(f"  {line}")
    if options.dry_run:
        print(f"All is right; would write the configuration of the model '{model}' to {target}")
        return config
    where = f"{torch.device} ({torch.device_name})" if torch.device_memory else "the processor"
    solver, batch = (config["sample"][key] for key in ("sampling_method", "per_proc_batch_size"))
    print(f"Model '{model}' on {where}, solver {solver}, {batch} pictures at a time.")
    return config


def settle_best(options: argparse.Namespace) -> configs.Config:
    """Settle the first of the models that can be."""
    print("Step 3: configuration of the sampling")
    torch = machine.torch_facts()
    if not torch.works:
        raise console.StepError(torch.note, console.fix_packages())
    names = candidates(options.model, torch)
    if options.model == "auto" and names == ["bundled"]:
        print("  no GPU: the bundled model (--model 800ep takes the published weights all the same)")
    for name in names[:-1]:
        try:
            return settle(name, options, torch)
        except console.StepError as error:
            print(f"  model '{name}' is passed over: {error}")
    return settle(names[-1], options, torch)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with contextlib.redirect_stdout(sys.stderr) if options.show else contextlib.nullcontext():
        config = settle_best(options)
        named = [] if options.output == OUTPUT else ["--config", str(options.output)]
        print(f"Next: {console.step_command('step4_run_inference.py', *named)}")
    if options.show:
        print(configs.render(config), end="")
    return console.OK


if __name__ == "__main__":
    console.run(main)
