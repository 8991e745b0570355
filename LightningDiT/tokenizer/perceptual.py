"""LPIPS (Zhang et al., arXiv 1801.03924) by its authors' package, with VGG-16 from a file.

The package contains the linear layers. The file is torchvision's, one with LPIPS's names, or a published VA-VAE
checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from LightningDiT.checkpoint import load_into, load_weights, without_values
from LightningDiT.errors import fixed_by, import_package
from LightningDiT.tokenizer.pretrained import cached_download

LPIPS_PIN = "lpips==0.1.4"
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
PUBLISHED_PREFIX = "loss.perceptual_loss."
SMALLEST_SIDE = 16  # pixels: VGG halves the resolution four times before its last layer
TRUNK, TORCHVISION_TRUNK = "net.", "features."


class PerceptualDistance(nn.Module):
    """LPIPS over VGG-16, frozen: a distance per pair of images, 0 for equal ones.

    Args:
        weights: of VGG-16 with the package's names (`net.slice1.0.weight`, ...) or torchvision's.
        path: their file, for messages.

    Raises:
        LightningDiTError: the package is missing, or the weights do not fit.
    """

    def __init__(self, weights: Mapping[str, Tensor], path: str | Path) -> None:
        super().__init__()
        lpips = import_package("lpips", "LPIPS", LPIPS_PIN)
        with without_values(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torchvision about the package's call
            model = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
        heads = load_weights(Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth")
        scaling = {f"scaling_layer.{name}": value for name, value in model.scaling_layer.state_dict().items()}
        load_into(model, _by_name(model, weights) | heads | _numbered(heads) | scaling, path)
        self.model = model.requires_grad_(False).eval()

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Return the distances (N,) between two batches of images (N, 3, H, W) in [-1, 1]."""
        return self.model(images.float(), reconstructions.float()).flatten()

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stay in evaluation mode: the linear layers have dropout."""
        return super().train(False)


def find_weights(given: str | Path | None) -> Path:
    """Return the file of VGG's weights: `given`, else that of torch.hub's cache, else a download.

    Raises:
        LightningDiTError: see `cached_download`.
    """
    fix = (
        f"give --lpips-weights {VGG_URL.rsplit('/', 1)[1]} (a published VA-VAE checkpoint holds VGG-16 too),"
        " or train by --without-lpips"
    )
    return Path(given) if given else cached_download(VGG_URL, "VGG-16 for LPIPS (528 MB)", fix)


def load_perceptual(given: str | Path | None) -> PerceptualDistance:
    """Return LPIPS with the weights of `find_weights`.

    Raises:
        LightningDiTError: the package or the weights are missing, or the file holds other weights.
    """
    import_package("lpips", "LPIPS", LPIPS_PIN)  # before a download
    path = find_weights(given)
    with fixed_by(f"give --lpips-weights FILE with VGG-16, as {VGG_URL}"):
        return PerceptualDistance(load_weights(path), path)


def _by_name(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return VGG's tensors in `weights` under the names of `model`, for each of the three kinds of files."""
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
