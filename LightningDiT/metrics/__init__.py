"""What generated images are judged by: image sets, networks that see them, scores, neighbours, and the picture."""
