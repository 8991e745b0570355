"""The networks whose features are compared: FID's Inception, the judge of Fashion-MNIST, any model of timm."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from LightningDiT.checkpoint import BUNDLED_FOLDER, load_weights
from LightningDiT.data.fashion_mnist import FASHION_MNIST_CLASSES
from LightningDiT.data.labels import IMAGENET_CLASSES, imagenet_synsets, names_of_model
from LightningDiT.device import best_device
from LightningDiT.errors import LightningDiTError, fixed_by
from LightningDiT.files import fingerprint
from LightningDiT.images import to_float
from LightningDiT.metrics.judge import load_judge
from LightningDiT.tokenizer.pretrained import cached_download, timm_model

#: The weights that FID is defined by (TensorFlow's Inception of 2015-12-05), as torch-fidelity converted them.
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
SPATIAL_CHANNELS = 7  # of `mixed_6/conv`, for sFID
JUDGE_FILE = Path(__file__).parents[2] / "models" / BUNDLED_FOLDER / "judge.safetensors"
JUDGE_SIDE = 32  # pixels
INCEPTION = "inception"  # name of the one network that FID and Inception Score are named after

#: `features` (N, F); `logits` (N, C) if the network classifies; `spatial` (N, S) if sFID is defined for it.
Activations = Mapping[str, Tensor]


class Extractor(ABC):
    """A network as a function from pixels to activations.

    Attributes:
        name: of the network, for the report.
        key: text that changes with the network and its weights.
        layer: layer of `features`.
        numbered: whether the logits have the order of the labels, so that an accuracy follows.
        classes: names of the outputs, as far as known.
    """

    name: str
    key: str
    layer: str
    numbered: bool = False
    classes: tuple[str, ...] | None = None

    def __init__(self) -> None:
        self.device = best_device()

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the activations for pixels (N, 3, H, W) uint8, float32 on the CPU."""
        activations = self.activations(pixels.to(self.device))
        return {kind: value.float().cpu() for kind, value in activations.items()}

    @abstractmethod
    def activations(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the activations for pixels (N, 3, H, W) uint8 on the network's device."""


class InceptionExtractor(Extractor):
    """The Inception-v3 of FID (Heusel et al., arXiv 1706.08500) in torch-fidelity's port, resizing included.

    `features` is `pool_3` (2048). `logits` are the 1008 outputs without bias, as ADM and TensorFlow's original compute
    the Inception Score; their order is not that of ImageNet's classes. `spatial` are the first 7 channels of
    `mixed_6/conv` at 17x17 (2023), from which ADM's evaluator computes sFID (Nash et al., arXiv 2103.03841).
    """

    layer = "pool_3"

    def __init__(self, weights: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity would unpickle any content of the file; it gets the tensors of the safe loader instead
        fix, content = f"download {INCEPTION_URL}", io.BytesIO()
        with fixed_by(fix):
            torch.save(load_weights(weights), content)
        content.seek(0)
        try:
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], content)
        except RuntimeError as error:
            raise LightningDiTError(
                f"{weights} holds other weights than FID's Inception ({str(error).splitlines()[-1].strip()})",
                fix,
            ) from error
        self.name, self.key = INCEPTION, f"{INCEPTION} {fingerprint(weights)}"
        self._spatial = torch.empty(0)  # of the last batch
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)  # `mixed_6/conv` in TensorFlow's graph
        self._network = network.to(self.device)

    def activations(self, pixels: Tensor) -> dict[str, Tensor]:
        features, logits = self._network(pixels)  # (N, 2048), (N, 1008)
        return {"features": features, "logits": logits, "spatial": self._spatial}

    def _keep_spatial(self, module: object, inputs: object, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].flatten(1)  # (N, 7 * 17 * 17)


class JudgeExtractor(Extractor):
    """The bundled classifier of Fashion-MNIST, for images of 32x32 pixels."""

    layer, numbered, classes = "penultimate layer", True, FASHION_MNIST_CLASSES

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self._judge = load_judge(weights).to(self.device)
        self.name, self.key = "judge", f"judge {fingerprint(weights)}"

    def activations(self, pixels: Tensor) -> dict[str, Tensor]:
        if tuple(pixels.shape[2:]) != (JUDGE_SIDE, JUDGE_SIDE):
            raise LightningDiTError(
                f"images have {pixels.shape[3]}x{pixels.shape[2]} pixels; the judge expects {JUDGE_SIDE}x{JUDGE_SIDE}",
                f"give --size {JUDGE_SIDE}, or other --features",
            )
        features = self._judge.features(to_float(pixels))  # (N, 96)
        return {"features": features, "logits": self._judge.output(features)}


class TimmExtractor(Extractor):
    """Any model of timm: the input of its classifier, and the logits if it has one.

    Images are resized (not cropped) to the model's input and normalised as in its training.

    Args:
        name: of the model in timm.
        weights: file with timm's names for its tensors; default: from the hub.
    """

    layer, numbered = "input of the classifier", True

    def __init__(self, name: str, weights: Path | None = None) -> None:
        super().__init__()
        fix = "choose a name from timm.list_models(pretrained=True), and give its weights as timm:NAME@FILE"
        self._model = timm_model(name, weights, classifier=True, fixes=(fix, fix)).to(self.device).eval()
        from timm.data import resolve_model_data_config

        self.name = f"timm:{name}"
        self.classes = names_of_model(weights) if weights else None
        if self.classes is None and self._model.num_classes == IMAGENET_CLASSES:
            self.classes = imagenet_synsets()
        source = fingerprint(weights) if weights else self._model.pretrained_cfg.get("hf_hub_id") or "hub"
        self.key = f"timm {name} {source}"
        data = resolve_model_data_config(self._model)
        self._channels, *side = data["input_size"]
        self._side = tuple(side)
        self._mode = data["interpolation"] if data["interpolation"] in ("bilinear", "bicubic") else "bicubic"
        self._mean, self._std = (torch.tensor(data[key], device=self.device)[:, None, None] for key in ("mean", "std"))

    def activations(self, pixels: Tensor) -> dict[str, Tensor]:
        images = pixels.float() / 255.0
        if tuple(images.shape[2:]) != self._side:
            images = F.interpolate(images, self._side, mode=self._mode, antialias=True).clamp(0, 1)
        images = images.mean(1, keepdim=True) if self._channels == 1 else images
        maps = self._model.forward_features((images - self._mean) / self._std)
        features = self._model.forward_head(maps, pre_logits=True).flatten(1)  # (N, F)
        if not self._model.num_classes:
            return {"features": features}
        return {"features": features, "logits": self._model.forward_head(maps)}


def find_inception(given: str | None) -> Path:
    """Return the file of Inception's weights: `given`, else that of torch.hub's cache, else a download.

    torch-fidelity uses the same cache.

    Raises:
        LightningDiTError: see `cached_download`.
    """
    fix = f"give --inception-weights {INCEPTION_URL.rsplit('/', 1)[1]}, or --features judge for Fashion-MNIST"
    return Path(given) if given else cached_download(INCEPTION_URL, "Inception's weights (95 MB)", fix)


def make_extractor(features: str, inception: str | None = None) -> Extractor:
    """Return the network that `features` names: `inception`, `judge`, `timm:NAME` or `timm:NAME@FILE`.

    Args:
        inception: file of Inception's weights, see `find_inception`.

    Raises:
        LightningDiTError: the name is another one, or the weights cannot be had or belong to another network.
    """
    kind, _, rest = features.partition(":")
    if kind == "timm" and rest:
        name, _, file = rest.partition("@")
        return TimmExtractor(name, Path(file) if file else None)
    if features == "judge":
        return JudgeExtractor(JUDGE_FILE)
    if features == INCEPTION:
        return InceptionExtractor(find_inception(inception))
    raise LightningDiTError(
        f"--features is {features!r}; inception, judge, timm:NAME or timm:NAME@FILE is expected", "choose one"
    )
