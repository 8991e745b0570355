"""Fixtures that many tests share: golden tensors, seeded weights, and a tiny pipeline's files.

All tests run on the CPU, whatever the machine has. With `--gpu` those marked `gpu` run on a GPU, and no others.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from LightningDiT.checkpoint import save_weights
from LightningDiT.config import load_config
from LightningDiT.device import best_device, gpu_count, gpu_device, gpu_failure
from LightningDiT.loading import model_settings
from LightningDiT.models.lightningdit import LightningDiT
from LightningDiT.tokenizer.autoencoder import AutoencoderKL
from LightningDiT.tokenizer.config import load_tokenizer_config
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.tokenizer.vavae import autoencoder_settings
from quickstart import ensure_venv
from tests.other_versions import other_python as other_python
from tests.published import good_stats, light_checkpoint
from tests.workers import pytest_cmdline_main as pytest_cmdline_main
from tests.workers import shared_folder

VISIBLE, ASKED = "CUDA_VISIBLE_DEVICES", "LIGHTNINGDIT_TESTS_ON_GPU"
if "--gpu" in sys.argv:
    os.environ.setdefault(ASKED, os.environ.get(VISIBLE, "all"))  # for the processes of pytest-xdist too
ON_GPU = ASKED in os.environ
# Before torch looks: tests compare bits, and each process that opens a GPU takes seconds. One GPU is enough for the
# tests that need one: a run on several would leave the process of its test.
ALL_GPUS = os.environ.get(ASKED, "")
os.environ[VISIBLE] = "" if not ON_GPU else "0" if ALL_GPUS == "all" else ALL_GPUS.partition(",")[0]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job ignores Ctrl-C; the tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["LIGHTNINGDIT_LANG"] = "en"  # one line for an error, whatever the locale

TINY_TOKENIZER = """
ckpt_path: tokenizer.safetensors
model:
  params:
    embed_dim: 4
    ddconfig: {z_channels: 4, resolution: 16, ch: 32, ch_mult: [1, 1], num_res_blocks: 1, attn_resolutions: []}
"""
TINY_CONFIG = """
ckpt_path: transformer.safetensors
data: {data_path: ., image_size: 16, num_classes: 3, class_names: ["cat, house cat", dog, "sea lion"]}
vae: {model_name: tokenizer.yaml, downsample_ratio: 2}
model: {model_type: LightningDiT-XS/2, in_chans: 4}
sample: {num_sampling_steps: 4, cfg_scale: 2.0, guided_channels: all, per_proc_batch_size: 2}
"""

PROJECT = Path(__file__).parent.parent
PACKAGE = PROJECT / "LightningDiT"
BUNDLED = PROJECT / "models" / "fashion-mnist"
GOLDEN = Path(__file__).parent / "golden"
COMPUTED = ("pos_embed", "freqs_cos", "freqs_sin")  # a model computes these for itself


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the tests marked gpu on a GPU, and no others")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu") and not ON_GPU:
        raise pytest.UsageError("torch is already told to use the CPU; give --gpu on the command line")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests for the chosen device: with --gpu those marked `gpu`, else all that do not need a GPU."""
    if config.getoption("--gpu") and not config.option.collectonly and best_device().type == "cpu":
        reason = gpu_failure(gpu_device(0)) if gpu_count() else "there is none, or torch has no CUDA"
        raise pytest.UsageError(f"--gpu: no GPU works here ({reason})")

    def fits(item: pytest.Item) -> bool:
        mark = item.get_closest_marker("gpu")
        return mark is not None if ON_GPU else mark is None or not mark.kwargs.get("needed", False)

    config.hook.pytest_deselected(items=[item for item in items if not fits(item)])
    items[:] = [item for item in items if fits(item)]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU with --gpu, else the CPU."""
    return gpu_device(0) if ON_GPU else torch.device("cpu")


def seeded_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor that the golden outputs were computed with for a parameter of this name."""
    generator = np.random.RandomState(zlib.crc32(name.encode()))  # frozen by NumPy's policy
    values = generator.standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        return torch.from_numpy(values * np.float32(0.7 / np.sqrt(np.prod(shape[1:]))))
    if name.endswith("weight"):
        return torch.from_numpy(1 + np.float32(0.1) * values)
    return torch.from_numpy(np.float32(0.02) * values)


def seed_weights(module: nn.Module) -> nn.Module:
    """Fill the parameters of `module` by name and return it in eval mode."""
    state = module.state_dict()
    for name, value in state.items():
        if not name.endswith(COMPUTED):
            state[name] = seeded_tensor(name, tuple(value.shape))
    module.load_state_dict(state)
    return module.eval()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, as the processes that a test starts have: the number of threads shows in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes within the block, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write bytes as a gzipped IDX file, as Fashion-MNIST comes."""
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}i", *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion_folder(tmp_path: Path) -> Path:
    """Twelve small photographs in Fashion-MNIST's files."""
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28))
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(12) % 3)
    return tmp_path


@pytest.fixture(scope="session")
def made_venv(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole virtual environment that has pip alone; tests change copies of it, which makes each a moved one, too."""
    with shared_folder(request, tmp_path_factory, "made") as folder:
        ensure_venv(folder / ".venv")
    return folder / ".venv"


@pytest.fixture(scope="session")
def manifest() -> dict[str, Any]:
    """The settings of every golden case."""
    return json.loads((GOLDEN / "manifest.json").read_text())


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    """The transformer's golden tensors."""
    return load_file(GOLDEN / "lightningdit.safetensors")


@pytest.fixture(scope="session")
def unit_model(manifest: dict[str, Any]) -> Callable[[str], LightningDiT]:
    """A function from a variant's name to the seeded unit model."""

    def build(variant: str = "default") -> LightningDiT:
        return seed_weights(LightningDiT(**{**manifest["common_kwargs"], **manifest["forward"][variant]}))

    return build


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a small tokenizer with seeded weights beside it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.yaml").write_text(TINY_TOKENIZER)
    settings = autoencoder_settings(load_tokenizer_config(folder / "tokenizer.yaml"))
    save_weights(seed_weights(AutoencoderKL(settings)).state_dict(), folder / "tokenizer.safetensors")
    return folder / "tokenizer.yaml"


@pytest.fixture(scope="session")
def tiny_source(tiny_tokenizer: Path) -> Path:
    """A folder with everything that a small pipeline needs; tests change copies of it."""
    folder = tiny_tokenizer.parent
    (folder / "config.yaml").write_text(TINY_CONFIG)
    model = seed_weights(LightningDiT(model_settings(load_config(folder / "config.yaml"))))
    save_weights(model.state_dict(), folder / "transformer.safetensors")
    LatentStats(torch.full((1, 4, 1, 1), 0.3), torch.full((1, 4, 1, 1), 1.7)).save(folder / "latents_stats.pt")
    return folder


@pytest.fixture
def tiny_folder(tiny_source: Path, tmp_path: Path) -> Path:
    """A copy of the small pipeline's folder that a test may damage."""
    return Path(shutil.copytree(tiny_source, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Contents of the three files by role, light but whole."""
    folder = tmp_path_factory.mktemp("published")
    torch.save(good_stats(), folder / "stats.pt")
    return {
        "vavae": light_checkpoint(folder / "vavae.pt", "vavae-f16d32", "state_dict"),
        "stats": (folder / "stats.pt").read_bytes(),
        "dit": light_checkpoint(folder / "dit.pt", "LightningDiT-XL/1", "ema"),
    }
