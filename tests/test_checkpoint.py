"""Weights as data: what loads, what is refused, and that nothing is lost in writing."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from LightningDiT.checkpoint import (
    atomic_path,
    fingerprint,
    inspect,
    load_into,
    load_weights,
    save_training_state,
    save_weights,
)
from LightningDiT.errors import LightningDiTError


def weights() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([1.0, 2.0])}


def wrapped(form: str) -> dict[str, object]:
    """The weights as one of the dictionaries that people save."""
    prefixed = {f"module.{name}": value for name, value in weights().items()}
    wrong = {name: value + 100 for name, value in weights().items()}
    return {
        "bare": weights(),
        "module": prefixed,
        "compiled": {f"_orig_mod.{name}": value for name, value in weights().items()},
        "ema": {"model": wrong, "ema": weights(), "opt": {"state": {}}, "config": {"seed": 1}},
        "model": {"model": prefixed, "step": 7},
        "state_dict": {"state_dict": weights(), "epoch": 3},
    }[form]


@pytest.mark.parametrize("form", ["bare", "module", "compiled", "ema", "model", "state_dict"])
def test_every_published_form_loads(form: str, tmp_path: Path) -> None:
    torch.save(wrapped(form), tmp_path / "weights.pt")
    loaded = load_weights(tmp_path / "weights.pt")
    assert loaded.keys() == weights().keys()
    for name, value in weights().items():
        torch.testing.assert_close(loaded[name], value, atol=0, rtol=0)


def test_what_the_file_holds_besides_is_reported(tmp_path: Path) -> None:
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
    with pytest.raises(LightningDiTError, match="does not exist; mend: .*python step2"):
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


def test_the_mend_of_a_bundled_file_is_git(tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError, match="mend: git restore models/fashion-mnist"):
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
