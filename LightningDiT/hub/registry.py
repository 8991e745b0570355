"""The registry of published weights: name, repository and purpose of each file. Set-up reads it before torch is there,
so it needs the standard library alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PRECISIONS = ("fp32", "bf16", "fp16")  # of converted transformers, the one with the same numbers first


@dataclass(frozen=True)
class WeightFile:
    """One published file.

    Args:
        name: file name on the hub and in models/.
        repo: repository on the hub.
        approx_bytes: size for dry runs; the exact one comes from the hub.
        role: "vavae" (tokenizer), "stats" (latent statistics) or "dit" (diffusion transformer).
        table: section of LightningDiT/checkpoint_keys.json with its tensors' names and shapes.
    """

    name: str
    repo: str
    approx_bytes: int
    role: str
    table: str | None


_VAVAE_REPO = "hustvl/vavae-imagenet256-f16d32-dinov2"
VAVAE = WeightFile("vavae-imagenet256-f16d32-dinov2.pt", _VAVAE_REPO, 800_000_000, "vavae", "vavae-f16d32")
STATS = WeightFile("latents_stats.pt", _VAVAE_REPO, 1_000, "stats", None)
DIT = {
    epochs: WeightFile(
        f"lightningdit-xl-imagenet256-{epochs}.pt",
        f"hustvl/lightningdit-xl-imagenet256-{epochs}",
        6_000_000_000,
        "dit",
        "LightningDiT-XL/1",
    )
    for epochs in ("800ep", "64ep")
}

SETS: dict[str, tuple[WeightFile, ...]] = {
    "800ep": (VAVAE, STATS, DIT["800ep"]),
    "64ep": (VAVAE, STATS, DIT["64ep"]),
    "all": (VAVAE, STATS, DIT["800ep"], DIT["64ep"]),
    "bundled": (),  # comes with the project
}
ROLES = ("vavae", "stats", "dit")
MODELS_VARIABLE = "LIGHTNINGDIT_MODELS"  # names the folder of the published files
#: Configurations in LightningDiT/configs with the settings of the published figures.
CONFIGS = {epochs: f"lightningdit_xl_{epochs}.yaml" for epochs in DIT}


def files_of(model: str, only: str | None = None) -> tuple[WeightFile, ...]:
    """Return the published files of a model, or those of one role among them."""
    return tuple(file for file in SETS[model] if only in (None, file.role))


def converted_name(name: str, precision: str) -> str:
    """Return the name of a converted copy: `a.fp16.safetensors` for `a.pt`."""
    return f"{Path(name).stem}.{precision}.safetensors"


def usable_names(file: WeightFile) -> tuple[str, ...]:
    """Return the names that the file may have, the best first: of a transformer also those of converted copies, fp32
    (same numbers, mapped faster) before the original and the others after it.
    """
    if file.role != "dit":
        return (file.name,)
    exact, *rounded = (converted_name(file.name, precision) for precision in PRECISIONS)
    return (exact, file.name, *rounded)
