"""Does it converge faster? Plain DiT, LightningDiT and aligned latents on Fashion-MNIST; `__main__` says more."""
