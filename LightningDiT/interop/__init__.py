"""Ways to and from other programs that people use: diffusers."""
