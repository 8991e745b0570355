"""LPIPS (Zhang et al., arXiv 1801.03924) by the package of its authors, with weights from a file that is there.

The package brings the linear layers; VGG-16 comes from a file: torchvision's, one with LPIPS's own names, or a
published VA-VAE checkpoint, which holds both.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from LightningDiT.checkpoint import load_into, load_weights, without_values
from LightningDiT.errors import LightningDiTError

LPIPS_PIN = "lpips==0.1.4"
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG_FILE, VGG_HASH = VGG_URL.rsplit("/", 1)[1], "397923af"
PUBLISHED_PREFIX = "loss.perceptual_loss."
SMALLEST_SIDE = 16  # pixels: VGG halves the image four times before its last layer
TRUNK, TORCHVISION_TRUNK = "net.", "features."


class PerceptualDistance(nn.Module):
    """LPIPS over VGG-16, frozen: a number per pair of images, 0 where they are equal.

    Args:
        weights: of VGG-16 by the package's names (`net.slice1.0.weight`, ...) or torchvision's; see `find_weights`.
        path: the file they came from, for messages.

    Raises:
        LightningDiTError: the package is missing, or the weights are others.
    """

    def __init__(self, weights: Mapping[str, Tensor], path: str | Path) -> None:
        super().__init__()
        require_lpips()
        import lpips

        with without_values(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torchvision on how the package asks it for an empty VGG
            model = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
        heads = load_weights(Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth")
        scaling = {f"scaling_layer.{name}": value for name, value in model.scaling_layer.state_dict().items()}
        load_into(model, _by_name(model, weights) | heads | _numbered(heads) | scaling, path)
        self.model = model.requires_grad_(False).eval()

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Return the distances (N,) of two sets of images (N, 3, H, W) in [-1, 1]."""
        return self.model(images.float(), reconstructions.float()).flatten()

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stay in evaluation: the linear layers have dropout."""
        return super().train(False)


def require_lpips() -> None:
    """Make sure that the package is there.

    Raises:
        LightningDiTError: it is not installed.
    """
    if importlib.util.find_spec("lpips") is None:
        raise LightningDiTError("lpips, which computes LPIPS, is missing", f"pip install {LPIPS_PIN}")


def find_weights(given: str | Path | None) -> Path:
    """Return the file of VGG's weights: the one given, that in torch.hub's cache, or one downloaded there.

    Raises:
        LightningDiTError: it is not there and cannot be downloaded; names the place and the option.
    """
    if given:
        return Path(given)
    place = Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
    if place.is_file():
        return place
    print(f"Downloading VGG-16 (528 MB) for LPIPS to {place}", flush=True)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(VGG_URL, str(place), VGG_HASH, progress=os.isatty(2))
    except (OSError, RuntimeError) as error:  # no network or disk; another hash
        raise LightningDiTError(
            f"VGG-16 for LPIPS is not at {place} and cannot be downloaded ({error})",
            f"curl -L -o {VGG_FILE} {VGG_URL} where there is a network and give --lpips-weights {VGG_FILE}"
            " (a published VA-VAE checkpoint holds it too), or train by --without-lpips",
        ) from error
    return place


def load_perceptual(given: str | Path | None) -> PerceptualDistance:
    """Return LPIPS with the weights of `find_weights`.

    Raises:
        LightningDiTError: the package or the weights are missing, or the file holds others.
    """
    require_lpips()
    path = find_weights(given)
    try:
        return PerceptualDistance(load_weights(path), path)
    except LightningDiTError as error:
        raise LightningDiTError(error.message, f"give --lpips-weights FILE with VGG-16, as {VGG_URL}") from error


def _by_name(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return VGG's tensors among `weights` under the names of `model`, whichever of the three ways they are called."""
    own = {name.removeprefix(PUBLISHED_PREFIX): tensor for name, tensor in weights.items()}
    found = {}
    for name in model.state_dict():
        if name.startswith(TRUNK):
            _, _, numbered = name.split(".", 2)  # net.slice2.5.weight is VGG's features.5.weight
            for source in (name, TORCHVISION_TRUNK + numbered):
                if source in own:
                    found[name] = own[source]
                    break
    return found


def _numbered(heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the linear layers under their second name, `lins.0.` for `lin0.`."""
    return {f"lins.{name[3:]}": tensor for name, tensor in heads.items()}
