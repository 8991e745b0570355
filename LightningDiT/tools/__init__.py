"""Tools around the library: the judge, metrics, evaluation, plots and benchmark. Nothing imports them."""
