"""The speed of this machine: `python -m LightningDiT.tools.benchmark`, see `__main__` and docs/benchmark.md."""
