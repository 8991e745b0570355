"""Nodes of LightningDiT for ComfyUI: this folder goes into ComfyUI/custom_nodes/, and README.md says more."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
