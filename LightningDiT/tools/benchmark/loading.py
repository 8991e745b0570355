"""Seconds and peak memory of loading a transformer, in a process of its own.

`python -m` this module CONFIG loads the transformer of a YAML file and prints figures as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from LightningDiT.checkpoint import save_weights
from LightningDiT.config import load_config
from LightningDiT.console import run_main
from LightningDiT.device import best_device, gpu_peak_bytes, resolve_precision, synchronise
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import free_bytes
from LightningDiT.loading import load_transformer, model_settings

from .forward import on_meta, random_weights, room_for
from .machine import PROJECT, lack_of, peak_resident_bytes
from .rounds import Setting

MODELS = ("LightningDiT-B/1", "LightningDiT-XL/1")
QUICK_MODELS = MODELS[:1]


@dataclass(frozen=True)
class Loaded:
    """The figures of loading one file.

    Attributes:
        model_type: preset.
        file: bytes of the weights file, float32.
        seconds: from the call to the model in its precision on its device.
        before, peak: largest resident bytes of the process before and after the call; None: unknown.
        gpu_peak: largest number of bytes on the GPU; None on the CPU.
    """

    model_type: str
    file: int
    seconds: float
    before: int | None
    peak: int | None
    gpu_peak: int | None


def load_and_report(config_path: str) -> dict[str, Any]:
    """Load the transformer of a YAML file in this process, a fresh one, and return seconds and peaks."""
    config = load_config(config_path)
    device = best_device()
    dtype = resolve_precision(config.sample.precision, device).dtype
    torch.zeros(1, device=device)  # a GPU's context is no part of the loading
    synchronise(device)
    before, started = peak_resident_bytes(), time.perf_counter()
    load_transformer(config, dtype).to(device)
    synchronise(device)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "before": before,
        "peak": peak_resident_bytes(),
        "gpu_peak": gpu_peak_bytes(device),
    }


def write_model(folder: Path, values: dict[str, Any]) -> Path:
    """Write random float32 weights and the YAML that names them, and return the YAML's path.

    Args:
        values: of the YAML, in the published schema; `ckpt_path` is added.
    """
    path = folder / "config.yaml"
    path.write_text(json.dumps({"ckpt_path": "transformer.safetensors", **values}), encoding="utf-8")  # YAML reads JSON
    model = random_weights(on_meta(model_settings(load_config(path))))
    save_weights(model.state_dict(), folder / "transformer.safetensors")
    return path


def measure_loading(setting: Setting) -> dict[str, Any]:
    """Return the figures of every preset that fits, and why others are skipped."""
    loaded, skipped = [], []
    for model_type in QUICK_MODELS if setting.quick else MODELS:
        with tempfile.TemporaryDirectory() as name:
            folder, values = Path(name), {"model": {"model_type": model_type}}
            if reason := lack_of_room(folder, values, setting):
                skipped.append(f"{model_type}: {reason}")
                continue
            print(f"  {model_type}: writing random weights, then loading them", flush=True)
            loaded.append(load_in_process(write_model(folder, values)))
    return {"loaded": [asdict(row) for row in loaded], "skipped": skipped}


def lack_of_room(folder: Path, values: dict[str, Any], setting: Setting) -> str | None:
    """Return why a model has no room in `folder` or in memory, or None."""
    (folder / "sizes.yaml").write_text(json.dumps(values), encoding="utf-8")
    settings = model_settings(load_config(folder / "sizes.yaml"))
    file = sum(tensor.nbytes for tensor in on_meta(settings).state_dict().values())
    return lack_of({f"disk in {folder.parent}": (file, free_bytes(folder))}) or room_for(settings, setting)


def load_in_process(config: Path) -> Loaded:
    """Return the figures of loading the transformer of a YAML file in a process of its own.

    Raises:
        LightningDiTError: that process failed.
    """
    command = [sys.executable, "-m", "LightningDiT.tools.benchmark.loading", str(config.resolve())]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise LightningDiTError(f"loading {config.name} failed: {reason}", "free memory, or add --quick")
    settings = load_config(config)
    size = Path(settings.ckpt_path or "").stat().st_size
    return Loaded(settings.model.model_type, size, **json.loads(done.stdout))


def main() -> int:
    """Load and print."""
    print(json.dumps(load_and_report(sys.argv[1])))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
