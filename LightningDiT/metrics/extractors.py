"""The networks whose view of an image is compared: FID's Inception, the judge of Fashion-MNIST, any timm model."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from LightningDiT.checkpoint import BUNDLED_FOLDER, load_into, load_weights
from LightningDiT.device import best_device
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import fingerprint
from LightningDiT.metrics.judge import load_judge

#: The weights that FID is defined by (TensorFlow's Inception of 2015-12-05), as torch-fidelity converted them.
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_FILE, INCEPTION_HASH = INCEPTION_URL.rsplit("/", 1)[1], "6726825d"
SPATIAL_CHANNELS = 7  # of `mixed_6/conv`, which sFID takes
JUDGE_FILE = Path(__file__).parents[2] / "models" / BUNDLED_FOLDER / "judge.safetensors"
JUDGE_SIDE = 32  # pixels
FIDELITY_PIN = "torch-fidelity==0.4.0"

Views = Mapping[str, Tensor]


class Extractor(ABC):
    """A network as a function from pixels to what it sees.

    Attributes:
        name: of the network, for the report.
        key: a text that changes with the network and its weights.
        layer: which layer `features` is.
        numbered: whether its outputs are numbered as the labels are, so that its argmax can be compared with them.
    """

    name: str
    key: str
    layer: str
    numbered: bool = False

    def __init__(self) -> None:
        self.device = best_device()

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return what it sees in (N, 3, H, W) uint8, float32 on the CPU.

        `features` (N, F); `logits` (N, C) where it classifies; `spatial` (N, S) where sFID is defined.
        """
        views = self.view(pixels.to(self.device))
        return {kind: value.float().cpu() for kind, value in views.items()}

    @abstractmethod
    def view(self, pixels: Tensor) -> dict[str, Tensor]:
        """As `__call__`, on the network's own device."""


def require_fidelity() -> None:
    """Make sure that torch-fidelity is there, before anything long is begun.

    Raises:
        LightningDiTError: it is not installed.
    """
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise LightningDiTError(
            f"torch-fidelity, which computes FID, Inception Score, precision and recall, is missing ({error})",
            f"pip install {FIDELITY_PIN}",
        ) from error


class Inception(Extractor):
    """The Inception-v3 of FID (Heusel et al., arXiv 1706.08500) in torch-fidelity's port, resizing included.

    `features` is `pool_3` (2048), `logits` the 1008 outputs without bias (as the Inception Score is computed by ADM
    and by TensorFlow's original), `spatial` the first 7 channels of `mixed_6/conv` at 17x17, 2023 values: what
    ADM's evaluator calls the spatial features and sFID (Nash et al., arXiv 2103.03841) is computed from. Its 1008
    classes have an order of their own, so that no accuracy follows from it.
    """

    layer = "pool_3"

    def __init__(self, weights: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity would unpickle whatever the file holds; it gets the tensors that the safe loader found
        fix, content = f"download {INCEPTION_URL}", io.BytesIO()
        try:
            torch.save(load_weights(weights), content)
        except LightningDiTError as error:
            raise LightningDiTError(error.message, fix) from error
        content.seek(0)
        try:
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], content)
        except RuntimeError as error:
            raise LightningDiTError(
                f"{weights} holds other weights than FID's Inception ({str(error).splitlines()[-1].strip()})",
                fix,
            ) from error
        self.name, self.key = "inception", f"inception {fingerprint(weights)}"
        self._spatial = torch.empty(0)  # of the batch that was seen last
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)  # `mixed_6/conv` in TensorFlow's graph
        self._network = network.to(self.device)

    def view(self, pixels: Tensor) -> dict[str, Tensor]:
        features, logits = self._network(pixels)  # (N, 2048), (N, 1008)
        return {"features": features, "logits": logits, "spatial": self._spatial}

    def _keep_spatial(self, module: object, inputs: object, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].flatten(1)  # (N, 7 * 17 * 17)


class JudgeView(Extractor):
    """The bundled classifier of Fashion-MNIST (studies/judge.py); sees 32x32 pixels."""

    layer, numbered = "penultimate layer", True

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self._judge = load_judge(weights).to(self.device)
        self.name, self.key = "judge", f"judge {fingerprint(weights)}"

    def view(self, pixels: Tensor) -> dict[str, Tensor]:
        if tuple(pixels.shape[2:]) != (JUDGE_SIDE, JUDGE_SIDE):
            raise LightningDiTError(
                f"the judge sees {JUDGE_SIDE}x{JUDGE_SIDE} pixels, the images have {pixels.shape[3]}x{pixels.shape[2]}",
                f"give --size {JUDGE_SIDE}, or other --features",
            )
        features = self._judge.features(pixels.float() / 127.5 - 1.0)  # (N, 96)
        return {"features": features, "logits": self._judge.output(features)}


class TimmView(Extractor):
    """Any model of timm: what goes into its classifier, and the classifier's outputs where it has one.

    Images are resized (not cropped) to the model's input and normalised as the model was trained.

    Args:
        name: as timm knows it.
        weights: file with the model's own names, which decides how many classes it has; the hub's where left out.
    """

    layer, numbered = "input of the classifier", True

    def __init__(self, name: str, weights: Path | None = None) -> None:
        super().__init__()
        import timm
        from timm.data import resolve_model_data_config

        self._model = _timm_model(timm, name, weights).to(self.device).eval()
        self.name = f"timm:{name}"
        source = fingerprint(weights) if weights else self._model.pretrained_cfg.get("hf_hub_id") or "hub"
        self.key = f"timm {name} {source}"
        data = resolve_model_data_config(self._model)
        self._channels, *side = data["input_size"]
        self._side = tuple(side)
        self._mode = data["interpolation"] if data["interpolation"] in ("bilinear", "bicubic") else "bicubic"
        self._mean, self._std = (torch.tensor(data[key], device=self.device)[:, None, None] for key in ("mean", "std"))

    def view(self, pixels: Tensor) -> dict[str, Tensor]:
        images = pixels.float() / 255.0
        if tuple(images.shape[2:]) != self._side:
            images = F.interpolate(images, self._side, mode=self._mode, antialias=True).clamp(0, 1)
        images = images.mean(1, keepdim=True) if self._channels == 1 else images
        maps = self._model.forward_features((images - self._mean) / self._std)
        features = self._model.forward_head(maps, pre_logits=True).flatten(1)  # (N, F)
        if not self._model.num_classes:
            return {"features": features}
        return {"features": features, "logits": self._model.forward_head(maps)}


def _timm_model(timm: Any, name: str, weights: Path | None) -> Any:
    """Return timm's model `name` with the weights of a file or of the hub."""
    fix = "choose a name from timm.list_models(pretrained=True), and give its weights as timm:NAME@FILE"
    if not timm.is_model(name):
        raise LightningDiTError(f"timm {timm.__version__} knows no model {name!r}", fix)
    if weights is None:
        try:
            return timm.create_model(name, pretrained=True)
        except Exception as error:  # no weights for it, no network, a full disk: timm and the hub have many errors
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise LightningDiTError(f"weights of {name} cannot be had ({reason[0]})", fix) from error
    head = timm.create_model(name, pretrained=False).pretrained_cfg.get("classifier")
    try:
        tensors = load_weights(weights)
        outputs = tensors.get(f"{head}.weight", torch.empty(0))
        model = timm.create_model(name, pretrained=False, num_classes=len(outputs) if outputs.dim() else 0)
        load_into(model, tensors, weights)
    except LightningDiTError as error:
        raise LightningDiTError(error.message, f"give a file with the weights of timm's {name}") from error
    return model


def find_inception(given: str | None) -> Path:
    """Return the file of Inception's weights: the one given, that in torch.hub's cache, or one downloaded there.

    The cache is where torch-fidelity itself keeps it; TORCH_HOME moves it.

    Raises:
        LightningDiTError: it is not there and cannot be downloaded; names the place and the command.
    """
    if given:
        return Path(given)
    place = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not place.is_file():
        print(f"Downloading Inception's weights (95 MB) to {place}", flush=True)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(place), INCEPTION_HASH, progress=os.isatty(2))
        except (OSError, RuntimeError) as error:  # no network or disk; another hash
            raise LightningDiTError(
                f"Inception's weights are not at {place} and cannot be downloaded ({error})",
                f"curl -L -o {INCEPTION_FILE} {INCEPTION_URL} where there is a network, then give"
                f" --inception-weights {INCEPTION_FILE}, or --features judge for Fashion-MNIST",
            ) from error
    return place


def make_extractor(features: str, inception: str | None = None) -> Extractor:
    """Return the network that `features` says: `inception`, `judge`, `timm:NAME` or `timm:NAME@FILE`.

    Args:
        inception: file of Inception's weights; see `find_inception`.

    Raises:
        LightningDiTError: another text, or the weights cannot be had or are not that network's.
    """
    kind, _, rest = features.partition(":")
    if kind == "timm" and rest:
        name, _, file = rest.partition("@")
        return TimmView(name, Path(file) if file else None)
    if features == "judge":
        return JudgeView(JUDGE_FILE)
    if features == "inception":
        return Inception(find_inception(inception))
    raise LightningDiTError(
        f"--features is {features!r}; inception, judge, timm:NAME or timm:NAME@FILE is expected", "choose one"
    )
