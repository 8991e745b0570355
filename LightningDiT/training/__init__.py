"""Training: the loop of the transformer's and the tokenizer's runs, and what serves them."""
