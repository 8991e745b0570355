"""Seconds of the demonstration, from its start to the first sampling step and to its images.

`python -m` this module TIMES.json SCRIPT [ARGUMENT ...] runs a script and notes when its first forward begins. The
script sees the same process, arguments and exit code as without it.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from LightningDiT.config import load_config
from LightningDiT.errors import LightningDiTError
from LightningDiT.models.lightningdit import LightningDiT

from .machine import PROJECT
from .rounds import Setting

DEMO = PROJECT / "step4_demo_inference.py"
STEP3_CONFIG = PROJECT / "kaggle_inference_config.yaml"
BUNDLED_WEIGHTS = PROJECT / "models" / "fashion-mnist" / "transformer.safetensors"


def demo_samples_bundled_model(config: Path = STEP3_CONFIG, weights: Path = BUNDLED_WEIGHTS) -> bool:
    """Whether the demonstration would sample the bundled model, and no other one that step 3 was given."""
    if not weights.exists():
        return False
    chosen = load_config(config).ckpt_path if config.exists() else weights
    return chosen is not None and Path(chosen).resolve() == weights.resolve()


def time_demo(script: Path) -> dict[str, float]:
    """Return the seconds from the start of the demonstration to its first sampling step and to its end.

    Raises:
        LightningDiTError: it failed, or sampled nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        times, pictures = Path(folder) / "times.json", Path(folder) / "pictures"
        command = [
            sys.executable,
            "-m",
            "LightningDiT.tools.benchmark.demo",
            str(times),
            str(script),
            "--output",
            str(pictures),
        ]
        started = time.time()
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
        ended = time.time()
        if done.returncode or not times.exists():
            reason = (done.stderr.strip().splitlines() or ["it sampled nothing"])[-1]
            raise LightningDiTError(f"{script.name} failed: {reason}", f"python {script.name}")
        first = json.loads(times.read_text(encoding="utf-8"))
    return {"first_step": first - started, "picture": ended - started}


def measure_demo(setting: Setting) -> dict[str, Any]:
    """Return the seconds of the demonstration, or why it is not timed."""
    if not demo_samples_bundled_model():
        return {"seconds": None, "skipped": [f"{DEMO.name} would not sample the bundled model"]}
    return {"seconds": time_demo(DEMO), "skipped": []}


def note_first_forward(path: Path) -> None:
    """Make the next forward of a LightningDiT write the time (seconds since 1970) to `path`, once."""
    forward = LightningDiT.forward

    def noted(self: LightningDiT, *args: Any, **kwargs: Any) -> Any:
        LightningDiT.forward = forward
        path.write_text(json.dumps(time.time()), encoding="utf-8")
        return forward(self, *args, **kwargs)

    LightningDiT.forward = noted


if __name__ == "__main__":
    times, script, *arguments = sys.argv[1:]
    note_first_forward(Path(times))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
