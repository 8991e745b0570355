"""The conversion of a checkpoint: the same numbers, rounded as asked, one tensor in memory at a time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from LightningDiT.checkpoint import inspect, load_weights
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import UNFINISHED
from setup_steps import checks, convert
from setup_steps.project import PROJECT
from setup_steps.weights import WeightFile, converted_name

FILE = WeightFile("small.pt", "someone/small", 1000, "dit", "small")
SHAPES = {"x_embedder.proj.weight": (6, 5, 1, 1), "blocks.0.norm1.weight": (6,), "scale": (), "final.bias": (3, 7)}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def ema(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Seeded weights, and a table of published names and shapes that they fit."""
    monkeypatch.setattr(checks, "published_table", lambda section: SHAPES)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def save(folder: Path, ema: dict[str, Tensor]) -> Path:
    """A checkpoint as it is published: what is used, and what doubles the size."""
    path = folder / FILE.name
    others = {name: tensor + 1 for name, tensor in ema.items()}
    torch.save({"ema": ema, "model": others, "opt": {"state": others}}, path)
    return path


@pytest.mark.parametrize("precision", DTYPES)
def test_the_copy_holds_the_ema_weights_cast(tmp_path: Path, ema: dict[str, Tensor], precision: str) -> None:
    source = save(tmp_path, ema)
    line = convert.convert(source, FILE, precision, replace=False)
    assert line.startswith(f"small.{precision}.safetensors: ")
    assert line.endswith("4 tensors, each read back and equal to the source's")
    copy = load_weights(tmp_path / f"small.{precision}.safetensors")
    assert list(copy) == sorted(SHAPES) or list(copy) == list(SHAPES)
    for name, tensor in ema.items():
        assert copy[name].dtype == DTYPES[precision]
        assert torch.equal(copy[name], tensor.to(DTYPES[precision]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"small.{precision}.safetensors", "small.pt"]
    # The size is the header's and one value's for each value.
    with safe_open(tmp_path / f"small.{precision}.safetensors", framework="pt") as opened:
        assert opened.metadata()["source"] == "small.pt"
    values = sum(tensor.numel() for tensor in ema.values())
    assert convert.bytes_needed(FILE, precision) == values * DTYPES[precision].itemsize


def test_replacing_removes_the_original_last(tmp_path: Path, ema: dict[str, Tensor]) -> None:
    source = save(tmp_path, ema)
    assert convert.convert(source, FILE, "bf16", replace=True).endswith("small.pt is removed")
    assert [path.name for path in tmp_path.iterdir()] == ["small.bf16.safetensors"]


def test_of_a_linked_original_only_the_link_is_removed(tmp_path: Path, ema: dict[str, Tensor]) -> None:
    attached, models = tmp_path / "attached", tmp_path / "models"
    attached.mkdir()
    models.mkdir()
    original = save(attached, ema)
    (models / FILE.name).symlink_to(original)
    convert.convert(models / FILE.name, FILE, "fp16", replace=True)
    assert [path.name for path in models.iterdir()] == ["small.fp16.safetensors"]
    assert original.is_file()


def test_a_copy_that_is_there_is_kept_until_the_source_changes(tmp_path: Path, ema: dict[str, Tensor]) -> None:
    source, target = save(tmp_path, ema), tmp_path / converted_name(FILE.name, "fp16")
    convert.convert(source, FILE, "fp16", replace=False)
    made = target.stat().st_mtime_ns
    assert "was converted before" in convert.convert(source, FILE, "fp16", replace=False)
    assert target.stat().st_mtime_ns == made
    ema["scale"] = ema["scale"] + 1
    save(tmp_path, ema)
    assert "before" not in convert.convert(source, FILE, "fp16", replace=False)
    assert torch.equal(load_weights(target)["scale"], ema["scale"].half())


def test_a_copy_that_went_bad_is_never_a_reason_to_remove_the_original(tmp_path: Path, ema: dict[str, Tensor]) -> None:
    source, target = save(tmp_path, ema), tmp_path / converted_name(FILE.name, "fp32")
    convert.convert(source, FILE, "fp32", replace=False)
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    assert convert.convert(source, FILE, "fp32", replace=True).endswith("small.pt is removed")
    for name, tensor in load_weights(target).items():
        assert torch.equal(tensor, ema[name])


def test_a_file_of_someone_else_with_the_copys_name_is_kept(tmp_path: Path, ema: dict[str, Tensor]) -> None:
    source, target = save(tmp_path, ema), tmp_path / converted_name(FILE.name, "bf16")
    target.write_bytes(b"mine")
    line = convert.convert(source, FILE, "bf16", replace=False)
    assert line.endswith("the file that had this name is kept as small.bf16.safetensors.other-1")
    assert (tmp_path / "small.bf16.safetensors.other-1").read_bytes() == b"mine"
    assert load_weights(target).keys() == ema.keys()


def test_a_converted_copy_is_a_source_too(tmp_path: Path, ema: dict[str, Tensor]) -> None:
    convert.convert(save(tmp_path, ema), FILE, "fp32", replace=True)
    exact = tmp_path / "small.fp32.safetensors"
    convert.convert(exact, FILE, "fp16", replace=False)
    assert torch.equal(load_weights(tmp_path / "small.fp16.safetensors")["scale"], ema["scale"].half())
    assert convert.convert(exact, FILE, "fp32", replace=True) == f"{exact.name}: is what was asked for already"
    assert exact.is_file()


@pytest.mark.parametrize(("first", "then"), [("fp16", "fp32"), ("bf16", "fp32"), ("bf16", "fp16")])
def test_digits_that_are_lost_are_not_invented(tmp_path: Path, ema: dict[str, Tensor], first: str, then: str) -> None:
    convert.convert(save(tmp_path, ema), FILE, first, replace=True)
    source = tmp_path / f"small.{first}.safetensors"
    with pytest.raises(LightningDiTError, match=rf"which have fewer digits than {then}; fix: fetch the original"):
        convert.convert(source, FILE, then, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize(
    ("value", "precision", "words"),
    [
        (7e4, "fp16", "tensor scale reaches 70000, fp16 ends at 65504; fix: take --convert bf16 or"),
        (-7e4, "fp16", "tensor scale reaches 70000, fp16 ends at 65504"),
        (float("nan"), "bf16", "tensor scale holds NaN or infinite values; fix: fetch it again"),
        (float("inf"), "fp32", "tensor scale holds NaN or infinite values"),
    ],
)
def test_values_that_do_not_fit_leave_the_source_alone(
    tmp_path: Path, ema: dict[str, Tensor], value: float, precision: str, words: str
) -> None:
    source = save(tmp_path, {**ema, "scale": torch.tensor(value)})
    with pytest.raises(LightningDiTError, match=re.escape(words)):
        convert.convert(source, FILE, precision, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["small.pt"]


def test_large_values_fit_into_bf16(tmp_path: Path, ema: dict[str, Tensor]) -> None:
    source = save(tmp_path, {**ema, "scale": torch.tensor(7e4)})
    convert.convert(source, FILE, "bf16", replace=False)
    assert load_weights(tmp_path / "small.bf16.safetensors")["scale"] == torch.tensor(7e4).bfloat16()


def test_a_tensor_that_is_no_number_of_the_network_is_refused(tmp_path: Path, ema: dict[str, Tensor]) -> None:
    source = save(tmp_path, {**ema, "scale": torch.tensor(3)})
    with pytest.raises(LightningDiTError, match=r"tensor scale is torch.int64, floating point was expected"):
        convert.convert(source, FILE, "fp16", replace=True)


def test_a_copy_that_reads_back_otherwise_is_dropped(
    tmp_path: Path, ema: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that changes a byte: the original stays although it was to be replaced."""
    write = convert._write

    def write_wrongly(job: convert.Job, path: Path, metadata: dict[str, str]) -> None:
        write(job, path, metadata)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(convert, "_write", write_wrongly)
    with pytest.raises(LightningDiTError, match=r"tensor final.bias is not that of .*small.pt; fix"):
        convert.convert(save(tmp_path, ema), FILE, "fp32", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["small.pt"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, ema: dict[str, Tensor]) -> None:
    source = save(tmp_path, {name: tensor for name, tensor in ema.items() if name != "scale"})
    with pytest.raises(LightningDiTError, match="lacks scale"):
        convert.convert(source, FILE, "fp16", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["small.pt"]


def test_what_a_killed_run_left_is_removed(tmp_path: Path, ema: dict[str, Tensor]) -> None:
    source = save(tmp_path, ema)
    for precision in ("fp16", "fp32"):
        (tmp_path / f".small.{precision}.safetensors.abcdefgh{UNFINISHED}").write_bytes(b"half a file" * 1000)
    convert.convert(source, FILE, "fp16", replace=False)
    assert inspect(tmp_path / "small.fp16.safetensors").shapes == SHAPES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.fp16.safetensors", "small.pt"]


def test_two_processes_do_not_write_one_copy(tmp_path: Path, ema: dict[str, Tensor]) -> None:
    fcntl = pytest.importorskip("fcntl")
    source = save(tmp_path, ema)
    with source.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(
            LightningDiTError, match=r"small.pt is being converted by another process; fix: wait for it"
        ):
            convert.convert(source, FILE, "fp16", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["small.pt"]
    convert.convert(source, FILE, "fp16", replace=True)


CHILD = """
import resource, sys, threading, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from setup_steps import checks, convert, project
from setup_steps.weights import WeightFile
import torch
from LightningDiT import checkpoint
from LightningDiT.device import PRECISIONS
import safetensors.torch

def anonymous():
    rows = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    return next((int(row.split()[1]) * 1024 for row in rows if row.startswith("RssAnon")), 0)

def watch():
    while not ended:
        sizes.append(anonymous())
        time.sleep(0.0005)

source = Path(sys.argv[2])
shapes = checkpoint.inspect(source).shapes
checks.published_table = lambda section: shapes
torch.ones(9).half().sum()
if sys.argv[4] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
ended, sizes = [], [anonymous()]
threading.Thread(target=watch, daemon=True).start()
def main():
    convert.convert(source, WeightFile(source.name, "a/b", 1, "dit", "small"), sys.argv[3], replace=False)
    ended.append(True)
    print(max(sizes) - sizes[0])
    return 0
project.run(main)
"""


def in_a_process(source: Path, precision: str, largest_file: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(PROJECT), str(source), precision, str(largest_file)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is read from /proc")
@pytest.mark.parametrize("precision", DTYPES)
def test_memory_stays_below_the_largest_tensor(tmp_path: Path, precision: str) -> None:
    """200 MB of tensors of 20 MB: anonymous memory (pages of mapped files are the system's) grows by at most one of
    them and some small change.
    """
    largest = 20_000_000
    path = tmp_path / "large.pt"
    torch.save({"ema": {f"t{i}": torch.full((largest // 4,), float(i)) for i in range(10)}}, path)
    done = in_a_process(path, precision)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < largest + 8_000_000


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path, ema: dict[str, Tensor]) -> None:
    source = save(tmp_path, {**ema, "large": torch.zeros(100_000)})
    done = in_a_process(source, "fp32", largest_file=200_000)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "cannot be written (File too large); fix: free space on that disk" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["small.pt"]
