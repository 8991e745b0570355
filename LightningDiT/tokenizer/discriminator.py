"""The PatchGAN discriminator (Isola et al., arXiv 1611.07004) with the tensor names of the published checkpoints."""

from __future__ import annotations

from torch import Tensor, nn

KERNEL = 4
SLOPE = 0.2  # of the leaky ReLU
INITIAL_STD = 0.02  # of all weights
LARGEST_FACTOR = 8  # largest width over the first one


class PatchDiscriminator(nn.Module):
    """Classifier of image patches as real or reconstructed; with three layers a patch has 70x70 pixels.

    Args:
        layers: number of convolutions that halve the resolution.
        in_channels: channels of the images.
        width: channels after the first convolution.
    """

    def __init__(self, layers: int = 3, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(in_channels, width, KERNEL, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        channels = width
        for index in range(1, layers + 1):
            before, channels = channels, width * min(2**index, LARGEST_FACTOR)
            stride = 2 if index < layers else 1
            modules += [
                nn.Conv2d(before, channels, KERNEL, stride=stride, padding=1, bias=False),  # the norm has a bias
                nn.BatchNorm2d(channels),
                nn.LeakyReLU(SLOPE),
            ]
        modules.append(nn.Conv2d(channels, 1, KERNEL, stride=1, padding=1))
        self.main = nn.Sequential(*modules)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 1, h, w) of images (N, in_channels, H, W); positive means real."""
        return self.main(images)


def smallest_side(layers: int) -> int:
    """Return the side in pixels of the smallest image for which a discriminator with `layers` layers has a logit."""
    side = 1
    for stride in (1, 1, *[2] * layers):
        side = max(1, stride * (side - 1) + KERNEL - 2)
    return side


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, INITIAL_STD)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, INITIAL_STD)
