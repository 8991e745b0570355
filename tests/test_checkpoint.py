"""Weights as data: what loads, what is refused, and that nothing is lost in writing."""

from __future__ import annotations

import argparse
import collections
import datetime
import errno
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from LightningDiT.checkpoint import (
    inspect,
    load_file,
    load_into,
    load_weights,
    save_training_state,
    save_weights,
    without_values,
)
from LightningDiT.config import load_config
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import atomic_path, fingerprint
from LightningDiT.loading import check_transformer_file, load_transformer
from tests.conftest import PROJECT


def weights() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([1.0, 2.0])}


FORMS = (
    *("bare", "module", "compiled", "both wrappers", "three wrappers", "sharded parallel"),
    *("ema", "model_ema", "empty ema", "model", "state_dict", "parameters", "whole numbers as names"),
    *("first stage", "whole LDM", "average of LDM"),
)


def wrapped(form: str) -> dict[str, object]:
    """The weights as one of the dictionaries that people save."""
    prefixed = {f"module.{name}": value for name, value in weights().items()}
    wrong = {name: value + 100 for name, value in weights().items()}
    return {
        "bare": weights(),
        "both wrappers": {f"_orig_mod.module.{name}": value for name, value in weights().items()},
        "three wrappers": {f"module._orig_mod.module.{name}": value for name, value in weights().items()},
        "sharded parallel": {f"_fsdp_wrapped_module.{name}": value for name, value in weights().items()},
        "model_ema": {"model": wrong, "model_ema": weights(), "epoch": 1},
        "empty ema": {"ema": {"decay": 0.999}, "model": weights()},
        "parameters": {name: nn.Parameter(value) for name, value in weights().items()},
        "whole numbers as names": weights() | {0: torch.zeros(1)},
        "first stage": {"state_dict": {f"first_stage_model.{name}": value for name, value in weights().items()}},
        "whole LDM": {
            "state_dict": {"model.x": torch.zeros(1), "model_ema.x": torch.zeros(1)}
            | {f"first_stage_model.{name}": value for name, value in weights().items()}
        },
        "average of LDM": wrong
        | {f"model_ema.{name.replace('.', '')}": value for name, value in weights().items()}
        | {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(5)},
        "module": prefixed,
        "compiled": {f"_orig_mod.{name}": value for name, value in weights().items()},
        "ema": {"model": wrong, "ema": weights(), "opt": {"state": {}}, "config": {"seed": 1}},
        "model": {"model": prefixed, "step": 7},
        "state_dict": {"state_dict": weights(), "epoch": 3},
    }[form]


@pytest.mark.parametrize("form", FORMS)
def test_every_published_form_loads(form: str, tmp_path: Path) -> None:
    torch.save(wrapped(form), tmp_path / "weights.pt")
    loaded = load_weights(tmp_path / "weights.pt")
    assert loaded.keys() == weights().keys()
    for name, value in weights().items():
        torch.testing.assert_close(loaded[name], value, atol=0, rtol=0)


def test_other_entries_of_the_file_are_reported(tmp_path: Path) -> None:
    torch.save(wrapped("ema"), tmp_path / "weights.pt")
    info = inspect(tmp_path / "weights.pt")
    assert (info.weights_key, info.extras) == ("ema", ("model", "opt", "config"))
    assert info.shapes == {"weight": (2, 3), "bias": (2,)}
    assert info.parameters == 8


def test_safetensors_keep_their_metadata(tmp_path: Path) -> None:
    save_weights(weights(), tmp_path / "weights.safetensors", {"steps": "12"})
    assert inspect(tmp_path / "weights.safetensors").metadata == {"steps": "12"}
    torch.testing.assert_close(load_weights(tmp_path / "weights.safetensors"), weights(), atol=0, rtol=0)


def test_the_legacy_format_loads(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(load_weights(tmp_path / "old.pt"), weights(), atol=0, rtol=0)


class Hostile:
    """An object whose unpickling would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.zeros(1), "extra": Hostile()}, tmp_path / "zip.pt")
    for protocol in (2, 4):
        (tmp_path / f"plain{protocol}.pt").write_bytes(pickle.dumps(Hostile(), protocol))
    for name, message in (
        ("zip.pt", r"is refused: opening it would run code \(.*print\)"),
        ("plain2.pt", r"is refused: opening it would run code \(.*print\)"),
        ("plain4.pt", "is cut short or no weights file"),
    ):
        with pytest.raises(LightningDiTError, match=message):
            load_weights(tmp_path / name)
    assert "code ran" not in capfd.readouterr().out


HAS_SAFE_GLOBALS = hasattr(torch.serialization, "safe_globals")  # torch 2.5 and newer


def neighbours_checkpoint() -> dict[str, object]:
    """What the training scripts of DiT, SiT and their kin save."""
    arguments = argparse.Namespace(lr=1e-4, data=Path("data"), classes=np.int64(1000), betas=np.ones(2))
    more = {"state": collections.defaultdict(list, {0: [torch.zeros(1)]}), "at": datetime.datetime(2024, 1, 1)}
    return {"model": weights(), "ema": weights(), "args": arguments, "train_steps": np.int64(7), "opt": more}


@pytest.mark.skipif(not HAS_SAFE_GLOBALS, reason="torch 2.5 has the list")
@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_types_are_passed_over_and_named(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(neighbours_checkpoint(), path, _use_new_zipfile_serialization=zipped)
    before = torch.serialization.get_safe_globals()
    with pytest.warns(UserWarning, match=r"weights\.pt: passed over argparse\.Namespace, .*numpy.* alone are read$"):
        loaded = load_weights(path)
    torch.testing.assert_close(loaded, weights(), atol=0, rtol=0)
    info = inspect(path)
    assert (info.weights_key, info.extras) == ("ema", ("model", "args", "train_steps", "opt"))
    assert "pathlib" in info.notes[0]
    assert "datetime.datetime" in info.notes[0]
    assert torch.serialization.get_safe_globals() == before  # a program's own list stays as it was


@pytest.mark.skipif(HAS_SAFE_GLOBALS, reason="torch before 2.5")
def test_harmless_types_need_torch_2_5(tmp_path: Path) -> None:
    torch.save(neighbours_checkpoint(), tmp_path / "weights.pt")
    with pytest.raises(LightningDiTError, match=r"which torch 2\.\d.* cannot pass over; fix: install torch 2\.5"):
        load_weights(tmp_path / "weights.pt")


def test_one_name_from_two_models_is_refused(tmp_path: Path) -> None:
    torch.save(weights() | {"module.bias": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(LightningDiTError, match=r"holds bias twice, once as module\.bias"):
        load_weights(tmp_path / "weights.pt")


def test_the_average_of_ldm_is_named(tmp_path: Path) -> None:
    torch.save(wrapped("average of LDM"), tmp_path / "weights.pt")
    assert inspect(tmp_path / "weights.pt").notes == ("took the averages of model_ema. for 2 of 2 tensors",)
    torch.save(wrapped("whole LDM"), tmp_path / "weights.pt")
    assert inspect(tmp_path / "weights.pt").notes == (
        "took 2 tensors of first_stage_model. and passed over the other 2",
    )


def test_the_average_of_ldm_is_found_whatever_dots_the_names_have(tmp_path: Path) -> None:
    """Its names have none, so that of a block within a block is found as one word."""
    own = {f"block.0.{name}": value for name, value in weights().items()}
    average = {f"model_ema.block0{name}": value + 1 for name, value in weights().items()}
    torch.save(own | average, tmp_path / "weights.pt")
    with pytest.warns(UserWarning, match="took the averages of model_ema. for 2 of 2 tensors"):
        loaded = load_weights(tmp_path / "weights.pt")
    assert loaded.keys() == own.keys()
    assert all(torch.equal(loaded[name], value + 1) for name, value in own.items())


@pytest.mark.parametrize("name", ["down_blocks.0.resnets.0.conv1.weight", "transformer_blocks.0.attn1.to_q.weight"])
def test_names_of_diffusers_are_named(name: str, tmp_path: Path) -> None:
    save_weights({name: torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(LightningDiTError, match=rf"has the tensor names of diffusers \({name}\)"):
        load_weights(tmp_path / "weights.safetensors")


def sharded(folder: Path, ending: str = "safetensors") -> Path:
    """Weights in two files, as hubs hold large ones, and their index."""
    files = {}
    for number, (name, value) in enumerate(weights().items(), 1):
        files[name] = f"model-{number:05d}-of-00002.{ending}"
        (save_file if ending == "safetensors" else torch.save)({name: value}, folder / files[name])
    index = folder / f"model.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": files}))
    return index


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_an_index_gives_the_tensors_of_all_its_shards(ending: str, tmp_path: Path) -> None:
    index = sharded(tmp_path, ending)
    torch.testing.assert_close(load_weights(index), weights(), atol=0, rtol=0)
    load_file(module := nn.Linear(3, 2), index, torch.bfloat16)
    assert torch.equal(module.bias, weights()["bias"].bfloat16())
    shard = tmp_path / f"model-00002-of-00002.{ending}"
    with pytest.raises(LightningDiTError, match=rf"is shard 2 of 2, a part of the weights; fix: name {index}"):
        load_weights(shard)
    shard.unlink()
    with pytest.raises(LightningDiTError, match="model-00002-of-00002.* does not exist"):
        load_weights(index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no index"),
        ("{}", "is no index"),
        ("{", "is no index"),
        ("[" * 100_000, "is no index"),
        ('{"weight_map": []}', "is no index"),
        ('{"weight_map": {}}', "names no shards"),
        ('{"weight_map": {"bias": 7}}', "names no shards"),
        ('{"weight_map": {"bias": ["a"]}}', "is no index"),
        ('{"weight_map": {"bias": "../model-00001-of-00002.safetensors"}}', "names no shards in its own folder"),
        ('{"weight_map": {"bias": "model-00001-of-00002.safetensors"}}', "lists bias in .*, which does not hold it"),
    ],
)
def test_a_bad_index_is_named(text: str, message: str, tmp_path: Path) -> None:
    index = sharded(tmp_path)
    index.write_text(text)
    with pytest.raises(LightningDiTError, match=message):
        load_weights(index)


ODD_TENSORS = {
    "whole": torch.tensor([1, 2]),
    "bool": torch.tensor([True, False]),
    "complex": torch.tensor([1j, 2]),
    "without values": torch.empty(2, device="meta"),
    "sparse or nested": torch.eye(2).to_sparse()[0],
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_tensors_of_another_kind_are_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(weights() | {"bias": ODD_TENSORS[kind]}, path)
    assert inspect(path).kinds == {"weight": "real", "bias": kind}
    message = rf"tensor bias is {kind}; real numbers are expected; fix: save the weights as plain"
    for dtype in (None, torch.bfloat16):
        with pytest.raises(LightningDiTError, match=message):
            load_file(nn.Linear(3, 2), path, dtype)
    with pytest.raises(LightningDiTError, match=message):
        load_into(nn.Linear(3, 2), load_weights(path), path)


def test_a_parameter_comes_as_a_plain_tensor(tmp_path: Path) -> None:
    torch.save(wrapped("parameters"), tmp_path / "weights.pt")
    load_file(module := nn.Linear(3, 2).requires_grad_(False), tmp_path / "weights.pt")
    assert not module.weight.requires_grad
    load_file(module := nn.Linear(3, 2), tmp_path / "weights.pt", torch.float64)
    assert module.weight.requires_grad
    assert module.weight.is_leaf


def test_float8_weights_load(tmp_path: Path) -> None:
    save_weights({name: value.to(torch.float8_e4m3fn) for name, value in weights().items()}, tmp_path / "w.safetensors")
    load_file(module := nn.Linear(3, 2), tmp_path / "w.safetensors", torch.float32)
    torch.testing.assert_close(dict(module.state_dict()), weights(), atol=0, rtol=0)
    load_file(module, tmp_path / "w.safetensors")


def zipped_again(path: Path, method: int, content: Mapping[str, bytes] | None = None) -> None:
    """Write the records of a zip file again, some with other content, as any zip tool does."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, value in records.items():
            archive.writestr(name, (content or {}).get(name.partition("/")[2], value))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_file_zipped_again_is_read_rightly(method: int, tmp_path: Path) -> None:
    given = {"weight": torch.randn(2, 3), "bias": torch.zeros(2)}
    torch.save(given, path := tmp_path / "weights.pt")
    zipped_again(path, method)
    torch.testing.assert_close(load_weights(path), given, atol=0, rtol=0)
    load_file(module := nn.Linear(3, 2), path, torch.float64)
    assert torch.equal(module.weight, given["weight"].double())


def test_the_bytes_of_every_kind_of_numbers_are_known(tmp_path: Path) -> None:
    names = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 complex128 float8_e5m2"
    given = {name: torch.zeros(3, dtype=getattr(torch, name)) for name in names.split()}
    torch.save(given | {"part": torch.zeros(9)[2:4]}, tmp_path / "weights.pt")
    assert {name: tensor.dtype for name, tensor in load_weights(tmp_path / "weights.pt").items()} == {
        name: tensor.dtype for name, tensor in given.items()
    } | {"part": torch.float32}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("size", [0, 4, 28])
def test_a_record_of_another_length_is_named(method: int, size: int, tmp_path: Path) -> None:
    torch.save(weights(), path := tmp_path / "weights.pt")
    zipped_again(path, method, {"data/0": b"\0" * size})
    with pytest.raises(LightningDiTError, match="cut short"):
        load_weights(path)


@pytest.mark.skipif(not hasattr(zipfile, "ZIP_BZIP2"), reason="no bzip2")
def test_what_torch_cannot_unpack_is_named(tmp_path: Path) -> None:
    torch.save({"weight": torch.randn(2000)}, path := tmp_path / "weights.pt")
    zipped_again(path, zipfile.ZIP_BZIP2)
    with pytest.raises(LightningDiTError, match="cut short or no weights file"):
        load_weights(path)


def test_a_file_that_grows_without_bound_is_refused(tmp_path: Path) -> None:
    torch.save(weights(), path := tmp_path / "weights.pt")
    zipped_again(path, zipfile.ZIP_DEFLATED, {"data/0": bytes(2**27)})
    with pytest.raises(LightningDiTError, match="is compressed and would grow to 134,2"):
        load_weights(path)


def test_a_record_that_is_there_twice_is_named(tmp_path: Path) -> None:
    torch.save(weights(), path := tmp_path / "weights.pt")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(next(name for name in archive.namelist() if name.endswith("data/0")), b"\0" * 24)
    with pytest.raises(LightningDiTError, match="a record is there twice"):
        load_weights(path)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to mmap 96 bytes from file </w.pt>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_a_lack_of_memory_is_no_damage(
    form: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    path = stored(form, tmp_path, weights())
    monkeypatch.setattr(torch, "load", fail)
    monkeypatch.setattr("safetensors.safe_open", fail)
    with pytest.raises(MemoryError, match="cannot be opened"):
        load_weights(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes with names")
def test_a_pipe_is_no_weights_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "weights.pt")
    for path in (tmp_path / "weights.pt", Path(os.devnull)):
        with pytest.raises(LightningDiTError, match="is a pipe or a device"):
            load_weights(path)


def test_what_is_no_weights_file_is_named(tmp_path: Path) -> None:
    cases = {
        "empty.pt": (b"", r"empty \(0 bytes\)"),
        "page.pt": (b"<!DOCTYPE html><html>", "is a web page"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid", "git LFS pointer"),
        "noise.pt": (b"\x93nothing that anyone wrote", "cut short or no weights file"),
        "noise.safetensors": (b"nothing that anyone wrote", "cut short or no safetensors file"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LightningDiTError, match=message):
            load_weights(tmp_path / name)
    with pytest.raises(LightningDiTError, match="does not exist; fix: name a file that exists, or python step2"):
        load_weights(tmp_path / "absent.pt")
    with pytest.raises(LightningDiTError, match="is a folder"):
        load_weights(tmp_path)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_named(suffix: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{suffix}"
    big = {"weight": torch.randn(200, 200)}
    if suffix == "pt":
        torch.save(big, path)
    else:
        save_file(big, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(LightningDiTError, match="cut short"):
        load_weights(path)


def test_a_dictionary_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"step": 1}, tmp_path / "weights.pt")
    with pytest.raises(LightningDiTError, match=r"holds no tensors \(entries: step\)"):
        load_weights(tmp_path / "weights.pt")


def test_a_module_takes_the_tensors_themselves() -> None:
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    given = weights()
    assert load_into(module, given | {"loss.scale": torch.zeros(1)}, "file", ("loss.",)) == ["loss.scale"]
    assert module.weight.data_ptr() == given["weight"].data_ptr()  # assigned, not copied
    torch.testing.assert_close(module(torch.ones(1, 3)), torch.tensor([[4.0, 14.0]]))


def test_a_bad_fit_lists_what_is_wrong() -> None:
    module = nn.Linear(3, 2)
    cases = {
        "1 missing: bias": {"weight": weights()["weight"]},
        r"1 of another shape: weight \[3, 2\] instead of \[2, 3\]": weights() | {"weight": torch.zeros(3, 2)},
        "1 unknown: extra": weights() | {"extra": torch.zeros(1)},
    }
    for message, given in cases.items():
        with pytest.raises(LightningDiTError, match=message):
            load_into(module, given, "file")


def test_nan_inside_is_refused_by_name() -> None:
    broken = weights() | {"bias": torch.tensor([1.0, float("nan")])}
    with pytest.raises(LightningDiTError, match="tensor bias holds NaN"):
        load_into(nn.Linear(3, 2), broken, "file")


def stored(form: str, folder: Path, content: dict[str, torch.Tensor]) -> Path:
    """A file of one of the three kinds that `load_weights` reads."""
    path = folder / f"weights.{form}"
    if form == "safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    return path


@pytest.mark.parametrize("form", ["safetensors", "pt", "legacy"])
@pytest.mark.parametrize("portion", [0, 2**26])
def test_a_file_is_loaded_in_another_precision_and_layout(
    form: str, portion: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether each tensor is a portion of its own or all are one."""
    monkeypatch.setattr("LightningDiT.checkpoint.PORTION_BYTES", portion)
    kernel, extra = torch.randn(4, 3, 3, 3), {"loss.scale": torch.zeros(1)}
    given = {"weight": kernel, "bias": torch.randn(4), "steps": torch.tensor(7)}
    with without_values():
        module = nn.Conv2d(3, 4, 3)
        module.register_buffer("steps", torch.zeros((), dtype=torch.long))
    path = stored(form, tmp_path, given | extra)
    assert load_file(module, path, torch.bfloat16, torch.channels_last, ("loss.",)) == ["loss.scale"]
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert (module.bias.dtype, module.steps.item()) == (torch.bfloat16, 7)
    expected = {name: value.bfloat16() if value.is_floating_point() else value for name, value in given.items()}
    torch.testing.assert_close(dict(module.state_dict()), expected, atol=0, rtol=0)


def test_a_file_that_does_not_fit_is_refused_before_it_is_converted(tmp_path: Path) -> None:
    path = stored("pt", tmp_path, weights() | {"weight": torch.full((3, 2), 7e4)})
    with pytest.raises(LightningDiTError, match=r"does not fit Linear.* weight \[3, 2\] instead of \[2, 3\]"):
        load_file(nn.Linear(3, 2), path, torch.float16)


def test_a_value_that_the_precision_cannot_hold_is_named(tmp_path: Path) -> None:
    path = stored("safetensors", tmp_path, weights() | {"bias": torch.tensor([1.0, -7e4])})
    with pytest.raises(LightningDiTError) as raised:
        load_file(nn.Linear(3, 2), path, torch.float16)
    message = f"{path}: tensor bias reaches 70000, float16 ends at 65504; fix: sample with --precision bf16 or fp32"
    assert str(raised.value) == message
    load_file(module := nn.Linear(3, 2), path, torch.bfloat16)
    assert module.bias[1] == torch.tensor(-7e4).bfloat16()


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_damaged_value_is_found_in_every_precision(dtype: torch.dtype | None, tmp_path: Path) -> None:
    path = stored("pt", tmp_path, weights() | {"bias": torch.tensor([1.0, float("inf")])})
    with pytest.raises(LightningDiTError, match="tensor bias holds NaN or infinite values; the file is damaged"):
        load_file(nn.Linear(3, 2), path, dtype)


LAYERS, WIDTH = 8, 2048  # 16 MiB a layer in float32, 128 MiB in all
MEASURED_LOADING = """
import json, re, sys
import torch
from torch import nn
from LightningDiT import checkpoint
from LightningDiT.models.lightningdit import LightningDiT
from LightningDiT.tokenizer.autoencoder import AutoencoderKL, AutoencoderSettings

def resident(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

layers, width, path, dtype = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], getattr(torch, sys.argv[4])
checkpoint.PORTION_BYTES = 2**24
with checkpoint.without_values():
    LightningDiT(use_rope=True), AutoencoderKL(AutoencoderSettings())
    module = nn.ModuleList([nn.Embedding(width, width), *(nn.Linear(width, width, False) for _ in range(layers - 1))])
before = resident("VmRSS")
checkpoint.load_file(module, path, dtype, ignored=("loss.",))
print(json.dumps([resident("VmHWM") - before, "torch._dynamo" in sys.modules]))
"""


@pytest.fixture(scope="module")
def large_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Weights of 128 MiB in two formats, and two times as much in each that a model has no place for."""
    folder = tmp_path_factory.mktemp("large")
    own, model, loss = (
        {f"{prefix}{index}.weight": torch.full((WIDTH, WIDTH), 0.5) for index in range(LAYERS)}
        for prefix in ("", "", "loss.")
    )
    files = {"pt": folder / "official.pt", "safetensors": folder / "with_loss.safetensors"}
    torch.save({"model": model, "ema": own, "opt": {"state": {0: {"exp_avg": loss}}}}, files["pt"])
    save_file(own | loss | {f"loss.{name}": tensor for name, tensor in model.items()}, files["safetensors"])
    yield files
    for path in files.values():
        path.unlink()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is read from /proc")
@pytest.mark.parametrize(("form", "dtype"), [("pt", "float32"), ("pt", "bfloat16"), ("safetensors", "bfloat16")])
def test_loading_takes_the_weights_and_one_portion(form: str, dtype: str, large_files: dict[str, Path]) -> None:
    """The peak of a process of its own. Other entries, or the unconverted weights, would add 128 MiB or more."""
    command = [sys.executable, "-c", MEASURED_LOADING, str(LAYERS), str(WIDTH), str(large_files[form]), dtype]
    # large blocks go back to the system at once; otherwise holes between them count as well
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True, env=environment)
    peak, compiler_came_along = json.loads(done.stdout)
    mebibyte = 2**20
    own = LAYERS * WIDTH**2 * getattr(torch, dtype).itemsize
    portion = 0 if dtype == "float32" else 16 * mebibyte
    one_tensor_is_checked = 40 * mebibyte  # its absolute values, and what is finite of them
    assert own <= peak <= own + portion + one_tensor_is_checked + 8 * mebibyte
    assert not compiler_came_along


def test_a_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    content = bytearray(np.random.default_rng(0).bytes(20_000_000))
    path.write_bytes(content)
    first = fingerprint(path)
    assert fingerprint(path) == first
    path.write_bytes(content[:-1])
    assert fingerprint(path) != first
    path.write_bytes(bytes(255 - byte for byte in content[:1_000_000]) + content[1_000_000:])
    assert fingerprint(path) != first


def test_the_fix_of_a_bundled_file_is_git(tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError, match="fix: git restore models/fashion-mnist"):
        load_weights(tmp_path / "models" / "fashion-mnist" / "transformer.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("good")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "good"
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LightningDiTError, match="cannot be written"):
        save_training_state({}, tmp_path / "file" / "state.pt")


#: Tensors that others add to this backbone: a projector of alignment, a second time, registers.
FURTHER = {
    "projectors.0.0.weight": (8, 192),
    "r_embedder.mlp.0.weight": (192, 256),
    "register_tokens": (1, 4, 192),
    "blocks.0.cross.q.weight": (192, 192),
}


@pytest.mark.parametrize("name", FURTHER)
@pytest.mark.parametrize("classes", [3, 1000])
def test_a_foreign_checkpoint_is_named_by_its_further_tensors(name: str, classes: int, tiny_folder: Path) -> None:
    """Before its settings are compared, and whatever they are."""
    path = tiny_folder / "transformer.safetensors"
    tensors = load_weights(path) | {name: torch.zeros(FURTHER[name])}
    table = "y_embedder.embedding_table.weight"
    tensors[table] = torch.zeros(classes + 1, tensors[table].shape[1])
    save_weights(tensors, path)
    config = load_config(tiny_folder / "config.yaml")
    wanted = rf"holds LightningDiT-XS/2 and tensors that it does not have \(1\): {name}; it may compute something else"
    for load in (partial(check_transformer_file, config, path), partial(load_transformer, config)):
        with pytest.raises(LightningDiTError, match=wanted) as raised:
            load()
        assert "\n" not in str(raised.value)
