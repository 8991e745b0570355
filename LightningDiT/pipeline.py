"""The pipeline under its short name: `from LightningDiT.pipeline import LightningDiTPipeline`."""

from LightningDiT.sampling.pipeline import LightningDiTPipeline, PipelineOutput

__all__ = ["LightningDiTPipeline", "PipelineOutput"]
