"""A run of sampling that can be stopped: a folder of images, a manifest, and what is missing in it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from LightningDiT.checkpoint import atomic_path, fingerprint
from LightningDiT.cli import check_space
from LightningDiT.config import Config, as_dict, load_tokenizer_config, tokenizer_config_path
from LightningDiT.console import Progress
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import save_png
from LightningDiT.pipeline import STATS_NAME, LightningDiTPipeline

MANIFEST = "manifest.json"
#: Settings that decide how a run is computed and not what comes out of it.
WITHOUT_EFFECT = ("per_proc_batch_size", "fid_num")


@dataclass(frozen=True)
class RunResult:
    """What a run has in its folder when it ends.

    Attributes:
        paths: the image of each label, None where the time budget ended before it.
        made: how many of them this call sampled.
        nfe: evaluations of the velocity per image; 0 where nothing was sampled.
        seconds: wall clock of this call.
    """

    paths: list[Path | None]
    made: int
    nfe: int
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every image is there."""
        return all(path is not None for path in self.paths)


def manifest_of(config: Config, labels: Sequence[int], seed: int) -> dict[str, Any]:
    """Return everything that the pixels of a run depend on, as plain values."""
    sample = {name: value for name, value in as_dict(config.sample).items() if name not in WITHOUT_EFFECT}
    tokenizer = load_tokenizer_config(tokenizer_config_path(config))
    files = {"transformer": config.ckpt_path, "tokenizer": config.vae.ckpt_path or tokenizer.ckpt_path}
    if config.data.latent_norm and config.data.data_path:
        files["statistics"] = str(Path(config.data.data_path) / STATS_NAME)
    return {
        "seed": seed,
        "labels": list(labels),
        "sample": sample,
        "transport": as_dict(config.transport),
        "model": as_dict(config.model),
        "latents": {"norm": config.data.latent_norm, "multiplier": config.data.latent_multiplier},
        "weights": {name: fingerprint(path) for name, path in files.items() if path},
    }


def run_name(manifest: dict[str, Any]) -> str:
    """Return a short name that belongs to these settings."""
    text = json.dumps(manifest, sort_keys=True)
    return f"run-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def open_run(folder: Path, manifest: dict[str, Any]) -> None:
    """Make `folder` the place of a run, or make sure that it is the place of this very run.

    Raises:
        LightningDiTError: it holds a run of other settings (the differing ones are named), or cannot be
            written.
    """
    file = folder / MANIFEST
    if file.exists():
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise LightningDiTError(f"{file} cannot be read ({error})", "choose another --output") from error
        plain = json.loads(json.dumps(manifest))
        changed = [key for key in plain if known.get(key) != plain[key]]
        if changed:
            details = "; ".join(f"{key}: {_short(known.get(key))} there, {_short(plain[key])} now" for key in changed)
            raise LightningDiTError(f"{folder} holds a run of other settings ({details})", "choose another --output")
        return
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def sample_run(
    pipe: LightningDiTPipeline, labels: Sequence[int], seed: int, folder: Path, minutes: float | None
) -> RunResult:
    """Sample the image of every label into `folder` as `000000.png`, ..., leaving out those that are there.

    Args:
        minutes: time budget; when it is over the batch under way is finished and the rest is left to a rerun,
            so that every call gets on.

    Raises:
        LightningDiTError: the folder cannot be written, holds another run, or the disk is too small.
    """
    started = time.monotonic()
    deadline = started + 60 * minutes if minutes is not None else None
    open_run(folder, manifest_of(pipe.config, labels, seed))
    paths = [folder / f"{index:06d}.png" for index in range(len(labels))]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    check_space(folder, len(missing), pipe.config.data.image_size)
    size = pipe.config.sample.per_proc_batch_size
    batches = [missing[start : start + size] for start in range(0, len(missing), size)]
    progress = Progress(len(batches) * (pipe.config.sample.num_sampling_steps - 1), "step")
    made, nfe = 0, 0
    try:
        for batch in batches:
            if made and deadline is not None and time.monotonic() > deadline:
                break
            out = pipe(
                [labels[index] for index in batch],
                seed=seed,
                indices=batch,
                callback=lambda step, t, state: progress.update(),
            )
            for index, image in zip(batch, out.images, strict=True):
                save_png(image, paths[index])
            made, nfe = made + len(batch), out.nfe
    finally:
        progress.close()
    whole = [path if path.exists() else None for path in paths]
    return RunResult(whole, made, nfe, time.monotonic() - started)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
