"""Show what there is and what would run: machine, versions, device, weights, and the time of an image.

Packages are compared with the tested ranges. Each model found is checked without reading its weights, and one image of
the first is made to measure the speed. The exit code is 1 if something must be put right before images can be made;
each such thing is a line with its fix.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from LightningDiT import __version__
from LightningDiT.command import versions
from LightningDiT.console import FAILED, OK, duration, format_bytes, is_installed, program, reads_chinese, run_main
from LightningDiT.errors import LightningDiTError, first_line, in_chinese
from LightningDiT.files import free_bytes, memory_bytes
from LightningDiT.hub.bundled import PACKAGE
from LightningDiT.hub.registry import SETS, usable_names
from LightningDiT.hub.repository import models_folder

if TYPE_CHECKING:
    from LightningDiT.config import Config

WIDTH = 16  # of the names before the findings
PUBLISHED_CONFIG = PACKAGE / "configs" / "lightningdit_xl_800ep.yaml"
HEAVY_BYTES = 1_000_000_000  # weights of this size are measured on a CPU only when --config names them
READY, NOT_READY = "ready: images can be made here", "not ready: {} to put right"
#: Headings and conclusions in Chinese.
CHINESE = {
    "Machine": "机器",
    "Versions": "版本",
    "Device": "设备",
    "Weights": "权重",
    "What would run": "能运行什么",
    READY: "可以生成图像",
    NOT_READY: "还不能生成图像：有 {} 处需要解决",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog=program("command.doctor"), description=__doc__)
    parser.add_argument("--config", type=Path, metavar="FILE", help="the model to measure; default: the first found")
    parser.add_argument("--quick", action="store_true", help="measure no speed")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, look, report."""
    args = parse(argv)
    problems: list[LightningDiTError] = []
    section("Machine", machine_rows())
    section("Versions", version_rows(problems))
    works = section("Device", device_rows(problems))
    if works and not problems:
        usable: dict[str, Config] = {}
        section("Weights", weight_rows(args.config, usable, problems))
        if not args.quick and not problems:
            section("What would run", speed_rows(usable, named=args.config is not None))
    return conclude(problems)


# ---- what is printed


def in_both(english: str, *values: object) -> str:
    """Return a text, and the same in Chinese behind it for those who read it."""
    chinese = f" · {CHINESE[english].format(*values)}" if reads_chinese() else ""
    return english.format(*values) + chinese


def section(title: str, rows: Iterator[tuple[str, str]]) -> bool:
    """Print a heading and its findings as they come; return whether there are any."""
    print(in_both(title), flush=True)
    some = False
    for name, finding in rows:
        print(f"  {name:{WIDTH}} {finding}", flush=True)
        some = True
    return some


def conclude(problems: Sequence[LightningDiTError]) -> int:
    """Print the problems with their fixes and return the exit code."""
    for problem in problems:
        print(f"problem: {problem}")
        chinese = in_chinese(problem.fix) if problem.fix and reads_chinese() else None
        if chinese:
            print(f"  解决办法：{chinese}")
    print(in_both(NOT_READY, len(problems)) if problems else in_both(READY))
    return FAILED if problems else OK


# ---- what is there


def machine_rows() -> Iterator[tuple[str, str]]:
    """Yield interpreter, system, memory and disk."""
    memory, here = memory_bytes(), Path.cwd()
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    yield "memory", format_bytes(memory) if memory else "unknown"
    if hasattr(os, "getloadavg"):
        yield "load", f"{os.getloadavg()[0]:.1f} programs computing in the last minute"
    yield "disk", f"{format_bytes(free_bytes(here))} free at {here}"


def version_rows(problems: list[LightningDiTError]) -> Iterator[tuple[str, str]]:
    """Yield each package with its version and tested range; what is needed and absent is a problem."""
    kind = "installed package" if is_installed() else "clone"
    yield versions.DISTRIBUTION, f"{__version__} ({kind}, {PACKAGE})"
    for row in versions.requirements():
        if row.installed is None and not row.extras:
            problems.append(LightningDiTError(f"{row.name}{row.tested} is needed and absent", row.fix))
        yield row.name, describe_version(row)


def describe_version(row: versions.Requirement) -> str:
    """Return a package's version with what its tested range means for it."""
    if row.fits:
        return f"{row.installed} (inside {row.tested})"
    if row.installed:
        return f"{row.installed} (OUTSIDE {row.tested}, the tested range: {row.fix})"
    return f"absent (extra {', '.join(row.extras)}: {row.fix})" if row.extras else "ABSENT"


def device_rows(problems: list[LightningDiTError]) -> Iterator[tuple[str, str]]:
    """Yield every GPU with whether a kernel runs on it, and the device that is used; nothing if torch fails."""
    try:
        from LightningDiT import device

        used = device.best_device()
    except LightningDiTError as error:
        problems.append(error)
        return
    except Exception as error:  # a truncated or foreign torch raises anything
        message = f"torch does not import ({first_line(error)})"
        problems.append(LightningDiTError(message, "python -m pip install --force-reinstall torch torchvision"))
        return
    for gpu in map(device.gpu_device, range(device.gpu_count())):
        fault = device.gpu_failure(gpu)
        yield f"GPU {gpu.index}", f"a kernel ran on {device.gpu_name(gpu)}" if not fault else f"NOT USED: {fault}"
    precision = device.resolve_precision("auto", used)
    yield "used", f"{device.gpu_name(used) or device.processor_name()}, precision {precision.name}"


def weight_rows(
    named: Path | None, usable: dict[str, Config], problems: list[LightningDiTError]
) -> Iterator[tuple[str, str]]:
    """Yield each model with whether its files fit, and which published files are in their folder.

    Args:
        named: the configuration that must be usable; the first model found.
        usable: takes the models whose files fit; it is a problem if there are none, or the named one is not among them.
    """
    from LightningDiT.demo.choices import find_models
    from LightningDiT.sampling.dry_run import verify

    folders = dict.fromkeys([Path.cwd(), *(() if is_installed() else [PACKAGE.parent])])
    models, left_out = find_models(list(folders), [named] if named else [])
    refused: list[LightningDiTError] = []
    for number, (name, model) in enumerate(models.items()):
        try:
            verify(model.config)
        except LightningDiTError as error:
            yield name, f"CANNOT BE USED: {error.message}"
            (problems if named and number == 0 else refused).append(error)
        else:
            usable[name] = model.config
            size = format_bytes(Path(str(model.config.ckpt_path)).stat().st_size)
            yield name, f"{model.config.model.model_type}, {size}, all files fit ({model.path})"
    if not usable and not problems:
        problems += refused
    for reason in left_out:
        yield "left out", reason
    folder = models_folder()
    there = [name for file in SETS["all"] for name in usable_names(file) if (folder / name).is_file()]
    yield "published", f"{', '.join(there) or 'none'} in {folder}"


def speed_rows(models: dict[str, Config], named: bool) -> Iterator[tuple[str, str]]:
    """Yield the time of an image of the first model that is light enough, and a prediction for the published one."""
    from LightningDiT.command import speed
    from LightningDiT.config import load_config
    from LightningDiT.device import best_device

    on_gpu = best_device().type != "cpu"
    for name, config in models.items():
        heavy = Path(str(config.ckpt_path)).stat().st_size > HEAVY_BYTES
        if heavy and not (named or on_gpu):
            yield name, f"not measured on a CPU; {program('command.doctor')} --config {config.source} does"
            continue
        found = speed.speed_of(config)
        how = "measured now" if found.measured else "from a few evaluations measured now"
        yield name, f"{seconds(found.seconds)} an image, {found.evaluations} evaluations ({how})"
        break
    published = load_config(PUBLISHED_CONFIG)
    found = speed.predicted_speed(published)
    blocks = " and ".join(map(str, speed.DEPTHS))
    yield (
        "published",
        (
            f"{seconds(found.seconds)} an image without decoding, {found.evaluations} evaluations of"
            f" {published.model.model_type} (predicted from {blocks} of its blocks, measured now)"
        ),
    )


def seconds(count: float) -> str:
    """Return seconds in words, with two digits below a minute."""
    return f"{count:.2g} s" if count < 60 else duration(count)


if __name__ == "__main__":
    sys.exit(run_main(main))
