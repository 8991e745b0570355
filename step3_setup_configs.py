#!/usr/bin/env python3
"""Step 3: find the weights, write kaggle_inference_config.yaml and open every file that it names."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from LightningDiT.console import OK
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import require_writable
from setup_steps import checks, configs, machine, project, sources, weights

ROLE_OPTIONS = {"dit": "checkpoint", "vavae": "tokenizer", "stats": "stats"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    from LightningDiT.reference.option import add_help_config
    from LightningDiT.sampling.options import add_preset_option

    parser = argparse.ArgumentParser(description=__doc__)
    add_help_config(parser)
    add = parser.add_argument
    auto = "auto (default): the published weights if they and a GPU are here, else the bundled model"
    attached = "searched by file name at any depth; default: LIGHTNINGDIT_ATTACHED, on Kaggle /kaggle/input"
    add("--model", choices=["auto", "bundled", "800ep", "64ep"], default="auto", help=auto)
    weights.add_models_option(parser)
    add("--attached", type=Path, metavar="FOLDER", help=attached)
    add("--checkpoint", type=Path, metavar="FILE", help="the transformer's weights")
    add("--tokenizer", type=Path, metavar="FILE", help="the tokenizer's weights")
    add("--stats", type=Path, metavar="FILE", help="a file named latents_stats.pt")
    add_preset_option(parser)
    add("--output", type=Path, default=project.CONFIG, metavar="FILE")
    add("--print", action="store_true", dest="show", help="print the YAML on stdout, all else on stderr")
    add("--dry-run", action="store_true", help="check all, write nothing")
    # the folder of the weights and the attached files, found once for all models
    parser.set_defaults(folder=None, inputs=None)
    options = parser.parse_args(argv)
    given = [name for name in ROLE_OPTIONS.values() if getattr(options, name)]
    if given and options.model not in ("800ep", "64ep"):
        parser.error(f"--{given[0]} goes with --model 800ep or --model 64ep")
    return options


def fetch_command(model: str, options: argparse.Namespace) -> str:
    """Return the command that fetches a model's files to the folder that is searched."""
    return project.step_command(project.STEP2, "--model", model, *weights.named_models(options.models_dir))


def with_option(option: str, value: Path | str) -> str:
    """Return the running command with another value of an option."""
    return configs.again(f"--{option}", str(value), without=[f"--{option}"])


def named_file(path: Path, role: str, fetch_again: str) -> Path:
    """Return the file that an option names, made absolute; refuse a folder, an absent file and a wrong name."""
    option = ROLE_OPTIONS[role]
    refuse_broken_link(path, fetch_again)
    path = project.absolute(path)
    if path.is_dir():
        inside = path / (weights.STATS.name if role == "stats" else "NAME")
        raise LightningDiTError(f"--{option} {path} is a folder, a file was expected", with_option(option, inside))
    if not path.is_file():
        raise LightningDiTError(f"--{option} {path} is not there", fetch_again)
    if role == "stats" and path.name != weights.STATS.name:
        refuse_other_name(path)
    return path


def refuse_other_name(path: Path) -> None:
    """Refuse statistics of another name, which a configuration, naming their folder, would not find."""
    from LightningDiT.tokenizer.latents import diagnose

    faults = diagnose(path)
    if faults:
        message = f"--stats {path} holds no latent statistics ({faults[0]})"
        raise LightningDiTError(message, f"name a good {weights.STATS.name}")
    folder = path.with_name(f"{path.stem}-folder")
    named = folder / weights.STATS.name
    commands = (["mkdir", "-p", str(folder)], ["cp", "-n", str(path), str(named)])
    raise LightningDiTError(
        f"--stats {path} is not called {weights.STATS.name}, and a configuration names folders",
        " && ".join([*map(shlex.join, commands), with_option("stats", named)]),
    )


def named_folder(path: Path, option: str, holds: str) -> Path:
    """Return the folder that an option names, made absolute; refuse a file and a broken link."""
    refuse_broken_link(path, with_option(option, "FOLDER"))
    folder = project.absolute(path)
    if folder.is_file():
        message = f"--{option} {folder} is a file, the folder that holds {holds} was expected"
        raise LightningDiTError(message, with_option(option, folder.parent))
    return folder


def refuse_broken_link(path: Path, fix: str) -> None:
    """Refuse a link whose target is gone, as step 2 leaves behind for a detached data set."""
    if path.is_symlink() and not path.exists():
        message = f"{path} is a link to {path.readlink()}, which is not there: the data set is detached"
        raise LightningDiTError(message, f"attach it again, or {fix}")


def find_files(model: str, options: argparse.Namespace) -> dict[str, Path]:
    """Return the files of a published model by role; raise one LightningDiTError for all that are absent."""
    folder = options.folder
    attached = options.attached or weights.attached_folder()
    if attached:
        attached = named_folder(attached, "attached", "the attached data sets")
    if options.attached and not attached.is_dir():
        raise LightningDiTError(f"--attached {attached} is not there", with_option("attached", "FOLDER"))
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
        raise LightningDiTError(f"not in {folder}: {', '.join(file.name for file in missing)}", fetch_again)
    return found


def build(model: str, options: argparse.Namespace) -> configs.Config:
    """Return the settings for one model."""
    return configs.bundled_config() if model == "bundled" else configs.published_config(find_files(model, options))


def settle(model: str, options: argparse.Namespace, torch: machine.TorchFacts) -> configs.Config:
    """Build, check and write the configuration of one model."""
    from LightningDiT.sampling.dry_run import verify_config

    target = configs.output_file(options.output)
    if model == "bundled":
        weights.say_unused(options.models_dir)
    config = build(model, options)
    if options.preset:
        print(f"  {configs.apply_preset(config, options.preset)}")
    reason = configs.fit_to_machine(config, "bundled" if model == "bundled" else "published", torch)
    require_writable(target.parent)
    lines = (configs.check if options.dry_run else configs.write)(config, target, verify_config)
    for line in (*lines, reason):
        print(f"  {line}")
    if options.dry_run:
        print(f"All is right; would write the configuration of the model '{model}' to {target}")
        return config
    where = f"{torch.device} ({torch.device_name})" if torch.device_memory else "the CPU"
    solver, batch = (config["sample"][key] for key in ("sampling_method", "per_proc_batch_size"))
    print(f"Model '{model}' on {where}, solver {solver}, batch size {batch}.")
    return config


def settle_best(options: argparse.Namespace) -> configs.Config:
    """Settle the first model that is possible."""
    print("Step 3: configuration of the sampling")
    torch = machine.torch_facts()
    if not torch.works:
        raise LightningDiTError(torch.note, project.fix_packages())
    if options.model in ("800ep", "64ep") or (options.model == "auto" and torch.device_memory):
        options.folder = weights.models_folder(options.models_dir, project.STEP3)
    if options.model != "auto":
        return settle(options.model, options, torch)
    if not torch.device_memory:
        print("  no GPU: the bundled model (--model 800ep takes the published weights nevertheless)")
    for name in ("800ep", "64ep") if torch.device_memory else ():
        try:
            return settle(name, options, torch)
        except LightningDiTError as error:
            print(f"  model '{name}' is passed over: {error}")
    return settle("bundled", options, torch)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with contextlib.redirect_stdout(sys.stderr) if options.show else contextlib.nullcontext():
        config = settle_best(options)
        named = [] if options.output == project.CONFIG else ["--config", str(options.output)]
        print(f"Next: {project.step_command(project.STEP4, *named)}")
    if options.show:
        print(configs.render(config), end="")
    return OK


if __name__ == "__main__":
    project.run(main)
