"""Damaged and strange inputs of every reader end in a result or in one line, never in a traceback or a hang.

Real small files of each kind are changed byte by byte, cut, and filled with values of other types, and hypothesis draws
the changes from fixed seeds (`derandomize`): `EXAMPLES` inputs a reader for each way of changing, and `OPTIONS` command
lines an entry point, up to 1,938 inputs in all. An input that once showed a fault is kept in `KEPT` and always tried.
No input may take more than `SECONDS`, `MEMORY` bytes of address space, or change a file that was there.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import importlib
import io
import json
import re
import shutil
import signal
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn

from LightningDiT.checkpoint import inspect, load_file, save_training_state, save_weights
from LightningDiT.config import load_config
from LightningDiT.console import run_main
from LightningDiT.data.fashion_mnist import read_idx
from LightningDiT.data.image_files import read_image
from LightningDiT.data.image_sets import open_samples
from LightningDiT.data.labels import CLASS_NAMES, LATENTS_MANIFEST, Labels, names_of_latents, names_of_model
from LightningDiT.data.list_files import open_list
from LightningDiT.data.shards import LatentShards, write_shard
from LightningDiT.images import centre_crop
from LightningDiT.metrics.cache import cached
from LightningDiT.metrics.sources import open_source
from LightningDiT.radar.level_images import load_windows, open_levels
from LightningDiT.radar.split import rows_digest, save_split
from LightningDiT.radar.written import FORMAT, levels_digest
from LightningDiT.sampling.calibrated import load_solvers
from LightningDiT.sampling.resumable_run import ACCELERATION, kept_layout, kept_plan, opened_run
from LightningDiT.tokenizer.config import load_tokenizer_config, tokenizer_training
from LightningDiT.tokenizer.latents import LatentStats, diagnose
from LightningDiT.tokenizer.vavae import autoencoder_settings
from LightningDiT.training import extraction
from LightningDiT.training.curves import quantities, read_log
from LightningDiT.training.run_dir import (
    RunDir,
    load_optimizer,
    random_state,
    require_form,
    restoring,
    set_random_state,
)
from setup_steps.downloads import PartFile, RemoteFile
from tests.conftest import TINY_CONFIG, TINY_TOKENIZER, write_idx
from tests.test_split import rows_of

EXAMPLES = 30
SECONDS = 10
MEMORY = 2 * 2**30


class HangError(BaseException):
    """An input took longer than `SECONDS`."""


# ---- ways of changing

#: Values of other types, sizes and depths, as JSON and YAML have them.
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, -(10**30), 1e308, 0.5, -0.5),
    *(float("nan"), float("inf"), -float("inf")),
    *("", "a", "\x00", "\x1b[31m", "\ud800", "../a", "/dev/zero", "${x}", "x" * 5000, "9" * 400, "1e999", "nan"),
    *([], {}, [[]], [None], [1, "a", None], {"": None}, {"a": {"a": {}}}, [0] * 1000),
]
#: The same for pickles, which hold tensors also.
ODD_PICKLED: list[Any] = [
    *ODD,
    *(torch.zeros(0), torch.zeros(()), torch.ones(3), torch.ones(2, 3), torch.full((3,), float("nan"))),
    *(torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.complex64)),
    *(torch.ones(3, device="meta"), torch.ones(3).to_sparse(), nn.Parameter(torch.ones(3)), (1, 2), {1: 2}, b"a"),
    *(torch.zeros(1).expand(10**9), torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.bfloat16)),
]
BYTES = [
    b"",
    b"\x00",
    b"\xff",
    b"\n",
    b'"',
    b"[" * 3000,
    b"{" * 3000,
    b"9" * 5000,
    b"\xff\xfe",
    b"\x00" * 64,
    b"- " * 2000,
]


@st.composite
def changed_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Cut a file, or overwrite, insert and delete at a few positions; or give arbitrary bytes."""
    kind = draw(st.sampled_from(["edit", "edit", "edit", "cut", "any"]))
    if kind == "any":
        return draw(st.binary(max_size=200))
    if kind == "cut":
        return whole[: draw(st.integers(0, len(whole)))]
    for _ in range(draw(st.integers(1, 4))):
        end = len(whole)  # headers and tables of contents are at both ends
        start = draw(st.integers(0, end) | st.integers(0, min(80, end)) | st.integers(max(0, end - 80), end))
        new = draw(st.binary(max_size=8) | st.sampled_from(BYTES))
        whole = whole[:start] + new + whole[start + draw(st.sampled_from([0, len(new), 1, 8])) :]
    return whole


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the keys that lead to each value within a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(path for key, part in inner for path in places(part, (*above, key)))]


@st.composite
def changed_values(draw: st.DrawFn, whole: Any, odd: list[Any]) -> Any:
    """Replace, drop or add a few values anywhere in nested ones."""
    whole = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        *path, key = (None, *draw(st.sampled_from(places(whole))))
        new = copy.deepcopy(draw(st.sampled_from(odd)))
        if not path:
            whole = new
            continue
        holder = whole
        for step in path[1:]:
            holder = holder[step]
        action = draw(st.sampled_from(["set", "set", "set", "drop", "add"]))
        if action == "set":
            holder[key] = new
        elif action == "drop":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from(["new", "", "labels", "${x}"]))] = new
        else:
            holder.insert(0, new)
    return whole


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def as_yaml(value: Any) -> bytes:
    return yaml.dump(value, sort_keys=False).encode()  # not the project's own writer


def as_safetensors(header: Any, rest: bytes = b"") -> bytes:
    text = as_json(header)
    return struct.pack("<Q", len(text)) + text + rest


def as_pickle(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def inputs_of(whole: bytes, name: str) -> list[st.SearchStrategy[bytes]]:
    """Return the ways in which a file of this name is changed."""
    ways: list[st.SearchStrategy[bytes]] = [changed_bytes(whole)]
    if name.endswith(".json"):
        ways.append(changed_values(json.loads(whole), ODD).map(as_json))
    elif name.endswith(".jsonl"):
        rows = [json.loads(line) for line in whole.splitlines()]
        lines = changed_values(rows, ODD).filter(lambda rows: isinstance(rows, list))
        ways.append(lines.map(lambda rows: b"\n".join(map(as_json, rows))))
    elif name.endswith(".yaml"):
        ways.append(changed_values(yaml.safe_load(whole), ODD).map(as_yaml))
    elif name.endswith(".safetensors"):
        size = struct.unpack("<Q", whole[:8])[0]
        header, rest = json.loads(whole[8 : 8 + size]), whole[8 + size :]
        ways.append(changed_values(header, ODD).map(lambda value: as_safetensors(value, rest)))
        ways.append(changed_values(load(whole), TENSORS).filter(is_saved).map(save))
        if header.get(METADATA):
            ways.append(changed_metadata(header, rest))
    elif name.endswith(".pt") and zipfile.is_zipfile(io.BytesIO(whole)):
        ways.append(changed_values(torch.load(io.BytesIO(whole), weights_only=True), ODD_PICKLED).map(as_pickle))
    elif name.endswith(".npz"):
        ways.append(changed_arrays(whole))
    elif name.endswith(".gz"):
        ways.append(changed_bytes(gzip.decompress(whole)).map(gzip.compress))
    return ways


def can_be_saved(tensor: Tensor) -> bool:
    """Return whether this safetensors writes tensors of such a dtype: 0.4.5 writes no complex ones."""
    try:
        return bool(save({"tensor": tensor}))
    except KeyError:
        return False


METADATA = "__metadata__"
TENSORS = [
    *(torch.zeros(0), torch.zeros(()), torch.ones(3), torch.ones(2, 3), torch.full((2,), float("nan")), -torch.ones(3)),
    *(
        torch.arange(3) - 1,
        torch.ones(2, dtype=torch.bool),
        torch.ones(2, dtype=torch.complex64),
        torch.arange(2) + 2**60,
    ),
    *(torch.ones(2, 4, 2, 2), torch.ones(3, 4, 2, 2), torch.ones(0, 4, 2, 2), torch.full((2, 4, 2, 2), float("inf"))),
    *(torch.ones(2, dtype=torch.float64), torch.ones(3, dtype=torch.bfloat16), torch.arange(3, dtype=torch.uint8)),
    *(torch.arange(300), torch.ones(1, 4, 2, 2), torch.ones(2, 0, 2, 2), torch.ones(2, 3).to(torch.float8_e4m3fn)),
]
TENSORS = [tensor for tensor in TENSORS if can_be_saved(tensor)]


def is_saved(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(tensor, Tensor) for tensor in value.values())


@st.composite
def changed_metadata(draw: st.DrawFn, header: dict[str, Any], rest: bytes) -> bytes:
    """Change JSON within the texts of a safetensors file's metadata."""
    header = copy.deepcopy(header)
    name = draw(st.sampled_from(sorted(header[METADATA])))
    try:
        value = json.loads(header[METADATA][name])
    except ValueError:
        value = header[METADATA][name]
    header[METADATA][name] = json.dumps(draw(changed_values(value, ODD))) if draw(st.integers(0, 9)) else "[" * 5000
    return as_safetensors(header, rest)


ARRAYS = [
    *(np.zeros((0, 4, 4, 3), np.uint8), np.zeros((2, 0, 4, 3), np.uint8), np.zeros((2, 4, 4, 1), np.uint8)),
    *(np.zeros((2, 4, 4, 3), np.float32), np.zeros((), np.uint8), np.array(["a", "b"]), np.array([1.5, 2])),
    *(np.array([-1, 0]), np.array([0, 10**18]), np.array([np.nan, 0]), np.array([0j, 1]), np.ones((3, 3))),
    *(np.full((2, 2), np.inf), np.zeros((2, 4, 4, 3), np.uint8, order="F"), np.array([True, False])),
]


@st.composite
def changed_arrays(draw: st.DrawFn, whole: bytes) -> bytes:
    """Replace an array of an .npz file, or change its bytes and pack them with a right checksum."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = draw(st.sampled_from(sorted(parts)))
    stream = io.BytesIO()
    np.lib.format.write_array(stream, draw(st.sampled_from(ARRAYS)))
    parts[name] = draw(st.just(stream.getvalue()) | changed_bytes(parts[name]))
    return packed(parts, draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])))


def packed(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for part, content in parts.items():
            archive.writestr(part, content)
    return stream.getvalue()


# ---- readers

CACHE = "values.json"
REPLACED = (CACHE, "w.pt.part.json")  # made again if they are damaged


@dataclass(frozen=True)
class Reader:
    """A file, how a good one is made, and what reads it.

    Attributes:
        file: its name.
        make: writes it, and what belongs to it, into a folder.
        read: reads the file of that path.
        lists: the folder beside it is read too, so that a message may name this.
    """

    file: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def weights_of(path: Path) -> list[str]:
    inspect(path)
    return load_file(layer(), path)


def save_old(path: Path) -> None:
    torch.save({"model": layer().state_dict()}, path, _use_new_zipfile_serialization=False)


def save_index(folder: Path) -> None:
    save_weights(layer().state_dict(), folder / "model-00001-of-00001.safetensors")
    listed = dict.fromkeys(layer().state_dict(), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def some_stats() -> LatentStats:
    return LatentStats(torch.full((1, 4, 1, 1), 0.3), torch.full((1, 4, 1, 1), 1.7))


def read_stats(path: Path) -> Tensor:
    diagnose(path, 4)
    return LatentStats.load(path, 4).normalise(torch.zeros(1, 4, 2, 2))


def save_model(folder: Path) -> None:
    metadata = {CLASS_NAMES: json.dumps(["ant", "bee"])} | some_stats().as_metadata()
    save_weights(layer().state_dict(), folder / "model.safetensors", metadata)


def read_model(path: Path) -> None:
    names_of_model(path)
    LatentStats.from_metadata(inspect(path).metadata, path)


def read_config(path: Path) -> None:
    config = load_config(path)
    with contextlib.suppress(FileNotFoundError):
        Labels.of(config)


def read_tokenizer(path: Path) -> None:
    config = load_tokenizer_config(path)
    autoencoder_settings(config)
    tokenizer_training(config)


SOLVERS = """
weights: 'abc'
solvers:
- guidance: {cfg_scale: 2.0, interval_start: 0.1}
  path_type: Linear
  error: 0.1
  noises: 8
  times: [0.0, 0.5, 1.0]
  coefficients:
  - [0.5]
  - [0.1, 0.4]
"""


def read_solvers(path: Path) -> None:
    for solver in load_solvers(path).solvers:
        solver.tensors()


EXTRACTED = {"settings": {"images": 2, "image_list": "k", "tokenizer": {"embed_dim": 4}}, CLASS_NAMES: ["a", "b"]}


def read_extracted(path: Path) -> None:
    names_of_latents(path.parent)
    extraction._check_settings(path, EXTRACTED["settings"])


def save_samples(folder: Path) -> None:
    for name in ("000000.png", "000001.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    plan = {"graphs": False, "batch": 4, "attention": None}
    described = {"seed": 0, "labels": [1, 0], "sample": {"cfg_scale": 2.0}, CLASS_NAMES: ["a", "b"], ACCELERATION: plan}
    (folder / "manifest.json").write_text(json.dumps(described))


def read_samples(path: Path) -> None:
    open_samples(path.parent).batch([0, 1])
    kept_layout(path.parent, False)
    kept_plan(path)
    with opened_run(path.parent, {"seed": 0, "labels": [1, 0], "sample": {"cfg_scale": 2.0}, CLASS_NAMES: ["a", "b"]}):
        pass


def save_level_files(folder: Path) -> None:
    """Two windows with their split."""
    rows = rows_of({"a": [2]})
    save_split(folder / "split.json", folder, folder, rows, {})
    grey, files = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257, {row.name: f"{row.number}.png" for row in rows}
    (folder / "levels").mkdir(exist_ok=True)
    for name in files.values():
        Image.fromarray(grey).save(folder / "levels" / name)
    told = {"format": FORMAT, "split": rows_digest(rows), "files": files, "pixels": [16, 16], "db_range": [-50, 0]}
    digests = dict.fromkeys(files, levels_digest(grey))
    (folder / "manifest.json").write_text(json.dumps({**told, "digests": digests, "db_range_of": None}))


def read_level_files(path: Path) -> None:
    split_file = path.with_name("split.json")
    load_windows(path.parent, split_file, "training")
    open_levels(path.parent, split_file, "training", draws=2).batch([0, 1])


REMOTE = RemoteFile("w.pt", "http://127.0.0.1/a/b/resolve/c/w.pt", 8, "0" * 64, "c")


def save_part(folder: Path) -> None:
    (folder / "w.pt.part").write_bytes(b"1234")
    (folder / "w.pt.part.json").write_text(json.dumps({**vars(REMOTE), "validator": '"e"'}))


def read_part(path: Path) -> None:
    path.with_name("w.pt.part").write_bytes(b"1234")
    with contextlib.closing(PartFile(path.with_name("w.pt"), REMOTE)) as part:
        part.take_up()


def save_shard(folder: Path) -> None:
    record = {extraction.RECORD: json.dumps({"images": 3, "moments": {}, "largest_label": 2, "unreadable": []})}
    latents = torch.arange(24.0).view(3, 2, 2, 2)
    write_shard(folder / "latents_rank00_shard000.safetensors", latents, torch.arange(3), latents + 1, record)


def read_shard(path: Path) -> None:
    extraction._record(path)
    shards = LatentShards(path.parent)
    shards.batch(torch.arange(len(shards)), torch.ones(len(shards), dtype=torch.bool))


def save_shard_part(folder: Path) -> None:
    rows = {"labels": torch.arange(2), "read": torch.ones(2, dtype=torch.bool), "cut": torch.zeros(2)}
    rows["latents0"] = torch.ones(2, 4, 2, 2)
    save_weights(rows, folder / "shard.part.safetensors", {"unreadable": json.dumps([["a", "b"]])})


def read_shard_part(path: Path) -> None:
    target = path.with_name("shard.safetensors")
    target.with_suffix(extraction.PART).write_bytes(path.read_bytes())
    rows = extraction._ShardRows(target, 3, (4, 2, 2), flips=False)
    assert 0 <= rows.done <= 3


def save_images(folder: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "list.csv").write_text("path,label\na.png,cat\nb.png,dog\n")
    (folder / "list.txt").write_text("a.png 0\nb.png 1\n")


def read_list(path: Path) -> None:
    images = open_list(path)
    _ = images.key, images.state, images.class_list()[:10]


def image_file(format_name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image.{format_name}")

    return make


def save_deep(folder: Path) -> None:
    Image.fromarray(np.arange(63, dtype=np.uint16).reshape(9, 7) * 1000).save(folder / "deep.png")


def read_cropped(path: Path) -> Any:
    """As `ImageSet.batch`, which says of any error that the image is none."""
    try:
        return np.asarray(centre_crop(read_image(path), 4))
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        return None


def read_npz(path: Path) -> None:
    source = open_source(str(path))
    if source.images is not None:
        source.images.batch(range(source.images.count))


def save_npz(folder: Path) -> None:
    pixels = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.savez(folder / "samples.npz", arr_0=pixels, arr_1=np.array([0, 1]), mu=np.zeros(3), sigma=np.eye(3))


def checkpoint_state() -> dict[str, Any]:
    model = layer()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"step": 1, "model": model.state_dict(), "opt": optimizer.state_dict(), "random": random_state()}


def other_optimizer() -> bytes:
    state = checkpoint_state()
    state["opt"]["param_groups"][0]["amsgrad"] = True
    return as_pickle(state)


def read_checkpoint(path: Path) -> None:
    from LightningDiT.checkpoint import load_training_state

    model = layer()
    optimizer = torch.optim.AdamW(model.parameters())
    found = RunDir(path.parent).newest()
    if found is None:
        return
    with restoring(found):
        state = load_training_state(found)
        require_form(state, {"step": 1, "model": model.state_dict(), "opt": {}, "random": {}})
        model.load_state_dict(state["model"])
        load_optimizer(optimizer, state["opt"])
        set_random_state(state["random"])
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def read_rows(path: Path) -> None:
    assert all(isinstance(name, str) for name in quantities({"run": read_log(path)}))


def into(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


READERS = [
    Reader(
        "weights.safetensors", lambda to: save_weights(layer().state_dict(), to / "weights.safetensors"), weights_of
    ),
    Reader(
        "weights.pt", lambda to: torch.save({"ema": layer().state_dict(), "step": 3}, to / "weights.pt"), weights_of
    ),
    Reader("old.pt", lambda to: save_old(to / "old.pt"), weights_of),
    Reader("model.safetensors.index.json", save_index, weights_of),
    Reader("model.safetensors", save_model, read_model),
    Reader("latents_stats.pt", lambda to: some_stats().save(to / "latents_stats.pt", 5), read_stats),
    Reader("config.yaml", lambda to: into(to, "config.yaml", TINY_CONFIG), read_config),
    Reader("tokenizer.yaml", lambda to: into(to, "tokenizer.yaml", TINY_TOKENIZER), read_tokenizer),
    Reader("solvers.yaml", lambda to: into(to, "solvers.yaml", SOLVERS), read_solvers),
    Reader(LATENTS_MANIFEST, lambda to: into(to, LATENTS_MANIFEST, json.dumps(EXTRACTED)), read_extracted),
    Reader("manifest.json", save_samples, read_samples),
    Reader("manifest.json", save_level_files, read_level_files),
    Reader("w.pt.part.json", save_part, read_part),
    Reader(CACHE, lambda to: into(to, CACHE, "[1, 2.5]"), lambda path: cached(path, list, list)),
    Reader(
        "log.jsonl", lambda to: into(to, "log.jsonl", '{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n'), read_rows
    ),
    Reader("latents_rank00_shard000.safetensors", save_shard, read_shard),
    Reader("shard.part.safetensors", save_shard_part, read_shard_part),
    Reader("list.csv", save_images, read_list),
    Reader("list.txt", save_images, read_list),
    *(Reader(f"image.{name}", image_file(name), read_cropped) for name in ("png", "jpg", "webp", "bmp", "gif", "tiff")),
    Reader("deep.png", save_deep, read_cropped),
    Reader("images.gz", lambda to: write_idx(to / "images.gz", np.zeros((2, 4, 4))), read_idx),
    Reader("samples.npz", save_npz, read_npz),
    Reader(
        "checkpoint-0000001.pt",
        lambda to: save_training_state(checkpoint_state(), to / "checkpoint-0000001.pt"),
        read_checkpoint,
    ),
]
#: The smallest input of each fault that was found, by reader.
KEPT: dict[str, list[bytes]] = {
    "model.safetensors.index.json": [b'{"weight_map": {"a": ""}}'],
    "tokenizer.yaml": [b"ckpt_path: -.inf\nmodel: {params: {ddconfig: {}}}", b"'9'"],
    "latents_rank00_shard000.safetensors": [
        as_safetensors({METADATA: {extraction.RECORD: text}}) for text in ("3", "{}", "[" * 5000)
    ],
    "shard.part.safetensors": [as_safetensors({METADATA: {"unreadable": "[" * 5000}})],
    "list.csv": [b"a.png,a" + b"9" * 5000],
    "samples.npz": [
        packed({"mu.npy": b"no array", "sigma.npy": b""}),
        packed({"mu.npy": b"\x93NUMPY\x01\x00\x02\x00{[", "sigma.npy": b""}),
    ],
    "checkpoint-0000001.pt": [other_optimizer()],
}


# ---- the checks


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Bound the time and the further address space of the block."""
    resource = pytest.importorskip("resource")

    def end(*_: object) -> None:
        raise HangError

    before, limit = signal.signal(signal.SIGALRM, end), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def said_by(action: Callable[[], object]) -> tuple[int, list[str]]:
    """Return the exit code of a command, and its lines on stderr without warnings; any traceback is raised."""
    said = io.StringIO()
    formatter = warnings.formatwarning
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), bounded():
            code = run_main(lambda: [0, action()][0])
    finally:
        warnings.formatwarning = formatter
    return code, [line for line in said.getvalue().splitlines() if not line.startswith(("warning:", "note:"))]


def check(reader: Reader, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    code, lines = said_by(lambda: reader.read(path))
    if code:
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert "memory ran out" not in lines[0] and "nested without end" not in lines[0], lines
        assert path.name in lines[0] or str(path.parent) in lines[0], lines
    if path.exists() and reader.file not in REPLACED:
        assert path.read_bytes() == content


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="bounds memory as Linux does")
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.file)
def test_files(reader: Reader, tmp_path: Path) -> None:
    reader.make(tmp_path)
    path = tmp_path / reader.file
    whole = path.read_bytes()
    check(reader, path, whole)
    for way in inputs_of(whole, reader.file):

        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(content=way)
        def changed(content: bytes) -> None:
            check(reader, path, content)

        for kept in KEPT.get(reader.file, ()):
            changed = example(content=kept)(changed)
        changed()


# ---- options

OPTIONS = 12
#: Modules with a `main(argv)`, and what their command line needs.
PROGRAMS: dict[str, list[str]] = {
    "LightningDiT.inference": ["--config", "config.yaml", "--dry-run"],
    "LightningDiT.train": ["--config", "config.yaml", "--dry-run"],
    "LightningDiT.train_tokenizer": ["--config", "tokenizer.yaml", "--output", "o", "--images", "images", "--dry-run"],
    "LightningDiT.extract_features": ["--config", "config.yaml", "--output", "o", "--images", "images", "--dry-run"],
    "LightningDiT.evaluate": ["--samples", "images", "--reference", "missing"],
    "LightningDiT.evaluate_tokenizer": ["--config", "tokenizer.yaml", "--images", "missing"],
    "LightningDiT.tools.merge_adapter": ["--config", "missing.yaml", "--output", "o", "--dry-run"],
    "LightningDiT.tools.convert_tokenizer": ["--tokenizer", "tokenizer.yaml", "--output", "o", "--dry-run"],
    "LightningDiT.tools.convert_pipeline": ["--config", "config.yaml", "--output", "o", "--dry-run"],
    "LightningDiT.tools.prune_latents": ["--latents", "shards", "--output", "o", "--dry-run"],
    "LightningDiT.tools.plot_training": ["missing"],
    "LightningDiT.tools.calibrate_solver": ["--config", "missing.yaml"],
    "LightningDiT.tools.match_guidance": ["--config", "missing.yaml"],
    "LightningDiT.tools.choose_tokenizer": ["--levels", "missing", "--split-file", "missing.json"],
    "LightningDiT.tools.training_memory": ["--config", "missing.yaml"],
    "LightningDiT.tools.simulate_walkers": ["--output", "o", "--dry-run"],
    "LightningDiT.tools.export_windows": ["--samples", "images", "--output", "o.npz"],
    "LightningDiT.tools.sweep_guidance": ["--config", "missing.yaml", "--dry-run"],
    "fix_latents_stats": ["--stats", "latents_stats.pt", "--dry-run"],
    "step3_setup_configs": ["--dry-run"],
    "step4_run_inference": ["--config", "config.yaml", "--dry-run"],
    "step4_demo_inference": ["--dry-run"],
    "step6_adapt_models": ["--levels", "missing", "--split-file", "missing.json", "--dry-run"],
    "step7_judge_generated": ["--generated", "images", "--levels", "missing", "--split-file", "missing.json"],
}
TEXTS = [
    *(
        "",
        "0",
        "1",
        "3",
        "-1",
        "1e999",
        "nan",
        "9" * 5000,
        "a",
        "None",
        "1.5",
        "true",
        ",",
        "0,1",
        "0 1",
        "cat",
        "\x00",
    ),
    *("\x1b[31m", "\udce9", "\ud800", "x" * 5000, "/dev/null", "/dev/zero", "/proc/self/mem", "missing", ".", "~"),
    *("config.yaml", "tokenizer.yaml", "transformer.safetensors", "images", "loop", "images/a.png", "[" * 3000, "${x}"),
]


@pytest.fixture(scope="module")
def house(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file of each kind that options name."""
    folder = Path(shutil.copytree(tiny_source, tmp_path_factory.mktemp("house") / "h"))
    for label in ("cat", "dog"):
        (folder / "images" / label).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(folder / "images" / label / "a.png")
    (folder / "images" / "cat" / "b.png").symlink_to("b.png")
    (folder / "loop").symlink_to("loop")
    (folder / "shards").mkdir()
    save_shard(folder / "shards")
    return folder


def options_of(program: str) -> list[str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        importlib.import_module(program).main(["--help"])
    found = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", said.getvalue())
    return sorted(set(found) - {"--help", "--test"})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="bounds memory as Linux does")
@pytest.mark.parametrize("program", PROGRAMS)
def test_options(program: str, house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(house)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names, before = options_of(program), contents(house)
    pairs = st.tuples(st.sampled_from(names), st.sampled_from(TEXTS)) if names else st.nothing()

    @settings(
        max_examples=OPTIONS, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(chosen=st.lists(pairs, min_size=1, max_size=2), joined=st.booleans())
    def run(chosen: list[tuple[str, str]], joined: bool) -> None:
        more = [part for name, text in chosen for part in ([f"{name}={text}"] if joined else [name, text])]
        with contextlib.suppress(SystemExit):  # of argparse, after its own line
            code, lines = said_by(lambda: importlib.import_module(program).main([*PROGRAMS[program], *more]))
            assert not code or (len(lines) == 1 and lines[0].startswith("error: ")), (more, lines)
            assert not any("memory ran out" in line for line in lines), (more, lines)
        assert contents(house) == before, more

    run()


def test_the_count_of_inputs(tmp_path: Path) -> None:
    ways = 0
    for number, reader in enumerate(READERS):
        folder = tmp_path / str(number)
        folder.mkdir()
        reader.make(folder)
        ways += len(inputs_of((folder / reader.file).read_bytes(), reader.file))
    assert f"up to {ways * EXAMPLES + len(PROGRAMS) * OPTIONS:,} inputs" in __doc__.replace("\n", " ")
