"""Image sets, latent shards, ADM's sample files, and the names of classes."""
