"""torch.compile as a switch: the same values, the same names, and plain computing where there is no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from studies.compile_study import Row, pays_after, table
from tests.conftest import PROJECT

WITHOUT_COMPILER = """
import sys, warnings
import torch
from torch import nn
from LightningDiT.compiling import compile_forward
from LightningDiT.sampling import pipeline
assert "torch._dynamo" not in sys.modules  # nothing of it before the switch is on

network = nn.Sequential(nn.Linear(3, 2), nn.GELU()).requires_grad_(False)
given, names = torch.ones(4, 3), list(network.state_dict())
expected = network(given)
compile_forward(network)
assert list(network.state_dict()) == names
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    made, line = [network(given) for _ in range(2)], sys._getframe().f_lineno
said = [one for one in said if "torch.compile does not work here" in str(one.message)]
assert [(one.filename, one.lineno) for one in said] == [("<string>", line)], said
text = str(said[0].message)
assert "\\n" not in text and text.endswith("going on uncompiled"), text
assert all(torch.equal(one, expected) for one in made)
assert "forward" not in vars(network)
print("as before")
"""


def test_without_a_compiler_it_goes_on_with_one_warning(tmp_path: Path) -> None:
    environment = os.environ | {
        "CXX": str(tmp_path / "no-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("as before"), done.stderr


def test_the_table_says_when_compiling_pays() -> None:
    """2 seconds become 1.5, so 60 seconds of compiling come back after 120 forwards."""
    row = Row("a network", 2, 2.0, 1.5, 60.0, 3e-6)
    assert pays_after(row) == "120 forwards"
    assert table([row])[-1] == "| a network | 2 | 2.0000 s | 1.5000 s | 1.33 | 60 s | 120 forwards | 3e-06 std |"
    assert pays_after(Row("a network", 2, 1.0, 1.5, 60.0, 0.0)) == "never"
