"""The tokenizer: autoencoder, latent statistics, and VA-VAE around them."""

import sys
from pathlib import Path

if __name__ == "tokenizer":
    # Published layout: the folder LightningDiT/ itself is on sys.path, so the package beside it is not found.
    sys.path.append(str(Path(__file__).resolve().parents[2]))
