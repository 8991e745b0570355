"""Images and latent shards for training."""
