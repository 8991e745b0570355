"""Seconds of the demonstration, from its start to the first sampling step and to its pictures."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from LightningDiT.config import load_config
from LightningDiT.errors import LightningDiTError
from LightningDiT.tools.benchmark.timed_script import FIRST_FORWARD

from .machine import PROJECT
from .rounds import Setting

DEMO = PROJECT / "step4_demo_inference.py"
STEP3_CONFIG = PROJECT / "kaggle_inference_config.yaml"
BUNDLED_WEIGHTS = PROJECT / "models" / "fashion-mnist" / "transformer.safetensors"


def demo_samples_bundled_model(config: Path = STEP3_CONFIG, weights: Path = BUNDLED_WEIGHTS) -> bool:
    """Whether the demonstration would sample the bundled model and not one that step 3 was told to use."""
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
        times = Path(folder) / "times.json"
        command = [sys.executable, "-m", "LightningDiT.tools.benchmark.timed_script", str(times), str(script)]
        started = time.time()
        done = subprocess.run(
            [*command, "--output", str(Path(folder) / "pictures")],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=False,
        )
        ended = time.time()
        if done.returncode or not times.exists():
            reason = (done.stderr.strip().splitlines() or ["it sampled nothing"])[-1]
            raise LightningDiTError(f"{script.name} failed: {reason}", f"python {script.name}")
        first = json.loads(times.read_text(encoding="utf-8"))[FIRST_FORWARD]
    return {"first_step": first - started, "picture": ended - started}


def measure_demo(setting: Setting) -> dict[str, Any]:
    """Return the seconds of the demonstration, or why it is not timed."""
    if not demo_samples_bundled_model():
        return {"seconds": None, "skipped": [f"{DEMO.name} would not sample the bundled model"]}
    return {"seconds": time_demo(DEMO), "skipped": []}
