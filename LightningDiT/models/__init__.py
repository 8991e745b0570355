"""The transformer and the layers that it is made of."""
