"""LightningDiT with VA-VAE: a library that generates images, and the parts that it is made of."""

from __future__ import annotations

from typing import Any

__version__ = "0.2.0.dev0"
__all__ = ["LightningDiTPipeline", "bundled_model", "load_config"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that importing the package costs nothing.

    Raises:
        LightningDiTError: this torch cannot use the numpy here, see `device.require_numpy`.
    """
    if name == "LightningDiTPipeline":
        from LightningDiT.device import require_numpy

        require_numpy()
        from LightningDiT.sampling.pipeline import LightningDiTPipeline

        return LightningDiTPipeline
    if name == "bundled_model":
        from LightningDiT.hub.bundled import bundled_model

        return bundled_model
    if name == "load_config":
        from LightningDiT.config import load_config

        return load_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
