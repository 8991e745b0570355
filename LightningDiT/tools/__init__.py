"""Commands around the library: solvers, guidance, latents, plots, memory and speed. No other part imports them."""
