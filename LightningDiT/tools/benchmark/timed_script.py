"""Run a script and note when its first evaluation of a LightningDiT begins.

`python -m LightningDiT.tools.benchmark.timed_script TIMES.json SCRIPT [ARGUMENT ...]`, used by
tools/benchmark. The script sees the same process, arguments and exit code as without it.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from LightningDiT.models.lightningdit import LightningDiT

FIRST_FORWARD = "first_forward"


def note_first_forward(path: Path) -> None:
    """Make the next forward of a LightningDiT write the time (seconds since 1970) to `path`, once."""
    forward = LightningDiT.forward

    def noted(self: LightningDiT, *args: Any, **kwargs: Any) -> Any:
        LightningDiT.forward = forward
        path.write_text(json.dumps({FIRST_FORWARD: time.time()}), encoding="utf-8")
        return forward(self, *args, **kwargs)

    LightningDiT.forward = noted


if __name__ == "__main__":
    times, script, *arguments = sys.argv[1:]
    note_first_forward(Path(times))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
