"""The evaluation of generated images and of tokenizers: image sets, networks, scores, neighbours, reports."""
