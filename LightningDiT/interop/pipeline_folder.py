"""A pipeline as a folder for `diffusers.DiffusionPipeline.from_pretrained`; diffusers is not needed to write it.

model_index.json           the parts, and that their code is in this folder
lightningdit_pipeline.py   that code, which imports LightningDiT: `trust_remote_code=True` allows it
transformer/               weights under our names, or a U-Net's; guide/ has those of autoguidance
vae/                       the tokenizer as `AutoencoderKL`, with the statistics of its latents
solver/                    config.yaml, which loads here too, and calibrated solvers
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from LightningDiT.checkpoint import save_weights
from LightningDiT.config import Config, as_dict, as_yaml
from LightningDiT.files import check_target, holding, refuse_inputs, write_text
from LightningDiT.formats import diffusers_vae
from LightningDiT.hub.repository import CONFIG_NAME, without_files
from LightningDiT.interop.autoencoder_kl import OLDEST, diffusers_config
from LightningDiT.loading import Network
from LightningDiT.models.lightningdit import LightningDiT
from LightningDiT.sampling.calibrated import guide_fingerprint, load_solvers, save_solvers, weights_fingerprint
from LightningDiT.sampling.pipeline import LightningDiTPipeline

PIPELINE, SOLVER = "LightningDiTDiffusionPipeline", "LightningDiTSolver"
TRANSFORMER, UNET = "LightningDiTTransformer", "LightningDiTUNet"
#: The module of each class. Each has a name of its own, since diffusers keeps local modules by their names.
CODE = {
    PIPELINE: "lightningdit_pipeline",
    SOLVER: "lightningdit_solver",
    TRANSFORMER: "lightningdit_transformer",
    UNET: "lightningdit_unet",
}
INDEX, SOLVERS_NAME, WEIGHTS = "model_index.json", "solvers.yaml", diffusers_vae.WEIGHTS[0]
NETWORKS = ("transformer", "guide", "vae")
MARK = "Code of LightningDiT for diffusers"  # in each module, and so a mark of the folder
#: Imports one class; diffusers would name the missing package by its module.
SOURCE = '''"""{mark}, which loads it with trust_remote_code=True."""

try:
    from LightningDiT.interop.pipeline import {name}
except ModuleNotFoundError as error:
    raise ImportError("this needs LightningDiT: pip install 'lightningdit-runnable[diffusers]'") from error

__all__ = ["{name}"]
'''


def check_pipeline_folder(folder: Path, inputs: Iterable[str | Path | None]) -> None:
    """Raise LightningDiTError if `write_pipeline` would replace a file, unless it began or wrote this folder itself.

    Args:
        inputs: files that the command reads, see `refuse_inputs`.
    """
    modules = [f"{part}/{CODE[name]}.py" for part in NETWORKS[:2] for name in (TRANSFORMER, UNET)]
    of_networks = [f"{part}/{name}" for part in NETWORKS for name in (WEIGHTS, diffusers_vae.CONFIG_NAME)]
    of_solver = [f"solver/{name}" for name in (CONFIG_NAME, SOLVERS_NAME, f"{CODE[SOLVER]}.py")]
    main = folder / f"{CODE[PIPELINE]}.py"
    for name in (INDEX, main.name, *modules, *of_networks, *of_solver):
        refuse_inputs(folder / name, inputs)
        check_target(folder / name, lambda _: holding(MARK)(main))


def write_pipeline(pipe: LightningDiTPipeline, folder: Path) -> None:
    """Write the parts of a pipeline into `folder` as they are in memory.

    Raises:
        LightningDiTError: diffusers has no such tokenizer, or the folder cannot be written.
    """
    write_module(folder, PIPELINE)  # the first file, by which a folder is known that was not finished
    vae, stats = folder / "vae", pipe.tokenizer.stats
    named, told = diffusers_vae.theirs(pipe.tokenizer.model.state_dict())
    sizes = diffusers_config(pipe.tokenizer.model.settings, stats, told)
    save_weights(named, vae / WEIGHTS, {"format": "pt"})
    write_json(vae / diffusers_vae.CONFIG_NAME, sizes)
    write_network(pipe.transformer, folder / "transformer", pipe.metadata())
    if pipe.guide is not None:
        write_network(pipe.guide, folder / "guide", {})
    write_solver(pipe.config, folder / "solver")
    write_code(folder, network_class(pipe.transformer), pipe.guide is not None)


def network_class(network: Network) -> str:
    """Return the name of the class of diffusers' kind that holds a network."""
    return TRANSFORMER if isinstance(network, LightningDiT) else UNET


def write_network(network: Network, folder: Path, metadata: dict[str, str]) -> None:
    """Write weights and config.json of a transformer, or a U-Net, as diffusers reads them."""
    save_weights(network.state_dict(), folder / WEIGHTS, {**metadata, "format": "pt"})
    values = {"_class_name": network_class(network), "_diffusers_version": OLDEST}
    write_json(folder / diffusers_vae.CONFIG_NAME, {**values, **dataclasses.asdict(network.settings)})


def write_solver(config: Config, folder: Path) -> None:
    """Write the settings, which name the other parts beside `folder`, and the calibrated solvers of their weights.

    The weights are there already.
    """
    sample, parts = config.sample, folder.parent
    named: dict[str, Any] = {"guide_ckpt": f"../guide/{WEIGHTS}" if sample.guide_ckpt else None, "solver_file": None}
    if sample.solver_file:
        own, guide = weights_fingerprint(str(config.ckpt_path), config.adapter_path), guide_fingerprint(sample)
        saved: dict[str | None, str] = {own: weights_fingerprint(parts / "transformer" / WEIGHTS)}
        if guide:
            saved[guide] = weights_fingerprint(parts / "guide" / WEIGHTS)
        save_solvers(load_solvers(sample.solver_file).renamed(saved), folder / SOLVERS_NAME)
        named["solver_file"] = SOLVERS_NAME
    bare = without_files(config)
    ratio = bare.vae.downsample_ratio
    values = dataclasses.replace(
        bare,
        ckpt_path=f"../transformer/{WEIGHTS}",
        vae=dataclasses.replace(type(bare.vae)(), downsample_ratio=ratio, ckpt_path=f"../vae/{WEIGHTS}"),
        sample=dataclasses.replace(bare.sample, **named),
    )
    write_text(folder / CONFIG_NAME, as_yaml(as_dict(values)))


def write_code(folder: Path, network: str, guided: bool) -> None:
    """Write model_index.json and the modules that it names."""
    classes = {"": PIPELINE, "transformer": network, "solver": SOLVER, **({"guide": network} if guided else {})}
    for part, name in classes.items():
        write_module(folder / part, name)
    index = {
        "_class_name": [CODE[PIPELINE], PIPELINE],
        "_diffusers_version": OLDEST,
        "guide": [CODE[network], network] if guided else [None, None],
        "solver": [CODE[SOLVER], SOLVER],
        "transformer": [CODE[network], network],
        "vae": ["diffusers", diffusers_vae.CLASS_NAME],
    }
    write_json(folder / INDEX, index)


def write_module(folder: Path, name: str) -> None:
    """Write the module that imports the class `name` of ours."""
    write_text(folder / f"{CODE[name]}.py", SOURCE.format(mark=MARK, name=name))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file as diffusers does."""
    write_text(path, json.dumps(values, indent=2) + "\n")
